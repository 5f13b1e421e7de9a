# SBORAX_DATA=data sborax train experiments/lora_rite/commonsense.py --mesh fsdp=16 --out runs/lora_rite_commonsense
"""LoRA-RITE (arXiv:2410.20625): commonsense reasoning, average of eight test sets, Gemma-2B.

Trained on the 170k commonsense samples of LLM-Adapters (arXiv:2304.01933), scored by generated answers. `experiment()`
is LoRA of rank 16 with LoRA-RITE. The numbers are of the README of github.com/gkevinyen5418/LoRA-RITE, commit c9bb451,
the first author's implementation in PyTorch; the paper's own code was not found.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task

FIVE = r"self_attn/(q|k|v)_proj|mlp/(up|down)_proj"
SAMPLES = 170_000
SCORED = "llm_adapters_commonsense"


def experiment() -> sx.Experiment:
    """LoRA of rank 16 on Gemma-2B with LoRA-RITE; no dropout and no weight decay, as the paper has it."""
    return sx.Experiment(
        model="google/gemma-2b",
        data=sx.Data(
            "commonsense_170k/train.json",
            template="llm_adapters",
            loss_on="all",
            max_length=256,
            overlong="truncate",
        ),
        rules=((FIVE, sx.LoRA(rank=16, alpha=32.0)),),
        optimizer=sx.Optimizer(name="lora_rite", lr=1e-3, schedule="linear", warmup=100),
        epochs=3,
        batch_size=16,
        precision="bfloat16",
    )


SOURCE = "README of github.com/gkevinyen5418/LoRA-RITE, commit c9bb451"
COLUMNS = "HellaSwag, avg"
ADAM = ("optimizer.name=adamw", "optimizer.lr=2e-4")
PUBLISHED = (
    Row("Gemma-2B, LoRA with Adam", by_task(COLUMNS, 53.16, 64.40), SOURCE, changes=ADAM),
    Row("Gemma-2B, LoRA with LoRA-RITE", by_task(COLUMNS, 66.08, 66.85), SOURCE),
)
UNKNOWN = (
    "Rank, alpha, rates, epochs and batch of the README's table: rank 16 is the paper's, 1e-3 the optimiser's default, "
    "the rest LLM-Adapters' recipe. A third party's note says that LoRA-RITE's best rate in the paper is about 20 "
    "times Adam's: sweep both.",
)
NEEDS = (
    "LLM-Adapters' commonsense_170k.json as $SBORAX_DATA/commonsense_170k/train.json.",
    "The test sets of LLM-Adapters' dataset/ under $SBORAX_DATA.",
    "google/gemma-2b is gated.",
)
