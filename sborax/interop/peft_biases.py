"""Biases beside an adapter in PEFT's files: the base's with `bias="all"` or `"lora_only"`, and LoRA's of `lora_bias`.

The base's biases are leaves of `params` here. LoRA's own bias belongs to lora_B, and PEFT merges s times it into the
base's bias. Here this is done on reading, and the sum is written as the base's bias.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sborax.adapters.core import SboraxError
from sborax.interop.peft_layout import HFLayout, same, tensor_in
from sborax.interop.peft_row import PREFIX, Fit

BIAS, OF_LORA = "bias", "lora_bias"
STORED = r"all|\w+_only"
"""Values of `bias` with which PEFT trains and stores biases: all of the model, or those of adapted modules."""


class Biases(NamedTuple):
    """The config's `bias`, and `{name in the file: Hugging Face's name}` of the biases that go with it."""

    value: str
    names: dict[str, str]


def stored_biases(config: Mapping[str, Any], layout: HFLayout, adapted: Collection[str]) -> dict[str, str]:
    """`{name in the file: Hugging Face's name}` of the base's biases in the file. adapted: the adapted modules."""
    value = config.get(BIAS) or "none"
    if value == "none":
        return {}
    if not isinstance(value, str) or not re.fullmatch(STORED, value):
        raise SboraxError(f"option {BIAS}={str(value)[:60]} is not supported")
    return _names(value, layout, adapted)


def check_saved(config: Mapping[str, Any], layout: HFLayout, saved: Collection[str]) -> None:
    """Raise SboraxError if a module of `modules_to_save` has a bias that `bias` stores as well. saved: the modules."""
    for module in saved if (config.get(BIAS) or "none") != "none" else ():
        if f"{module}.bias" in layout.slots:
            raise SboraxError(f"{BIAS}={config[BIAS]}: {module} of modules_to_save has a bias, which comes twice then")


def _names(value: str, layout: HFLayout, adapted: Collection[str]) -> dict[str, str]:
    names = {}
    for name in layout.slots:
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and (value == "all" or module in adapted):
            names[f"{module}.base_layer.bias" if module in adapted else name] = name
    return names


def added_biases(
    config: Mapping[str, Any], layout: HFLayout, fits: Mapping[str, Fit]
) -> dict[str, tuple[str, float, tuple[int, ...]]]:
    """LoRA's own biases, by tensor: the name of the base's bias, what it is multiplied by, and the tensor's shape.

    Raises SboraxError for a module that has no bias here.
    """
    added = {}
    for module, fit in fits.items() if config.get(OF_LORA) else ():
        name = f"{module}.bias"
        if name not in layout.slots:
            raise SboraxError(f"option {OF_LORA}=True is not supported for {module}, which has no bias to add it to")
        added[f"{PREFIX}{module}.lora_B.bias"] = (
            name,
            fit.frozen["scale"],
            tensor_in(layout, layout.leaves, name).shape,
        )
    return added


def trained_biases(
    kind: str, layout: HFLayout, leaves: Mapping[str, Any], changed: Collection[str], adapted: Collection[str]
) -> Biases:
    """How PEFT stores the biases among the leaves that were trained, where its config has `bias`.

    None are stored so if a module with a bias was trained beside its bias: `modules_to_save` holds both.

    Args:
    - kind: PEFT's kind of adapter.
    - leaves: every leaf, by our path.
    - changed: paths of the leaves that were trained.
    - adapted: the adapted modules.
    """
    tuned = {
        name.rpartition(".")[0]
        for name, slot in layout.slots.items()
        if slot.path in changed
        and slot.path.endswith("/bias")
        and not same(tensor_in(layout, leaves, name), tensor_in(layout, layout.leaves, name))
    }
    beside = {
        name.rpartition(".")[0]
        for name, slot in layout.slots.items()
        if slot.path in changed and not slot.path.endswith("/bias")
    }
    if not tuned or any(f"{module}.bias" in layout.slots for module in beside):
        return Biases("none", {})
    value = f"{kind.lower()}_only" if tuned <= set(adapted) else "all"
    return Biases(value, _names(value, layout, adapted))
