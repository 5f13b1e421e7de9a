# SBORAX_DATA=data sborax train experiments/sbora_smollm2.py --out runs/sbora_smollm2
"""SBoRA-FA on SmolLM2-135M and BoolQ: all linear layers, rank 64, alpha = 2 rank as in the paper (arXiv:2407.05413)."""

import sborax as sx


def experiment() -> sx.Experiment:
    """The data have LLM-Adapters' columns (instruction, output). The loss is on answers only."""
    return sx.Experiment(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        rules=[("self_attn|mlp", sx.SBoRA(rank=64, alpha=128.0, variant="FA"))],
        data=sx.Data("boolq/train.json", template="alpaca", max_length=256),
        eval=sx.Eval(data=sx.Data("boolq/test.json", template="alpaca", max_length=256, limit=200)),
        optimizer=sx.Optimizer(lr=1e-3, schedule="cosine", warmup=0.03),
        steps=500,
        batch_size=8,
    )
