"""ResLoRA: the authors' arrays, its shortcuts in a decoder, and its merges."""

import dataclasses
import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import prints
from nightly import nightly_unless
from sborax_models import TINY, relative, tokens_of, unrolled
from tiny_model import write_data, write_model

import sborax as sx
from sborax.adapters import core
from sborax.adapters.compose import ByLayer
from sborax.adapters.core import Adapter, Context, linear, structure
from sborax.adapters.depth import remember
from sborax.adapters.tree import nodes
from sborax.cli import main
from sborax.interop.reslora import by_inputs, by_weights, merge_by_inputs, merge_by_weights
from sborax.models import LanguageModel, Llama, LlamaConfig, abstract

GOLDEN = np.load(Path(__file__).parent / "golden" / "reslora.npz")
SHORTCUT = {"is": "input", "bs": "block", "ms": "middle"}
LAYERS = 3


# The authors' arrays.


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def golden_params():
    return {"layers": {"proj": {"kernel": jnp.stack([jnp.asarray(GOLDEN[f"W{n}"].T) for n in range(LAYERS)])}}}


def golden_adapters(kind, pre_num):
    a, b = (jnp.stack([jnp.asarray(GOLDEN[f"{name}{n}"].T) for n in range(LAYERS)]) for name in "AB")
    method = sx.ResLoRA(3, SHORTCUT.get(kind, "block"), 0 if kind == "lora" else -1 if pre_num == 999 else pre_num)
    scale = jnp.full(LAYERS, jnp.asarray(GOLDEN["scaling"], jnp.float64))
    return {"layers": {"proj": {"kernel": Adapter({"a": a, "b": b}, {"scale": scale}, structure(method))}}}


def by_hand(params, adapters, x):
    """The golden net: tanh between layers, each handing on what it remembers. Also what each saw, by batch axis."""
    (weights,), (node,) = jax.tree.leaves(params), nodes(sx.link(adapters)).values()
    inputs, outputs, memory, sizes = [], [], {}, []
    for n in range(LAYERS):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], node)
        ctx = Context(memory=memory)
        inputs.append(x)
        outputs.append(linear(x, weights[n], layer, ctx))
        memory = remember(x, layer, ctx)
        sizes.append(
            {name: jnp.linalg.norm(leaf.reshape(*leaf.shape[:2], -1), axis=(0, 1)) for name, leaf in memory.items()}
        )
        x = jnp.tanh(outputs[-1])
    norms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sizes)
    return inputs, outputs, {"layers/proj/kernel": norms}


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-10, atol=1e-12)


CASES = sorted({name.partition("__")[0] for name in GOLDEN.files if "__y" in name and not name.startswith("merge")})


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_authors(name, double):
    kind, _, pre_num = name.partition("_pre")
    params, adapters, x = golden_params(), golden_adapters(kind, int(pre_num)), jnp.asarray(GOLDEN["x"])
    train, frozen = sx.split(adapters)
    inputs, outputs, _ = by_hand(params, adapters, x)

    def loss(train, x):
        return jnp.sum(by_hand(params, sx.combine(train, frozen), x)[1][-1] * GOLDEN["ct"])

    grads, gx = jax.grad(loss, (0, 1))(train, x)
    (grad,) = nodes(grads).values()
    for n in range(LAYERS):
        close(inputs[n], GOLDEN[f"{name}__h{n}"])
        close(outputs[n], GOLDEN[f"{name}__y{n}"])
        close(grad.train["a"][n], GOLDEN[f"{name}__gA{n}"].T)
        close(grad.train["b"][n], GOLDEN[f"{name}__gB{n}"].T)
    close(gx, GOLDEN[f"{name}__gx"])
    assert sx.count(adapters) == LAYERS * 3 * (13 + 13)


@pytest.mark.parametrize("name", ["merge_is_flag4_pre1", "merge_ms_flag4_pre1", "merge_ms_flag4_pre2"])
def test_merges_by_inputs_are_the_authors(name, double):
    kind, pre_num = name.split("_")[1], int(name[-1])
    params, adapters = golden_params(), golden_adapters(kind, pre_num)
    batches = [by_hand(params, adapters, jnp.asarray(GOLDEN[x]))[2] for x in ("x", "x_extra0", "x_extra1")]
    inputs, outputs, _ = by_hand(params, by_inputs(adapters, batches), jnp.asarray(GOLDEN["x"]))
    for n in range(LAYERS):
        close(inputs[n], GOLDEN[f"{name}__h{n}"])
        close(outputs[n], GOLDEN[f"{name}__y{n}"])
    node, plain = (nodes(tree)["layers/proj/kernel"] for tree in (adapters, by_inputs(adapters, batches)))
    factors = plain.train["a"][:, 0, 0] / (node.train["a"][:, 0, 0] * node.frozen["scale"])
    close(factors, 1 + GOLDEN[f"{name}__alpha"])
    close(plain.train["b"], node.train["b"])


