# sborax train experiments/pissa/metamathqa.py --mesh fsdp=8 --out runs/pissa_metamathqa
"""PiSSA (arXiv:2404.02948): GSM8K after tuning Gemma-7B, from the paper's abstract.

`experiment()` is PiSSA on every projection of Gemma-7B, alpha equal to the rank and no dropout, as the authors have it.
Data and everything else are as in `bone/metamathqa`, whose authors compare with PiSSA.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task, method_change
from sborax.data.template import ALPACA

SEVEN = "self_attn|mlp"
SAMPLES = 395_000
HARNESS = "gsm8k"


def experiment() -> sx.Experiment:
    """PiSSA of rank 64 on Gemma-7B, by 16 subspace iterations."""
    return sx.Experiment(
        model="google/gemma-7b",
        data=sx.Data(
            "meta-math/MetaMathQA",
            template=ALPACA.replace("{instruction}", "{query}"),
            answer="{response}",
            overlong="truncate",
            max_length=512,
        ),
        rules=((SEVEN, sx.PiSSA(rank=64, niter=16)),),
        optimizer=sx.Optimizer(lr=2e-5, schedule="cosine", warmup=0.03),
        epochs=1,
        batch_size=8,
        accumulate=16,
        precision="bfloat16",
    )


SOURCE = "abstract of arXiv:2404.02948"
BONE = "table images in github.com/JL-er/Bone: version 4, commit 47d6db3"
SEVEN_B = ("model=meta-llama/Llama-2-7b-hf", method_change(sx.PiSSA(rank=36, niter=16)))
MISTRAL = ("model=mistralai/Mistral-7B-v0.1", method_change(sx.PiSSA(rank=34, niter=16)))
LORA = (method_change(sx.LoRA(rank=64, alpha=64.0)),)
COLUMNS = "GSM8K, MATH"
PUBLISHED = (
    Row("Gemma-7B, LoRA", by_task(COLUMNS, 74.53, None), SOURCE, changes=LORA),
    Row("Gemma-7B, PiSSA", by_task(COLUMNS, 77.7, None), SOURCE),
    Row("LLaMA-2-7B, PiSSA, by Bone's authors", by_task(COLUMNS, 43.89, 6.92), BONE, "89.9M", changes=SEVEN_B),
    Row("Mistral-7B, PiSSA, by Bone's authors", by_task(COLUMNS, 67.01, 18.13), BONE, "89.1M", changes=MISTRAL),
)
UNKNOWN = (
    "The paper's rank, learning rate, batch, epochs and training data: 64, 2e-5, 128, one, and MetaMathQA are used.",
    "How the paper scores GSM8K; lm-evaluation-harness is used.",
)
NEEDS = (
    "google/gemma-7b and meta-llama/Llama-2-7b-hf are gated.",
    "lm-evaluation-harness for GSM8K: pip install 'sborax[eval]'.",
)
