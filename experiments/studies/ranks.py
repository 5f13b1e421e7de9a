"""Do ranks that a paper chooses for each layer beat one rank for all, and the same ranks in another order?

What decides, fixed before anything ran. Metric, learning rate and seeds are those of the atlas. SARA's ranks cover a
quarter of the sum of a weight's singular values, which is 2 % fewer parameters than rank 8 everywhere. Its control
shuffles these ranks among the layers of each kernel. PRILoRA's ranks grow from 4 to 12 with depth, which trains as many
parameters as rank 8; its controls are rank 8, and ranks that shrink from 12 to 4. PRILoRA's pruning is an arm of its
own.
"""

import sborax as sx
from experiments.studies.atlas import TUNING, in_every_setting, rules
from experiments.studies.claims import Beats
from experiments.studies.study import Study

MASS = sx.SingularMass(0.25)
GROWING = sx.LinearRanks(4, 12)
METHODS = {
    "LoRA": sx.LoRA(rank=8),
    "SARA, uniform ranks": sx.SARA(rank=8),
    "SARA": sx.SARA(rank=MASS),
    "SARA, shuffled ranks": sx.SARA(rank=sx.ShuffledRanks(MASS)),
    "LoRA, SARA's ranks": sx.LoRA(rank=MASS),
    "PRILoRA's ranks": sx.PRILoRA(rank=GROWING),
    "PRILoRA, uniform ranks": sx.PRILoRA(rank=8),
    "PRILoRA, shrinking ranks": sx.PRILoRA(rank=sx.LinearRanks(12, 4)),
}


def study() -> Study:
    """The study."""
    arms = {name: rules(method) for name, method in METHODS.items()}
    arms["PRILoRA, ranks and pruning"] = {**rules(sx.PRILoRA(rank=GROWING)), "procedure": sx.PRILoRAPruning(every=20)}
    return Study(
        name="ranks",
        title="ranks by layer against uniform and shuffled ones, stories260k",
        protocol=__doc__ or "",
        arms=in_every_setting(arms),
        **TUNING,
        claims=(
            Beats("SARA's ranks beat uniform ones", "2408.03290", "SARA", "SARA, uniform ranks"),
            Beats("SARA's ranks beat the same ranks shuffled", "2408.03290", "SARA", "SARA, shuffled ranks"),
            Beats("SARA's ranks beat uniform ones in LoRA", "2408.03290", "LoRA, SARA's ranks"),
            Beats("SARA beats LoRA", "2408.03290", "SARA"),
            Beats("PRILoRA's ranks beat uniform ones", "2401.11316", "PRILoRA's ranks", "PRILoRA, uniform ranks"),
            Beats(
                "ranks that grow beat ranks that shrink", "2401.11316", "PRILoRA's ranks", "PRILoRA, shrinking ranks"
            ),
            Beats("PRILoRA's pruning helps", "2401.11316", "PRILoRA, ranks and pruning", "PRILoRA's ranks"),
        ),
    )
