# SBORAX_DATA=data sborax train experiments/lora/e2e.py --out runs/lora_e2e
"""LoRA (arXiv:2106.09685): restaurants described from their attributes, E2E NLG.

The paper tunes GPT-2, which is no model of the LLaMA family: SmolLM2-360M stands in for it, and no published number can
be set beside a run of this recipe. Prompt, data and metrics are the paper's (github.com/microsoft/LoRA, examples/NLG).
"""

from collections.abc import Mapping
from typing import Any

import sborax as sx
from sborax.cli.recipes import Row, by_task
from sborax.data.template import AbstractTemplate, Piece
from sborax.evaluate.nlg import linearised

SAMPLES = 42_061
SCORED = "e2e_nlg"


class E2E(AbstractTemplate):
    """The linearised attributes, then the description."""

    def pieces(self, record: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
        return [Piece(linearised(record["mr"]), False), Piece(f" {record['ref']}", True)]


def experiment() -> sx.Experiment:
    """LoRA of rank 4 on q and v of SmolLM2-360M."""
    return sx.Experiment(
        model="HuggingFaceTB/SmolLM2-360M",
        data=sx.Data("e2e_nlg/trainset.csv", template="E2E", max_length=256, overlong="truncate"),
        rules=((r"self_attn/(q|v)_proj", sx.LoRA(rank=4, alpha=8.0)),),
        optimizer=sx.Optimizer(lr=2e-4, schedule="linear"),
        epochs=5,
        batch_size=8,
        precision="bfloat16",
    )


SOURCE = "a third party's note of BaLoRA's table"
NOTE = "unverified: measured by other authors, and read in a third party's note"
PUBLISHED = (
    Row("GPT-2 medium, LoRA with AdamW, rank 4", by_task("BLEU", 68.6), SOURCE, changes=None, note=NOTE),
    Row("GPT-2 medium, LoRA with LoRA-RITE, rank 4", by_task("BLEU", 69.3), SOURCE, changes=None, note=NOTE),
)
UNKNOWN = (
    "The paper's own table was not read.",
    "Learning rate, alpha, batch and epochs: 2e-4 is LoRA's usual rate, the others are our choice.",
)
NEEDS = (
    "E2E NLG as $SBORAX_DATA/e2e_nlg/trainset.csv and testset_w_refs.csv (github.com/tuetschek/e2e-dataset).",
    "sacrebleu, nltk and rouge-score: pip install 'sborax[eval]'.",
    "GPT-2, which sborax does not have.",
)
DIFFERS = ("Text is greedy, where the authors search with 10 beams and a length penalty.",)
