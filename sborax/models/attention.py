"""Attention over sequences that may be padded or packed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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

    Padding rows see padding alone, so that no row is empty. Scores and softmax are float32.
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqkgh,btkh->bkgqt", grouped, key, preferred_element_type=jnp.float32)
    mask = visible(queries, key.shape[1], query_segments, key_segments)[:, None, None]
    scores = jnp.where(mask, scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = jnp.einsum("bkgqt,btkh->bqkgh", weights, value)
    return out.reshape(batch, queries, heads, head_dim)
