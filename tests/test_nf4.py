"""NF4 against bitsandbytes on the CPU, under JAX's transformations, and what it keeps in memory."""

import functools

import bitsandbytes.functional as bnb
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from nightly import nightly_unless

from sborax.adapters import core
from sborax.layout.mesh import make_mesh
from sborax.models import nf4
from sborax.models.gguf import open_gguf
from sborax.models.nf4 import NF4Array, quantise, quantise_numpy
from sborax.models.sharding import base_specs, quantised_specs

pytestmark = pytest.mark.usefixtures("strict", "compiled_fully")

ROUTES = [quantise, quantise_numpy]
by_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.04).astype(jnp.dtype(dtype))


def ties() -> np.ndarray:
    """Values at, just below and just above every midpoint, in blocks whose absmax is 1."""
    near = np.concatenate([np.nextafter(nf4.MIDPOINTS, -2), nf4.MIDPOINTS, np.nextafter(nf4.MIDPOINTS, 2)])
    column = np.concatenate([near, [1.0], np.zeros(18)]).astype(np.float32)
    return np.tile(column[:, None], (2, 40))


def tie_scales() -> np.ndarray:
    """Blocks whose absmax spread over seven decades, so that the 8-bit codes of the scales are all over the map."""
    return normal(128, 512) * np.logspace(-6, 1, 512, dtype=np.float32)


MATRICES = {
    "random": normal(128, 40),
    "bfloat16": normal(128, 40, dtype="bfloat16"),
    "float16": normal(128, 40, dtype="float16"),
    "one row": normal(64, 1),
    "many groups, the last one ragged": normal(576, 161),
    "zeros": np.zeros((128, 40), np.float32),
    "zero blocks among others": np.where(np.arange(128)[:, None] < 64, np.float32(0), normal(128, 40)),
    "negative zeros": np.full((128, 40), -0.0, np.float32),
    "a constant": np.full((128, 40), 0.3, np.float32),
    "a negative constant": np.full((128, 40), -0.3, np.float32),
    "ties": ties(),
    "spread scales": tie_scales(),
    "one outlier": np.where(np.arange(128)[:, None] == 77, np.float32(40), normal(128, 40)),
    "tiny": normal(128, 40) * np.float32(1e-33),
    "huge": normal(128, 40) * np.float32(1e37),
}
EXTREME = {
    "subnormal": normal(128, 40) * np.float32(1e-37),
    "inverse of the absmax is subnormal": np.full((64, 3), 1e38, np.float32),
}


nest = jax.jit(lambda absmax, offset: nf4._nest(jnp, absmax, offset, np.finfo(np.float32).tiny))
dequantise = jax.jit(NF4Array.dense)


def reference(weight: np.ndarray) -> tuple[NF4Array, np.ndarray]:
    """What bitsandbytes makes of torch's (out, in) weight, in our layout, and its dequantisation."""
    size, out = weight.shape
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[str(weight.dtype)]
    tensor = torch.from_numpy(np.ascontiguousarray(weight.T).astype(np.float32)).to(dtype)
    packed, state = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = NF4Array(
        packed.numpy().reshape(out, size // 2).T,
        state.absmax.numpy().reshape(out, size // 64).T,
        state.state2.absmax.numpy(),
        state.offset.numpy(),
        dtype=jnp.dtype(weight.dtype),
    )
    return ours, bnb.dequantize_4bit(packed, state).float().numpy().T


def first_absmax(weight: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(weight.T).astype(np.float32))
    return bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4")[1].absmax.numpy().reshape(weight.shape[1], -1).T


def assert_equal_to_bitsandbytes(route, weight: np.ndarray) -> None:
    theirs, dense = reference(weight)
    ours = route(jnp.asarray(weight) if route is quantise else weight)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    # The exact mean to the last bit. torch's own float32 sum strays from it by up to two.
    absmax = first_absmax(weight)
    exact = np.float32(absmax.mean(dtype=np.float64))
    np.testing.assert_array_max_ulp(np.asarray(ours.offset), exact, maxulp=1)
    np.testing.assert_array_max_ulp(np.asarray(ours.offset), theirs.offset, maxulp=4)
    # Given their offset, everything else is equal.
    if route is quantise:
        codes, nested = nest(absmax, theirs.offset)
    else:
        codes, nested = nf4._nest(np, absmax, theirs.offset, np.float32(1e-38))
    np.testing.assert_array_equal(codes, theirs.absmax)
    np.testing.assert_array_equal(nested, theirs.nested)
    if ours.offset == theirs.offset:
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, ours), theirs)
    back = dequantise(theirs)
    assert back.dtype == weight.dtype
    np.testing.assert_array_equal(np.asarray(back, np.float32), dense)


