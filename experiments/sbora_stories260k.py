# SBORAX_MODELS=models SBORAX_DATA=data sborax train experiments/sbora_stories260k.py
"""SBoRA-FA on a model of 260 thousand parameters and Shakespeare: the quickest run there is, for trying things out."""

import sborax as sx
from sborax.data.options import Data
from sborax.train.experiment import Experiment, Optimizer


def experiment() -> Experiment:
    """All linear layers, windows of 128 tokens."""
    return Experiment(
        model="stories260k",
        rules=(sx.Rule("self_attn|mlp", sx.SBoRA(rank=16)),),
        data=Data("tinyshakespeare", template="text", overlong="split", max_length=128),
        optimizer=Optimizer(lr=3e-3, schedule="cosine"),
        steps=60,
        batch_size=8,
    )
