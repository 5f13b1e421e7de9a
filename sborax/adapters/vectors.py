"""Vectors of chosen tokens, which are trained in place of a whole table: the embedding, or a head that is not tied.

They are leaves beside the table, with the tokens that they belong to:

    embed_tokens/vectors   (n, d), the vectors
    embed_tokens/tokens    (n,) int32, the rows of the table `embed_tokens/embedding` in which they stand
    lm_head/vectors        (m, d), those of the head
    lm_head/tokens         (m,) int32, the columns of the kernel `lm_head/kernel` in which they stand
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sborax.adapters.core import AbstractWeight, SboraxError
from sborax.adapters.tables import HEAD, LOOKUP, TABLE

OF_EMBEDDING, OF_HEAD = "embed_tokens", "lm_head"
TABLES = {OF_EMBEDDING: TABLE, OF_HEAD: HEAD}
"""The tables whose vectors may be trained, by their modules."""
VECTORS = {f"{module}/vectors": table for module, table in TABLES.items()}
"""The table of vectors, by their path."""
TOKENS = {f"{module}/tokens": table for module, table in TABLES.items()}
"""The table of tokens, by their path."""

Chosen = Sequence[int] | Mapping[str, Sequence[int]]
"""Tokens of the embedding, or of each module in `TABLES`."""


def by_module(tokens: Chosen) -> dict[str, tuple[int, ...]]:
    """The tokens of each module; without those of which there are none.

    Raises SboraxError for another module, and unless the tokens of each are distinct.
    """
    given = tokens if isinstance(tokens, Mapping) else {OF_EMBEDDING: tokens}
    for module, ids in given.items():
        if module not in TABLES:
            raise SboraxError(f"train_tokens: there are vectors of {' and '.join(TABLES)}, not of {str(module)[:40]!r}")
        distinct = isinstance(ids, Sequence) and all(type(token) is int and token >= 0 for token in ids)
        if not distinct or len(set(ids)) < len(ids):
            raise SboraxError(f"train_tokens: expected distinct ids of tokens, got {str(ids)[:60]}")
    return {module: tuple(ids) for module, ids in given.items() if ids}


def vectors_of(
    tokens: Chosen, leaves: Mapping[str, Any], adapted: Sequence[str] = ()
) -> tuple[dict[str, Float[Array, "n d"]], dict[str, Int[Array, " n"]]]:
    """Float32 copies of the vectors of `tokens`, and the tokens, by path.

    - leaves: of the model, by path.
    - adapted: paths of the adapters.

    Raises SboraxError for tokens that a table lacks, a model without the table, and a table that is adapted or
    quantised.
    """
    vectors, places = {}, {}
    for module, ids in by_module(tokens).items():
        table = leaves.get(TABLES[module])
        if table is None:
            tied = module == OF_HEAD and TABLE in leaves
            why = ": it is tied to the embedding, whose vectors it shares; leave it out" if tied else ""
            raise SboraxError(f"train_tokens: the model has no {module}{why}")
        if isinstance(table, AbstractWeight):
            raise SboraxError(f"train_tokens: {TABLES[module]} is quantised, and cannot be trained itself")
        of_table = (TABLE, LOOKUP) if module == OF_EMBEDDING else (HEAD,)
        both = next((path for path in of_table if path in adapted), None)
        if both is not None:
            raise SboraxError(f"train_tokens: {both} has an adapter, too; leave one of the two out")
        count = table.shape[0] if module == OF_EMBEDDING else table.shape[1]
        beyond = next((token for token in ids if token >= count), None)
        if beyond is not None:
            raise SboraxError(
                f"train_tokens: the model has the tokens 0..{count - 1}, and not {beyond}; train on a larger model, "
                "which sx.resize_vocabulary makes and sx.save_hf writes"
            )
        rows = jnp.asarray(ids, jnp.int32)
        vectors[f"{module}/vectors"] = _at(table, module, rows).astype(jnp.float32)
        places[f"{module}/tokens"] = rows
    return vectors, places


def _at(table: Float[Array, "_ _"], module: str, rows: Int[Array, " n"]) -> Float[Array, "n d"]:
    return table[rows] if module == OF_EMBEDDING else table[:, rows].T


def with_vectors(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`leaves` by path, with trained vectors, if there are any, in their tables in place of beside them."""
    plain = {path: leaf for path, leaf in leaves.items() if path not in VECTORS and path not in TOKENS}
    for module, path in TABLES.items():
        if f"{module}/vectors" in leaves:
            vectors, rows = leaves[f"{module}/vectors"].astype(plain[path].dtype), leaves[f"{module}/tokens"]
            of_rows = plain[path].at[rows] if module == OF_EMBEDDING else plain[path].at[:, rows]
            plain[path] = of_rows.set(vectors if module == OF_EMBEDDING else vectors.T)
    return plain


def vectors_fit(vectors: Mapping[str, Any], leaves: Mapping[str, Any]) -> bool:
    """Whether vectors and tokens of a file fit the tables of a model, whose leaves are `leaves` by path."""

    def fits(module: str) -> bool:
        held, rows = vectors.get(f"{module}/vectors"), vectors.get(f"{module}/tokens")
        table = leaves.get(TABLES[module])
        if held is None or rows is None or table is None:
            return held is None and rows is None
        count, width = table.shape if module == OF_EMBEDDING else table.shape[::-1]
        if not jnp.issubdtype(rows.dtype, jnp.integer) or not held.shape == (rows.size, width) == (*rows.shape, width):
            return False
        return bool(((rows >= 0) & (rows < count)).all())

    return all(map(fits, TABLES))
