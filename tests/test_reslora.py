"""ResLoRA: the authors' arrays, its shortcuts in a decoder, and its merges."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sborax_models import TINY, relative, tokens_of
from test_llama import unrolled

import sborax as sx
from sborax.core import Adapter, Context, linear, structure
from sborax.depth import remember
from sborax.models import LanguageModel, Llama, LlamaConfig, abstract, generate
from sborax.models.llama import kept_names
from sborax.procedures.reslora import by_inputs, by_weights
from sborax.tree import nodes

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
    inputs, outputs, memory, seen = [], [], {}, []
    for n in range(LAYERS):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], node)
        ctx = Context(tokens=memory)
        inputs.append(x)
        outputs.append(linear(x, weights[n], layer, ctx))
        memory = remember(x, layer, ctx)
        seen.append(
            {name: jnp.linalg.norm(leaf.reshape(*leaf.shape[:2], -1), axis=(0, 1)) for name, leaf in memory.items()}
        )
        x = jnp.tanh(outputs[-1])
    norms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
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
        own = sum(GOLDEN[f"B{k}"] @ GOLDEN[f"A{k}"] for k in range(n + 1)).T
        want = GOLDEN[f"W{n}"].T + GOLDEN["scaling"] * own
        np.testing.assert_allclose(np.asarray(merged[n]), want, rtol=0, atol=1e-6)


def test_equal_inputs_merge_exactly_with_alpha_one(double):
    params, adapters = golden_params(), golden_adapters("is", 1)
    (weights,), (node,), x = jax.tree.leaves(params), nodes(adapters).values(), jnp.asarray(GOLDEN["x"])
    norms = {"layers/proj/kernel": {"input": jnp.broadcast_to(jnp.linalg.norm(x, axis=(0, 1)), (LAYERS, 13))}}
    (plain,) = nodes(by_inputs(adapters, [norms])).values()
    memory = {}
    for n in range(LAYERS):
        own, other = (jax.tree.map(lambda leaf, n=n: leaf[n], tree) for tree in (node, plain))
        ctx = Context(tokens=memory)
        close(linear(x, weights[n], own, ctx), linear(x, weights[n], other))
        memory = remember(x, own, ctx)


def test_the_gradient_goes_through_the_layer_before(double):
    params, adapters = golden_params(), golden_adapters("is", 1)
    (weights,), (node,) = jax.tree.leaves(params), nodes(adapters).values()
    x, before = jnp.asarray(GOLDEN["x"]), jnp.asarray(GOLDEN["x_extra0"])
    last = jax.tree.map(lambda leaf: leaf[2], node)

    def loss(before):
        tokens = {"input": before, "linked": jnp.ones(before.shape[:-1])}
        return jnp.sum(linear(x, weights[2], last, Context(tokens=tokens)) * GOLDEN["ct"])

    close(jax.grad(loss)(before), GOLDEN["scaling"] * GOLDEN["ct"] @ GOLDEN["B2"] @ GOLDEN["A2"])


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
    config = LlamaConfig(**(TINY | {"head_dim": 8, "num_hidden_layers": DEPTH}))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.2, leaf.dtype), abstract(config))
    return LanguageModel(Llama(config), params, config, None)


MODEL = random_model()
LOOP = dataclasses.replace(MODEL, module=Llama(MODEL.config, scan=False))
IDS = tokens_of(MODEL, 2, 12)


def moved(adapters, seed=1):
    train, frozen = sx.split(adapters)
    rng = np.random.default_rng(seed)
    train = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.2, leaf.dtype), train)
    return sx.combine(train, frozen)


@functools.cache
def adapted(name, layers=None):
    rule = sx.Rule(TARGETS, METHODS.get(name) or sx.LoRA(2, alpha=4.0), layers=layers)
    return moved(sx.attach(jax.random.key(1), MODEL.params, [rule])[1])


@jax.jit
def logits(params, adapters):
    return MODEL.apply(params, adapters, IDS)


def flattened(adapters, layers=range(DEPTH)):
    """One node a layer: the layers of a stack taken apart, those of a rule that leaves some out without the others."""

    def one(node, i):
        if isinstance(node.method, sx.ResLoRA):
            return jax.tree.map(lambda leaf: leaf[i], node)
        ((child, _),) = node.method.children(node)
        return jax.tree.map(lambda leaf: leaf[i], child)

    return {
        "layers": {
            str(i): jax.tree.map(lambda node, i=i: one(node, i), adapters["layers"], is_leaf=sx.core.is_adapter)
            for i in layers
        }
    }


def change_by_hand(method, x, before, a, b, n, first):
    """What the papers's formula adds to x W in layer n of a chain that starts at `first`; a, b, before by layer."""
    m = n - first if method.pre_num == -1 else min(method.pre_num, n - first)
    if method.shortcut == "input":
        return (x + (before[n - 1] if n > first else x)) @ a[n] @ b[n]
    if method.shortcut == "block":
        return sum(x @ a[n - k] @ b[n - k] for k in range(m + 1))
    return sum(before[n - k] @ a[n - k] for k in range(m + 1)) @ b[n]


