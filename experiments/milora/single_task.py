# SBORAX_DATA=data sborax train experiments/milora/single_task.py --mesh fsdp=16 --out runs/milora_boolq
"""MiLoRA (arXiv:2410.18035, mixture of LoRA with a router): seven tasks, a model each, LLaMA-2-7B.

`experiment()` is MiLoRA of rank 32 on BoolQ. Settings are the paper's: learning rate 1e-4, linear after 6 % of warm-up,
at most 10 epochs, 16 samples a step for small sets and 128 for others, at most 768 tokens. For another task change the
data, as in `data.name=ARC-Easy/train.json`, and score that task. No code was found.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task, method_change

SEVEN = "self_attn|mlp"
SAMPLES = 9_427
SCORED = "llm_adapters_boolq"


def experiment() -> sx.Experiment:
    """MiLoRA of rank 32 on every projection of LLaMA-2-7B, one expert a layer."""
    return sx.Experiment(
        model="meta-llama/Llama-2-7b-hf",
        data=sx.Data("boolq/train.json", template="llm_adapters", max_length=768, overlong="truncate"),
        rules=((SEVEN, sx.MiLoRA(rank=32, top_k=1)),),
        optimizer=sx.Optimizer(lr=1e-4, schedule="linear", warmup=0.06),
        epochs=10,
        batch_size=16,
        precision="bfloat16",
    )


SOURCE = "Table 1 of arXiv:2410.18035"
POOLERS = "ablation of poolers in arXiv:2410.18035"
COLUMNS = "ARC-e, ARC-c, BoolQ, OBQA, PIQA, AQuA, GSM8K, avg"
COUNT = "broken: the count of 80.9M leaves the pooler's vectors out, 0.1M"
MEAN = (method_change(sx.MiLoRA(rank=32, pooler="mean")),)
LAST = (method_change(sx.MiLoRA(rank=32, pooler="last")),)
LORA, DORA = (method_change(sx.LoRA(rank=32)),), (method_change(sx.DoRA(rank=32)),)
PUBLISHED = (
    Row("LoRA, rank 32", by_task(COLUMNS, 73.4, 57.2, 68.8, 80.1, 81.4, 16.6, 31.1, 58.4), SOURCE, changes=LORA),
    Row("DoRA", by_task(COLUMNS, 76.5, 59.8, 71.7, 80.6, 82.7, 17.9, 32.6, 60.3), SOURCE, changes=DORA),
    Row("MOELoRA", by_task(COLUMNS, 76.8, 60.2, 72.0, 81.1, 82.7, 18.3, 32.3, 60.4), SOURCE, changes=None),
    Row(
        "MiLoRA",
        by_task(COLUMNS, 77.8, 61.2, 72.8, 81.7, 83.3, 19.9, 33.9, 61.5),
        SOURCE,
        "80.9M",
        "81.0M",
        note=COUNT,
    ),
    Row("MiLoRA, pooler: mean", by_task("BoolQ", 72.5), POOLERS, changes=MEAN),
    Row("MiLoRA, pooler: last token", by_task("BoolQ", 72.4), POOLERS, changes=LAST),
)
UNKNOWN = (
    "How many experts are in use per layer: the introduction says one, section 4.3 says 3; its counts of 12.3M and "
    "16.4M activated parameters fit one, 25.2M fits none. rules.0.method.top_k=3 is worth a run.",
    "Whether the chosen experts' outputs are multiplied by their probability, and what is pooled in training.",
    "The prompt, and how answers are found; those of LLM-Adapters are used.",
    "DoRA's rank: 32.",
)
NEEDS = (
    "LLM-Adapters' training and test sets of the tasks under $SBORAX_DATA.",
    "meta-llama/Llama-2-7b-hf is gated.",
    "MOELoRA, which sborax does not have.",
    "The paper's other tables (several tasks at once; MT-Bench, MMLU and BBH after instructions) have no recipe.",
)
DIFFERS = (
    "The router's activation is trained with the rest, where the paper alternates it on held-out batches "
    "(examples/milora_bilevel.py does).",
    "Training does not stop early; the paper evaluates every 200 steps with a patience of 10. Beams are 4, not 3.",
)
