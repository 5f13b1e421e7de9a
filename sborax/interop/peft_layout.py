"""Hugging Face's module and tensor names for the leaves of our parameter tree."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from sborax.adapters import tables
from sborax.adapters.core import AbstractWeight
from sborax.adapters.leaves import flatten
from sborax.adapters.tables import TABLE, leaf_of
from sborax.models import names
from sborax.models.names import hf_module, row, unlayered

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TYING = "ensure_weight_tying"
"""The config field that makes PEFT's LoRA keep a head tied to an embedding that is adapted or in `modules_to_save`."""
TIED_FACTORS = {
    f"{HEAD}.lora_A.weight": f"{EMBEDDING}.lora_embedding_B",
    f"{HEAD}.lora_B.weight": f"{EMBEDDING}.lora_embedding_A",
}
"""The tensors of a head that shares the embedding's adapter, and those of which they are the transposes."""
PREFIX, ROOT = "base_model.model.", "base_model."
"""Prefixes in PEFT's files: of a module's tensors, and of tensors that all modules share."""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Slot(NamedTuple):
    """The place of one of Hugging Face's tensors in our tree.

    - path: the leaf that holds it.
    - layer: its position, if the leaf stacks layers.
    - transposed: whether ours is the transpose.
    """

    path: str
    layer: int | None
    transposed: bool


@dataclasses.dataclass(frozen=True)
class HFLayout:
    """A parameter tree under Hugging Face's names, without experts."""

    leaves: dict[str, Any]
    """Every leaf by our path."""
    slots: dict[str, Slot]
    """The place of every tensor, by Hugging Face's name."""
    depths: dict[str, int | None]
    """How many layers each adapted weight stacks, by our adapter's path; None for a weight without a stack."""
    shared: bool = True
    """Whether a tied head has the adapter of the embedding. PEFT's `ensure_weight_tying` says so."""

    @property
    def adaptable(self) -> list[str]:
        """Every module that can be adapted."""
        slots = [name for name, slot in self.slots.items() if slot.path == TABLE or slot.path.endswith("/kernel")]
        return [name.removesuffix(".weight") for name in slots] + ([HEAD] if self.tied else [])

    def place(self, module: str) -> tuple[str, int | None]:
        """The path of a module's adapter, and its layer."""
        if self.tied and module == HEAD:
            return tables.HEAD, None
        path, layer, _ = self.slots[f"{module}.weight"]
        return (tables.LOOKUP if path == TABLE and self.tied and not self.shared else path), layer

    @property
    def modules(self) -> list[str]:
        """Every module that has a tensor."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.slots))

    @property
    def torch_modules(self) -> list[str]:
        """Every module of transformers' model that has a weight, a tied head among them."""
        return [*self.modules, *([HEAD] if self.tied else [])]

    def numbers(self, modules: Iterable[str]) -> dict[str, int]:
        """The position of each of these modules in transformers' model, among them."""
        kinds = {entry.hf: kind for kind, entry in enumerate(names.TABLE)}

        def place(module: str) -> tuple[int, int]:
            if f"{module}.weight" not in self.slots:
                return len(self.slots), len(kinds)
            slot = self.slots[f"{module}.weight"]
            entry, number = row(slot.path), unlayered(slot.path)[1]
            layer = number if slot.layer is None else slot.layer
            return (len(self.slots) if layer is None else layer), kinds[entry.hf]

        return {module: number for number, module in enumerate(sorted(modules, key=place))}

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return "lm_head.weight" not in self.slots

    def kernel(self, path: str, layer: int | None) -> Any:
        """The (in, out) kernel of one layer, dense or quantised."""
        leaf = self.leaves[path]
        return leaf if layer is None else jax.tree.map(lambda part: part[layer], leaf)

    def shape(self, path: str) -> tuple[int, int]:
        """(in, out) of one layer of the weight of an adapter."""
        leaf = leaf_of(path, self.leaves)
        fan_in, fan_out = self.leaves[leaf].shape[-2:]
        return (fan_out, fan_in) if leaf != path == tables.HEAD else (fan_in, fan_out)

    def module(self, path: str, layer: int | None) -> str:
        """Hugging Face's module for one layer of the weight of an adapter."""
        return EMBEDDING if path in (TABLE, tables.LOOKUP) else hf_module(path, layer)


def layout_of(params: Any) -> HFLayout:
    """The layout of a parameter tree. Raises SboraxError for a leaf that the model's table of names lacks."""
    leaves, slots, depths = flatten(params), {}, {}
    for path, leaf in leaves.items():
        entry, number = row(path), unlayered(path)[1]
        if "{expert}" in entry.hf:
            # transformers holds the experts of a layer in one parameter, which is no module.
            continue
        stacked = "{layer}" in entry.hf and number is None
        if path.endswith("/kernel"):
            depths[path] = leaf.shape[0] if stacked else None
        for layer in range(leaf.shape[0]) if stacked else [None]:
            name = entry.hf.format(layer=number if layer is None else layer)
            slots[name] = Slot(path, layer, entry.transposed)
    depths |= dict.fromkeys(tables.tables(params))
    return HFLayout(leaves, slots, depths)


def tensor_in(layout: HFLayout, leaves: Mapping[str, Any], name: str) -> Any:
    """One of Hugging Face's tensors, by its name, of these leaves by path; a kernel as ours, (in, out)."""
    slot = layout.slots[name]
    return leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer]


def same(leaf: Any, other: Any) -> bool:
    """Whether two leaves hold the same values. A quantised leaf is taken to equal the dense one it was made from."""
    if leaf is other or isinstance(leaf, AbstractWeight) or isinstance(other, AbstractWeight):
        return True
    return bool(leaf.shape == other.shape and (leaf == other).all())


def wide(weight: Any) -> Array:
    """A weight, or any other parameter, as a dense float32 array."""
    return (weight.dense() if isinstance(weight, AbstractWeight) else weight).astype("float32")


def transposed_copies(layout: HFLayout, stored: Collection[str]) -> dict[str, str]:
    """`TIED_FACTORS` where the head shares the adapter of the embedding, with the prefix of PEFT's files; else empty.

    stored: names of tensors.
    """
    copies = {PREFIX + copy: PREFIX + name for copy, name in TIED_FACTORS.items()}
    return copies if layout.tied and layout.shared and set(stored) >= set(copies.values()) else {}


def tied_copies(layout: HFLayout, stored: Iterable[str]) -> dict[str, str]:
    """Tensors that PEFT's file holds twice, as `{name of the copy: name of the original}`.

    Where the head is tied to the embedding and the embedding is in `modules_to_save`, PEFT stores it for the head, too.

    stored: the modules in `modules_to_save`.
    """
    return {f"{HEAD}.weight": f"{EMBEDDING}.weight"} if layout.tied and EMBEDDING in set(stored) else {}
