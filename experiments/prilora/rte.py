# SBORAX_DATA=data sborax train experiments/prilora/rte.py --mesh fsdp=8 --out runs/prilora_rte
"""PRILoRA (arXiv:2401.11316): GLUE, here RTE.

The paper tunes DeBERTaV3-base, an encoder, which is no model of the LLaMA family: LLaMA-2-7B stands in for it, and no
published number can be set beside a run of this recipe. None could be read either. What can be tested is the claim:
ranks that grow with depth, and pruning, against LoRA of as many parameters.
"""

from collections.abc import Mapping
from typing import Any

import sborax as sx
from sborax.cli.recipes import Row, method_change
from sborax.data.template import AbstractTemplate, Piece

SEVEN = "self_attn|mlp"
SAMPLES = 2_490
SCORED = "rte"
WORDS = {"entailment": " True", "not_entailment": " False"}


class RTE(AbstractTemplate):
    """The question of the task `rte`, then True or False."""

    def pieces(self, record: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
        prompt = f"{record['sentence1'].strip()}\nQuestion: {record['sentence2'].strip()} True or False?\nAnswer:"
        return [Piece(prompt, False), Piece(WORDS[record["label"]], True)]


def experiment() -> sx.Experiment:
    """PRILoRA with ranks 4 to 12 on every projection of LLaMA-2-7B, pruned every 40 steps."""
    return sx.Experiment(
        model="meta-llama/Llama-2-7b-hf",
        data=sx.Data("glue/RTE/train.jsonl", template="RTE", max_length=512, overlong="truncate"),
        rules=((SEVEN, sx.PRILoRA(rank=sx.LinearRanks(4, 12))),),
        optimizer=sx.Optimizer(lr=2e-4, schedule="linear"),
        epochs=5,
        batch_size=8,
        precision="bfloat16",
        procedure=sx.PRILoRAPruning(fraction=0.5, every=40, beta=0.9),
    )


TABLE = "unknown: the paper's table could not be read, and is of another model"
UNIFORM = (method_change(sx.LoRA(rank=8)), "procedure=null")
UNPRUNED = ("procedure=null",)
PUBLISHED = (
    Row("LLaMA-2-7B, PRILoRA, ranks 4 to 12", {}, "", note=TABLE),
    Row("LLaMA-2-7B, ranks 4 to 12 without pruning", {}, "", changes=UNPRUNED, note=TABLE),
    Row("LLaMA-2-7B, LoRA, rank 8", {}, "", changes=UNIFORM, note=TABLE),
)
UNKNOWN = (
    "The paper's constants: ranks 4 to 12, half of a's entries every 40 steps and a decay of 0.9 are remembered and "
    "not confirmed.",
    "Learning rate, epochs, batch: our choice.",
)
NEEDS = (
    "GLUE's RTE under $SBORAX_DATA/glue/RTE: train.jsonl with columns sentence1, sentence2 and label, since GLUE's own "
    "train.tsv has bare quotation marks that are no CSV, and dev.tsv as it is.",
    "meta-llama/Llama-2-7b-hf is gated.",
    "DeBERTaV3, which sborax does not have.",
)
