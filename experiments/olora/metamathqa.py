# sborax train experiments/olora/metamathqa.py --mesh fsdp=4 --out runs/olora_metamathqa
"""OLoRA (arXiv:2406.01775): GSM8K and MATH after MetaMathQA, LLaMA-2-7B, as Bone's authors measured it.

OLoRA's own tables were not read. `experiment()` is OLoRA of rank 36 with the settings of `bone/metamathqa`.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task, method_change
from sborax.data.template import ALPACA

SEVEN = "self_attn|mlp"
SAMPLES = 395_000
HARNESS = "gsm8k"


def experiment() -> sx.Experiment:
    """OLoRA of rank 36 on every projection of LLaMA-2-7B."""
    return sx.Experiment(
        model="meta-llama/Llama-2-7b-hf",
        data=sx.Data(
            "meta-math/MetaMathQA",
            template=ALPACA.replace("{instruction}", "{query}"),
            answer="{response}\n<|EOT|>",
            overlong="truncate",
            max_length=512,
        ),
        rules=((SEVEN, sx.OLoRA(rank=36)),),
        optimizer=sx.Optimizer(lr=2e-5, schedule="cosine", warmup=0),
        epochs=1,
        batch_size=8,
        accumulate=8,
        precision="bfloat16",
    )


FIRST = "table image of versions 1 to 3 in github.com/JL-er/Bone, commit 76cb5ca"
FOURTH = "table image of version 4 in github.com/JL-er/Bone, commit 47d6db3"
COLUMNS = "GSM8K, MATH, HumanEval, MT-Bench"
LORA = (method_change(sx.LoRA(rank=36)),)
PUBLISHED = (
    Row("LLaMA-2-7B, OLoRA, first table", by_task(COLUMNS, 41.93, 6.48, 20.12, 4.09), FIRST, "89.9M"),
    Row("LLaMA-2-7B, OLoRA, later table", by_task(COLUMNS, 42.93, 6.51, 21.12, 4.03), FOURTH, "89.9M"),
    Row("LLaMA-2-7B, LoRA, later table", by_task(COLUMNS, 40.75, 5.22, 17.68, 3.73), FOURTH, "89.9M", changes=LORA),
)
UNKNOWN = (
    "OLoRA's own tables, models, data and settings: they claim faster convergence than LoRA, and no number was read.",
    "The rank follows from the count; alpha is taken to be the rank.",
)
NEEDS = (
    "meta-llama/Llama-2-7b-hf is gated.",
    "lm-evaluation-harness for GSM8K: pip install 'sborax[eval]'.",
    "HumanEval and MT-Bench: sborax runs no written code and asks no judge.",
)
