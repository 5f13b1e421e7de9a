"""Vectors of chosen tokens, which are trained in place of the whole embedding.

They are leaves beside the table, with the tokens that they belong to:

    embed_tokens/vectors   (n, d), the vectors
    embed_tokens/tokens    (n,) int32, the rows of the table `embed_tokens/embedding` in which they stand
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sborax.adapters.core import SboraxError
from sborax.adapters.tables import LOOKUP, TABLE

VECTORS, TOKENS = "embed_tokens/vectors", "embed_tokens/tokens"


def vectors_of(
    tokens: Sequence[int], leaves: Mapping[str, Any], adapted: Sequence[str] = ()
) -> tuple[Float[Array, "n d"], Int[Array, " n"]]:
    """Float32 copies of the vectors of `tokens`, and the tokens.

    - leaves: of the model, by path.
    - adapted: paths of the adapters.

    Raises SboraxError for tokens that the table lacks, a model without a table, and one whose table is adapted.
    """
    if TABLE not in leaves:
        raise SboraxError("train_tokens: the model has no embed_tokens")
    count = leaves[TABLE].shape[0]
    beyond = next((token for token in tokens if not 0 <= token < count), None)
    if beyond is not None:
        raise SboraxError(
            f"train_tokens: the model has the tokens 0..{count - 1}, and not {beyond}; train on a larger model, which "
            "sx.resize_vocabulary makes and sx.save_hf writes"
        )
    both = next((path for path in (TABLE, LOOKUP) if path in adapted), None)
    if both is not None:
        raise SboraxError(f"train_tokens: {both} has an adapter, too; leave one of the two out")
    places = jnp.asarray(tokens, jnp.int32)
    return leaves[TABLE][places].astype(jnp.float32), places


def with_vectors(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`leaves` by path, with trained vectors, if there are any, in the table in place of beside it."""
    if VECTORS not in leaves:
        return dict(leaves)
    plain = {path: leaf for path, leaf in leaves.items() if path not in (VECTORS, TOKENS)}
    vectors = leaves[VECTORS].astype(plain[TABLE].dtype)
    return {**plain, TABLE: plain[TABLE].at[leaves[TOKENS]].set(vectors)}
