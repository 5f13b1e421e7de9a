"""What happens between the steps of a run: chains, boosting, budgets, pruning."""

from sborax.procedures.adalora import AdaLoRABudget
from sborax.procedures.boost import XGBLoRA
from sborax.procedures.chain import COLA
from sborax.procedures.prilora import PRILoRAPruning
from sborax.procedures.procedure import AbstractProcedure, Boundary, Run
from sborax.procedures.prune import LoRAPrune

__all__ = ["COLA", "AbstractProcedure", "AdaLoRABudget", "Boundary", "LoRAPrune", "PRILoRAPruning", "Run", "XGBLoRA"]
