# SBORAX_DATA=data sborax train experiments/sbora/mmlu.py --mesh fsdp=8 --out runs/qsbora_mmlu
"""QSBoRA (arXiv:2407.05413): MMLU, 5-shot, after tuning LLaMA-7B, LLaMA-13B or LLaMA-3-8B in 4 bits.

Trained on Alpaca, or on a sample of Flan v2. `experiment()` is QSBoRA-FA on LLaMA-13B and Alpaca. Settings are those of
`qsbora.py` and its scripts in github.com/cityuhkai/SBoRA, commit 8870499: NF4 with double quantisation, rank 64, alpha
16, every projection, 10,000 steps of 64 at a constant rate, loss on the answer alone.
"""

import sborax as sx
from sborax.adapters.core import AbstractMethod
from sborax.cli.recipes import Row, by_task, method_change

SEVEN = "self_attn|mlp"
SCORED = "mmlu"


def experiment() -> sx.Experiment:
    """QSBoRA-FA on LLaMA-13B and Alpaca; 384 tokens of prompt and 128 of answer make 512."""
    return sx.Experiment(
        model="huggyllama/llama-13b",
        data=sx.Data("tatsu-lab/alpaca", template="alpaca", max_length=512, overlong="truncate"),
        rules=((SEVEN, sx.SBoRA(rank=64, alpha=16.0, variant="FA")),),
        optimizer=sx.Optimizer(lr=2e-4, schedule="constant", warmup=0, clip=0.3),
        steps=10_000,
        batch_size=16,
        accumulate=4,
        precision="bfloat16",
        quant="nf4",
        save=sx.Save(every=2000, keep=5),
    )


SOURCE = "README of github.com/cityuhkai/SBoRA, commit 8870499, table of MMLU"
COLUMNS = "MMLU after Alpaca, MMLU after Flan v2"
MODELS = {"LLaMA-7B": "huggyllama/llama-7b", "LLaMA-13B": "", "LLaMA-3-8B": "meta-llama/Meta-Llama-3-8B"}
BUILD: dict[str, AbstractMethod] = {
    "QLoRA": sx.LoRA(rank=64, alpha=16.0),
    "QDoRA": sx.DoRA(rank=64, alpha=16.0),
    "QSBoRA-FA": sx.SBoRA(rank=64, alpha=16.0, variant="FA"),
    "QSBoRA-FB": sx.SBoRA(rank=64, alpha=16.0, variant="FB"),
}
HALVED = "broken: the printed count is half of what is trained, since the script halves the counts of 4-bit models"


def _row(model: str, name: str, printed: str, trained: str, alpaca: float, flan: float) -> Row:
    changes = ((f"model={MODELS[model]}",) if MODELS[model] else ()) + (method_change(BUILD[name]),)
    return Row(f"{model}, {name}", by_task(COLUMNS, alpaca, flan), SOURCE, printed, trained, changes, HALVED)


PUBLISHED = (
    _row("LLaMA-7B", "QLoRA", "80.0M", "159.9M", 37.9, 44.4),
    _row("LLaMA-7B", "QDoRA", "80.6M", "161.3M", 38.0, 42.8),
    _row("LLaMA-7B", "QSBoRA-FA", "43.5M", "87.0M", 36.5, 43.1),
    _row("LLaMA-7B", "QSBoRA-FB", "36.4M", "72.9M", 36.9, 43.4),
    _row("LLaMA-13B", "QLoRA", "", "250.3M", 45.4, 46.7),
    _row("LLaMA-13B", "QDoRA", "", "252.5M", 46.7, 48.8),
    _row("LLaMA-13B", "QSBoRA-FA", "", "136.3M", 49.0, 51.0),
    _row("LLaMA-13B", "QSBoRA-FB", "", "114.0M", 48.3, 50.5),
    _row("LLaMA-3-8B", "QLoRA", "", "167.8M", 51.9, 49.5),
    _row("LLaMA-3-8B", "QDoRA", "", "169.1M", 53.0, 51.9),
    _row("LLaMA-3-8B", "QSBoRA-FA", "", "88.1M", 56.5, 56.4),
    _row("LLaMA-3-8B", "QSBoRA-FB", "", "79.7M", 54.5, 55.0),
)
UNKNOWN = (
    "Which checkpoint the table scores, the last or the best of the five evaluations; the last is scored here, and all "
    "five are kept.",
)
NEEDS = (
    "tatsu-lab/alpaca from the hub; the authors hold 1,024 samples of it out.",
    "For the column of Flan v2, 50,000 samples of it (40 % Flan 2021, 32 % P3, 20 % NIv2, 5 % CoT, 3 % dialog, without "
    "inputs above 384 or targets above 128 characters), as alpaca-like records: data.name=flan_v2/train.json.",
    "MMLU as $SBORAX_DATA/mmlu/dev.jsonl and test.jsonl.",
    "meta-llama/Meta-Llama-3-8B is gated.",
)
DIFFERS = (
    "MMLU's test split, where the authors score the validation split.",
    "Computed in bfloat16, where the authors' scripts leave it at float32.",
    "AdamW is not paged, and rows are not grouped by length.",
    "One limit of 512 tokens, where the authors cut prompts at 384 and answers at 128.",
)