@pytest.mark.parametrize("pre_num", [1, 2])
def test_the_weight_merge_of_middle_has_the_authors_form(pre_num, double):
    """Their flag 3 takes the alphas from the inputs: with those, a*_n gives their outputs."""
    name = f"merge_ms_flag3_pre{pre_num}"
    a, b, w = (np.stack([GOLDEN[f"{part}{n}"].T for n in range(LAYERS)]) for part in "ABW")
    f, scale, x = GOLDEN[f"{name}__f"], GOLDEN["scaling"], GOLDEN["x"]
    for n in range(LAYERS):
        star = a[n] + sum(f[n - k] / f[n] * a[n - k] for k in range(1, min(pre_num, n) + 1))
        y = x @ (w[n] + scale * star @ b[n])
        close(y, GOLDEN[f"{name}__y{n}"])
        x = np.tanh(y)
    # Ours differs in the alphas alone: from f_j = ||W*_j||.
    (node,) = nodes(by_weights(golden_params(), golden_adapters("ms", pre_num))).values()
    sizes, want = [], []
    for n in range(LAYERS):
        ratio = [sizes[n - k - 1] / sizes[n - 1] if n > k else 1.0 for k in range(1, min(pre_num, n) + 1)]
        want.append(a[n] + sum(r * a[n - k] for k, r in enumerate(ratio, start=1)))
        sizes.append(np.linalg.norm(w[n] + scale * want[n] @ b[n]))
    close(node.train["a"], scale * np.stack(want))


def test_the_weight_merge_of_input_is_the_papers(double):
    """alpha_n = f_{n-2} / f_{n-1} with f of the merged weight; the authors' code writes into the base instead."""
    w, a, b = (np.stack([GOLDEN[f"{part}{n}"].T for n in range(LAYERS)]) for part in "WAB")
    scale, sizes, want = GOLDEN["scaling"], [], []
    for n in range(LAYERS):
        alpha = sizes[n - 2] / sizes[n - 1] if n > 1 else 1.0
        want.append(w[n] + (1 + alpha) * scale * a[n] @ b[n])
        sizes.append(np.linalg.norm(want[n]))
    plain = by_weights(golden_params(), golden_adapters("is", 1))
    (node,) = nodes(plain).values()
    close(jnp.stack([w[n] + node.train["a"][n] @ node.train["b"][n] for n in range(LAYERS)]), np.stack(want))


def test_block_merges_exactly(double):
    params, adapters = golden_params(), golden_adapters("bs", 999)
    merged = sx.merge(params, adapters)["layers"]["proj"]["kernel"]
    for n in range(LAYERS):
        change = sum(GOLDEN[f"B{k}"] @ GOLDEN[f"A{k}"] for k in range(n + 1)).T
        want = GOLDEN[f"W{n}"].T + GOLDEN["scaling"] * change
        np.testing.assert_allclose(np.asarray(merged[n]), want, rtol=0, atol=1e-6)


def test_equal_inputs_merge_exactly_with_alpha_one(double):
    params, adapters = golden_params(), golden_adapters("is", 1)
    (weights,), (node,), x = jax.tree.leaves(params), nodes(adapters).values(), jnp.asarray(GOLDEN["x"])
    norms = {"layers/proj/kernel": {"input": jnp.broadcast_to(jnp.linalg.norm(x, axis=(0, 1)), (LAYERS, 13))}}
    (plain,) = nodes(by_inputs(adapters, [norms])).values()
    memory = {}
    for n in range(LAYERS):
        layer, plain_layer = (jax.tree.map(lambda leaf, n=n: leaf[n], tree) for tree in (node, plain))
        ctx = Context(memory=memory)
        close(linear(x, weights[n], layer, ctx), linear(x, weights[n], plain_layer))
        memory = remember(x, layer, ctx)


