"""Where Hugging Face keeps what our parameter tree holds."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from sborax.adapters.core import AbstractWeight
from sborax.adapters.leaves import flatten
from sborax.models.names import hf_module, row, unlayered

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TYING = "ensure_weight_tying"
"""The config field by which PEFT's LoRA keeps a head tied to an embedding that is stored whole."""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Slot(NamedTuple):
    """One of Hugging Face's tensors: the leaf that holds it, and its layer if the leaf stacks them."""

    path: str
    layer: int | None
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parameter tree seen from Hugging Face's side."""

    leaves: dict[str, Any]
    """Every leaf by our path."""
    slots: dict[str, Slot]
    """Every tensor by Hugging Face's name."""
    depths: dict[str, int | None]
    """How many layers each kernel stacks; None for one that stacks none."""

    @property
    def linear(self) -> list[str]:
        """The modules that may be adapted."""
        return [name.removesuffix(".weight") for name, slot in self.slots.items() if slot.path.endswith("/kernel")]

    @property
    def modules(self) -> list[str]:
        """Every module that has a tensor."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.slots))

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return "lm_head.weight" not in self.slots

    def kernel(self, path: str, layer: int | None) -> Any:
        """One layer's (in, out) kernel, dense or not."""
        leaf = self.leaves[path]
        return leaf if layer is None else jax.tree.map(lambda part: part[layer], leaf)

    def shape(self, path: str) -> tuple[int, int]:
        """(in, out) of one layer of a kernel."""
        fan_in, fan_out = self.leaves[path].shape[-2:]
        return fan_in, fan_out

    def module(self, path: str, layer: int | None) -> str:
        """Hugging Face's module for a layer of one of our kernels."""
        return hf_module(path, layer)


def layout_of(params: Any) -> Layout:
    """The layout of a parameter tree of ours. Raises SboraxError for a leaf that the model's table does not name."""
    leaves, slots, depths = flatten(params), {}, {}
    for path, leaf in leaves.items():
        entry, number = row(path), unlayered(path)[1]
        stacked = "{layer}" in entry.hf and number is None
        if path.endswith("/kernel"):
            depths[path] = leaf.shape[0] if stacked else None
        for layer in range(leaf.shape[0]) if stacked else [None]:
            name = entry.hf.format(layer=number if layer is None else layer)
            slots[name] = Slot(path, layer, entry.transposed)
    return Layout(leaves, slots, depths)


def same(one: Any, other: Any) -> bool:
    """Whether two leaves hold the same values. Quantised ones are taken to stand for the dense one they came from."""
    if one is other or isinstance(one, AbstractWeight) or isinstance(other, AbstractWeight):
        return True
    return bool(one.shape == other.shape and (one == other).all())


def wide(weight: Any) -> Array:
    """A weight, or any other parameter, as a dense float32 array."""
    return (weight.dense() if isinstance(weight, AbstractWeight) else weight).astype("float32")


def tied_copies(layout: Layout, whole: Iterable[str]) -> dict[str, str]:
    """What PEFT stores beside the embedding if that is among the modules stored `whole` and the head is tied to it: a
    copy for the head, by the name of its tensor, and the name of the one it copies."""
    return {f"{HEAD}.weight": f"{EMBEDDING}.weight"} if layout.tied and EMBEDDING in set(whole) else {}
