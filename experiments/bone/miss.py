# sborax train experiments/bone/miss.py --mesh fsdp=4 --out runs/miss_metamathqa
"""MiSS (arXiv:2409.15371, last versions, ICLR 2026), as Bone is called later: averages of GSM8K, MATH, HumanEval, MBPP.

`experiment()` is Bone of rank 64 on LLaMA-2-7B, trained on MetaMathQA as in `bone/metamathqa`, which gives the first
half of the average. The numbers are from a third party's note of the paper.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task
from sborax.data.template import ALPACA

SEVEN = "self_attn|mlp"
SAMPLES = 395_000
HARNESS = "gsm8k"


def experiment() -> sx.Experiment:
    """Bone of rank 64 on every projection of LLaMA-2-7B."""
    return sx.Experiment(
        model="meta-llama/Llama-2-7b-hf",
        data=sx.Data(
            "meta-math/MetaMathQA",
            template=ALPACA.replace("{instruction}", "{query}"),
            answer="{response}\n<|EOT|>",
            overlong="truncate",
            max_length=512,
        ),
        rules=((SEVEN, sx.Bone(rank=64)),),
        optimizer=sx.Optimizer(lr=2e-5, schedule="cosine", warmup=0),
        epochs=1,
        batch_size=8,
        accumulate=8,
        precision="bfloat16",
    )


SOURCE = "a third party's note of arXiv:2409.15371, version of ICLR 2026"
NOTE = "unverified: from a third party's note, not from the paper"
COLUMNS = "average of 4, MATH"
MODELS = {
    "LLaMA-2-7B": (),
    "Mistral-7B": ("model=mistralai/Mistral-7B-v0.1",),
    "LLaMA-2-13B": ("model=meta-llama/Llama-2-13b-hf",),
    "Qwen3-4B": None,
}


def _row(model: str, name: str, average: float, math: float | None = None) -> Row:
    changes = MODELS[model] if name == "MiSS" else None
    return Row(f"{model}, {name}", by_task(COLUMNS, average, math), SOURCE, changes=changes, note=NOTE)


PUBLISHED = (
    _row("LLaMA-2-7B", "LoRA", 24.72),
    _row("LLaMA-2-7B", "PiSSA", 27.70),
    _row("LLaMA-2-7B", "MiSS", 29.30),
    _row("Mistral-7B", "LoRA", 40.12),
    _row("Mistral-7B", "PiSSA", 44.45),
    _row("Mistral-7B", "MiSS", 47.79),
    _row("LLaMA-2-13B", "LoRA", 34.60),
    _row("LLaMA-2-13B", "PiSSA", 39.52),
    _row("LLaMA-2-13B", "MiSS", 42.11),
    _row("Qwen3-4B", "LoRA", 62.79, 15.20),
    _row("Qwen3-4B", "PiSSA", 66.21, 26.00),
    _row("Qwen3-4B", "MiSS", 68.22, 34.82),
)
UNKNOWN = (
    "Settings of this version, the ranks of LoRA and PiSSA, which of Qwen3's models, and all training data: the "
    "settings of `bone/metamathqa` are used. The note's counts for Mistral (87.0M, 94.4M) are not those of version 4.",
)
NEEDS = (
    "meta-llama/Llama-2-7b-hf is gated.",
    "lm-evaluation-harness for GSM8K: pip install 'sborax[eval]'.",
    "HumanEval and MBPP: sborax runs no written code.",
    "The paper's GLUE table is of RoBERTa, which is no model of the LLaMA family.",
)
