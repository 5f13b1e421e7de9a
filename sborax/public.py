"""The public names of sborax, as attributes of the package."""

import importlib
from typing import TYPE_CHECKING, Any

from sborax import methods
from sborax.adapters.arrow import arrow
from sborax.adapters.combination import Combination
from sborax.adapters.compose import chain
from sborax.adapters.core import Adapter, Context, Hint, SboraxError, linear
from sborax.adapters.experts import combine_experts, remove_expert
from sborax.adapters.hints import gradient_hints
from sborax.adapters.paths import Plan, Rule, plan
from sborax.adapters.ranks import LinearRanks, ShuffledRanks, SingularMass
from sborax.adapters.tree import (
    add,
    attach,
    combine,
    count,
    labels,
    link,
    merge,
    rebase,
    scale,
    specs,
    split,
    trainable,
    value_and_grad,
)
from sborax.adapters.weighted import Weighted, merge_weighted, unmerge
from sborax.data.options import Data
from sborax.methods import *  # noqa: F403
from sborax.methods.activated import Activated
from sborax.optim import lora_fa, lora_plus, lora_rite, split_lora_fa
from sborax.procedures import COLA, AdaLoRABudget, LoRAPrune, PRILoRAPruning, XGBLoRA
from sborax.sweep.grid import Sweep
from sborax.train.experiment import Eval, Experiment, Save, load_experiment
from sborax.train.kasa_loss import KaSALoss
from sborax.train.loss import AbstractLoss, CrossEntropy
from sborax.train.monteclora_loss import MonteCLoRALoss
from sborax.train.optimizer import AbstractOptimizer
from sborax.train.optimizers import (
    SGD,
    AbstractScheduled,
    Adafactor,
    Adam,
    AdamW,
    Lion,
    LoRAFA,
    LoRARITE,
    Optimizer,
)

if TYPE_CHECKING:
    from sborax.data.batches import Batches
    from sborax.interop.peft import load_peft, save_peft
    from sborax.interop.weighted_lora import weighted_lora
    from sborax.layout.sharding import Layout
    from sborax.models import generate, load_model, save_hf
    from sborax.models.linen import apply_linen
    from sborax.models.nnx import Trained, adapt_nnx, adapters_nnx
    from sborax.models.replication import replicate_layers
    from sborax.models.vocabulary import resize_vocabulary
    from sborax.records.adapter import load_adapter, save_adapter
    from sborax.records.checkpoint import open_checkpoints
    from sborax.train.inputs import input_hints
    from sborax.train.outputs import Outputs
    from sborax.train.prepare import Prepared, prepare
    from sborax.train.read import read_data, read_held_out, read_model
    from sborax.train.step import forward_backward, make_loss, make_step

# Imported on first use: methods and verbs need JAX alone, and Flax, transformers and orbax take seconds to import.
_LATER = {
    "Batches": "sborax.data.batches",
    "Layout": "sborax.layout.sharding",
    "Outputs": "sborax.train.outputs",
    "Prepared": "sborax.train.prepare",
    "Trained": "sborax.models.nnx",
    "adapt_nnx": "sborax.models.nnx",
    "adapters_nnx": "sborax.models.nnx",
    "apply_linen": "sborax.models.linen",
    "forward_backward": "sborax.train.step",
    "make_loss": "sborax.train.step",
    "make_step": "sborax.train.step",
    "open_checkpoints": "sborax.records.checkpoint",
    "prepare": "sborax.train.prepare",
    "read_data": "sborax.train.read",
    "read_held_out": "sborax.train.read",
    "read_model": "sborax.train.read",
    "input_hints": "sborax.train.inputs",
    "generate": "sborax.models",
    "load_adapter": "sborax.records.adapter",
    "load_model": "sborax.models",
    "load_peft": "sborax.interop.peft",
    "replicate_layers": "sborax.models.replication",
    "resize_vocabulary": "sborax.models.vocabulary",
    "save_adapter": "sborax.records.adapter",
    "save_hf": "sborax.models",
    "save_peft": "sborax.interop.peft",
    "weighted_lora": "sborax.interop.weighted_lora",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'sborax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "AbstractLoss",
    "Batches",
    "CrossEntropy",
    "KaSALoss",
    "MonteCLoRALoss",
    "Layout",
    "Outputs",
    "Prepared",
    "forward_backward",
    "make_loss",
    "make_step",
    "open_checkpoints",
    "prepare",
    "read_data",
    "read_held_out",
    "read_model",
    "AbstractOptimizer",
    "AbstractScheduled",
    "Activated",
    "AdaLoRABudget",
    "Adafactor",
    "Adam",
    "AdamW",
    "Adapter",
    "COLA",
    "Combination",
    "Context",
    "Data",
    "Eval",
    "Experiment",
    "Hint",
    "LinearRanks",
    "Lion",
    "LoRAFA",
    "LoRAPrune",
    "LoRARITE",
    "Optimizer",
    "PRILoRAPruning",
    "Plan",
    "Rule",
    "SGD",
    "Save",
    "SboraxError",
    "ShuffledRanks",
    "SingularMass",
    "Sweep",
    "Weighted",
    "XGBLoRA",
    "add",
    "apply_linen",
    "arrow",
    "Trained",
    "adapt_nnx",
    "adapters_nnx",
    "attach",
    "chain",
    "combine",
    "combine_experts",
    "count",
    "generate",
    "gradient_hints",
    "input_hints",
    "labels",
    "linear",
    "link",
    "load_adapter",
    "load_experiment",
    "load_model",
    "load_peft",
    "lora_fa",
    "lora_plus",
    "lora_rite",
    "merge",
    "merge_weighted",
    "plan",
    "rebase",
    "remove_expert",
    "replicate_layers",
    "resize_vocabulary",
    "save_adapter",
    "save_hf",
    "save_peft",
    "scale",
    "specs",
    "split",
    "split_lora_fa",
    "trainable",
    "unmerge",
    "value_and_grad",
    "weighted_lora",
    *methods.__all__,
]
