"""Every attention back end: packed samples equal lone ones, padding on either side changes nothing, none is misused."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType
from sborax_models import TINY, relative

import sborax as sx
from sborax.layout.state import take_apart
from sborax.models import LanguageModel, Llama, LlamaConfig, abstract, backends, cudnn
from sborax.models.attention import attention
from sborax.models.backends import attend, choose
from sborax.train.step import sums

pytestmark = pytest.mark.usefixtures("strict")
AXES = ("data", "fsdp", "tensor")


@pytest.fixture
def interpreted(monkeypatch):
    """Splash's kernels without a TPU."""
    monkeypatch.setitem(backends.KERNELS, "splash", functools.partial(backends.splash, interpret=True))


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "backend"),
    [
        ("auto", "cpu", "float32", 64, "xla"),
        ("auto", "cuda", "bfloat16", 128, "cudnn"),
        ("auto", "cuda", "float32", 128, "xla"),
        ("auto", "cuda", "bfloat16", 100, "xla"),
        ("auto", "gpu", "bfloat16", 128, "xla"),
        ("auto", "tpu", "bfloat16", 64, "splash"),
        ("auto", "tpu", "float32", 80, "splash"),
        ("xla", "tpu", "bfloat16", 128, "xla"),
        ("cudnn", "cuda", "float16", 64, "cudnn"),
    ],
)
def test_auto_suits_the_device(name, device, dtype, head_dim, backend):
    assert choose(name, device, dtype, head_dim) == backend


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "why"),
    [
        ("splash", "cpu", "float32", 64, "splash runs on TPUs, these devices are cpu; use auto or xla"),
        ("splash", "tpu", "float16", 64, "splash computes in bfloat16 or float32, not in float16"),
        ("cudnn", "tpu", "bfloat16", 64, "cudnn runs on NVIDIA GPUs from Ampere on, these devices are tpu"),
        ("cudnn", "cuda", "float32", 64, "cudnn computes in bfloat16 or float16, not in float32"),
        ("cudnn", "cuda", "bfloat16", 132, "cudnn takes heads of a multiple of 8 up to 128 features, not of 132"),
        ("flash", "cuda", "bfloat16", 64, "'flash' is not one of auto, xla, cudnn, splash"),
    ],
)
def test_a_back_end_that_cannot_says_so(name, device, dtype, head_dim, why):
    with pytest.raises(sx.SboraxError, match=f"^attention: {why}"):
        choose(name, device, dtype, head_dim)


