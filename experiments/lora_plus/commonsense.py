# SBORAX_DATA=data sborax train experiments/lora_plus/commonsense.py --mesh fsdp=16 --out runs/lora_plus_commonsense
"""LoRA+ (arXiv:2402.12354): b learns faster than a; commonsense reasoning on LLaMA-7B.

The paper's tables were not read: PEFT's documentation quotes a gain of 1 to 2 % and up to twice the speed. This recipe
is a place to test that: LoRA of `sbora/commonsense` with the ratio of PEFT's example, 16, and half the learning rate,
as PEFT advises to lower it.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task

FIVE = r"self_attn/(q|k|v)_proj|mlp/(up|down)_proj"
SAMPLES = 170_000
SCORED = "llm_adapters_commonsense"


def samples(name: str) -> sx.Data:
    """Rows of the training set: loss on prompt and answer, at most 256 tokens."""
    return sx.Data(name, template="llm_adapters", loss_on="all", max_length=256, overlong="truncate")


def experiment() -> sx.Experiment:
    """LoRA+ of rank 32 on LLaMA-7B."""
    return sx.Experiment(
        model="yahma/llama-7b-hf",
        data=samples("commonsense_170k/train.json"),
        rules=((FIVE, sx.LoRA(rank=32, alpha=64.0, dropout=0.05)),),
        optimizer=sx.Optimizer(lr=1e-4, schedule="linear", warmup=100, b_ratio=16.0),
        epochs=1,
        batch_size=16,
        precision="bfloat16",
        eval=sx.Eval(samples("commonsense_170k/validation.json"), every=80),
        save=sx.Save(every=80, best=True),
    )


SBORA = "README of github.com/cityuhkai/SBoRA, commit 8870499, table of commonsense reasoning"
PLAIN = ("optimizer.lr=2e-4", "optimizer.b_ratio=1")
TABLE = "unknown: the paper's tables were not read"
PUBLISHED = (
    Row("LLaMA-7B, LoRA+, rank 32, ratio 16", {}, "", note=TABLE),
    Row("LLaMA-7B, LoRA, rank 32, by SBoRA's authors", by_task("avg", 72.8), SBORA, "56.1M", changes=PLAIN),
)
UNKNOWN = (
    "The paper's models, data, ranks and rates: nothing here is taken from it but the ratio's meaning.",
    "The best ratio; LoRA-RITE's authors give their LoRA+ baseline a ratio of 4 (optimizer.b_ratio=4).",
)
NEEDS = (
    "LLM-Adapters' commonsense_170k.json as two files in $SBORAX_DATA/commonsense_170k: 120 samples in "
    "validation.json, the rest in train.json.",
    "The test sets of LLM-Adapters' dataset/ under $SBORAX_DATA.",
)
