"""Vectors of chosen tokens, which are trained in place of a whole table: the embedding, or a head that is not tied.

They are leaves beside the table, with the tokens that they belong to:

    embed_tokens/vectors   (n, d), the vectors
    embed_tokens/tokens    (n,) int32, the rows of the table `embed_tokens/embedding` in which they stand
    lm_head/vectors        (m, d), those of the head
    lm_head/tokens         (m,) int32, the columns of the kernel `lm_head/kernel` in which they stand
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sborax.adapters.core import AbstractWeight, SboraxError
from sborax.adapters.tables import HEAD, LOOKUP, TABLE


class Table(NamedTuple):
    """A table of token vectors.

    - path: of the leaf.
    - axis: that of the tokens.
    - adapted: the paths at which it may have an adapter.
    """

    path: str
    axis: int
    adapted: tuple[str, ...]

    def at(self, tokens: Int[Array, " n"]) -> tuple[Any, ...]:
        """The index of the vectors of `tokens`."""
        return (slice(None),) * self.axis + (tokens,)


OF_EMBEDDING, OF_HEAD = "embed_tokens", "lm_head"
TABLES = {OF_EMBEDDING: Table(TABLE, 0, (TABLE, LOOKUP)), OF_HEAD: Table(HEAD, 1, (HEAD,))}
"""The tables whose vectors may be trained, by their modules."""
VECTORS = {f"{module}/vectors": table.path for module, table in TABLES.items()}
"""The path of the table that vectors belong to, by the path of the vectors."""
TOKENS = {f"{module}/tokens": table.path for module, table in TABLES.items()}
"""The path of the table that tokens belong to, by the path of the tokens."""

Chosen = Sequence[int] | Mapping[str, Sequence[int]]
"""Tokens of the embedding, or of each module in `TABLES`."""


def by_module(tokens: Chosen) -> dict[str, tuple[int, ...]]:
    """The tokens of each module. Modules without tokens are left out.

    Raises SboraxError for another module, and unless the tokens of each are distinct.
    """
    ids_by_module = tokens if isinstance(tokens, Mapping) else {OF_EMBEDDING: tokens}
    for module, ids in ids_by_module.items():
        if module not in TABLES:
            raise SboraxError(f"train_tokens: there are vectors of {' and '.join(TABLES)}, not of {str(module)[:40]!r}")
        distinct = isinstance(ids, Sequence) and all(type(token) is int and token >= 0 for token in ids)
        if not distinct or len(set(ids)) < len(ids):
            raise SboraxError(f"train_tokens: expected distinct ids of tokens, got {str(ids)[:60]}")
    return {module: tuple(ids) for module, ids in ids_by_module.items() if ids}


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
        table = TABLES[module]
        leaf = leaves.get(table.path)
        if leaf is None:
            tied = module == OF_HEAD and TABLE in leaves
            why = ": it is tied to the embedding, whose vectors it shares; leave it out" if tied else ""
            raise SboraxError(f"train_tokens: the model has no {module}{why}")
        if isinstance(leaf, AbstractWeight):
            raise SboraxError(f"train_tokens: {table.path} is quantised, and cannot be trained itself")
        adapter_path = next((path for path in table.adapted if path in adapted), None)
        if adapter_path is not None:
            raise SboraxError(f"train_tokens: {adapter_path} has an adapter, too; leave one of the two out")
        count = leaf.shape[table.axis]
        unknown = next((token for token in ids if token >= count), None)
        if unknown is not None:
            raise SboraxError(
                f"train_tokens: the model has the tokens 0..{count - 1}, and not {unknown}; enlarge its vocabulary by "
                "sx.resize_vocabulary, save it with sx.save_hf, and train that model"
            )
        rows = jnp.asarray(ids, jnp.int32)
        vectors[f"{module}/vectors"] = jnp.moveaxis(leaf[table.at(rows)], table.axis, 0).astype(jnp.float32)
        places[f"{module}/tokens"] = rows
    return vectors, places


def with_vectors(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`leaves` by path, with trained vectors, if there are any, in their tables in place of beside them."""
    plain = {path: leaf for path, leaf in leaves.items() if path not in VECTORS and path not in TOKENS}
    for module, table in TABLES.items():
        if f"{module}/vectors" in leaves:
            leaf, vectors = plain[table.path], jnp.moveaxis(leaves[f"{module}/vectors"], 0, table.axis)
            plain[table.path] = leaf.at[table.at(leaves[f"{module}/tokens"])].set(vectors.astype(leaf.dtype))
    return plain


def vectors_fit(vectors: Mapping[str, Any], leaves: Mapping[str, Any]) -> bool:
    """Whether vectors and tokens of a file fit the tables of a model, whose leaves are `leaves` by path."""

    def fits(module: str) -> bool:
        array, rows = vectors.get(f"{module}/vectors"), vectors.get(f"{module}/tokens")
        table = TABLES[module]
        leaf = leaves.get(table.path)
        if array is None or rows is None or leaf is None:
            return array is None and rows is None
        count, width = leaf.shape[table.axis], leaf.shape[1 - table.axis]
        if not jnp.issubdtype(rows.dtype, jnp.integer) or not array.shape == (rows.size, width) == (*rows.shape, width):
            return False
        return bool(((rows >= 0) & (rows < count)).all())

    return all(map(fits, TABLES))
