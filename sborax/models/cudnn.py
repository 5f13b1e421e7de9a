"""cuDNN's flash attention on rows of packed samples.

Hopper GPUs get the runs of tokens of which a row consists, and compute nothing between them. Others get a mask, and
compute every pair of tokens that are in causal order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
from jax.extend.backend import get_backend
from jaxtyping import Array, Bool, Float, Int

from sborax.models.attention import padded, visible

RUNS = 8
"""The most runs in a row that are passed to cuDNN. A row with more is computed with a mask."""
_HOPPER = 9.0
_RIGHT_OFFSETS = (0, 11)
"""The first JAX whose offsets of keys are right where several heads share one."""


def cudnn(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    segments: Int[Array, "batch seq"] | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention within segments, 0 for padding on a GPU that takes runs."""
    if segments is not None and takes_runs(query.shape[2], key.shape[2]):
        return by_runs_or_mask(query, key, value, segments)
    return by_mask(query, key, value, segments)


def takes_runs(heads: int, kv_heads: int) -> bool:
    """Whether cuDNN takes rows as runs on this GPU and through this JAX."""
    hopper = float(get_backend().devices()[0].compute_capability) >= _HOPPER
    return hopper and (heads == kv_heads or jax.__version_info__ >= _RIGHT_OFFSETS)


def by_mask(query: Array, key: Array, value: Array, segments: Array | None) -> Array:
    """Attention with a bias (seq, seq) a row for its segments."""
    length = query.shape[1]
    # The backward pass with a bias takes even lengths alone.
    query, key, value = (padded(x, 2) for x in (query, key, value))
    mask = None
    if segments is not None:
        ids = padded(segments, 2)
        mask = visible(ids.shape[1], ids.shape[1], ids, ids)[:, None]
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True, implementation="cudnn")
    return out[:, :length]


def runs(
    segments: Int[Array, "batch seq"], most: int
) -> tuple[Int[Array, "batch starts"], Int[Array, "batch runs"], Bool[Array, ""]]:
    """Starts and lengths of the runs of equal segments, without padding; -1 behind the last.

    Also whether these describe the rows in full: no row has more than `most`, and no segment continues after another
    one or after padding.
    """
    previous = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    starts = (segments > 0) & (segments != previous)
    number = jnp.cumsum(starts, axis=1, dtype=jnp.int32) - 1
    # (batch, seq, run): to which run a token belongs.
    member = (number[:, :, None] == jnp.arange(most, dtype=jnp.int32)[None, None, :]) & (segments > 0)[:, :, None]
    lengths = jnp.sum(member, axis=1, dtype=jnp.int32)
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :, None]
    first = jnp.sum(jnp.where(member & starts[:, :, None], slots, 0), axis=1, dtype=jnp.int32)
    valid = lengths > 0
    offsets = jnp.pad(jnp.where(valid, first, -1), ((0, 0), (0, 1)), constant_values=-1)
    new = ~starts | (segments > lax.cummax(previous, axis=1))
    return offsets, jnp.where(valid, lengths, -1), jnp.all((number < most) & new)


def by_runs(query: Array, key: Array, value: Array, offsets: Array, lengths: Array) -> Array:
    """Attention within runs of tokens. What lies between them is undefined."""
    length = query.shape[1]
    # JAX refuses odd lengths in the backward pass.
    query, key, value = (padded(x, 2) for x in (query, key, value))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out: Any = dot_product_attention(
            query,
            key,
            value,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=offsets,
            kv_offsets=offsets,
            scale=query.shape[-1] ** -0.5,
            mask_type=MaskType.PADDING_CAUSAL,
        )
    return out[:, :length]


def _either(segments: Array, of: Callable[..., Any], *inputs: Array) -> Any:
    """`of(attend, *inputs)` with the attention that these segments allow, 0 in padding."""
    offsets, lengths, fit = runs(segments, RUNS)
    with_runs = functools.partial(by_runs, offsets=offsets, lengths=lengths)
    with_mask = functools.partial(by_mask, segments=segments)
    results = lax.cond(fit, functools.partial(of, with_runs), functools.partial(of, with_mask), *inputs)
    return jax.tree.map(lambda x: jnp.where((segments > 0)[:, :, None, None], x, jnp.zeros((), x.dtype)), results)


@jax.custom_vjp
def by_runs_or_mask(query: Array, key: Array, value: Array, segments: Array) -> Array:
    """Attention by runs, or by a mask where a row has too many. Backward computes it again."""
    return _either(segments, lambda attend, *qkv: attend(*qkv), query, key, value)


def _forward(query: Array, key: Array, value: Array, segments: Array) -> tuple[Array, tuple[Array, ...]]:
    return by_runs_or_mask(query, key, value, segments), (query, key, value, segments)


def _backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    *inputs, segments = residuals

    def gradients(attend: Any, query: Array, key: Array, value: Array, g: Array) -> tuple[Array, ...]:
        return jax.vjp(attend, query, key, value)[1](g)

    # The gradient of padding is 0 before, too: cuDNN never writes there.
    g = jnp.where((segments > 0)[:, :, None, None], g, jnp.zeros((), g.dtype))
    return (*_either(segments, gradients, *inputs, g), None)


by_runs_or_mask.defvjp(_forward, _backward)
