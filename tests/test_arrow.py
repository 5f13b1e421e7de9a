"""Arrow: the mix of a token against PEFT's and against NumPy's, and the contract of an adapter, wherever it runs."""

import copy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from bare_kernels import (
    assert_close,
    base,
    fitted,
    forward,
    host,
    inputs,
    masks,
    normal,
    projected,
    standalone,
    trained,
)
from cases import IN, LAYERS, METHODS, OUT
from nightly import nightly_unless
from test_contract import depends_on
from test_contract_model import CONFIG, EXPERTS, TOKENS, params_of
from torch_pair import build, logits, torch_logits

import sborax as sx
from sborax.adapters.arrow import Arrow, _shares
from sborax.adapters.compose import part_context
from sborax.adapters.core import AbstractMethod, dense, is_weight, pair_of, structure
from sborax.adapters.grouped import Sizes, grouped_linear
from sborax.adapters.leaves import map_with_path, nest
from sborax.adapters.tree import nodes
from sborax.config import codec
from sborax.layout.sharding import Layout
from sborax.models import LanguageModel, Llama, generate
from sborax.models.load import is_layer_kernel
from sborax.models.nf4 import quantise
from sborax.records.adapter import fingerprint, load_adapter, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def led(adapters, seed, ratio=0.1):
    """Adapters with random factors, each column of a shorter than the one before: one direction leads clearly."""
    rng = np.random.default_rng(seed)

    def draw(node):
        train = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), node.train)
        if "a" in train:
            train["a"] = 3 * train["a"] * np.float32(ratio) ** np.arange(train["a"].shape[-1], dtype=np.float32)
        return sx.Adapter(jax.tree.map(jnp.asarray, train), node.frozen, node.method, node.in_axes)

    return nest({path: draw(node) for path, node in nodes(adapters).items()})


def trees_of(params, rules, ratio=0.1):
    return [led(sx.attach(jax.random.key(i), params, rule)[1], i, ratio) for i, rule in enumerate(rules)]


def padded(adapters, rank):
    """The same LoRA with columns and rows of zeros."""

    def wider(node):
        a, b = node.train["a"], node.train["b"]
        padding = rank - a.shape[-1]
        train = {
            "a": jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, padding)]),
            "b": jnp.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, padding), (0, 0)]),
        }
        return sx.Adapter(train, node.frozen, sx.LoRA(rank=rank), node.in_axes)

    return nest({path: wider(node) for path, node in nodes(adapters).items()})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base"))


def in_peft(pair, places, top_k, temperature, general=()):
    config = peft.ArrowConfig(top_k=top_k, router_temperature=temperature, use_gks=bool(general), rng_seed=0)
    model = peft.create_arrow_model(copy.deepcopy(pair.torch), places, config, list(general) or None)
    return model.eval()


@pytest.mark.parametrize("general", [0, 2], ids=["plain", "general"])
def test_logits_are_those_of_peft(pair, general, tmp_path):
    """Ranks and alphas differ; PEFT, which takes one rank, gets columns of zeros."""
    model, targets = pair.ours, "q_proj|down_proj"
    ranks = (4, 4, 4) if general else (2, 4, 3)
    rules = [[(targets, sx.LoRA(rank=rank, alpha=alpha))] for rank, alpha in zip(ranks, (4.0, 6.0, 1.5), strict=True)]
    trees = trees_of(model.params, rules)
    general_trees = trees_of(model.params, [[(targets, sx.LoRA(rank=4, alpha=8.0))]] * 5)[3 : 3 + general]
    places = [tmp_path / str(i) for i in range(3 + general)]
    for place, tree in zip(places, [*trees, *general_trees], strict=True):
        sx.save_peft(place, model, model.params, padded(tree, 4))
    names = [str(place) for place in places]
    expected = torch_logits(in_peft(pair, names[:3], 2, 0.5, names[3:]))
    got = logits(model, model.params, sx.arrow(model.params, trees, 2, 0.5, general_trees))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    if general:
        read = [sx.load_peft(place, model)[1] for place in places]
        mixture = sx.arrow(model.params, read[:3], top_k=2, temperature=0.5, general=read[3:])
        np.testing.assert_allclose(logits(model, model.params, mixture), expected, rtol=0, atol=1e-4)
    # It is neither the base nor a fixed mix.
    alike = sx.arrow(model.params, trees, 3, 1e6, general_trees)
    for adapters in (None, alike):
        assert np.abs(logits(model, model.params, adapters) - expected).max() > 0.05


