"""Methods that lose to LoRA in a short run, and methods that do not, in one of four times the steps.

What decides, fixed before anything ran. In the 100 steps of the atlas OLoRA, LoRA+ and LoRA-RITE end above LoRA, which
their papers do not see; this study asks whether that is because the run is short. Data, metric, learning rates and
seeds are those of the atlas, on E2E, and so are the arms of 100 steps: their results are shared. In 400 steps of 8 rows
no example is seen twice. A method profits from length if its loss falls by more than LoRA's does.
"""

from typing import Any

import sborax as sx
from experiments.studies.atlas import OPTIMIZERS, TUNING, arm, rules
from experiments.studies.claims import Beats, LessGrowth
from experiments.studies.study import Study

SHORT, LONG = 100, 400
"""Steps."""
PAPERS = {
    "OLoRA": "2406.01775",
    "LoRA+": "2402.12354",
    "LoRA-RITE": "2410.20625",
    "SBoRA-FA": "2407.05413",
    "Bone": "2409.15371",
}


def label(name: str, steps: int) -> str:
    """The name of an arm."""
    return f"{name}, {steps} steps"


def study() -> Study:
    """The study."""
    lora = rules(sx.LoRA(rank=8))
    arms: dict[str, dict[str, Any]] = {
        "LoRA": lora,
        "OLoRA": rules(sx.OLoRA(rank=8)),
        "LoRA+": {**lora, "optimizer": OPTIMIZERS["LoRA+"]},
        "LoRA-RITE": {**lora, "optimizer": OPTIMIZERS["LoRA-RITE"]},
        # Of LoRA's parameters, as in the atlas.
        "SBoRA-FA": rules(sx.SBoRA(rank=15)),
        "Bone": rules(sx.Bone(rank=15)),
    }
    return Study(
        name="lengths",
        title="a run of four times the steps, stories260k",
        protocol=__doc__ or "",
        arms=tuple(
            arm("E2E", label(name, steps), **{**changes, "steps": steps})
            for steps in (LONG, SHORT)
            for name, changes in arms.items()
        ),
        **TUNING,
        reference=label("LoRA", LONG),
        claims=(
            *(
                Beats(f"{name} beats LoRA in {LONG} steps", paper, label(name, LONG), label("LoRA", LONG))
                for name, paper in PAPERS.items()
            ),
            *(
                LessGrowth(
                    f"four times the steps gain {name} more than LoRA",
                    paper,
                    (label(name, LONG), label(name, SHORT)),
                    (label("LoRA", LONG), label("LoRA", SHORT)),
                )
                for name, paper in PAPERS.items()
            ),
        ),
    )
