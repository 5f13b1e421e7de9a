"""A model with another number of tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import flatten, replace_leaves
from sborax.adapters.tables import HEAD, TABLE
from sborax.models.config import LlamaConfig
from sborax.models.language_model import LanguageModel
from sborax.models.tokenizer import check_vocabulary

SHRINKAGE = 1e-9
"""Variance of drawn rows over that of the old ones, as in transformers' `_init_added_embeddings_weights_with_mean`."""


def resize_vocabulary(
    model: LanguageModel, size: int, *, multiple: int = 1, key: Key[Array, ""] | None = None
) -> LanguageModel:
    """A model with `size` tokens: transformers' `resize_token_embeddings`, before any adapter.

        model.tokenizer.add_tokens(["<think>", "</think>"])
        larger = sx.resize_vocabulary(model, len(model.tokenizer))

    Rows of the embedding, and of a head that is not tied to it, are added or dropped at the end. Every new row is
    mean(old rows), where transformers draws new rows from N(mean, 1e-9 cov) of the old ones: they are within a few
    times 3e-5 standard deviations of the mean. With a `key` they are drawn here, too, even if there are fewer old
    rows than features, where transformers takes the mean.

    The tokenizer of the new model is that of `model`. `save_hf` writes both.

    Args:
    - model: the base. It stays as it is, apart from its tokenizer, which is shared.
    - size: number of tokens.
    - multiple: the size is rounded up to a multiple of this, as by transformers' `pad_to_multiple_of`; default 1.
    - key: for drawn rows; None (default) for the mean itself.

    Raises SboraxError for a size below 1 or beyond `models.config.WIDEST`, for one that leaves out a token that the
    config or the tokenizer needs, and for a config that is not a `LlamaConfig`.
    """
    config = model.config
    if not isinstance(config, LlamaConfig):
        raise SboraxError(f"resize_vocabulary: takes models with a LlamaConfig, not with a {type(config).__name__}")
    if size < 1 or multiple < 1:
        raise SboraxError(f"resize_vocabulary: size and multiple must be 1 or more, got {size} and {multiple}")
    size = -(-size // multiple) * multiple
    resized = dataclasses.replace(config, vocab_size=size)
    if model.tokenizer is not None:
        check_vocabulary(model.tokenizer, size, "resize_vocabulary")
    leaves, keys = flatten(model.params), (None, None) if key is None else jax.random.split(key)
    new: dict[str, Any] = {TABLE: _with_rows(leaves[TABLE], size, keys[0])}
    if HEAD in leaves:
        new[HEAD] = _with_rows(leaves[HEAD].T, size, keys[1]).T
    params = replace_leaves(model.params, new)
    return LanguageModel(model.module.clone(config=resized), params, resized, model.tokenizer)


def _with_rows(table: Float[Array, "vocab d"], size: int, key: Key[Array, ""] | None) -> Float[Array, "size d"]:
    """`table` with rows added or dropped at the end."""
    count, features = table.shape
    if size <= count:
        return table[:size]
    old = jnp.asarray(table, jnp.float32)
    mean = old.mean(axis=0, keepdims=True)
    new = jnp.broadcast_to(mean, (size - count, features))
    if key is not None:
        # A product of normal numbers with the deviations has their covariance, singular or not.
        weights = jax.random.normal(key, (size - count, count)) * (SHRINKAGE / count) ** 0.5
        new = new + jnp.matmul(weights, old - mean, precision="highest")
    return jnp.concatenate([jnp.asarray(table), new.astype(table.dtype)])