def test_a_router_that_peft_has_saved_is_refused_and_its_adapters_are_read(pair, tmp_path):
    """PEFT's directory of the router has the temperature and no names; PEFT does not load it, either."""
    model = pair.ours
    trees = trees_of(model.params, [[("q_proj", sx.LoRA(rank=4))]] * 2)
    for i, tree in enumerate(trees):
        sx.save_peft(tmp_path / str(i), model, model.params, tree)
    theirs = in_peft(pair, [str(tmp_path / str(i)) for i in range(2)], 2, 0.5)
    expected = torch_logits(theirs)
    theirs.save_pretrained(tmp_path / "saved")
    with pytest.raises(AttributeError):
        peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path / "saved" / "arrow_router")
    with pytest.raises(sx.SboraxError, match="option arrow_config=.* the file lacks .* sx.arrow") as caught:
        sx.load_peft(tmp_path / "saved" / "arrow_router", model)
    assert "\n" not in str(caught.value)
    read = [sx.load_peft(tmp_path / "saved" / f"task_{i}", model)[1] for i in range(2)]
    got = logits(model, model.params, sx.arrow(model.params, read, top_k=2, temperature=0.5))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


KINDS = {
    "LoRA": [sx.LoRA(rank=3, alpha=6.0), sx.LoRA(rank=5), sx.LoRA(rank=2, alpha=1.0)],
    "ragged": [sx.LoRA(rank=(2, 4, 3)), sx.LoRA(rank=(4, 1, 2), alpha=4.0), sx.LoRA(rank=2)],
    "factors": [sx.SBoRA(rank=4), sx.add(sx.LoRA(rank=2), sx.SBoRA(rank=3)), sx.scale(sx.LoRA(rank=3), -0.5)],
    "dense": [sx.Bone(rank=6), sx.LoRA(rank=3), sx.ResLoRA(rank=2)],
}
by_kind = pytest.mark.parametrize("name", nightly_unless(["dense"], KINDS))


def mixed(methods, quantised=False, top_k=2, temperature=0.7):
    params = {"layers": {"proj": {"kernel": base("float32", True, quantised)}}}
    trees = trees_of(params, [[("proj", method)] for method in methods], ratio=0.8)
    return params, trees, sx.arrow(params, trees, top_k=top_k, temperature=temperature)


def reference(params, trees, x, top_k=2, temperature=0.7):
    """The mixed projection of every layer, from the changes that the adapters merge to."""
    weight = host(dense(jax.tree.leaves(params, is_leaf=is_weight)[0]))
    plain = {"layers": {"proj": {"kernel": jnp.zeros(weight.shape)}}}
    changes = [host(sx.merge(plain, tree)["layers"]["proj"]["kernel"]) for tree in trees]
    rows = []
    for layer in range(LAYERS):
        scores = np.stack([np.abs(x @ np.linalg.svd(change[layer])[0][:, 0]) for change in changes], axis=1)
        smallest = np.sort(scores, axis=1)[:, -top_k][:, None]
        shares = np.where(scores >= smallest, np.exp(scores / temperature), 0)
        shares = shares / shares.sum(axis=1, keepdims=True)
        outputs = np.stack([x @ change[layer] for change in changes])
        rows.append(x @ weight[layer] + np.einsum("tn,nto->to", shares, outputs))
    return np.stack(rows)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("quantised", nightly_unless([False], [False, True]), ids=["dense", "nf4"])