def test_the_gradient_goes_through_the_layer_before(double):
    params, adapters = golden_params(), golden_adapters("is", 1)
    (weights,), (node,) = jax.tree.leaves(params), nodes(adapters).values()
    x, previous = jnp.asarray(GOLDEN["x"]), jnp.asarray(GOLDEN["x_extra0"])
    last = jax.tree.map(lambda leaf: leaf[2], node)

    def loss(previous):
        memory = {"input": previous, "linked": jnp.ones(previous.shape[:-1])}
        return jnp.sum(linear(x, weights[2], last, Context(memory=memory)) * GOLDEN["ct"])

    close(jax.grad(loss)(previous), GOLDEN["scaling"] * GOLDEN["ct"] @ GOLDEN["B2"] @ GOLDEN["A2"])


# In a decoder.


TARGETS = r"self_attn/(q|o)_proj|mlp/down_proj"
METHODS = {
    "block": sx.ResLoRA(2, alpha=4.0),
    "block-1": sx.ResLoRA(2, pre_num=1, alpha=4.0),
    "input": sx.ResLoRA(2, "input", alpha=4.0),
    "middle": sx.ResLoRA(2, "middle", alpha=4.0),
    "middle-1": sx.ResLoRA(2, "middle", pre_num=1, alpha=4.0),
}
DEPTH = 4
by_name = pytest.mark.parametrize("name", METHODS)


def random_model() -> LanguageModel:
    config = LlamaConfig(
        **(TINY | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": DEPTH})
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.2, leaf.dtype), abstract(config))
    return LanguageModel(Llama(config), params, config, None)


MODEL = random_model()
LOOP = dataclasses.replace(MODEL, module=Llama(MODEL.config, scan=False))
IDS = tokens_of(MODEL, 2, 12)


def tuned(adapters, seed=1):
    train, frozen = sx.split(adapters)
    rng = np.random.default_rng(seed)
    train = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.2, leaf.dtype), train)
    return sx.combine(train, frozen)


@functools.cache
def adapted(name, layers=None):
    rule = sx.Rule(TARGETS, METHODS.get(name) or sx.LoRA(2, alpha=4.0), layers=layers)
    return tuned(sx.attach(jax.random.key(1), MODEL.params, [rule])[1])


@jax.jit
def logits(params, adapters):
    return MODEL.apply(params, adapters, IDS)


def flattened(adapters, layers=range(DEPTH)):
    """One node a layer: the layers of a stack taken apart, those of a rule that leaves some out without the others."""

    def layer_of(node, i):
        if not isinstance(node.method, ByLayer):
            return jax.tree.map(lambda leaf: leaf[i], node)
        ((child, _),) = node.method.children(node)
        return jax.tree.map(lambda leaf: leaf[i], child)

    return {
        "layers": {
            str(i): jax.tree.map(lambda node, i=i: layer_of(node, i), adapters["layers"], is_leaf=core.is_adapter)
            for i in layers
        }
    }


def change_by_hand(method, x, inputs, a, b, n, first):
    """What the papers's formula adds to x W in layer n of a chain that starts at `first`; a, b, inputs by layer."""
    m = n - first if method.pre_num == -1 else min(method.pre_num, n - first)
    if method.shortcut == "input":
        return (x + (inputs[n - 1] if n > first else x)) @ a[n] @ b[n]
    if method.shortcut == "block":
        return sum(x @ a[n - k] @ b[n - k] for k in range(m + 1))
    return sum(inputs[n - k] @ a[n - k] for k in range(m + 1)) @ b[n]


@pytest.mark.nightly
@pytest.mark.parametrize("layers", nightly_unless([(0, 1, 3)], [None, (0, 1, 3)]), ids=["all", "gap"])
@by_name
def test_scanned_equals_unrolled_equals_the_formula(name, layers, monkeypatch):
    adapters = adapted(name, layers)
    ours = logits(MODEL.params, adapters)
    flat_params = unrolled(MODEL, MODEL.params)
    flat = flattened(adapters, layers or range(DEPTH))
    assert relative(jax.jit(LOOP.apply)(flat_params, flat, IDS), ours) < 1e-5
    assert relative(ours, logits(MODEL.params, adapted("lora"))) > 1e-3

    # The formula itself, in the place of the projection, layer by layer.
    flat_nodes, inputs = nodes(flat), {}

    def plainly(x, weight, adapter=None, ctx=Context(), bias=None):
        y = x @ weight
        assert bias is None
        path = next((path for path, w in kernels.items() if w is weight), None)
        if path is None or "/".join(path) not in flat_nodes:
            return y
        number = int(path[1])
        place = (*path[:1], "*", *path[2:])
        inputs.setdefault(place, {})[number] = x
        alike = {int(p.split("/")[1]): node for p, node in flat_nodes.items() if p.split("/")[2:] == list(path[2:])}
        a, b = ({n: node.train[leaf] for n, node in alike.items()} for leaf in "ab")
        first = next(n for n in range(number, -1, -1) if n - 1 not in alike)
        scale = alike[number].frozen["scale"]
        return y + scale * change_by_hand(METHODS[name], x, inputs[place], a, b, number, first)

    kernels = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(flat_params)
        if path[-1].key == "kernel"
    }
    monkeypatch.setattr(core, "linear", plainly)
    assert relative(LOOP.apply(flat_params, None, IDS), ours) < 1e-5


