# SBORAX_DATA=data sborax train experiments/lora_smollm2.py --out runs/lora_smollm2
"""LoRA on SmolLM2-135M and BoolQ: all linear layers, rank 16; the baseline for `sbora_smollm2.py`."""

import sborax as sx


def experiment() -> sx.Experiment:
    """Like `sbora_smollm2.py`, except for the method and LoRA's usual learning rate."""
    return sx.Experiment(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        rules=[("self_attn|mlp", sx.LoRA(rank=16, alpha=32.0))],
        data=sx.Data("boolq/train.json", template="alpaca", max_length=256),
        eval=sx.Eval(data=sx.Data("boolq/test.json", template="alpaca", max_length=256, limit=200)),
        optimizer=sx.Optimizer(lr=2e-4, schedule="cosine", warmup=0.03),
        steps=500,
        batch_size=8,
    )
