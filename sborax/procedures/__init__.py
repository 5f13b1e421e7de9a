"""What happens between the steps of a run: chains, boosting, pruning."""

from sborax.procedures.boost import XGBLoRA
from sborax.procedures.chain import COLA
from sborax.procedures.procedure import AbstractProcedure, Boundary, Run
from sborax.procedures.prune import LoRAPrune

__all__ = ["COLA", "AbstractProcedure", "Boundary", "LoRAPrune", "Run", "XGBLoRA"]