@pytest.mark.parametrize("layers", [None, (0, 1, 3)], ids=["all", "gap"])
@by_name
def test_scanned_equals_unrolled_equals_the_formula(name, layers, monkeypatch):
    adapters = adapted(name, layers)
    ours = logits(MODEL.params, adapters)
    flat_params = unrolled(MODEL, MODEL.params)
    flat = flattened(adapters, layers or range(DEPTH))
    assert relative(jax.jit(LOOP.apply)(flat_params, flat, IDS), ours) < 1e-5
    assert relative(ours, logits(MODEL.params, adapted("lora"))) > 1e-3

    # The formula itself, in the place of the projection, layer by layer.
    own, seen = nodes(flat), {}

    def plainly(x, weight, adapter=None, ctx=Context()):
        y = x @ weight
        path = next((path for path, w in kernels.items() if w is weight), None)
        if path is None or "/".join(path) not in own:
            return y
        number = int(path[1])
        place = (*path[:1], "*", *path[2:])
        seen.setdefault(place, {})[number] = x
        alike = {int(p.split("/")[1]): node for p, node in own.items() if p.split("/")[2:] == list(path[2:])}
        a, b = ({n: node.train[leaf] for n, node in alike.items()} for leaf in "ab")
        first = next(n for n in range(number, -1, -1) if n - 1 not in alike)
        scale = alike[number].frozen["scale"]
        return y + scale * change_by_hand(METHODS[name], x, seen[place], a, b, number, first)

    kernels = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(flat_params)
        if path[-1].key == "kernel"
    }
    monkeypatch.setattr(sx.core, "linear", plainly)
    assert relative(LOOP.apply(flat_params, None, IDS), ours) < 1e-5


@by_name
def test_text_over_a_cache_is_that_of_whole_passes(name):
    adapters = adapted(name)
    prompt, new = np.asarray(IDS)[0, :5].tolist(), 6
    text = generate(MODEL, MODEL.params, adapters, [prompt, prompt[:3]], new, eos=())
    for start, written in zip((prompt, prompt[:3]), text, strict=True):
        whole = jnp.asarray([start + written])
        likeliest = jnp.argmax(jax.jit(MODEL.apply)(MODEL.params, adapters, whole), -1)[0]
        assert likeliest[len(start) - 1 : -1].tolist() == written


@by_name
def test_gradients_agree_in_every_form(name):
    train, frozen = sx.split(adapted(name))

    def gradient(own, params):
        def loss(train):
            return jnp.mean(jnp.square(own.apply(params, sx.combine(train, frozen), IDS)))

        return jax.jit(jax.grad(loss))(train)

    plain = gradient(MODEL, MODEL.params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain))
    assert kept_names("full") == ()
    for remat in ("full", "qkv,adapter_h"):
        own = dataclasses.replace(MODEL, module=Llama(MODEL.config, remat=remat))
        for got, want in zip(jax.tree.leaves(gradient(own, MODEL.params)), jax.tree.leaves(plain), strict=True):
            assert relative(got, want) < 1e-5


@by_name
def test_many_adapters_share_one_base(name):
    members = [moved(adapted(name), seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = jax.jit(jax.vmap(lambda own: MODEL.apply(MODEL.params, own, IDS)))(stacked)
    for got, member in zip(together, members, strict=True):
        assert relative(got, logits(MODEL.params, member)) < 1e-5
