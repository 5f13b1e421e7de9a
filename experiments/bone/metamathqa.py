# sborax train experiments/bone/metamathqa.py --mesh fsdp=4 --out runs/bone_metamathqa
"""Bone (arXiv:2409.15371, version 4): GSM8K and MATH after MetaMathQA, LLaMA-2-7B and Mistral-7B.

Bone of version 4 is what was later called MiSS; what versions 1 to 3 call Bone is Bat (see `bone/bat`). `experiment()`
is Bone of rank 64 on LLaMA-2-7B. Settings are those of the authors' scripts in github.com/JL-er/Bone, commit dc5f7a9:
one epoch, 64 samples a step as 4 GPUs with 8 of 2, Alpaca's prompt, loss on the answer alone.
"""

import sborax as sx
from sborax.adapters.core import AbstractMethod
from sborax.cli.recipes import Row, by_task, method_change
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


SOURCE = "table image of version 4 in github.com/JL-er/Bone, commit 47d6db3"
COLUMNS = "GSM8K, MATH, HumanEval, MT-Bench"
MISTRAL = "model=mistralai/Mistral-7B-v0.1"


def _row(model: str, method: AbstractMethod | None, name: str, parameters: str, *scores: float | None) -> Row:
    changes = None
    if method is not None:
        changes = ((MISTRAL,) if model == "Mistral-7B" else ()) + (method_change(method),)
    return Row(f"{model}, {name}", by_task(COLUMNS, *scores), SOURCE, parameters, "", changes)


PUBLISHED = (
    _row("LLaMA-2-7B", sx.LoRA(rank=36), "LoRA", "89.9M", 40.75, 5.22, 17.68, 3.73),
    _row("LLaMA-2-7B", sx.OLoRA(rank=36), "OLoRA", "89.9M", 42.93, 6.51, 21.12, 4.03),
    _row("LLaMA-2-7B", sx.PiSSA(rank=36), "PiSSA", "89.9M", 43.89, 6.92, 22.25, 4.11),
    _row("LLaMA-2-7B", sx.Bone(rank=64), "Bone", "87.0M", 48.16, 8.58, 24.08, 4.31),
    _row("RWKV6-7B", None, "LoRA", "88.1M", 38.13, 6.06, None, None),
    _row("RWKV6-7B", None, "PiSSA", "88.1M", 40.48, 6.12, None, None),
    _row("RWKV6-7B", None, "Bone", "88.1M", 41.73, 6.52, None, None),
    _row("Mistral-7B", sx.LoRA(rank=34), "LoRA", "89.1M", 65.17, 15.82, 39.02, None),
    _row("Mistral-7B", sx.PiSSA(rank=34), "PiSSA", "89.1M", 67.01, 18.13, 40.85, None),
    _row("Mistral-7B", sx.Bone(rank=64), "Bone", "88.1M", 66.94, 18.85, 41.76, None),
)
UNKNOWN = (
    "The ranks of LoRA, OLoRA and PiSSA: 36, and 34 on Mistral, follow from their counts; their alpha is taken to be "
    "the rank, and their learning rate that of Bone.",
    "Which Mistral-7B; the first release is used.",
    "Which part of MetaMathQA: later scripts take 100k of its samples.",
    "How MATH was scored, and what the models behind HumanEval and MT-Bench were trained on.",
)
NEEDS = (
    "meta-llama/Llama-2-7b-hf is gated.",
    "lm-evaluation-harness for GSM8K: pip install 'sborax[eval]'.",
    "HumanEval and MT-Bench: sborax runs no written code and asks no judge.",
    "RWKV6: no model of the LLaMA family.",
)
DIFFERS = (
    'The base is bfloat16 throughout. The authors cast every module whose name has "gate" in it to float32, gate_proj '
    "with it, which looks unintended.",
    "PEFT's own runs of Bone gain 1 to 2 points over LoRA on GSM8K, and Bone takes larger steps than LoRA at the same "
    "learning rate: compare methods at the best rate of each (`sborax sweep`).",
)
