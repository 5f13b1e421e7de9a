"""The model inside a mesh of the user's own, whatever its axes are called: the numbers without a mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sborax as sx
from sborax.adapters.constraints import AXES, compiled_axes, dividing
from sborax.models import LanguageModel, Llama, LlamaConfig, generate
from sborax.models.attention import attention
from sborax.models.backends import KERNELS, attend, splash
from sborax.train.head_loss import head_loss

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=(2,),
)
MODEL = LanguageModel(Llama(CONFIG), {}, CONFIG, None)
MESHES = {
    "dp mp": ((4, 2), ("dp", "mp")),
    "fsdp tensor": ((4, 2), ("fsdp", "tensor")),
    "data": ((8,), ("data",)),
    "data mp": ((2, 4), ("data", "mp")),
    "all of ours": ((2, 2, 1, 2), AXES),
}


def mesh_of(name, kind=AxisType.Auto):
    sizes, axes = MESHES[name]
    return jax.make_mesh(sizes, axes, axis_types=(kind,) * len(axes))


@pytest.fixture(scope="module")
def parts():
    """Random parameters with adapters, of which one has a cut of its own."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), MODEL.abstract())
    rules = [("self_attn", sx.LoRA(rank=4)), ("gate_proj", sx.DoRA(rank=2)), ("down_proj", sx.Bone(rank=4))]
    return sx.attach(jax.random.key(0), params, rules)


def tokens_of(rows):
    return jnp.asarray(np.random.default_rng(1).integers(3, 64, (rows, 8)), jnp.int32)


def outputs(params, adapters, tokens):
    """Logits, and gradients of a loss in the trained leaves."""
    train, frozen = sx.split(adapters)

    def loss(train, params, tokens):
        logits = MODEL.apply(params, sx.combine(train, frozen), tokens)
        hidden = MODEL.hidden(params, sx.combine(train, frozen), tokens).reshape(-1, CONFIG.hidden_size)
        flat = tokens.reshape(-1)
        table = params["embed_tokens"]["embedding"]
        return jnp.mean(jnp.square(logits)) + head_loss(hidden, table, flat, flat > 9, True), logits

    return jax.jit(jax.grad(loss, has_aux=True))(train, params, tokens)


@pytest.fixture(scope="module")
def alone(parts):
    """Outputs and texts without a mesh, by the number of rows."""
    tokens = {rows: tokens_of(rows) for rows in (8, 3)}
    return {rows: (outputs(*parts, ids), generate(MODEL, *parts, ids.tolist(), 4)) for rows, ids in tokens.items()}


@pytest.mark.nightly
# Eight rows are divisible by every mesh, three by none.
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("data mp", 3),
        ("dp mp", 8),
        ("fsdp tensor", 3),
        ("fsdp tensor", 8),
        ("data", 8),
    ],
)
def test_outputs_are_those_without_a_mesh(parts, alone, name, rows):
    params, adapters = parts
    tokens, (expected, texts) = tokens_of(rows), alone[rows]
    mesh = mesh_of(name)

    def laid(leaf):
        last = mesh.axis_names[-1]
        even = leaf.ndim > 2 and leaf.shape[-1] % mesh.shape[last] == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(None, None, last) if even else PartitionSpec()))

    weights = params if name == "data" else jax.tree.map(laid, params)
    with jax.set_mesh(mesh):
        chex.assert_trees_all_close(outputs(weights, adapters, tokens), expected, rtol=0, atol=1e-5)
        assert generate(MODEL, weights, adapters, tokens.tolist(), 4) == texts


@pytest.mark.parametrize("name", ["dp mp", "fsdp tensor"])
def test_adapters_begin_as_without_a_mesh(parts, name):
    params, _ = parts
    rules = [("q_proj", sx.PiSSA(rank=2)), ("k_proj", sx.LoRA(rank=2))]
    expected = sx.attach(jax.random.key(0), params, rules)
    for kind in (AxisType.Auto, AxisType.Explicit):
        with jax.set_mesh(mesh_of(name, kind)):
            chex.assert_trees_all_close(sx.attach(jax.random.key(0), params, rules), expected, rtol=0, atol=1e-6)


def test_inside_a_shard_map_of_the_users(parts):
    params, adapters = parts
    tokens = tokens_of(8)
    mesh = mesh_of("data")
    mapped = jax.shard_map(
        functools.partial(MODEL.apply, params, adapters),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    chex.assert_trees_all_close(jax.jit(mapped)(tokens), MODEL.apply(params, adapters, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dp mp", "data"])
def test_explicit_axes_are_refused_in_a_line(parts, name):
    params, adapters = parts
    count = len(MESHES[name][1])
    with (
        jax.set_mesh(mesh_of(name, AxisType.Explicit)),
        pytest.raises(sx.SboraxError, match=rf"are Explicit.*axis_types=\(AxisType.Auto,\) \* {count}"),
    ):
        MODEL.apply(params, adapters, tokens_of(8))


@pytest.mark.parametrize("name", MESHES)
def test_attention_that_the_compiler_cannot_cut(monkeypatch, name):
    monkeypatch.setitem(KERNELS, "splash", functools.partial(splash, interpret=True))
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 8, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    with jax.set_mesh(mesh_of(name)):
        got = jax.jit(functools.partial(attend, "splash"))(query, key, value)
    np.testing.assert_allclose(got, attention(query, key, value), rtol=0, atol=1e-5)


def test_axes_that_are_ours():
    assert compiled_axes() == {} and dividing(8, AXES) == ()
    with jax.set_mesh(mesh_of("data mp")):
        assert compiled_axes() == {"data": 2}
        assert dividing(8, AXES) == ("data",) and dividing(3, AXES) == ()
    with jax.set_mesh(mesh_of("dp mp")):
        assert compiled_axes() == {}
