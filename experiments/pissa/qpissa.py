# sborax train experiments/pissa/qpissa.py --mesh fsdp=16 --out runs/qpissa_metamathqa
"""QPiSSA (arXiv:2404.02948): GSM8K after tuning LLaMA-3-70B in 4 bits, from the paper's abstract.

`experiment()` is PiSSA whose residual is held in NF4. Data and everything else are as in `pissa/metamathqa`.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task, method_change
from sborax.data.template import ALPACA

SEVEN = "self_attn|mlp"
SAMPLES = 395_000
HARNESS = "gsm8k"


def experiment() -> sx.Experiment:
    """PiSSA of rank 64 on LLaMA-3-70B in NF4, by 16 subspace iterations."""
    return sx.Experiment(
        model="meta-llama/Meta-Llama-3-70B",
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
        batch_size=16,
        accumulate=8,
        precision="bfloat16",
        quant="nf4",
    )


SOURCE = "abstract of arXiv:2404.02948"
LORA = (method_change(sx.LoRA(rank=64, alpha=64.0)),)
PUBLISHED = (
    Row("LLaMA-3-70B, QLoRA", by_task("GSM8K", 81.73), SOURCE, changes=LORA),
    Row("LLaMA-3-70B, QPiSSA", by_task("GSM8K", 86.05), SOURCE),
)
UNKNOWN = (
    "The paper's rank, learning rate, batch, epochs and training data: 64, 2e-5, 128, one, and MetaMathQA are used.",
    "How often the paper repeats quantising the residual and taking the singular values of its error; once here.",
    "How the paper scores GSM8K; lm-evaluation-harness is used.",
)
NEEDS = (
    "meta-llama/Meta-Llama-3-70B is gated.",
    "The dense weights pass through memory while they are read: each kernel that PiSSA starts from.",
    "lm-evaluation-harness for GSM8K: pip install 'sborax[eval]'.",
)