@pytest.mark.parametrize("shortcut", ["block", "input", "middle"])
def test_no_previous_layers_is_plain_lora(shortcut):
    trees = [
        sx.attach(jax.random.key(1), MODEL.params, [(TARGETS, method)])[1]
        for method in (sx.LoRA(2, alpha=4.0), sx.ResLoRA(2, shortcut, pre_num=0, alpha=4.0))
    ]
    chex.assert_trees_all_equal(*map(jax.tree.leaves, trees))
    lora, ours = map(tuned, trees)
    np.testing.assert_array_equal(logits(MODEL.params, ours), logits(MODEL.params, lora))
    chex.assert_trees_all_equal(sx.merge(MODEL.params, ours), sx.merge(MODEL.params, lora))


def carried(adapters):
    """How many values go from layer to layer."""
    jaxpr = jax.make_jaxpr(MODEL.apply)(MODEL.params, adapters, IDS).jaxpr
    (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    return scan.params["num_carry"]


def test_only_values_that_are_read_are_carried():
    plain = carried(None)
    assert carried(adapted("lora")) == carried(adapted("block")) == plain
    assert carried(adapted("middle")) == plain + 3 and carried(adapted("input")) == plain + 2 * 3


def test_dropout_is_one_mask_for_a_layer_and_the_next():
    params = {"layers": {"proj": {"kernel": jnp.ones((2, 8, 6))}}}
    rules = [("proj", sx.ResLoRA(3, "middle", dropout=0.5))]
    node = tuned(sx.attach(jax.random.key(0), params, rules)[1])["layers"]["proj"]["kernel"]
    first = jax.tree.map(lambda leaf: leaf[0], node)
    x, ctx = jax.random.normal(jax.random.key(2), (2, 5, 8)), Context(jax.random.key(3))
    added = linear(x, jnp.zeros((8, 6)), first, ctx)
    hidden = remember(x, first, ctx)["hidden"][..., 0, :]
    np.testing.assert_allclose(added, hidden @ first.train["b"], rtol=1e-5, atol=1e-6)
    assert relative(hidden, x @ first.train["a"]) > 0.1


@pytest.mark.parametrize("build", [lambda m: sx.add(m, sx.LoRA(2)), lambda m: sx.scale(m, 0.5)], ids=["sum", "scaled"])
@pytest.mark.parametrize("name", ["block-1", "input"])
def test_sums_and_multiples_link_their_parts(name, build):
    rules = [("o_proj", build(METHODS[name]))]
    stacked = tuned(sx.attach(jax.random.key(1), MODEL.params, rules)[1])
    flat = unrolled(MODEL, stacked)
    ours = logits(MODEL.params, stacked)
    assert relative(jax.jit(LOOP.apply)(unrolled(MODEL, MODEL.params), flat, IDS), ours) < 1e-5
    # By hand: the part alone, then whatever the composition does to its delta.
    node = stacked["layers"]["self_attn"]["o_proj"]["kernel"]
    ((child, _), *siblings) = node.method.children(node)
    alone = {"layers": {"self_attn": {"o_proj": {"kernel": child}}}}
    if siblings:
        alone["layers"]["self_attn"]["o_proj"]["kernel"] = Adapter(
            {"0": child.train, "1": jax.tree.map(jnp.zeros_like, siblings[0][0].train)}, node.frozen, node.method
        )
        want = logits(MODEL.params, alone)
        zeroed = jax.tree.map(jnp.zeros_like, siblings[0][0].train)
        without = dataclasses.replace(node, train={**node.train, "1": zeroed})
        got = logits(MODEL.params, {"layers": {"self_attn": {"o_proj": {"kernel": without}}}})
    else:
        halved = dataclasses.replace(child, frozen={**child.frozen, "scale": 0.5 * child.frozen["scale"]})
        want, got = logits(MODEL.params, {"layers": {"self_attn": {"o_proj": {"kernel": halved}}}}), ours
    assert relative(got, want) < 1e-5


# Merging, exporting, planning.


@pytest.mark.parametrize("layers", [None, (0, 1, 3)], ids=["all", "gap"])
@pytest.mark.parametrize("name", ["block", "block-1"])
def test_a_merged_block_is_the_adapted_model(name, layers):
    adapters = adapted(name, layers)
    ours = logits(MODEL.params, adapters)
    merged = sx.merge(MODEL.params, adapters)
    assert relative(logits(merged, None), ours) < 1e-5
    if layers:
        for path in ("q_proj", "o_proj"):
            kernels = (tree["layers"]["self_attn"][path]["kernel"][2] for tree in (merged, MODEL.params))
            np.testing.assert_array_equal(*kernels)
    flat = flattened(adapters, layers or range(DEPTH))
    assert sx.count(flat) == sx.count(adapters)
    flat_merged = sx.merge(unrolled(MODEL, MODEL.params), flat)
    chex.assert_trees_all_close(flat_merged, unrolled(MODEL, merged), rtol=1e-7, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("layers", nightly_unless([(0, 1, 3)], [None, (0, 1, 3)]), ids=["all", "gap"])
@pytest.mark.parametrize("name", ["input", "middle-1"])
def test_values_merge_approximately_and_the_error_is_told(name, layers):
    adapters = jax.tree.map(lambda leaf: leaf, adapted(name, layers))
    with pytest.raises(sx.SboraxError, match="cannot be merged: a layer reads values of earlier ones"):
        sx.merge(MODEL.params, adapters)
    norms = jax.jit(lambda *inputs: MODEL.collect(*inputs, ["remembered"])[1].remembered)
    batches = [norms(MODEL.params, adapters, ids) for ids in (IDS, IDS[:, ::-1])]
    hidden = jax.jit(lambda params, adapters: MODEL.hidden(params, adapters, IDS))
    adapted_, base = hidden(MODEL.params, adapters), hidden(MODEL.params, None)
    for result in (
        merge_by_inputs(MODEL.params, adapters, batches, hidden),
        merge_by_weights(MODEL.params, adapters, hidden),
    ):
        ours = hidden(result.params, None)
        size = np.linalg.norm(adapted_)
        np.testing.assert_allclose(result.error, np.linalg.norm(ours - adapted_) / size, rtol=1e-3)
        np.testing.assert_allclose(result.moved, np.linalg.norm(base - adapted_) / size, rtol=1e-3)
        assert 0 < result.error < result.moved and f"{result.error:.3g}" in str(result)
        assert relative(hidden(MODEL.params, result.adapters), ours) < 1e-4
    # One node a layer: the same numbers.
    flat_params, flat = unrolled(MODEL, MODEL.params), flattened(adapters, layers or range(DEPTH))
    flat_norms = jax.jit(lambda *inputs: LOOP.collect(*inputs, ["remembered"])[1].remembered)
    flat_batches = [flat_norms(flat_params, flat, ids) for ids in (IDS, IDS[:, ::-1])]
    plain = nodes(by_inputs(flat, flat_batches)), nodes(by_weights(flat_params, flat))
    for mine, stacked in zip(plain, (by_inputs(adapters, batches), by_weights(MODEL.params, adapters)), strict=True):
        for path, node in nodes(flattened(stacked, layers or range(DEPTH))).items():
            np.testing.assert_allclose(mine[path].train["a"], node.train["a"], rtol=1e-4, atol=1e-6)
    with pytest.raises(sx.SboraxError, match="no norms"):
        by_inputs(adapters, [{}])
    with pytest.raises(sx.SboraxError, match="at least one batch"):
        by_inputs(adapters, [])


@pytest.mark.nightly
def test_norms_leave_padding_out():
    adapters = adapted("middle")
    short = IDS[:, :7]
    padded = jnp.concatenate([short, IDS[:, 7:]], axis=1)
    segments = jnp.concatenate([jnp.ones((2, 7), jnp.int32), jnp.zeros((2, 5), jnp.int32)], axis=1)
    want = MODEL.collect(MODEL.params, adapters, short, ["remembered"])[1].remembered
    got = MODEL.collect(MODEL.params, adapters, padded, ["remembered"], segment_ids=segments)[1].remembered
    assert set(got) == set(nodes(adapters))
    chex.assert_trees_all_close(got, want, rtol=1e-4)
    assert MODEL.collect(MODEL.params, adapted("block"), short, ["remembered"])[1].remembered == {}
    # The input's size is that of the projection's own observations.
    memory = MODEL.collect(MODEL.params, adapted("input"), short, ["remembered"])[1].remembered
    sizes = MODEL.collect(MODEL.params, adapted("input"), short, ["inputs"])[1].inputs
    for path, norms in memory.items():
        np.testing.assert_allclose(norms["input"], sizes[path], rtol=1e-5)


def test_blocks_are_exported_as_plain_lora(tmp_path):
    export = sx.save_peft(tmp_path / "block", MODEL, MODEL.params, adapted("block-1"))
    assert export.peft_type == "LORA" and not export.errors
    params, copy = sx.load_peft(tmp_path / "block", MODEL)
    assert relative(logits(params, copy), logits(MODEL.params, adapted("block-1"))) < 1e-5
    assert all(node.method.rank == 2 * 2 for node in nodes(copy).values())
    for form in ("native", "lora"):
        with pytest.raises(sx.SboraxError, match="a layer reads values of earlier ones"):
            sx.save_peft(tmp_path / "input", MODEL, MODEL.params, adapted("input"), as_=form)
    plainly = by_weights(MODEL.params, adapted("input"))
    sx.save_peft(tmp_path / "input", MODEL, MODEL.params, plainly)
    params, copy = sx.load_peft(tmp_path / "input", MODEL)
    assert relative(logits(params, copy), logits(MODEL.params, plainly)) < 1e-5


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (("lm_head", sx.ResLoRA(2)), "lm_head/kernel: ResLoRA links layers, so the kernel must be stacked"),
        (sx.Rule("q_proj", sx.ResLoRA(2), stack_axes=0, in_axes=1), "q_proj/kernel: ResLoRA links layers"),
        (("q_proj", sx.ResLoRA(2, pre_num=-2)), "pre_num >= -1"),
        (("q_proj", sx.ResLoRA(200)), r"rank must lie in 1\.\.64"),
    ],
)
def test_what_cannot_be_linked_is_refused_at_planning(rule, says):
    with pytest.raises(sx.SboraxError, match=says) as caught:
        sx.plan(MODEL.params, [rule])
    assert "\n" not in str(caught.value)


