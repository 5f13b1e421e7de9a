"""LoRA, methods that train one factor, and full fine-tuning over ranks and batch sizes.

What decides, fixed before anything ran. Every run sees 1,024 examples, in steps of 4, 16 or 64. Metric and choice of
the learning rate are those of the atlas: the loss of held-out answers after the last step in nats a token, the rate
chosen on half of the items with three seeds, the other half reported. The penalty of a large batch is the loss at 64
rows a step minus that at 4. arXiv:2602.09492 sees one in LoRA; the question is whether it is smaller for methods that
train one factor. The best learning rate does not depend on the rank if its slope is below a twentieth of a decade a
doubling.

LoRA's scale is 1 at every rank, unless an arm has an alpha. The arms with alpha = 8, whose scale is 8 / rank, were
added once the slope of the others was known.
"""

from typing import Any

import sborax as sx
from experiments.studies.atlas import arm, rules
from experiments.studies.claims import Beats, LessGrowth, RateSlope
from experiments.studies.study import Arm, Study
from sborax.adapters.core import AbstractMethod
from sborax.sweep.rates import half_decades

EXAMPLES = 1024
RANKS = (1, 2, 4, 8, 16, 32)
BATCHES = (4, 16, 64)
MIDDLE = 8
"""The rank at which batch sizes are compared."""
MIDDLE_BATCH = 16
"""The batch size at which ranks are compared."""
SLOPES = {"LoRA": "LoRA with scale 1", "SBoRA-FA": "SBoRA-FA", "Bone": "Bone"}
"""The methods whose best learning rate is followed over ranks, and their names in claims."""
FALLING = "LoRA with alpha 8"
"""LoRA with a scale that falls with the rank, and is 1 at the middle one."""


def at_rank(rank: int) -> dict[str, AbstractMethod]:
    """The methods at one rank."""
    return {
        "LoRA": sx.LoRA(rank=rank),
        "SBoRA-FA": sx.SBoRA(rank=rank),
        "SBoRA-FB": sx.SBoRA(rank=rank, variant="FB"),
        "Bone": sx.Bone(rank=rank),
        "DoRA": sx.DoRA(rank=rank),
    }


def label(name: str, rank: int, batch: int) -> str:
    """The name of an arm."""
    return f"{name}, rank {rank}, batch {batch}"


def arms() -> list[Arm]:
    """Batch sizes at the middle rank, with full fine-tuning, then the other ranks, and LoRA with a falling scale."""
    every_arm = []
    for batch in BATCHES:
        every_arm += [arm_at(name, MIDDLE, batch, **rules(method)) for name, method in at_rank(MIDDLE).items()]
        every_arm.append(arm("E2E", f"full fine-tuning, batch {batch}", train_base=True, **steps(batch)))
    for rank in RANKS:
        if rank != MIDDLE:
            every_arm += [arm_at(name, rank, MIDDLE_BATCH, **rules(method)) for name, method in at_rank(rank).items()]
    every_arm += [
        arm_at(FALLING, rank, MIDDLE_BATCH, **rules(sx.LoRA(rank=rank, alpha=float(MIDDLE))))
        for rank in RANKS
        if rank != MIDDLE
    ]
    return every_arm


def arm_at(name: str, rank: int, batch: int, **changes: Any) -> Arm:
    """An arm of a rank and a batch size."""
    return arm("E2E", label(name, rank, batch), **changes, **steps(batch))


def steps(batch: int) -> dict[str, Any]:
    """As many steps of that many rows as see all examples once."""
    return {"steps": EXAMPLES // batch, "batch_size": batch}


def study() -> Study:
    """The study."""
    small, large = min(BATCHES), max(BATCHES)
    growth = [
        LessGrowth(
            f"a large batch costs {name} less than LoRA",
            "2602.09492",
            (label(name, MIDDLE, large), label(name, MIDDLE, small)),
            (label("LoRA", MIDDLE, large), label("LoRA", MIDDLE, small)),
        )
        for name in ("SBoRA-FA", "SBoRA-FB", "Bone", "DoRA")
    ]
    full = (f"full fine-tuning, batch {large}", f"full fine-tuning, batch {small}")
    by_method = {words: {rank: label(name, rank, MIDDLE_BATCH) for rank in RANKS} for name, words in SLOPES.items()}
    falling = {rank: label(FALLING, rank, MIDDLE_BATCH) for rank in RANKS}
    by_method[FALLING] = falling | {MIDDLE: label("LoRA", MIDDLE, MIDDLE_BATCH)}
    slopes = [
        RateSlope(
            f"the best learning rate of {name} does not depend on the rank",
            "",
            tuple((arm_name, rank) for rank, arm_name in by_rank.items()),
        )
        for name, by_rank in by_method.items()
    ]
    batches = (label("LoRA", MIDDLE, small), label("LoRA", MIDDLE, large))
    return Study(
        name="factors",
        title="ranks and batch sizes of methods that train one factor or two, stories260k",
        protocol=__doc__ or "",
        arms=tuple(arms()),
        rates=half_decades(1e-3, 5),
        seeds=(0, 1, 2),
        reference=label("LoRA", MIDDLE, MIDDLE_BATCH),
        claims=(
            Beats("LoRA loses with a large batch, at equal examples", "2602.09492", *batches),
            *growth,
            LessGrowth(
                "a large batch costs full fine-tuning less than LoRA", "2602.09492", full, (batches[1], batches[0])
            ),
            *slopes,
        ),
    )
