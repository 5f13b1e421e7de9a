# SBORAX_MODELS=models SBORAX_DATA=data sborax train experiments/sbora_stories260k.py
"""SBoRA-FA on a model of 260 thousand parameters and Shakespeare: the fastest run, for trying things out."""

import sborax as sx


def experiment() -> sx.Experiment:
    """All linear layers, windows of 128 tokens."""
    return sx.Experiment(
        model="stories260k",
        rules=(sx.Rule("self_attn|mlp", sx.SBoRA(rank=16)),),
        data=sx.Data("tinyshakespeare", template="text", overlong="split", max_length=128),
        optimizer=sx.Optimizer(lr=3e-3, schedule="cosine"),
        steps=60,
        batch_size=8,
    )
