# SBORAX_DATA=data sborax train experiments/xgblora/mmlu.py --mesh fsdp=16 --out runs/xgblora_mmlu
"""XGBLoRA (arXiv:2410.19694): MMLU after Alpaca-GPT4, LLaMA-3-8B.

Boosters of rank 1 on 11 random layers of 32, the best of the paper's Table 6. No value of its tables could be read and
no code was found, so no number stands here. `experiment()` is XGBLoRA with boosters of 8 steps.
"""

import sborax as sx
from sborax.cli.recipes import Row, method_change

SCORED = "mmlu"


def experiment() -> sx.Experiment:
    """Boosters of rank 1 on q and v of 11 layers of LLaMA-3-8B."""
    return sx.Experiment(
        model="meta-llama/Meta-Llama-3-8B",
        data=sx.Data("alpaca_gpt4/train.json", template="alpaca", max_length=512, overlong="truncate"),
        rules=((r"self_attn/(q|v)_proj", sx.LoRA(rank=1)),),
        optimizer=sx.Optimizer(lr=2e-4, schedule="linear"),
        steps=3_000,
        batch_size=16,
        precision="bfloat16",
        procedure=sx.XGBLoRA(every=8, layers=11),
    )


TABLE = "unknown: the paper's table could not be read"
LORA = (method_change(sx.LoRA(rank=8, alpha=16.0)), "procedure=null")
PUBLISHED = (
    Row("LLaMA-3-8B, XGBLoRA, rank 1, 11 layers", {}, "", note=TABLE),
    Row("LLaMA-3-8B, LoRA, rank 8", {}, "", changes=LORA, note=TABLE),
)
UNKNOWN = (
    'Steps of a booster, learning rate, targets, batch and length: the paper says that they "follow LoRA". 8 steps, '
    "2e-4, q and v, 16 and 3,000 steps are our choice; procedure.every=1, 4, 16 and 64 are worth a run each.",
    "Penalty of the factors' norms in the loss: 0.",
)
NEEDS = (
    "Alpaca-GPT4 as $SBORAX_DATA/alpaca_gpt4/train.json, in Alpaca's columns.",
    "MMLU as $SBORAX_DATA/mmlu/dev.jsonl and test.jsonl.",
    "meta-llama/Meta-Llama-3-8B is gated.",
)
