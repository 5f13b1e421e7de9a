# SBORAX_DATA=data sborax train experiments/sara/commonsense.py --mesh fsdp=16 --out runs/sara_commonsense
"""SARA and Mo-SARA (arXiv:2408.03290): commonsense reasoning, the eight sets of LLM-Adapters (arXiv:2304.01933).

None of the paper's tables could be read and its authors released no code, so no number stands here. What can be tested
is the claim: ranks from singular values against uniform and shuffled ranks of the same total. `experiment()` is SARA
with the recipe of LLM-Adapters.
"""

import sborax as sx
from sborax.cli.recipes import Row, method_change

TWO = r"self_attn/(q|v)_proj"
SAMPLES = 170_000
SCORED = "llm_adapters_commonsense"


def experiment() -> sx.Experiment:
    """SARA on q and v of LLaMA-7B; every rank is the least whose singular values reach 2 % of their sum."""
    return sx.Experiment(
        model="yahma/llama-7b-hf",
        data=sx.Data(
            "commonsense_170k/train.json",
            template="llm_adapters",
            loss_on="all",
            max_length=256,
            overlong="truncate",
        ),
        rules=((TWO, sx.SARA(rank=sx.SingularMass(0.02))),),
        optimizer=sx.Optimizer(lr=3e-4, schedule="linear", warmup=100),
        epochs=3,
        batch_size=16,
        precision="bfloat16",
    )


TABLE = "unknown: the paper's table could not be read"
CONTROL = "unknown: our control, no row of the paper"
SHUFFLED = sx.ShuffledRanks(sx.SingularMass(0.02))
PUBLISHED = (
    Row("LLaMA-7B, SARA, threshold 0.02", {}, "", note=TABLE),
    Row("LLaMA-7B, Mo-SARA, 5 sets", {}, "", changes=(method_change(sx.MoSARA()),), note=TABLE),
    Row("LLaMA-7B, LoRA, rank 32", {}, "", changes=(method_change(sx.LoRA(rank=32, alpha=64.0)),), note=TABLE),
    Row("LLaMA-7B, SARA, ranks shuffled", {}, "", changes=(method_change(sx.SARA(rank=SHUFFLED)),), note=CONTROL),
)
UNKNOWN = (
    "The paper's tables, and with them base model, learning rate, epochs and batch; those of LLM-Adapters are used. "
    "That the model is LLaMA-7B and that q and v are adapted follows from a third party's code and names of figures.",
    "SARA's threshold; 0.02 here, and 0.005, 0.01 and 0.05 are worth a run each (rules.0.method.rank.threshold=0.05).",
    "Mo-SARA's threshold and number of sets; 0.5 and 5, as a third party's code has them.",
    "How the paper starts the factors; see `sborax methods SARA` and `sborax methods MoSARA`.",
    "A fair LoRA has the mean of SARA's ranks, not 32; `sx.plan` of the loaded model's params and the rules has them.",
)
NEEDS = (
    "LLM-Adapters' commonsense_170k.json as $SBORAX_DATA/commonsense_170k/train.json.",
    "The test sets of LLM-Adapters' dataset/ under $SBORAX_DATA.",
)
