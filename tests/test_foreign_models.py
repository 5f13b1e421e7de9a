"""Adapters inside Flax models that are not ours: equal to the merged model, in Linen and in NNX."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import METHODS
from flax import nnx
from nightly import nightly_unless
from torch_pair import shaken

import sborax as sx
from benchmarks.foreign import Dense, dense, runners
from sborax.adapters.tree import nodes

WIDTH, HEADS, TOKENS = 32, 4, 6
IMAGES = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
TEXT = jax.random.randint(jax.random.key(4), (2, TOKENS), 0, 40)


class Block(nn.Module):
    """Attention and a gated unit, as in a ViT; the shape that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden), None


class Vit(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (4, 4), strides=(4, 4), name="patches")(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        if self.scan:
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = stack(name="layers")(x, None)
        else:
            for number in range(2):
                x, _ = Block(name=f"block_{number}")(x, None)
        return nn.Dense(5, name="head")(x.mean(axis=1))


class Gpt2(nn.Module):
    """A causal block over embedded tokens, its projections in one as GPT-2 has them."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, WIDTH, name="embed")
        x = embed(tokens)
        mixed = nn.Dense(3 * WIDTH, name="c_attn")(nn.LayerNorm()(x)).reshape(*tokens.shape, 3, HEADS, -1)
        query, key, value = (mixed[:, :, i] for i in range(3))
        mask = nn.make_causal_mask(tokens)
        x = x + nn.Einsum((WIDTH, WIDTH), "...i,io->...o", use_bias=False, name="c_proj")(
            nn.dot_product_attention(query, key, value, mask=mask).reshape(*tokens.shape, WIDTH)
        )
        return embed.attend(x)


MODELS = {
    "vit": (Vit(), IMAGES, [
        sx.Rule("attention/(query|key|value)", sx.SBoRA(rank=4), in_axes=1),
        sx.Rule("attention/out", sx.HiRA(rank=4), in_axes=2),
        ("up|down", sx.Bone(rank=8)), ("head", sx.LoRA(rank=2)), sx.Rule("patches", sx.LoRA(rank=2), in_axes=3),
    ]),
    "scanned vit": (Vit(scan=True), IMAGES, [
        sx.Rule("attention/(query|key|value)", sx.LoRA(rank=4), in_axes=1),
        sx.Rule("attention/out", sx.LoRA(rank=4), in_axes=2),
        ("up|down", sx.OFT(block=8)), ("head", sx.IA3()),
    ]),
    "gpt2": (Gpt2(), TEXT, [("c_attn|c_proj", sx.PiSSA(rank=4))]),
}  # fmt: skip


def build(name):
    module, inputs, rules = MODELS[name]
    params = jax.jit(module.init)(jax.random.key(0), inputs)["params"]
    # Biases and scales that start at 0 and 1 would hide what is done with them.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    params, adapters = sx.attach(jax.random.key(2), params, rules)
    return module, inputs, params, shaken(adapters)


@pytest.mark.parametrize("name", nightly_unless(["gpt2"], MODELS))
def test_a_linen_model_computes_what_the_merged_one_does(name):
    module, inputs, params, adapters = build(name)
    train, frozen = sx.split(adapters)

    def inside(train):
        return sx.apply_linen(module, {"params": params}, sx.combine(train, frozen), inputs)

    def merged(train):
        return module.apply({"params": sx.merge(params, sx.combine(train, frozen))}, inputs)

    with jax.default_matmul_precision("highest"):
        ours, theirs = jax.jit(inside)(train), jax.jit(merged)(train)
        slopes = [jax.jit(jax.grad(lambda t, f=f: (f(t) ** 2).mean()))(train) for f in (inside, merged)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(ours - module.apply({"params": params}, inputs))).max() > 1e-2
    chex.assert_trees_all_close(*slopes, rtol=1e-4, atol=1e-5)


class Feed(nnx.Module):
    """A gated unit, which `nnx.vmap` stacks and `nnx.scan` runs through."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class NnxVit(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, WIDTH, (4, 4), strides=(4, 4), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.layers = nnx.vmap(Feed)(rngs.split(2))
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + self.attention(x)
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return self.head(x.mean(axis=1))


class NnxGpt2(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(40, WIDTH, rngs=rngs)
        self.c_attn = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.c_proj = nnx.Einsum("...i,io->...o", (WIDTH, WIDTH), (WIDTH,), rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        mixed = self.c_attn(x).reshape(*tokens.shape, 3, HEADS, -1)
        query, key, value = (mixed[:, :, i] for i in range(3))
        attended = nnx.dot_product_attention(query, key, value, mask=nnx.make_causal_mask(tokens))
        return self.embed.attend(x + self.c_proj(attended.reshape(*tokens.shape, WIDTH)))


NNX = {
    "vit": (NnxVit, IMAGES, [
        sx.Rule("attention/(query|key|value)", sx.SBoRA(rank=4), in_axes=1),
        sx.Rule("attention/out", sx.HiRA(rank=4), in_axes=2),
        ("up", sx.Bone(rank=8)), ("down", sx.LoRA(rank=4)), ("head", sx.IA3()),
        sx.Rule("patches", sx.LoRA(rank=2), in_axes=3),
    ]),
    "gpt2": (NnxGpt2, TEXT, [("c_attn|c_proj", sx.PiSSA(rank=4))]),
}  # fmt: skip


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_model_computes_what_the_merged_one_does(name):
    kind, inputs, rules = NNX[name]
    model = kind(nnx.Rngs(0))
    graph, state, variables = nnx.split(model, nnx.Param, ...)
    plain = nnx.to_pure_dict(state)
    plain = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), plain)
    params, adapters = sx.attach(jax.random.key(2), plain, rules)
    adapters = shaken(adapters)

    def filled(params):
        full = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(full, params)
        return nnx.merge(graph, full, variables)

    train, frozen = sx.split(adapters)
    adapted = sx.adapt_nnx(filled(params), adapters)

    def inside(model):
        return (model(inputs) ** 2).mean()

    def merged(train):
        return (filled(sx.merge(params, sx.combine(train, frozen)))(inputs) ** 2).mean()

    with jax.default_matmul_precision("highest"):
        loss, slope = nnx.jit(nnx.value_and_grad(inside, argnums=nnx.DiffState(0, sx.Trained)))(adapted)
        expected, expected_slope = jax.jit(jax.value_and_grad(merged))(train)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    learnt = nodes(sx.adapters_nnx(adapted))
    assert learnt.keys() == nodes(adapters).keys()
    chex.assert_trees_all_equal(sx.split(sx.adapters_nnx(adapted))[0], train)
    slopes = sorted((str(leaf.shape), np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(slope))
    expected_slopes = sorted(
        (str(leaf.shape), np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(expected_slope)
    )
    for (shape, size), (expected_shape, expected_size) in zip(slopes, expected_slopes, strict=True):
        assert shape == expected_shape
        np.testing.assert_allclose(size, expected_size, rtol=1e-4, atol=1e-6)
    # Split and merged as any NNX model, the adapted one is the same.
    np.testing.assert_allclose(nnx.merge(*nnx.split(adapted))(inputs), adapted(inputs), rtol=1e-6)


def test_no_merged_weight_is_formed():
    """Temporaries of a step: merged kernels and their gradients would take more than all else."""
    inside, merged = runners(dense(rows=16))
    # Two kernels at a time, at least, in the merged step; without them 0.062 is left.
    assert merged.temporaries > 2 * 1024 * 1024 * 4
    assert inside.temporaries < 0.08 * merged.temporaries


class Forgetful(nn.Module):
    """Reads one of its layers in training alone."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="always")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(8, name="sometimes")(x) if train or self.is_initializing() else x


def test_an_adapter_that_is_never_reached_is_an_error():
    module, x = Forgetful(), jnp.ones((2, 8))
    params = module.init(jax.random.key(0), x)["params"]
    _, adapters = sx.attach(jax.random.key(1), params, [(".*", sx.LoRA(rank=2))])
    with pytest.raises(sx.SboraxError, match="sometimes/kernel: the model never reads this kernel in such a call"):
        sx.apply_linen(module, {"params": params}, adapters, x)
    # Keyword arguments and rngs go to the model; an rng of dropout is the adapters', too.
    rngs = {"dropout": jax.random.key(5)}
    _, dropped = sx.attach(jax.random.key(1), params, [(".*", sx.LoRA(rank=2, dropout=0.5))])
    outputs = [
        sx.apply_linen(module, {"params": params}, shaken(tree), x, train=True, rngs=rngs)
        for tree in (adapters, dropped)
    ]
    assert np.abs(np.asarray(outputs[0] - outputs[1])).max() > 1e-3


def test_what_has_no_module_and_what_links_layers_is_refused():
    model = Feed(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.split(model)[1])
    _, adapters = sx.attach(jax.random.key(0), {"other": params}, [("up", sx.LoRA(rank=2))])
    with pytest.raises(sx.SboraxError, match="other/up/kernel: the model has no module with this kernel"):
        sx.adapt_nnx(model, adapters)
    linked = [sx.Rule("up", sx.ResLoRA(rank=2))]
    for apply, tree in (
        (lambda adapters: sx.adapt_nnx(model, adapters), params),
        (lambda adapters: sx.apply_linen(Dense(), {"params": params}, adapters, None), params),
    ):
        _, adapters = sx.attach(jax.random.key(0), {"layers": {"0": tree}}, linked)
        with pytest.raises(sx.SboraxError, match="ResLoRA needs a model that knows it"):
            apply(adapters)


MEANS = [case for case in METHODS if case.method.token_mean]


@pytest.mark.parametrize("case", MEANS, ids=lambda case: case.name)
def test_means_over_tokens_need_a_model_that_gives_the_mask(case):
    """Without it they would count padding."""
    model, kernel = nn.Dense(96), jnp.ones((128, 96))
    params = {"layers": {"proj": {"kernel": kernel}}}
    _, adapters = sx.attach(jax.random.key(0), params, [("proj", case.method)])
    assert adapters["layers"]["proj"]["kernel"].method.token_mean
    with pytest.raises(sx.SboraxError, match="layers/proj/kernel: .* needs a model that knows it") as caught:
        sx.apply_linen(model, {"params": params}, adapters, jnp.ones((2, 128)))
    assert "\n" not in str(caught.value)


class Doubled(nnx.Linear):
    """A projection whose module does more than multiply."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Pair(nnx.Module):
    def __init__(self, first=nnx.Linear, second=nnx.Linear, width=8):
        self.first, self.second = first(width, width, rngs=nnx.Rngs(0)), second(width, width, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(self.first(x))


def adapted_pair(model, method, **options):
    params, adapters = sx.attach(
        jax.random.key(1), nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1]), [("first|second", method)]
    )
    return params, shaken(adapters), lambda adapters: sx.adapt_nnx(model, adapters, **options)


def test_a_subclass_of_an_nnx_projection_keeps_its_call():
    model, x = Pair(first=Doubled), jnp.ones((2, 8))
    params, adapters, adapt = adapted_pair(model, sx.LoRA(rank=2))
    merged = nnx.clone(model)
    nnx.update(merged, sx.merge(params, adapters))
    np.testing.assert_allclose(adapt(adapters)(x), merged(x), rtol=1e-5)


def test_adapters_of_an_nnx_model_drop_in_training_alone():
    model, x = Pair(), jnp.ones((2, 8))
    _, adapters, adapt = adapted_pair(model, sx.LoRA(rank=2, dropout=0.5), rngs=nnx.Rngs(3))
    adapted, plain = adapt(adapters), sx.adapt_nnx(model, adapters)
    call = nnx.jit(lambda model: model(x))
    first, second = call(adapted), call(adapted)
    assert np.abs(np.asarray(first - second)).max() > 1e-3
    adapted.eval()
    np.testing.assert_allclose(call(adapted), plain(x), rtol=1e-6)
    np.testing.assert_array_equal(plain(x), plain(x))


class Gated(nnx.Module):
    """Has a kernel and a flag of its own, which its call reads."""

    def __init__(self, deterministic):
        self.kernel, self.deterministic = nnx.Param(jnp.eye(8)), deterministic

    def __call__(self, x):
        return x @ self.kernel[...] * (1.0 if self.deterministic else 2.0)


class Trunk(nnx.Module):
    def __init__(self, own=False, drops=True):
        self.first, self.second = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), Gated(own)
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1)) if drops else None

    def __call__(self, x):
        y = self.first(x)
        return self.second(y if self.drop is None else self.drop(y))