def test_nothing_stands_on_linked_factors():
    with pytest.raises(sx.SboraxError, match="links layers"):
        sx.chain(sx.ResLoRA(2), sx.DoRA(2))


EXPERIMENT = """
import sborax as sx

def experiment():
    return sx.Experiment(
        model={model!r},
        data=sx.Data(name={data!r}, template="chat", max_length=96),
        rules=(("self_attn/(q|v)", sx.ResLoRA(rank=2, alpha=4.0, shortcut={shortcut!r})),),
        optimizer=sx.Optimizer(lr=1e-2, schedule="constant", warmup=0),
        steps=4,
        batch_size=2,
    )
"""


@pytest.mark.parametrize("shortcut", nightly_unless([], ["block", "middle"]))
def test_every_command(shortcut, tmp_path, capsys):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data.jsonl")
    file, run = tmp_path / "own.py", tmp_path / "run"
    file.write_text(EXPERIMENT.format(model=str(model), data=str(data), shortcut=shortcut))
    trained = 2 * 2 * ((32 + 32) + (32 + 16))
    assert f"trainable: {trained:,} parameters" in prints(capsys, "plan", file)
    prints(capsys, "train", file, "--out", run)
    output = prints(capsys, "generate", run, "--prompt", "1 plus", "--max-new-tokens", 4)
    out = tmp_path / "out"
    if shortcut == "block":
        prints(capsys, "merge", run, out)
        assert prints(capsys, "generate", out, "--prompt", "1 plus", "--max-new-tokens", 4) == output
        assert "LORA adapter of 4 modules" in prints(capsys, "export", run, tmp_path / "peft")
        return
    assert main(["merge", str(run), str(out)]) == 2
    assert "cannot be merged: a layer reads values" in capsys.readouterr().err
    for by in ("inputs", "weights"):
        assert "merged approximately: relative error of the outputs 0." in prints(
            capsys, "merge", run, tmp_path / by, "--approximate", by
        )
    assert "no: " not in prints(capsys, "methods", "reslora")
