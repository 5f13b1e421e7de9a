# SBORAX_DATA=data sborax train experiments/lora_rite/gsm8k.py --mesh fsdp=8 --out runs/lora_rite_gsm8k
"""LoRA-RITE (arXiv:2410.20625): GSM8K, Gemma-7B.

`experiment()` is LoRA of rank 16 with LoRA-RITE, trained on GSM8K's own training set. The numbers are from a summary of
the paper, which has no code that was found.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task

SAMPLES = 7_473
SCORED = "peft_gsm8k"


def experiment() -> sx.Experiment:
    """LoRA of rank 16 on Gemma-7B with LoRA-RITE; no dropout and no weight decay, as the paper has it."""
    return sx.Experiment(
        model="google/gemma-7b",
        data=sx.Data(
            "gsm8k/train.jsonl",
            template="Question: {question} Think step by step.\nAnswer:",
            answer=" {answer}",
            max_length=512,
            overlong="truncate",
        ),
        rules=(("self_attn|mlp", sx.LoRA(rank=16, alpha=16.0)),),
        optimizer=sx.Optimizer(name="lora_rite", lr=1e-3, schedule="linear"),
        epochs=3,
        batch_size=16,
        precision="bfloat16",
    )


SOURCE = "a summary of arXiv:2410.20625"
NOTE = "unverified: from a summary of the paper"
ADAM = ("optimizer.name=adamw", "optimizer.lr=2e-4")
PUBLISHED = (
    Row("Gemma-7B, LoRA with Adam", by_task("GSM8K", 48.37), SOURCE, changes=ADAM, note=NOTE),
    Row("Gemma-7B, LoRA with Lamb", by_task("GSM8K", 50.64), SOURCE, changes=None, note=NOTE),
    Row("Gemma-7B, LoRA with LoRA-RITE", by_task("GSM8K", 55.50), SOURCE, note=NOTE),
)
UNKNOWN = (
    "Prompt, targets, alpha, rates, epochs, batch and how answers are found: all our choice, but for rank 16.",
    "The paper's best rates, of which a third party's note says that LoRA-RITE's is about 20 times Adam's: sweep both.",
)
NEEDS = (
    "GSM8K as $SBORAX_DATA/gsm8k/train.jsonl and test.jsonl.",
    "google/gemma-7b is gated.",
    "Super-Natural Instructions, the paper's other table (+4.6 % over Adam on Gemma-2B, abstract), has no recipe.",
)
