# SBORAX_DATA=data sborax train experiments/cola/rte.py --mesh fsdp=8 --out runs/cola_rte
"""COLA, Chain of LoRA (arXiv:2401.04151): RTE, LLaMA-2-7B.

1,000 training samples, five epochs for every method, LoRA of rank 8 and alpha 16 on q and v, AdamW with a linear rate.
`experiment()` is a chain of three. The numbers are from a summary of the paper; no code was found.
"""

from collections.abc import Mapping
from typing import Any

import sborax as sx
from sborax.cli.recipes import Row, by_task
from sborax.data.template import AbstractTemplate, Piece

SAMPLES = 1_000
SCORED = "rte"
WORDS = {"entailment": " True", "not_entailment": " False"}


class RTE(AbstractTemplate):
    """The question of the task `rte`, then True or False."""

    def pieces(self, record: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
        prompt = f"{record['sentence1'].strip()}\nQuestion: {record['sentence2'].strip()} True or False?\nAnswer:"
        return [Piece(prompt, False), Piece(WORDS[record["label"]], True)]


def experiment() -> sx.Experiment:
    """A chain of three on LLaMA-2-7B: 625 steps of 8 with knots after 209 and 418."""
    return sx.Experiment(
        model="meta-llama/Llama-2-7b-hf",
        data=sx.Data("glue/RTE/train.jsonl", template="RTE", max_length=512, overlong="truncate", limit=SAMPLES),
        rules=((r"self_attn/(q|v)_proj", sx.LoRA(rank=8, alpha=16.0)),),
        optimizer=sx.Optimizer(lr=1e-4, schedule="linear", warmup=0),
        epochs=5,
        batch_size=8,
        precision="bfloat16",
        procedure=sx.COLA(every=209),
    )


SOURCE = "a summary of arXiv:2401.04151v1"
NOTE = "unverified: from a summary of the paper"
OVER = "WSC over LoRA, BoolQ over LoRA, RTE over LoRA"
PUBLISHED = (
    Row("LLaMA-2-7B, LoRA", by_task("RTE", 82.09), SOURCE, changes=("procedure=null",), note=NOTE),
    Row("LLaMA-2-7B, COLA", by_task("RTE", 85.70), SOURCE, note=NOTE),
    Row("OPT-1.3B, COLA", by_task(OVER, 3.66, 1.38, 1.66), SOURCE, changes=None, note=NOTE),
)
UNKNOWN = (
    "Where the knots are: segments of equal length here. Which length of chain a number belongs to: of 1 to 3, longer "
    "is said to be better.",
    "Which rate of 1e-3, 8e-4, 5e-4, 1e-4 and 5e-5 is RTE's, and whether it starts again at a knot (not here): sweep.",
    "Batch 4 or 8: 8. The prompt: lm-evaluation-harness'. Numbers are means over 5 seeds.",
)
NEEDS = (
    "GLUE's RTE under $SBORAX_DATA/glue/RTE: train.jsonl with columns sentence1, sentence2 and label, since GLUE's own "
    "train.tsv has bare quotation marks that are no CSV, and dev.tsv as it is.",
    "The paper tests 1,000 samples of its own split.",
    "meta-llama/Llama-2-7b-hf is gated.",
    "OPT, which is no model of the LLaMA family.",
)
