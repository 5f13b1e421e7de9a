# SBORAX_DATA=data sborax train experiments/sara/e2e.py --mesh fsdp=8 --out runs/sara_e2e
"""SARA and Mo-SARA (arXiv:2408.03290): restaurants described from their attributes, E2E NLG.

None of the paper's tables could be read and its authors released no code, so no number stands here. `experiment()` is
SARA with LoRA's prompt for E2E (arXiv:2106.09685), which is what `sborax eval --tasks e2e_nlg` asks.
"""

from collections.abc import Mapping
from typing import Any

import sborax as sx
from sborax.cli.recipes import Row, method_change
from sborax.data.template import AbstractTemplate, Piece
from sborax.evaluate.nlg import linearised

TWO = r"self_attn/(q|v)_proj"
SAMPLES = 42_061
SCORED = "e2e_nlg"


class E2E(AbstractTemplate):
    """The linearised attributes, then the description."""

    def pieces(self, record: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
        return [Piece(linearised(record["mr"]), False), Piece(f" {record['ref']}", True)]


def experiment() -> sx.Experiment:
    """SARA on q and v of LLaMA-7B; every rank is the least whose singular values reach 2 % of their sum."""
    return sx.Experiment(
        model="yahma/llama-7b-hf",
        data=sx.Data("e2e_nlg/trainset.csv", template="E2E", max_length=256, overlong="truncate"),
        rules=((TWO, sx.SARA(rank=sx.SingularMass(0.02))),),
        optimizer=sx.Optimizer(lr=3e-4, schedule="linear", warmup=100),
        epochs=3,
        batch_size=16,
        precision="bfloat16",
    )


TABLE = "unknown: the paper's table could not be read"
LORA = sx.LoRA(rank=32, alpha=64.0)
PUBLISHED = (
    Row("LLaMA-7B, SARA, threshold 0.02", {}, "", note=TABLE),
    Row("LLaMA-7B, Mo-SARA, 5 sets", {}, "", changes=(method_change(sx.MoSARA()),), note=TABLE),
    Row("LLaMA-7B, LoRA, rank 32", {}, "", changes=(method_change(LORA),), note=TABLE),
)
UNKNOWN = (
    "The paper's tables, and with them base model, learning rate, epochs and batch; those of LLM-Adapters are used.",
    "SARA's threshold, Mo-SARA's threshold and number of sets: 0.02, 0.5 and 5.",
    "How the paper decodes; text is greedy here, where LoRA's authors search with 10 beams.",
)
NEEDS = (
    "E2E NLG as $SBORAX_DATA/e2e_nlg/trainset.csv and testset_w_refs.csv (github.com/tuetschek/e2e-dataset).",
    "sacrebleu, nltk and rouge-score: pip install 'sborax[eval]'.",
)
