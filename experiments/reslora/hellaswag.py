# SBORAX_DATA=data sborax train experiments/reslora/hellaswag.py --mesh fsdp=16 --out runs/reslora_hellaswag
"""ResLoRA (arXiv:2402.18039): HellaSwag, LLaMA-2-7B, as gains over LoRA of rank 4.

`experiment()` has the block shortcut, whose merge is exact. Settings are those of the scripts for language generation
in github.com/microsoft/LMOps, `reslora/`: rank 4, alpha 8 and dropout 0.1 on q and v, learning rate 1e-4, weight decay
0.1, 6 % of warm-up, 128 samples a step.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task, method_change

TWO = r"self_attn/(q|v)_proj"
SCORED = "llm_adapters_hellaswag"


def experiment() -> sx.Experiment:
    """ResLoRA of rank 4 with block shortcuts from four layers on LLaMA-2-7B."""
    return sx.Experiment(
        model="meta-llama/Llama-2-7b-hf",
        data=sx.Data("hellaswag/train.json", template="llm_adapters", max_length=256, overlong="truncate"),
        rules=((TWO, sx.ResLoRA(rank=4, alpha=8.0, dropout=0.1, shortcut="block", pre_num=4)),),
        optimizer=sx.Optimizer(lr=1e-4, schedule="linear", warmup=0.06, decay=0.1),
        epochs=3,
        batch_size=16,
        accumulate=8,
        precision="bfloat16",
    )


SOURCE = "a translation of arXiv:2402.18039"
NOTE = "unverified: from a translation, whose tables are images; whether the percentages are relative is unclear"
COLUMNS = "HellaSwag % over LoRA"
INPUT = (method_change(sx.ResLoRA(rank=4, alpha=8.0, dropout=0.1, shortcut="input")),)
MIDDLE = (method_change(sx.ResLoRA(rank=4, alpha=8.0, dropout=0.1, shortcut="middle", pre_num=4)),)
LORA = (method_change(sx.LoRA(rank=4, alpha=8.0, dropout=0.1)),)
TABLE = "unknown: the paper's gains are against this row, whose score could not be read"
PUBLISHED = (
    Row("LLaMA-2-7B, LoRA", {}, "", changes=LORA, note=TABLE),
    Row("LLaMA-2-7B, ResLoRA, input shortcut", by_task(COLUMNS, 10.98), SOURCE, changes=INPUT, note=NOTE),
    Row("LLaMA-2-7B, ResLoRA, block shortcut", by_task(COLUMNS, 20.77), SOURCE, note=NOTE),
    Row("LLaMA-2-7B, ResLoRA, middle shortcut", by_task(COLUMNS, 36.85), SOURCE, changes=MIDDLE, note=NOTE),
)
UNKNOWN = (
    "How many previous blocks: a moderate number is said to be best, and 4 is that of the authors' example for GLUE.",
    "Epochs, prompt, length and how answers are found: three epochs, and LLM-Adapters' prompt and search.",
)
NEEDS = (
    "HellaSwag's training and test sets in LLM-Adapters' form under $SBORAX_DATA/hellaswag.",
    "meta-llama/Llama-2-7b-hf is gated.",
    "The paper's tables of GLUE (RoBERTa) and of images (Stable Diffusion) are of other models.",
)
DIFFERS = (
    "Runs with the input and middle shortcut are scored unmerged; `sborax merge --approximate` is the paper's merge.",
)
