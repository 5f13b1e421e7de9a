# SBORAX_DATA=data sborax train experiments/orthogonal/two_experts.py --mesh fsdp=8 --out runs/orthogonal_arc
"""Orthogonal Adaptation (arXiv:2312.02432): experts trained apart and summed without crosstalk.

The paper customises a diffusion model, of which sborax has none: here two experts of LLaMA-2-7B learn ARC-Easy and
OpenBookQA, each in columns of its own of a shared orthogonal basis, and no published number can be set beside a run of
this recipe. `experiment()` is the first expert; the second row of the table below is the other. Then

    sborax merge runs/orthogonal_arc merged --add runs/orthogonal_obqa=1.0

adds them up. The control sums two plain LoRAs.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task, method_change

SEVEN = "self_attn|mlp"
SAMPLES = 2_250
SCORED = "llm_adapters_arc_easy,llm_adapters_openbookqa"


def experiment() -> sx.Experiment:
    """The first of two experts of rank 16."""
    return sx.Experiment(
        model="meta-llama/Llama-2-7b-hf",
        data=sx.Data("ARC-Easy/train.json", template="llm_adapters", max_length=256, overlong="truncate"),
        rules=((SEVEN, sx.OrthogonalAdaptation(rank=16, expert=0, experts=2)),),
        optimizer=sx.Optimizer(lr=3e-4, schedule="linear"),
        epochs=3,
        batch_size=8,
        precision="bfloat16",
    )


OURS = "unknown: our analogue, no row of the paper"
SOURCE = "README of github.com/cityuhkai/SBoRA, commit 8870499, table of single concepts"
COLUMNS = "text alignment, image alignment"
SECOND = ("data.name=openbookqa/train.json", "rules.0.method.expert=1")
CONTROL = (method_change(sx.LoRA(rank=16)),)
OTHER = ("data.name=openbookqa/train.json", *CONTROL)
PUBLISHED = (
    Row("LLaMA-2-7B, expert for ARC-Easy", {}, "", note=OURS),
    Row("LLaMA-2-7B, expert for OpenBookQA", {}, "", changes=SECOND, note=OURS),
    Row("LLaMA-2-7B, LoRA for ARC-Easy", {}, "", changes=CONTROL, note=OURS),
    Row("LLaMA-2-7B, LoRA for OpenBookQA", {}, "", changes=OTHER, note=OURS),
    Row("diffusion, Custom Diffusion", by_task(COLUMNS, 0.7893, 0.6661), SOURCE, changes=None),
    Row("diffusion, Mix-of-Show", by_task(COLUMNS, 0.6793, 0.7529), SOURCE, changes=None),
    Row("diffusion, Orthogonal Adaptation", by_task(COLUMNS, 0.6932, 0.7518), SOURCE, changes=None),
    Row("diffusion, SBoRA-FA", by_task(COLUMNS, 0.7105, 0.7454), SOURCE, changes=None),
    Row("diffusion, SBoRA-FB", by_task(COLUMNS, 0.7176, 0.7293), SOURCE, changes=None),
)
UNKNOWN = (
    "The paper's rank, learning rate and weights of the sum: 16, 3e-4 and 1.",
    "Which side the paper freezes; the input side here, which follows from its formula (the other: "
    "rules.0.method.side=out).",
)
NEEDS = (
    "LLM-Adapters' training and test sets of ARC-Easy and OpenBookQA under $SBORAX_DATA.",
    "meta-llama/Llama-2-7b-hf is gated.",
    "Diffusion models, which sborax does not have.",
)