def test_adapted_nnx_modules_have_the_mode_of_the_model():
    x = jnp.ones((2, 8))

    def adapted(model):
        params = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])
        rules = [("first", sx.LoRA(rank=2, dropout=0.5)), ("second", sx.LoRA(rank=2))]
        return sx.adapt_nnx(model, sx.attach(jax.random.key(1), params, rules)[1], nnx.Rngs(dropout=1))

    model = Trunk()
    assert not adapted(model).first.deterministic and not adapted(model).second.deterministic
    model.eval()
    assert adapted(model).first.deterministic and adapted(model).second.deterministic
    # At their start the adapters change nothing.
    np.testing.assert_allclose(adapted(model)(x), model(x), rtol=1e-6)
    fixed = adapted(Trunk(own=True))
    assert fixed.second.deterministic and not fixed.first.deterministic
    plain = Pair()
    assert not sx.adapt_nnx(plain, adapted_pair(plain, sx.LoRA(rank=2))[1]).first.deterministic


def test_layers_under_a_scan_drop_differently():
    """Each layer has its own key, and its own place in the stream."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(params=key))

    model = stack(jax.random.split(jax.random.key(0), 3))
    params = {"layers": nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])}
    _, adapters = sx.attach(jax.random.key(1), params, [("kernel|layers", sx.LoRA(rank=4, dropout=0.5))])
    adapted = sx.adapt_nnx(model, shaken(adapters)["layers"], rngs=nnx.Rngs(3))

    @nnx.scan(in_axes=(0, None), out_axes=0)
    def change(layer, x):
        return layer(x) - x @ layer.kernel[...]

    first, second = (np.asarray(change(adapted, jnp.ones((1, 4)))) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    assert len({tuple(row.ravel().round(4)) for row in first}) == 3


def test_a_merged_kernel_refuses_dropout():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images):
            return nn.Conv(3, (2, 2), name="conv")(images)

    module = Net()
    params = module.init(jax.random.key(0), IMAGES)["params"]
    rule = sx.Rule("conv", sx.LoRA(rank=2, dropout=0.5), in_axes=3)
    _, adapters = sx.attach(jax.random.key(1), params, [rule])
    sx.apply_linen(module, {"params": params}, adapters, IMAGES)
    with pytest.raises(sx.SboraxError, match="conv/kernel: computes with the merged kernel, which has no dropout"):
        sx.apply_linen(module, {"params": params}, adapters, IMAGES, rngs={"dropout": jax.random.key(2)})
    _, adapters, adapt = adapted_pair(Pair(first=Doubled), sx.LoRA(rank=2, dropout=0.5), rngs=nnx.Rngs(0))
    with pytest.raises(sx.SboraxError, match="Doubled: computes with the merged kernel, which has no dropout"):
        adapt(adapters)(jnp.ones((2, 8)))


def test_an_nnx_module_has_one_adapter_and_its_own_kernel():
    model = Pair()
    _, adapters, adapt = adapted_pair(model, sx.LoRA(rank=2))
    with pytest.raises(sx.SboraxError, match="first/kernel: has an adapter; adapt the model with the sum"):
        sx.adapt_nnx(adapt(adapters), adapters)
    model.second.kernel = model.first.kernel
    first = {"first": adapters["first"]}
    with pytest.raises(sx.SboraxError, match="first/kernel: is also the kernel of second/kernel"):
        sx.adapt_nnx(model, first)


def test_a_linen_module_that_is_called_in_two_ways_has_its_adapter_in_both():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.DenseGeneral(6, axis=1, name="layer")
            return layer(x).sum() + layer(x.sum(axis=2)).sum()

    module, x = Net(), jax.random.normal(jax.random.key(0), (2, 5, 3))
    params = module.init(jax.random.key(1), x)["params"]
    _, adapters = sx.attach(jax.random.key(2), params, [("layer", sx.LoRA(rank=2))])
    adapters = shaken(adapters)
    expected = module.apply({"params": sx.merge(params, adapters)}, x)
    np.testing.assert_allclose(sx.apply_linen(module, {"params": params}, adapters, x), expected, rtol=1e-5)


def test_attention_of_nnx_forms_no_merged_weight():
    attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.split(attention, nnx.Param, ...)[1])
    rules = [sx.Rule("query|key|value", sx.LoRA(rank=2), in_axes=1)]
    adapted = sx.adapt_nnx(attention, sx.attach(jax.random.key(1), params, rules)[1])
    graph, state = nnx.split(adapted)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, jnp.ones((1, TOKENS, WIDTH)))
    assert f"f32[{WIDTH},{WIDTH}] = dot_general" not in str(jaxpr)
