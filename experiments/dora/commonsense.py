# SBORAX_DATA=data sborax train experiments/dora/commonsense.py --mesh fsdp=16 --out runs/dora_commonsense
"""DoRA (arXiv:2402.09353): commonsense reasoning, average of eight test sets, LLaMA-7B, LLaMA-2-7B and LLaMA-3-8B.

Trained on the 170k commonsense samples of LLM-Adapters (arXiv:2304.01933), scored by generated answers. `experiment()`
is DoRA of rank 32 on LLaMA-7B. SBoRA's authors train with DoRA's code: what is not known of DoRA's own settings is as
in `sbora/commonsense`.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task, method_change

FIVE = r"self_attn/(q|k|v)_proj|mlp/(up|down)_proj"
SAMPLES = 170_000
SCORED = "llm_adapters_commonsense"


def samples(name: str) -> sx.Data:
    """Rows of the training set: loss on prompt and answer, at most 256 tokens."""
    return sx.Data(name, template="llm_adapters", loss_on="all", max_length=256, overlong="truncate")


def experiment() -> sx.Experiment:
    """DoRA of rank 32 on LLaMA-7B."""
    return sx.Experiment(
        model="yahma/llama-7b-hf",
        data=samples("commonsense_170k/train.json"),
        rules=((FIVE, sx.DoRA(rank=32, alpha=64.0, dropout=0.05)),),
        optimizer=sx.Optimizer(lr=2e-4, schedule="linear", warmup=100),
        epochs=3,
        batch_size=16,
        precision="bfloat16",
        eval=sx.Eval(samples("commonsense_170k/validation.json"), every=80),
        save=sx.Save(every=80, best=True),
    )


SOURCE = "README of github.com/NVlabs/DoRA, averages of commonsense reasoning"
LORA = method_change(sx.LoRA(rank=32, alpha=64.0, dropout=0.05))
HALF = method_change(sx.DoRA(rank=16, alpha=32.0, dropout=0.05))
MODELS = {
    "LLaMA-7B": (),
    "LLaMA-2-7B": ("model=meta-llama/Llama-2-7b-hf",),
    "LLaMA-3-8B": ("model=meta-llama/Meta-Llama-3-8B",),
}


def _row(model: str, name: str, average: float, *changes: str) -> Row:
    return Row(f"{model}, {name}", by_task("avg", average), SOURCE, changes=(*MODELS[model], *changes))


PUBLISHED = (
    _row("LLaMA-7B", "LoRA", 76.3, LORA),
    _row("LLaMA-7B", "DoRA, rank 32", 78.4),
    _row("LLaMA-7B", "DoRA, rank 16", 77.5, HALF),
    _row("LLaMA-2-7B", "LoRA", 77.6, LORA),
    _row("LLaMA-2-7B", "DoRA, rank 32", 79.7),
    _row("LLaMA-2-7B", "DoRA, rank 16", 80.5, HALF),
    _row("LLaMA-3-8B", "LoRA", 80.8, LORA),
    _row("LLaMA-3-8B", "DoRA, rank 32", 85.2),
    _row("LLaMA-3-8B", "DoRA, rank 16", 85.0, HALF),
)
UNKNOWN = (
    "Learning rate, alpha, dropout, warm-up and batch: those of SBoRA's scripts are used, and the README advises a "
    "rate slightly below LoRA's. Three epochs are remembered and not confirmed.",
    "LoRA's rank in the table: 32 is used.",
    "How much scores vary: the authors say that the paper's numbers are single runs. SBoRA's authors get 71.7 and 72.7 "
    "from DoRA on LLaMA-7B in one epoch.",
)
NEEDS = (
    "LLM-Adapters' commonsense_170k.json as two files in $SBORAX_DATA/commonsense_170k: 120 samples in "
    "validation.json, the rest in train.json.",
    "The test sets of LLM-Adapters' dataset/ under $SBORAX_DATA.",
    "meta-llama/Llama-2-7b-hf and meta-llama/Meta-Llama-3-8B are gated.",
)
