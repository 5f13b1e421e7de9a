"""Procedures act between the steps of a run: chains, boosting, budgets, pruning."""

from sborax.procedures.adalora import AdaLoRABudget
from sborax.procedures.boost import XGBLoRA
from sborax.procedures.chain import COLA
from sborax.procedures.in_place import AbstractInPlace
from sborax.procedures.prilora import PRILoRAPruning
from sborax.procedures.procedure import AbstractProcedure, Boundary, Run
from sborax.procedures.prune import LoRAPrune
from sborax.procedures.segment import AbstractSegmented

__all__ = [
    "COLA",
    "AbstractInPlace",
    "AbstractProcedure",
    "AbstractSegmented",
    "AdaLoRABudget",
    "Boundary",
    "LoRAPrune",
    "PRILoRAPruning",
    "Run",
    "XGBLoRA",
]
