# SBORAX_DATA=data sborax train experiments/loraprune/wikitext.py --mesh fsdp=16 --out runs/loraprune_wikitext
"""LoRAPrune (arXiv:2305.18403): perplexity of WikiText-2 and PTB after half of LLaMA-7B is pruned.

`experiment()` prunes half of the heads and hidden channels while LoRA trains on LaMini-instruction. Settings are those
of the script in github.com/aim-uofa/LoRAPrune: rank 8, alpha 16, dropout 0.05, every projection, learning rate 1e-4,
128 samples a step, two epochs. `sborax slim runs/loraprune_wikitext small` writes the smaller model.
"""

import sborax as sx
from sborax.cli.recipes import Row, by_task
from sborax.data.template import ALPACA

SCORED = "wikitext2,ptb"


def experiment() -> sx.Experiment:
    """Half of LLaMA-7B, pruned every 10 steps."""
    return sx.Experiment(
        model="huggyllama/llama-7b",
        data=sx.Data(
            "MBZUAI/LaMini-instruction", template=ALPACA, answer="{response}", max_length=512, overlong="truncate"
        ),
        rules=(("self_attn|mlp", sx.LoRA(rank=8, alpha=16.0, dropout=0.05)),),
        optimizer=sx.Optimizer(lr=1e-4, schedule="linear", warmup=0),
        epochs=2,
        batch_size=16,
        accumulate=8,
        precision="bfloat16",
        procedure=sx.LoRAPrune(ratio=0.5, every=10),
    )


SOURCE = "a third party's note of arXiv:2305.18403v5"
EARLIER = "an earlier version of arXiv:2305.18403"
NOTE = "unverified: from a third party's note; the abstract has its differences from LLM-Pruner"
WINDOW = (
    "unverified: of an earlier version with windows of 128 tokens (wikitext2_128), not to be compared with other rows"
)
COLUMNS = "WikiText-2, PTB, zero-shot avg, GB"
PUBLISHED = (
    Row("LLaMA-7B, 50 %, LLM-Pruner", by_task(COLUMNS, 16.41, 20.85, 51.90, 38.6), SOURCE, changes=None, note=NOTE),
    Row("LLaMA-7B, 50 %, LoRAPrune", by_task(COLUMNS, 11.60, 17.39, 54.81, 18.3), SOURCE, note=NOTE),
    Row("LLaMA-7B, 50 %, 8 bits", by_task(COLUMNS, 11.65, 17.41, None, 13.8), SOURCE, changes=None, note=NOTE),
    Row(
        "LLaMA-7B, 20 %, LoRAPrune, earlier",
        by_task("WikiText-2", 16.80),
        EARLIER,
        changes=("procedure.ratio=0.2",),
        note=WINDOW,
    ),
    Row(
        "LLaMA-7B, 50 %, LoRAPrune, earlier",
        by_task("WikiText-2", 30.12),
        EARLIER,
        note=WINDOW,
    ),
)
UNKNOWN = (
    "Which of the function's rates the table has: the script says 1e-4, the function's default is 3e-4.",
    "The paper squares the importance, its code takes the absolute value, as here (procedure.power=2 for the paper).",
    "The prompt around LaMini's instructions: Alpaca's.",
    "The size of the training data, and with it the hours.",
)
NEEDS = (
    "MBZUAI/LaMini-instruction from the hub, with columns instruction and response.",
    "WikiText-2's raw test text as wikitext-2/test.txt and PTB's validation sentences as ptb/ under $SBORAX_DATA.",
    "The zero-shot average is of tasks of lm-evaluation-harness (`--harness`).",
    "Bases in 8 bits and LLM-Pruner, which sborax does not have.",
)
