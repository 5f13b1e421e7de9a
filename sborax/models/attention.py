"""Attention over sequences that may be padded or packed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 256
"""Smallest number of queries in a block. Smaller blocks would save little."""
BLOCKS = 8
"""Largest number of blocks. Twice as many would save 3 % of the scores."""


def visible(
    queries: int,
    keys: int,
    query_segments: Int[Array, "batch queries"] | None,
    key_segments: Int[Array, "batch keys"] | None,
    window: Int[Array, ""] | None = None,
) -> Bool[Array, "#batch queries keys"]:
    """Mask of the keys that each query sees: those of its own segment that are not later than itself.

    The queries are the last of the keys. Segment 0 is padding. Without segments all tokens are in one segment.

    - window: how many tokens back a query sees, itself included and padding left out; None for all.
    """
    slots = jnp.arange(keys - queries, keys)
    mask = slots[None, :, None] >= jnp.arange(keys)[None, None, :]
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    if window is None:
        return mask
    tokens = jnp.ones((1, keys), jnp.int32) if key_segments is None else (key_segments != 0).astype(jnp.int32)
    places = jnp.cumsum(tokens, axis=1, dtype=jnp.int32)
    return mask & (places[:, keys - queries :, None] - places[:, None, :] < window)


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    query_segments: Int[Array, "batch queries"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
    window: Int[Array, ""] | None = None,
    cap: float | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """softmax(q k' / sqrt(head_dim) + mask) v, each key head serving heads / kv_heads query heads.

    - window: see `visible`.
    - cap: scores s become cap tanh(s / cap). None (default) leaves them.

    Padding sees padding, so that no row of scores is empty. Scores and softmax are float32. Many queries are computed
    in blocks. A block is multiplied by the keys up to its end alone, since none of its queries sees later ones.
    """
    queries = query.shape[1]
    size = max(BLOCK, -(-queries // BLOCKS))
    earlier = key.shape[1] - queries
    blocks = []
    for start in range(0, queries, size):
        block, visible_keys = slice(start, start + size), slice(0, min(start + size, queries) + earlier)
        segments = (None, None)
        if query_segments is not None and key_segments is not None:
            segments = (query_segments[:, block], key_segments[:, visible_keys])
        keys, values = key[:, visible_keys], value[:, visible_keys]
        blocks.append(_block(query[:, block], keys, values, *segments, window, cap))
    return jnp.concatenate(blocks, axis=1)


def _block(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    query_segments: Int[Array, "batch queries"] | None,
    key_segments: Int[Array, "batch keys"] | None,
    window: Int[Array, ""] | None,
    cap: float | None,
) -> Float[Array, "batch queries heads head_dim"]:
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # Heads before tokens, or else XLA would transpose the scores, the largest array here.
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgqh,bkth->bkgqt", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    mask = visible(queries, key.shape[2], query_segments, key_segments, window)[:, None, None]
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = jnp.einsum("bkgqt,bkth->bkgqh", weights, value)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head_dim)


def padded(x: Array, multiple: int) -> Array:
    """`x` (batch, seq, ...) padded with zeros: segment 0 is padding, and no query sees keys behind it."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
