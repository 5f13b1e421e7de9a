"""sborax: parameter-efficient fine-tuning in JAX. Adapters are pure transforms over Flax parameter trees."""

from sborax.compose import chain
from sborax.core import Adapter, Context, Hint, SboraxError, linear
from sborax.data.options import Data
from sborax.methods import SARA, Bat, Bone, DoRA, LoRA, MoSARA, OLoRA, PiSSA, SBoRA
from sborax.paths import Plan, Rule, plan
from sborax.ranks import LinearRanks, ShuffledRanks, SingularMass
from sborax.train.experiment import Eval, Experiment, Optimizer, Save, load_experiment
from sborax.tree import (
    add,
    attach,
    combine,
    count,
    labels,
    merge,
    scale,
    specs,
    split,
    trainable,
    value_and_grad,
)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Bat",
    "Bone",
    "Context",
    "Data",
    "DoRA",
    "Eval",
    "Experiment",
    "Hint",
    "LinearRanks",
    "LoRA",
    "MoSARA",
    "OLoRA",
    "Optimizer",
    "PiSSA",
    "Plan",
    "Rule",
    "SARA",
    "SBoRA",
    "ShuffledRanks",
    "SingularMass",
    "Save",
    "SboraxError",
    "add",
    "attach",
    "chain",
    "combine",
    "count",
    "labels",
    "linear",
    "load_experiment",
    "merge",
    "plan",
    "scale",
    "specs",
    "split",
    "trainable",
    "value_and_grad",
]