@by_kind
def test_a_kernel_mixes_what_its_adapters_merge_to(name, quantised):
    params, trees, adapters = mixed(KINDS[name], quantised)
    (weight,), (node,) = jax.tree.leaves(params, is_leaf=is_weight), nodes(adapters).values()
    assert_close(forward(inputs(), weight, node), reference(params, trees, host(inputs())), 2e-5)
    assert sx.count(adapters) == sum(sx.count(sx.link(tree)) for tree in trees)
    narrow = forward(inputs("bfloat16"), weight, node)
    assert narrow.dtype == jnp.bfloat16 and np.isfinite(host(narrow)).all()


@pytest.mark.usefixtures("strict")
def test_it_is_an_adapter_like_any_other(tmp_path):
    """On disk, side by side, added, scaled, on layers one by one, in training; but it has no merged form."""
    params, trees, adapters = mixed(KINDS["LoRA"])
    weight, (node,) = params["layers"]["proj"]["kernel"], nodes(adapters).values()
    x, y = inputs(), forward(inputs(), weight, node)
    save_adapter(tmp_path, adapters, base=fingerprint(params))
    twin = load_adapter(tmp_path, params)[1]
    chex.assert_trees_all_equal_structs(twin, adapters)
    chex.assert_trees_all_equal(twin, adapters)
    with pytest.raises(sx.SboraxError, match="layers/proj/kernel: Arrow cannot be merged: it mixes its parts anew"):
        sx.merge(params, adapters)
    second = sx.arrow(params, trees, top_k=2, temperature=5.0)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), adapters, second)
    beside = jax.jit(jax.vmap(lambda node: forward(x, weight, node)))(*nodes(stack).values())
    assert_close(beside[0], y, 1e-5)
    assert_close(beside[1], forward(x, weight, *nodes(second).values()), 1e-5)
    assert np.abs(host(beside[0] - beside[1])).max() > 0.05
    plain = np.einsum("ti,lio->lto", host(x), host(weight))
    (double,) = nodes(sx.add(adapters, sx.scale(adapters, -0.5))).values()
    assert_close(forward(x, weight, double), plain + 0.5 * (host(y) - plain), 2e-5)
    flat = {"layers": {str(i): {"proj": {"kernel": weight[i]}} for i in range(LAYERS)}}

    def unstacked(tree):
        (node,) = nodes(tree).values()
        layers = {str(i): {"proj": {"kernel": jax.tree.map(lambda leaf, i=i: leaf[i], node)}} for i in range(LAYERS)}
        return {"layers": layers}

    singles = nodes(sx.arrow(flat, [unstacked(tree) for tree in trees], top_k=2, temperature=0.7))
    for i in range(LAYERS):
        assert_close(projected(x, weight[i], singles[f"layers/{i}/proj/kernel"]), y[i], 2e-5)
    single = jax.tree.map(lambda leaf: leaf[0], node)

    def loss(train):
        return jnp.sum(sx.linear(x, weight[0], sx.Adapter(train, single.frozen, single.method)))

    closed = jax.make_jaxpr(jax.grad(loss))(single.train)
    assert not depends_on(closed.jaxpr, set(closed.jaxpr.invars))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(single.train)))


@pytest.mark.usefixtures("strict")
def test_adapters_of_some_layers_are_mixed_there():
    params = {"layers": {"proj": {"kernel": base()}}}
    rules = [
        [sx.Rule("proj", sx.LoRA(rank=2), layers=(0, 2))],
        [sx.Rule("proj", sx.LoRA(rank=2), layers=(0,)), sx.Rule("proj", sx.SBoRA(rank=3), layers=(2,))],
    ]
    trees = trees_of(params, rules, ratio=0.8)
    (node,) = nodes(sx.arrow(params, trees, top_k=1)).values()
    got = forward(inputs(), base(), node)
    assert_close(got, reference(params, trees, host(inputs()), 1, 1.0), 2e-5)
    chex.assert_trees_all_equal(got[1], jax.jit(lambda x, w: x @ w)(inputs(), base()[1]))
    everywhere = trees_of(params, [[("proj", sx.LoRA(rank=2))]])
    with pytest.raises(sx.SboraxError, match="layers/proj/kernel: only some of the adapters adapt layer 1"):
        sx.arrow(params, [trees[0], *everywhere], top_k=1)


