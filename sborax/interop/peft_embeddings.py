"""Embedding and head of the base in PEFT's files: `save_embedding_layers` of its `save_pretrained`.

PEFT stores them beside an adapter if it is asked to, if one of them is adapted, and if the vocabulary was resized. Here
they are read into `params`.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sborax.adapters.core import SboraxError
from sborax.adapters.tables import TABLE
from sborax.interop.peft_file import Tensors
from sborax.interop.peft_layout import EMBEDDING, HEAD, PREFIX, HFLayout, tensor_in, wide
from sborax.interop.peft_tokens import DELTA

BARE, OF_ADAPTER, OF_ROWS = "weight", "base_layer.weight", "token_adapter.base_layer.weight"
"""Names of the base's weight behind the module's: of a module as it is, of one with an adapter, or with rows."""
AXES = {EMBEDDING: {"lora_embedding_A": 1}, HEAD: {"lora_B.weight": 0}}
"""The axis of tokens in tensors of an adapter, by the name behind the module's."""


class Repeated(NamedTuple):
    """Tensors that PEFT keeps beside a module of `modules_to_save`, or for a tied head, and does not need.

    - copies: `{name of the copy: name of the original}`.
    - unused: names of tensors that do not change the function.
    """

    copies: dict[str, str]
    unused: frozenset[str]


def check_size(tensors: Tensors, layout: HFLayout) -> None:
    """Raise SboraxError for a file of a model with another number of tokens."""
    if TABLE not in layout.leaves:
        return
    count, features = layout.leaves[TABLE].shape
    for module, axes in AXES.items():
        for suffix, axis in {BARE: 0, OF_ADAPTER: 0, OF_ROWS: 0, **axes}.items():
            name = f"{PREFIX}{module}.{suffix}"
            shape = tensors.shape(name) if name in tensors.names else ()
            # Another width is that of another model.
            if len(shape) == 2 and shape[axis] != count and (suffix in axes or shape[1] == features):
                raise SboraxError(
                    f"{name} is of a vocabulary of {shape[axis]:,}, and this model has {count:,} tokens; give "
                    f"sx.resize_vocabulary(model, {shape[axis]})"
                )


def stored_layers(
    names: Iterable[str], layout: HFLayout, saved: Collection[str], form: Collection[str]
) -> dict[str, str]:
    """Embedding and head of the base in a file, as `{name behind the prefix: Hugging Face's name}`.

    Args:
    - names: of all tensors in the file.
    - saved: the modules of `modules_to_save`, of which the file has the trained weights.
    - form: those of `BARE`, `OF_ADAPTER` and `OF_ROWS` to look for.
    """
    all_names, layers = set(names), {}
    for module in (EMBEDDING, HEAD):
        suffix, table = _base_name(module, all_names, layout), _table(module, layout)
        stored = suffix in form and f"{PREFIX}{module}.{suffix}" in all_names
        if stored and table not in saved and f"{table}.weight" in layout.slots:
            layers[f"{module}.{suffix}"] = f"{table}.weight"
    return layers


def repeated(names: Collection[str], layout: HFLayout, saved: Collection[str]) -> Repeated:
    """What a file repeats of both modules. The arguments are those of `stored_layers`."""
    copies, unused = {}, set()
    for module in (EMBEDDING, HEAD):
        table = _table(module, layout)
        if table in saved:
            copies[f"{PREFIX}{module}.modules_to_save.weight"] = f"{PREFIX}{table}.weight"
            unused.add(f"{PREFIX}{module}.original_module.weight")
        if table != module:
            copies[f"{PREFIX}{module}.token_adapter.{DELTA}"] = f"{PREFIX}{table}.token_adapter.{DELTA}"
    return Repeated(
        {copy: name for copy, name in copies.items() if copy in names and name in names}, frozenset(unused & set(names))
    )


def written_layers(names: Iterable[str], layout: HFLayout, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of embedding and head for a file that has the tensors `names`, by their names there.

    - leaves: of the base as PEFT has it, by our path.
    """
    all_names, layers = set(names), {}
    for module in (EMBEDDING, HEAD):
        name = f"{_table(module, layout)}.weight"
        if f"{PREFIX}{module}.weight" not in all_names:
            leaf = np.asarray(wide(tensor_in(layout, leaves, name)))
            table = leaf.T if layout.slots[name].transposed else leaf
            layers[f"{PREFIX}{module}.{_base_name(module, all_names, layout)}"] = np.ascontiguousarray(table)
    return layers


def _table(module: str, layout: HFLayout) -> str:
    """The module whose weight this one has: a tied head has that of the embedding."""
    return EMBEDDING if layout.tied else module


def _base_name(module: str, names: Collection[str], layout: HFLayout) -> str:
    """What PEFT calls the base's weight behind the module's name, in a file with these tensors."""

    def parts(module: str) -> set[str]:
        head = f"{PREFIX}{module}."
        suffixes = {name.removeprefix(head) for name in names if name.startswith(head)}
        return suffixes - {BARE, OF_ADAPTER, OF_ROWS}

    siblings = parts(module)
    rows = f"token_adapter.{DELTA}"
    if rows in siblings or (not siblings and rows in parts(_table(module, layout))):
        return OF_ROWS
    return OF_ADAPTER if siblings else BARE
