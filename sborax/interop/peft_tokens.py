"""Rows of an embedding or a head in PEFT's files: `trainable_token_indices` beside an adapter, and `TRAINABLE_TOKENS`.

A row is the vector of a token. PEFT keeps the chosen rows as they are after training, and puts them into the base's
table whenever it is read. Here they are in the table itself, in `params`. A tied head has the rows of the embedding.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sborax.adapters.core import AbstractWeight, SboraxError
from sborax.interop.peft_layout import EMBEDDING, HEAD, PREFIX, HFLayout, tensor_in, wide

TOKENS = "trainable_token_indices"
"""The config field, of a kind that adapts other modules."""
DELTA = "trainable_tokens_delta"
LARGEST_SHARE = 0.5
"""A table of which more rows were trained is written as a whole. PEFT keeps every index in the config."""

Rows = Mapping[str, list[int]]
"""The numbers of trained rows, by module."""


class TrainedRows(NamedTuple):
    """Trained rows in the form of a file.

    - config: config fields.
    - tensors: by their names in the file.
    - paths: of the leaves whose change they hold.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    paths: frozenset[str]


def checked_indices(value: Any, field: str, count: int) -> list[int]:
    """`value`, the rows of a table of `count` rows. Raises SboraxError unless they are distinct and inside it."""
    valid = isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)
    if not valid or not value or len(set(value)) != len(value):
        raise SboraxError(f"{field}: expected distinct tokens in 0..{count - 1}, got {str(value)[:60]}")
    if max(value) >= count:
        raise SboraxError(
            f"{field}: there is token {str(max(value))[:20]}, and this model has {count:,} tokens; give "
            "sx.resize_vocabulary(model, n) with as many tokens as the adapter's base had"
        )
    return value


def with_rows(
    table: Float[np.ndarray, "vocab d"], indices: list[int], rows: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "vocab d"]:
    """A copy of `table` with other rows at `indices`."""
    table = table.copy()
    table[indices] = rows
    return table


def changed_rows(after: Float[np.ndarray, "vocab d"], before: Float[np.ndarray, "vocab d"]) -> Int[np.ndarray, " n"]:
    """The numbers of the rows that differ, in ascending order."""
    return np.flatnonzero((after != before).any(axis=1))


def rows_in(config: Mapping[str, Any], layout: HFLayout, adapted: Collection[str], saved: Collection[str]) -> Rows:
    """The rows that a file has beside an adapter.

    Args:
    - config: the fields of `adapter_config.json`. A list of rows is of the embedding; otherwise the rows are listed by
      the endings of modules' names.
    - adapted: the adapted modules.
    - saved: the modules of `modules_to_save`.

    Raises SboraxError for rows that PEFT does not train, and for those that `params` cannot hold.
    """
    value = config.get(TOKENS)
    if value is None:
        return {}
    rows: dict[str, list[int]] = {}
    for name, indices in value.items() if isinstance(value, dict) else [(EMBEDDING, value)]:
        modules = [module for module in layout.torch_modules if module.endswith(name)]
        if not modules:
            raise SboraxError(f"{TOKENS}: this model has no module {name[:60]!r}")
        for module in modules:
            if module in rows:
                raise SboraxError(f"{TOKENS} has the rows of {module} twice")
            rows[module] = indices
    if layout.tied and HEAD in rows:
        if rows[HEAD] != rows.get(EMBEDDING):
            raise SboraxError(
                f"{TOKENS}: the rows of {HEAD} are not those of the embedding, to which the head is tied here; merge "
                "the adapter in PEFT and load the model that it saves"
            )
        del rows[HEAD]
    for module, indices in rows.items():
        _check_module(module, layout, adapted, saved)
        checked_indices(indices, TOKENS, _table(layout, layout.leaves, module).shape[0])
    return rows


def _check_module(module: str, layout: HFLayout, adapted: Collection[str], saved: Collection[str]) -> None:
    """Raise SboraxError unless PEFT changes rows of the module, and `params` can hold them."""
    slot = layout.slots.get(f"{module}.weight")
    leaf = None if slot is None else layout.leaves[slot.path]
    if slot is None or tensor_in(layout, layout.leaves, f"{module}.weight").ndim != 2:
        why = "it is no embedding and no projection"
    elif module in adapted:
        why = "it has an adapter, beside which PEFT trains no rows"
    elif module in saved:
        why = "it is in modules_to_save, beside which PEFT trains no rows"
    elif f"{module}.bias" in layout.slots:
        why = "PEFT drops its bias; merge the adapter there and load the model that it saves"
    elif isinstance(leaf, AbstractWeight):
        why = "it is quantised in this model; load the model unquantised"
    else:
        return
    raise SboraxError(f"{TOKENS} of {module}: {why}")


def row_shapes(rows: Rows, layout: HFLayout) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name in the file."""
    return {
        _key(module): (len(indices), _table(layout, layout.leaves, module).shape[1]) for module, indices in rows.items()
    }


def tables_with_rows(rows: Rows, layout: HFLayout, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's tensors after the change, by name. read: gives a tensor of the file."""
    return {
        f"{module}.weight": with_rows(_table(layout, layout.leaves, module), indices, read(_key(module)))
        for module, indices in rows.items()
    }


def trained_rows(
    layout: HFLayout, leaves: Mapping[str, Any], changed: Collection[str], adapted: Collection[str]
) -> TrainedRows:
    """What a file has of an embedding and a head of which some rows were trained, at most `LARGEST_SHARE` of them.

    Args:
    - leaves: every leaf, by our path.
    - changed: paths of the leaves that were trained.
    - adapted: the adapted modules.
    """
    indices: dict[str, list[int]] = {}
    tensors: dict[str, np.ndarray] = {}
    paths: set[str] = set()
    for module in (EMBEDDING, HEAD):
        slot = layout.slots.get(f"{module}.weight")
        if slot is None or slot.path not in changed or module in adapted or f"{module}.bias" in layout.slots:
            continue
        final, initial = (_table(layout, source, module) for source in (leaves, layout.leaves))
        trained = changed_rows(final, initial)
        if len(trained) <= LARGEST_SHARE * len(initial):
            indices[module.rpartition(".")[2]] = trained.tolist()
            tensors[_key(module)] = np.ascontiguousarray(final[trained])
            paths.add(slot.path)
    short = EMBEDDING.rpartition(".")[2]
    value = indices[short] if indices.keys() == {short} else indices
    return TrainedRows({TOKENS: value} if indices else {}, tensors, frozenset(paths))


def _key(module: str) -> str:
    return f"{PREFIX}{module}.token_adapter.{DELTA}"


def _table(layout: HFLayout, leaves: Mapping[str, Any], module: str) -> np.ndarray:
    """The weight of a module, with a row for each output or token, float32. leaves: by our path."""
    name = f"{module}.weight"
    leaf = np.asarray(wide(tensor_in(layout, leaves, name)))
    return leaf.T if layout.slots[name].transposed else leaf