@by_route
@pytest.mark.parametrize("name", MATRICES)
def test_equals_bitsandbytes(name, route):
    assert_equal_to_bitsandbytes(route, MATRICES[name])


@pytest.mark.parametrize(
    "name", nightly_unless(["blk.0.attn_k"], ["blk.0.attn_k", "blk.14.attn_output", "blk.29.ffn_down"])
)
@pytest.mark.parametrize("route", nightly_unless([quantise_numpy], ROUTES), ids=lambda route: route.__name__)
def test_equals_bitsandbytes_on_a_real_model(name, route, smollm2):
    weight = open_gguf(smollm2).read(f"{name}.weight").T
    assert weight.shape[0] in (576, 1536)
    assert_equal_to_bitsandbytes(route, weight)


@pytest.mark.parametrize("name", EXTREME)
def test_host_route_equals_bitsandbytes_beyond_normal_floats(name):
    weight = EXTREME[name]
    theirs, _ = reference(weight)
    ours = quantise_numpy(weight)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(nf4._encode(np, weight, np.float32(1e-38))[1], first_absmax(weight))


def test_dynamic_map_equals_bitsandbytes():
    np.testing.assert_array_equal(nf4.dynamic_map(), bnb.create_dynamic_map().numpy())


def test_dynamic_codes_equal_bitsandbytes_around_every_step():
    steps = nf4._dynamic_thresholds()
    values = np.concatenate([np.nextafter(steps, -2), steps, np.nextafter(steps, 2), normal(4096) * 20])
    values = np.clip(values, -1, 1).astype(np.float32)
    # A 1 in every block makes the absmax 1, so that the values reach the table unscaled.
    blocks = np.pad(np.resize(values, (len(values) // 255 + 1, 255)), ((0, 0), (0, 1)), constant_values=1)
    codes, _ = bnb.quantize_blockwise(torch.from_numpy(blocks), blocksize=256)
    np.testing.assert_array_equal(np.searchsorted(steps, blocks, side="right"), codes.numpy())


@pytest.mark.parametrize("table", [nf4.LEVELS, nf4.dynamic_map()], ids=len)
def test_selects_read_a_table_as_a_gather_does(table):
    codes = np.random.default_rng(0).permutation(len(table)).astype(np.uint8).reshape(2, -1)
    for read in (nf4.look_up, nf4._selected, nf4._gathered):
        np.testing.assert_array_equal(jax.jit(functools.partial(read, table))(codes), table[codes])


@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
def test_a_tpu_gathers_no_single_numbers(stack):
    """It would take them one after the other. In a step, HBM traffic grew to that of a few dozen dense weights."""
    weight = jax.eval_shape(quantise, jax.ShapeDtypeStruct((*stack, 128, 40), jnp.float32))
    traced = jax.jit(lambda weight: weight.dense()).trace(weight)
    assert "gather" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "gather" in traced.lower(lowering_platforms=("cpu",)).as_text()


@by_route
def test_stack_equals_its_layers(route):
    stack = normal(2, 3, 128, 40)
    packed = route(stack)
    assert packed.shape == (2, 3, 128, 40) and packed.dtype == np.float32
    for i in range(2):
        for j in range(3):
            layer = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], packed)
            assert layer.shape == (128, 40)
            chex.assert_trees_all_equal(layer, route(stack[i, j]))
    np.testing.assert_array_equal(dequantise(packed)[1, 2], dequantise(route(stack[1, 2])))


def test_host_route_reads_transposed_views_and_chunks(monkeypatch):
    torch_order = normal(50, 192)
    expected = quantise_numpy(torch_order.T)
    monkeypatch.setattr(nf4, "_CHUNK", 192 * 7)
    chex.assert_trees_all_equal(quantise_numpy(torch_order.T), expected)
    chex.assert_trees_all_equal(quantise_numpy(np.ascontiguousarray(torch_order.T)), expected)


def test_half_a_byte_a_parameter_on_the_device():
    weight = quantise(normal(4, 512, 512))
    codes = sum(shard.data.nbytes for shard in weight.codes.addressable_shards)
    assert codes == 4 * 512 * 512 // 2
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    assert total == codes + 4 * (512 * 512 // 64 + 4 * 16 + 4)
    # The runtime holds what the array claims: the executable that takes it is handed as many bytes.
    memory = jax.jit(lambda w: w.dense().sum()).lower(weight).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 1.01 * total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("logical", ["float32", "bfloat16"])
def test_matmul_and_its_gradient_are_those_of_the_dense_weight(dtype, logical):
    weight = quantise(normal(128, 40, dtype=logical))
    x, g = jnp.asarray(normal(6, 128, seed=1, dtype=dtype)), jnp.asarray(normal(6, 40, seed=2, dtype=dtype))

    def with_gradient(matmul):
        y, pull = jax.vjp(lambda x: matmul(x, weight), x)
        return y, pull(g)[0]

    got = jax.jit(lambda: with_gradient(core.matmul))()
    expected = with_gradient(lambda x, w: x @ core.dense(w).astype(x.dtype))
    assert got[0].dtype == got[1].dtype == dtype
    chex.assert_trees_all_close(got, expected, rtol=1e-5 if dtype == "float32" else 2e-2, atol=1e-6)


def loss(matmul, x, weights):
    def layer(h, weight):
        return jnp.tanh(matmul(h, weight)), None

    return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)


def test_gradient_under_scan_remat_and_vmap():
    weights = quantise(normal(3, 64, 64) * 4)
    dense, x = weights.dense(), jnp.asarray(normal(2, 5, 64, seed=1))
    expected = jax.jit(jax.vmap(jax.grad(lambda x: loss(jnp.matmul, x, dense))))(x)
    close = dict(rtol=1e-4, atol=1e-6)
    for matmul in (core.matmul, jax.checkpoint(core.matmul)):
        of = jax.grad(lambda x, matmul=matmul: loss(matmul, x, weights))
        chex.assert_trees_all_close(jax.jit(jax.vmap(of))(x), expected, **close)
    # Mapping the weights themselves, forwards and backwards.
    per_layer = jax.jit(jax.vmap(jax.grad(lambda x, w: jnp.sum(core.matmul(x, w) ** 2)), in_axes=(None, 0)))
    per_dense = jax.jit(jax.vmap(jax.grad(lambda x, w: jnp.sum((x @ w) ** 2)), in_axes=(None, 0)))
    chex.assert_trees_all_close(per_layer(x[0], weights), per_dense(x[0], dense), **close)


def test_weight_has_no_gradient():
    weight = quantise(normal(64, 8))
    x = jnp.ones((2, 64))
    cotangents = jax.grad(lambda w: core.matmul(x, w).sum(), allow_int=True)(weight)
    assert cotangents.codes.dtype == cotangents.absmax.dtype == jax.dtypes.float0
    assert not cotangents.nested.any() and not cotangents.offset.any()


def test_no_dense_stack_is_kept_for_the_backward_pass():
    size, tokens = 256, 4
    dense_layer = size * size * 4

    def temporaries(matmul, layers):
        weights = quantise(normal(layers, size, size))
        gradient = jax.jit(jax.grad(lambda x, w: loss(matmul, x, w)))
        return gradient.lower(jnp.ones((tokens, size)), weights).compile().memory_analysis().temp_size_in_bytes

    growth = temporaries(core.matmul, 18) - temporaries(core.matmul, 2)
    activations = 16 * tokens * size * 4
    # tanh keeps two values a token for each layer; sixteen dense weights would be 32 times that.
    assert growth <= 2.1 * activations < dense_layer
    # The measure sees a kept stack: without the custom rule it is one dense weight a layer.
    naive = temporaries(lambda x, w: x @ w.dense(), 18) - temporaries(lambda x, w: x @ w.dense(), 2)
    assert naive > 15 * dense_layer


def test_frozen_projection_keeps_neither_its_input_nor_a_dense_weight():
    weight = quantise(normal(128, 64))
    _, pull = jax.vjp(lambda x: core.matmul(x, weight), jnp.ones((5, 128)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert size <= sum(leaf.nbytes for leaf in jax.tree.leaves(weight))


def test_encode_keeps_kind_dtype_and_nearly_the_values():
    weight = quantise(normal(2, 128, 40, dtype="bfloat16"))
    new = jnp.asarray(normal(2, 128, 40, seed=3))
    second = jax.jit(lambda w, d: w.encode(d))(weight, new)
    assert isinstance(second, NF4Array) and second.dtype == jnp.bfloat16 and second.shape == weight.shape
    # The widest gap between levels is 0.304 of the absmax: half of it, and the 8-bit error of the scales.
    error = jnp.abs(second.dense().astype(jnp.float32) - new)
    bound = 0.17 * jnp.abs(new).max(axis=1, keepdims=True)
    assert bool((error <= bound).all())
    mapped = jax.jit(jax.vmap(lambda w, d: w.encode(d)))(weight, new)
    chex.assert_trees_all_equal((mapped.codes, mapped.absmax), (second.codes, second.absmax))
    chex.assert_trees_all_close(mapped, second, rtol=1e-6)


def test_a_weight_on_a_mesh():
    weight = quantise(normal(3, 256, 64))
    params = {"layers": {"mlp": {"up_proj": {"kernel": weight}}}}

    def spec(mesh):
        return base_specs(params, mesh.shape)["layers"]["mlp"]["up_proj"]["kernel"]

    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert spec(mesh) == PartitionSpec(None, "fsdp", "tensor")
    placed = jax.device_put(
        weight, jax.tree.map(lambda leaf: NamedSharding(mesh, leaf), quantised_specs(weight, spec(mesh)))
    )
    assert placed.codes.addressable_shards[0].data.shape == (3, 32, 32)
    assert placed.absmax.addressable_shards[0].data.shape == (3, 1, 32)
    assert placed.nested.is_fully_replicated and placed.offset.is_fully_replicated
    x = jnp.asarray(normal(5, 256, seed=1))
    of = jax.jit(jax.vmap(core.matmul, in_axes=(None, 0)))
    np.testing.assert_allclose(of(x, placed), of(x, weight), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(NF4Array.dense)(placed), weight.dense())
    # Four blocks are too few for eight devices, so the output is cut.
    assert spec(make_mesh({"fsdp": 8})) == PartitionSpec(None, None, ("fsdp", "tensor"))


def test_a_shard_of_a_weight_is_refused():
    weight = quantise(normal(256, 256))
    shard = NF4Array(weight.codes[:64], weight.absmax[:2], weight.nested, weight.offset, dtype=weight.dtype)
    with pytest.raises(core.SboraxError, match="whole weights"):
        shard.dense()


@by_route
def test_mistakes(route):
    with pytest.raises(core.SboraxError, match=r"\(\.\.\., in, out\) = \(96, 64\)"):
        route(normal(96, 64))
    with pytest.raises(core.SboraxError, match="does not allow"):
        route(normal(64))
    with pytest.raises(core.SboraxError, match="got int32"):
        route(np.ones((64, 2), np.int32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_host_route_refuses_values_that_are_not_finite(value):
    weight = normal(128, 4)
    weight[3, 2] = value
    with pytest.raises(core.SboraxError, match="not finite"):
        quantise_numpy(weight)