def test_a_change_of_zero_has_no_share():
    params = {"proj": {"kernel": jnp.ones((IN, OUT))}}
    _, fresh = sx.attach(jax.random.key(0), params, [("proj", sx.LoRA(rank=2))])
    (node,) = nodes(sx.arrow(params, [fresh, *trees_of(params, [[("proj", sx.LoRA(rank=2))]])], top_k=1)).values()
    assert not np.any(node.frozen["prototypes"][0])
    np.testing.assert_allclose(np.linalg.norm(node.frozen["prototypes"][1]), 1.0, rtol=1e-5)


def in_model(config, targets, top_k=2):
    model = LanguageModel(Llama(config, jnp.dtype("float32")), {}, config, None)
    params = params_of(config)
    rules = [[(targets, sx.LoRA(rank=rank))] for rank in (2, 3, 4)]
    return model, params, sx.arrow(params, trees_of(params, rules, ratio=0.8), top_k=top_k)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("config", "quantised"), [(CONFIG, False), (CONFIG, True), (EXPERTS, False)], ids=["dense", "nf4", "experts"]
)
def test_text_with_a_cache_is_text_without(config, quantised):
    model, params, adapters = in_model(config, "self_attn|mlp/(experts/)?(gate|up|down)_proj")
    if quantised:
        params = map_with_path(
            lambda path, leaf: quantise(leaf) if is_layer_kernel(path) and leaf.shape[-2] % 64 == 0 else leaf, params
        )
    prompts = TOKENS[0, :2, :5].tolist()
    texts = generate(model, params, adapters, prompts, 4)
    apply = jax.jit(model.apply)
    for prompt, text in zip(prompts, texts, strict=True):
        row = [*prompt, *text]
        best = np.argmax(apply(params, adapters, jnp.asarray([row], jnp.int32))[0], axis=-1)
        assert list(text) == list(best[len(prompt) - 1 : -1])
    assert texts != generate(model, params, None, prompts, 4)


def test_general_subtracts_factors_as_they_act():
    """What a mask leaves out is neither mixed nor subtracted: adapters with masks are as the LoRA that they equal."""
    params, count = {"layers": {"proj": {"kernel": base()}}}, 4
    masked = next(case.method for case in METHODS if masks(case.method) & fitted(case.method)[1].frozen.keys())
    nodes_of = [trained(standalone(tree), i) for i, tree in enumerate(trees_of(params, [[("proj", masked)]] * count))]
    plain = [
        sx.Adapter({"a": pair.a, "b": pair.b}, {"scale": pair.scale}, structure(sx.LoRA(rank=masked.rank)))
        for pair in map(pair_of, nodes_of)
    ]
    got, expected = (
        forward(inputs(), base(), standalone(sx.arrow(params, trees[:2], top_k=1, general=trees[2:])))
        for trees in ([{"layers": {"proj": {"kernel": node}}} for node in tree] for tree in (nodes_of, plain))
    )
    assert_close(got, expected, 1e-5)


NOISY = [case for case in METHODS if case.method.draws and not (case.method.no_merge or case.method.rewrites_base)]


@pytest.mark.parametrize("case", NOISY, ids=lambda case: case.name)
def test_noise_has_the_share_of_the_part_that_draws_it(case):
    """With a key, as without one, what a part adds to a token is multiplied by its share, and so is its noise."""
    _, _, adapters = mixed([case.method] * 3, top_k=2)
    node = jax.tree.map(lambda leaf: leaf[0], standalone(adapters))
    x, ctx, arrow = inputs(), sx.Context(jax.random.key(5)), node.method
    got = sx.linear(x, base()[0], node, ctx)
    shares = _shares(x, node.frozen["prototypes"], 2, node.frozen["temperature"])
    assert (shares == 0).any() and (shares > 0.1).any()
    expected = sx.linear(x, base()[0])
    for i, (part, _) in enumerate(arrow.children(node)):
        change = part.method.add_to(jnp.zeros_like(got), x, part, part_context(arrow, ctx, i))
        expected = expected + shares[:, i : i + 1] * change
    assert_close(got, expected, 1e-5)
    assert np.abs(host(got) - host(sx.linear(x, base()[0], node))).max() > 1e-3