def arrays(rows, length, heads=4, kv_heads=2, head_dim=16):
    rng = np.random.default_rng(0)
    shapes = ((rows, length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def with_gradients(attend_to, query, key, value, slope, segments):
    """What comes out, and the gradients in queries, keys and values, for a random gradient of what comes out."""

    def total(query, key, value):
        out = attend_to(query, key, value, segments, segments)
        return jnp.sum(out * slope), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(query, key, value)
    return out, *grads


SEGMENTS = np.array([[1] * 60 + [2] * 50 + [3] * 40, [1] * 130 + [0] * 20, [0] * 30 + [1] * 120, [1] * 150], np.int32)


@pytest.mark.parametrize("segments", [jnp.asarray(SEGMENTS), None], ids=["segments", "whole rows"])
def test_splash_equals_xla(interpreted, segments):
    inputs = arrays(4, SEGMENTS.shape[1])
    ours = with_gradients(functools.partial(attend, "splash"), *inputs, segments)
    for got, want in zip(ours, with_gradients(attention, *inputs, segments), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_blocks_equals_attention_at_once(monkeypatch, padded):
    """Outputs and gradients, with a last block that is not full; padding may fill whole blocks."""
    inputs = arrays(2, 150)
    segments = jnp.asarray(SEGMENTS[[0, 2]]) if padded else None
    expected = with_gradients(attention, *inputs, segments)
    monkeypatch.setattr("sborax.models.attention.BLOCK", 16)
    # 19 queries each.
    for got, want in zip(with_gradients(attention, *inputs, segments), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def test_blocks_behind_a_cache(monkeypatch):
    """The last 40 of 150 tokens as queries: the same rows as of all of them."""
    query, key, value, _ = arrays(2, 150)
    expected = attention(query, key, value)[:, 110:]
    monkeypatch.setattr("sborax.models.attention.BLOCK", 16)
    np.testing.assert_allclose(attention(query[:, 110:], key, value), expected, atol=2e-6)


def test_long_rows_cost_little_more_than_the_half_that_is_seen():
    """FLOPs of both products for 2,048 tokens: 9/16 of the square, by eight blocks."""
    query, key, value, _ = arrays(1, 2048)
    cost = jax.jit(attention).lower(query, key, value).compile().cost_analysis()
    square = 4 * 2048**2 * 4 * 16
    # What softmax and mask cost is counted too.
    assert 9 / 16 < cost["flops"] / square < 0.7


def test_splash_on_a_mesh_equals_splash_alone(interpreted):
    inputs, segments = arrays(4, SEGMENTS.shape[1]), jnp.asarray(SEGMENTS)
    alone = with_gradients(functools.partial(attend, "splash"), *inputs, segments)
    with jax.set_mesh(jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)):
        parted = with_gradients(functools.partial(attend, "splash"), *inputs, segments)
    for got, want in zip(parted, alone, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_cache_is_left_to_xla():
    query, key, value, _ = arrays(2, 9)
    np.testing.assert_array_equal(attend("splash", query[:, 6:], key, value), attention(query[:, 6:], key, value))


def with_cudnn(monkeypatch, by_runs):
    """A cuDNN of some version on a GPU that is not here, which takes rows as runs or not."""
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", versions)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "takes_runs", lambda heads, kv_heads: by_runs)


@pytest.mark.parametrize(
    ("segments", "starts", "lengths", "fit"),
    [
        ([1, 1, 2, 2, 2, 0], [0, 2, -1, -1], [2, 3, -1], True),
        ([0, 0, 1, 1, 4, 4], [2, 4, -1, -1], [2, 2, -1], True),
        ([1, 2, 3, 3, 3, 3], [0, 1, 2, -1], [1, 1, 4], True),
        ([0, 0, 0, 0, 0, 0], [-1, -1, -1, -1], [-1, -1, -1], True),
        ([1, 2, 3, 4, 4, 4], [0, 1, 2, -1], [1, 1, 1], False),
        ([1, 1, 2, 2, 1, 1], [0, 2, 4, -1], [2, 2, 2], False),
        ([1, 1, 0, 0, 1, 1], [0, 4, -1, -1], [2, 2, -1], False),
    ],
)
def test_runs_of_a_row(segments, starts, lengths, fit):
    """A segment that goes on behind another one is no run, and a fourth run is one too many."""
    runs = cudnn.runs(jnp.array([segments], jnp.int32), 3)
    for got, want in zip(runs, ([starts], [lengths], fit), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("limit", [3, 2], ids=["by runs", "too many runs"])
def test_runs_and_masks_give_the_same(monkeypatch, limit):
    """Outputs and gradients of real tokens. In place of cuDNN: XLA, and NaN where cuDNN writes nothing."""

    def by_runs(query, key, value, offsets, lengths):
        slots = jnp.arange(query.shape[1])[None, :, None]
        member = (slots >= offsets[:, None, :-1]) & (slots < (offsets[:, :-1] + lengths)[:, None, :])
        ids = jnp.where(member.any(2), 1 + jnp.argmax(member, 2), 0)
        took.append(ids)
        out = attention(query, key, value, ids, ids)
        return jnp.where((ids > 0)[:, :, None, None], out, jnp.nan)

    took = []
    monkeypatch.setattr(cudnn, "RUNS", limit)
    monkeypatch.setattr(cudnn, "by_runs", by_runs)
    monkeypatch.setattr(
        cudnn, "by_mask", lambda query, key, value, segments: attention(query, key, value, segments, segments)
    )
    monkeypatch.setattr(cudnn, "takes_runs", lambda heads, kv_heads: True)
    inputs, segments = arrays(4, SEGMENTS.shape[1]), jnp.asarray(SEGMENTS)
    real = (SEGMENTS > 0)[:, :, None, None]

    def masked(attend_to, *args):
        return jnp.where(real, attend_to(*args), 0)

    ours = with_gradients(functools.partial(masked, functools.partial(attend, "cudnn")), *inputs, segments)
    assert took, "runs are part of the program"
    for got, want in zip(ours, with_gradients(functools.partial(masked, attention), *inputs, segments), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)
    out = attend("cudnn", *inputs[:3], segments, segments)
    np.testing.assert_array_equal(np.where(real, 0, out), 0)


def test_cudnn_gets_runs(monkeypatch):
    """Lowered for a Hopper GPU that is not here: both programs, of which the step takes that which fits its rows."""
    with_cudnn(monkeypatch, by_runs=True)
    query, key, value = (jax.ShapeDtypeStruct((4, 33, n, 16), jnp.bfloat16) for n in (4, 2, 2))

    def total(query, key, value, segments):
        return jnp.sum(attend("cudnn", query, key, value, segments).astype(jnp.float32))

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(query, key, value, jax.ShapeDtypeStruct((4, 33), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = ("fmhaSoftmax(", "fmhaSoftmaxBackward(", "fmhaScaleBiasSoftmax(", "fmhaScaleBiasSoftmaxBackward(")
    # The output itself is not used: only the backward pass computes it, for its statistics.
    assert [text.count(f"@__cudnn${name}") for name in kernels] == [1, 1, 1, 1]
    forward = next(line for line in text.splitlines() if "@__cudnn$fmhaSoftmax(" in line)
    assert "tensor<4x8xi32>, tensor<4x9xi32>" in forward and "PADDING_CAUSAL" in forward


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["one device", "mesh"])
def test_cudnn_gets_a_mask_of_the_segments(monkeypatch, sizes):
    """Lowered for a GPU that is not here, with a cuDNN of some version."""
    with_cudnn(monkeypatch, by_runs=False)
    query, key, value, slope = (jax.ShapeDtypeStruct((4, 33, n, 16), jnp.bfloat16) for n in (4, 2, 2, 4))
    segments = jax.ShapeDtypeStruct((4, 33), jnp.int32)

    def gradients(query, key, value, slope, segments):
        return jax.grad(lambda *qkv: jnp.sum(attend("cudnn", *qkv, segments) * slope), (0, 1, 2))(query, key, value)

    mesh = jax.make_mesh(sizes or (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        traced = jax.jit(gradients).trace(query, key, value, slope, segments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    rows, heads, kv = (4 // 4, 4 // 2, 2 // 2) if sizes else (4, 4, 2)
    queries, shared = f"tensor<{rows}x34x{heads}x16xbf16>", f"tensor<{rows}x34x{kv}x16xbf16>"
    forward = next(line for line in text.splitlines() if "@__cudnn$fmhaScaleBiasSoftmax(" in line)
    assert f"({queries}, {shared}, {shared}, tensor<{rows}x1x34x34xbf16>)" in forward
    assert "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text


@pytest.mark.parametrize(("remat", "times"), [("cheap", 1), ("full", 2)])
def test_what_remat_keeps_of_splash_is_not_computed_again(remat, times):
    """Kernels in the program of a gradient, lowered for a TPU that is not here."""
    config = LlamaConfig(**TINY, head_dim=8)
    model = LanguageModel(Llama(config, remat=remat, attention="splash"), {}, config, None)
    tokens = jax.ShapeDtypeStruct((1, 40), jnp.int32)

    def gradient(params, tokens, segments):
        return jax.grad(lambda params: jnp.sum(model.hidden(params, None, tokens, segment_ids=segments)))(params)

    traced = jax.jit(gradient).trace(abstract(config), tokens, tokens)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    counts = [text.count(f'kernel_name = "splash_mha_{kernel}_segmented') for kernel in ("fwd", "dkv", "dq")]
    assert counts == [times, 1, 1]


@pytest.fixture(scope="module")
def adapted():
    """A tiny model's params and LoRA adapters with random leaves."""
    config = LlamaConfig(**TINY, head_dim=8)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), abstract(config))
    params, adapters = sx.attach(jax.random.key(1), params, [("self_attn|mlp", sx.LoRA(rank=2))])
    train, frozen = sx.split(adapters)
    train = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), train)
    return config, params, sx.combine(train, frozen)


LENGTHS = (9, 14, 5, 8)


def row(samples, segments, length, place=0):
    """One row of these samples, one after the other from `place` on."""
    tokens, targets, counts, ids = (np.zeros((1, length), np.int32) for _ in range(4))
    for sample, segment in zip(samples, segments, strict=True):
        slots = slice(place, place + len(sample) - 1)
        tokens[0, slots], targets[0, slots], ids[0, slots] = sample[:-1], sample[1:], segment
        counts[0, slots] = np.arange(len(sample) - 1) >= 2
        place = slots.stop
    return {"tokens": tokens, "targets": targets, "counts": counts > 0, "segments": ids}


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_packed_equals_alone_padded_on_either_side(adapted, interpreted, backend):
    """Logits of every token and gradients of every leaf: four samples in a row, and each in a row of its own."""
    config, params, adapters = adapted
    model = LanguageModel(Llama(config, remat="cheap", attention=backend), {}, config, None)
    parts = take_apart(params, adapters, train_also=["norm"])

    @jax.jit
    def run(batch):
        logits = model.apply(params, adapters, batch["tokens"], segment_ids=batch["segments"])

        def loss(train):
            return sums(model, train, parts.frozen, parts.base, batch, None).losses["loss"]

        return logits, *jax.value_and_grad(loss)(parts.train)

    rng = np.random.default_rng(1)
    samples = [rng.integers(0, config.vocab_size, length) for length in LENGTHS]
    length = 40
    logits, loss, grads = run(row(samples, (1, 2, 3, 4), length))
    start, total, summed = 0, 0.0, jax.tree.map(jnp.zeros_like, grads)
    for number, sample in enumerate(samples):
        # Alternately against the left and the right end of the row.
        size = len(sample) - 1
        place = 0 if number % 2 else length - size
        alone, term, gradient = run(row([sample], (1,), length, place))
        assert relative(logits[0, start : start + size], alone[0, place : place + size]) < 1e-5
        start, total, summed = start + size, total + term, jax.tree.map(jnp.add, summed, gradient)
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    chex.assert_trees_all_equal_structs(grads, summed)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(summed), strict=True):
        assert np.abs(want).max() > 1e-3 and relative(got, want) < 1e-5
