"""Optimisers that treat a and b differently: optax transformations over the trained halves of adapters."""

from sborax.optim.lora_fa import lora_fa, project_lora_fa, split_lora_fa
from sborax.optim.lora_plus import groups, lora_plus
from sborax.optim.lora_rite import LoRARiteState, balance_pairs, lora_rite, scale_by_lora_rite

__all__ = [
    "LoRARiteState",
    "balance_pairs",
    "groups",
    "lora_fa",
    "lora_plus",
    "lora_rite",
    "project_lora_fa",
    "scale_by_lora_rite",
    "split_lora_fa",
]