def test_experts_of_a_mixture_mix_their_own():
    """Rows of one expert after the other, against a loop over experts."""
    params, _, adapters = mixed(KINDS["LoRA"])
    weight, (node,) = params["layers"]["proj"]["kernel"], nodes(adapters).values()
    x, sizes = jnp.asarray(normal(7, 19, IN)), (5, 0, 14)
    got = jax.jit(grouped_linear)(x, weight, Sizes(jnp.asarray(sizes)), node)
    for expert, rows in ((0, slice(0, 5)), (2, slice(5, 19))):
        of_expert = jax.tree.map(lambda leaf, expert=expert: leaf[expert], node)
        assert_close(got[rows], projected(x[rows], weight[expert], of_expert), 2e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_on_a_mesh_it_is_what_it_is_without(sizes, top_k):
    """Where two parts are equally like a token, rounding chooses; it does with two of three in this model."""
    model, params, adapters = in_model(CONFIG, "self_attn|mlp", top_k)
    want = jax.jit(model.apply)(params, adapters, TOKENS[0])
    layout = Layout.of(sizes, 4)
    laid = layout.model(params, adapters, CONFIG)
    with layout.context():
        got = jax.jit(model.apply)(*laid, TOKENS[0])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def refused(says, params, trees, **options):
    with pytest.raises(sx.SboraxError) as caught:
        sx.arrow(params, trees, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_mixed_is_refused_in_a_line(pair):
    kernel = jnp.asarray(normal(1, 2, 16, 12))
    params = {"layers": {"proj": {"kernel": kernel}, "other": {"kernel": kernel}}}

    def tree(method, targets="proj"):
        return sx.attach(jax.random.key(0), params, [(targets, method)])[1]

    two = [tree(sx.LoRA(rank=2)), tree(sx.LoRA(rank=2))]
    refused("top_k=3 must be a whole number in 1..2, the number of adapters", params, two)
    refused("there is nothing to mix", params, [], top_k=1)
    refused("temperature must be above 0, got 0.0", params, two, top_k=1, temperature=0.0)
    refused("layers/proj/kernel: only some of the adapters", params, [*two, tree(sx.LoRA(rank=2), "other")], top_k=1)
    refused("DoRA rewrites the weight as a whole", params, [*two, tree(sx.DoRA(rank=2))], top_k=1)
    refused("PiSSA took its start out of the base", params, [*two, tree(sx.PiSSA(rank=2))], top_k=1)
    refused("MoSARA has no single change", params, [*two, tree(sx.MoSARA(rank=2))], top_k=1)
    refused("Arrow has no single change", params, [sx.arrow(params, two, top_k=1)], top_k=1)
    refused("ranks 2 and 3; general", params, two, top_k=1, general=[tree(sx.LoRA(rank=3))])
    # As the circulant changes of C3A, whose singular values come in pairs.
    alike = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.eye(*leaf.shape[-2:]), leaf.shape), sx.split(two[0])[0])
    alike = sx.combine(alike, sx.split(two[0])[1])
    refused("layers/proj/kernel: LoRA stretches two directions alike", params, [two[0], alike], top_k=1)
    refused("SBoRA is more than a pair of factors", params, two, top_k=1, general=[tree(sx.SBoRA(rank=2))])
    model = pair.ours
    table = sx.attach(jax.random.key(0), model.params, [("embed_tokens", sx.LoRA(rank=2))])[1]
    refused("this adapter is of the table of tokens", model.params, [table], top_k=1)
    method = Arrow((sx.LoRA(rank=2), sx.LoRA(rank=3)), 1)
    assert codec.decode(AbstractMethod, codec.encode(method)) == method
    with pytest.raises(sx.SboraxError, match="Arrow mixes adapters that are trained; attach and train each"):
        sx.plan(params, [("proj", method)])
    mix = sx.arrow(model.params, trees_of(model.params, [[("q_proj", sx.LoRA(rank=2))]] * 2), top_k=1)
    with pytest.raises(sx.SboraxError, match="PEFT has no Arrow, nor a merged form of it to truncate"):
        sx.save_peft("never", model, model.params, mix)
