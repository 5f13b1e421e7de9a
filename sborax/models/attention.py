"""Attention over sequences that may be padded or packed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 256
"""Queries whose scores are one array, at least: below it, what keys after them would cost is little."""
BLOCKS = 8
"""Blocks at most: twice as many would save 3 % of the scores."""


def visible(
    queries: int,
    keys: int,
    query_segments: Int[Array, "batch queries"] | None,
    key_segments: Int[Array, "batch keys"] | None,
) -> Bool[Array, "#batch queries keys"]:
    """Which keys each query sees: not later than itself, and of its own segment.

    The queries are the last ones among the keys. Segment 0 is padding; without segments all is one segment.
    """
    slots = jnp.arange(keys - queries, keys)
    causal = slots[None, :, None] >= jnp.arange(keys)[None, None, :]
    if query_segments is None or key_segments is None:
        return causal
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    query_segments: Int[Array, "batch queries"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """softmax(q k' / sqrt(head_dim) + mask) v, each key head serving heads / kv_heads query heads.

    Padding rows see padding alone, so that no row is empty. Scores and softmax are float32. Many queries are taken in
    blocks, and the keys after a block are left out of its products: no query of it sees them.
    """
    queries = query.shape[1]
    size = max(BLOCK, -(-queries // BLOCKS))
    earlier = key.shape[1] - queries
    done = []
    for start in range(0, queries, size):
        own, seen = slice(start, start + size), slice(0, min(start + size, queries) + earlier)
        segments = (None, None)
        if query_segments is not None and key_segments is not None:
            segments = (query_segments[:, own], key_segments[:, seen])
        done.append(_block(query[:, own], key[:, seen], value[:, seen], *segments))
    return jnp.concatenate(done, axis=1)


def _block(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    query_segments: Int[Array, "batch queries"] | None,
    key_segments: Int[Array, "batch keys"] | None,
) -> Float[Array, "batch queries heads head_dim"]:
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # Heads before tokens: contracted as they come, XLA would transpose the scores, the largest array here.
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgqh,bkth->bkgqt", grouped, key, preferred_element_type=jnp.float32)
    mask = visible(queries, key.shape[2], query_segments, key_segments)[:, None, None]
    scores = jnp.where(mask, scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = jnp.einsum("bkgqt,bkth->bkgqh", weights, value)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head_dim)
