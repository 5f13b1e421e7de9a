"""Hugging Face's module and tensor names for the leaves of our parameter tree."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from sborax.adapters.core import AbstractWeight
from sborax.adapters.leaves import flatten
from sborax.models.names import TABLE, hf_module, row, unlayered

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TYING = "ensure_weight_tying"
"""The config field that makes PEFT's LoRA keep a head tied to an embedding in `modules_to_save`."""
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
    """How many layers each kernel stacks, by our path; None for a kernel without a stack."""

    @property
    def linear(self) -> list[str]:
        """Every module that can be adapted."""
        return [name.removesuffix(".weight") for name, slot in self.slots.items() if slot.path.endswith("/kernel")]

    @property
    def modules(self) -> list[str]:
        """Every module that has a tensor."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.slots))

    def numbers(self, modules: Iterable[str]) -> dict[str, int]:
        """The position of each of these modules in transformers' model, among them."""
        kinds = {entry.hf: kind for kind, entry in enumerate(TABLE)}

        def place(module: str) -> tuple[int, int]:
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
        """(in, out) of one layer of a kernel."""
        fan_in, fan_out = self.leaves[path].shape[-2:]
        return fan_in, fan_out

    def module(self, path: str, layer: int | None) -> str:
        """Hugging Face's module for one layer of a kernel."""
        return hf_module(path, layer)


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


def tied_copies(layout: HFLayout, stored: Iterable[str]) -> dict[str, str]:
    """Tensors that PEFT's file holds twice, as `{name of the copy: name of the original}`.

    Where the head is tied to the embedding and the embedding is in `modules_to_save`, PEFT stores it for the head, too.

    stored: the modules in `modules_to_save`.
    """
    return {f"{HEAD}.weight": f"{EMBEDDING}.weight"} if layout.tied and EMBEDDING in set(stored) else {}
