"""Methods on a base in 4 bits against each on the dense base.

What decides, fixed before anything ran. Model, data, metric, learning rates and seeds are those of the study `real`, on
E2E, and so are the arms on the dense base: their results are shared. Kernels of layers are in NF4, the weights that
adapters train are not. Methods that rewrite the base, such as PiSSA, quantise what is left of it, so that QPiSSA starts
nearer to the dense base than QLoRA.

The claims that QSBoRA and QBone forget less than QLoRA were added after all arms had run. They ask of a 4-bit base what
`real` asks of the dense one.
"""

from experiments.studies.atlas import rules
from experiments.studies.claims import Beats, LessGrowth
from experiments.studies.real import FORGETTING, METHODS, TUNING, arm
from experiments.studies.study import Study

NAMED = ("LoRA", "SBoRA-FA", "SBoRA-FB", "Bone", "PiSSA", "DoRA")
SHARE = 0.02
"""The share of its loss that 4 bits may cost a method."""


def study() -> Study:
    """The study."""
    dense = [arm("E2E", name, **rules(METHODS[name])) for name in NAMED]
    packed = [arm("E2E", f"Q{name}", **rules(METHODS[name]), quant="nf4") for name in NAMED]
    return Study(
        name="quantised",
        title="a base in 4 bits, SmolLM2-135M",
        protocol=__doc__ or "",
        arms=tuple(pair for pairs in zip(packed, dense, strict=True) for pair in pairs),
        **TUNING,
        reference="QLoRA",
        claims=(
            Beats("QSBoRA-FA beats QLoRA at equal parameters", "2407.05413", "QSBoRA-FA", "QLoRA"),
            Beats("QSBoRA-FB beats QLoRA at equal parameters", "2407.05413", "QSBoRA-FB", "QLoRA"),
            Beats("QSBoRA-FA is as good as QLoRA at equal parameters", "2407.05413", "QSBoRA-FA", "QLoRA", slack=0.01),
            Beats("QBone beats QLoRA at equal parameters", "2409.15371", "QBone", "QLoRA"),
            Beats("QPiSSA beats QLoRA", "2404.02948", "QPiSSA", "QLoRA"),
            Beats("QDoRA beats QLoRA", "2402.09353", "QDoRA", "QLoRA"),
            LessGrowth("4 bits cost PiSSA less than LoRA", "2404.02948", ("QPiSSA", "PiSSA"), ("QLoRA", "LoRA")),
            *(Beats(f"Q{name} forgets less than QLoRA", "", f"Q{name}", "QLoRA", kind="kept") for name in FORGETTING),
            *(
                Beats(f"4 bits cost {name} less than {100 * SHARE:g} %", "2305.14314", f"Q{name}", name, slack=SHARE)
                for name in NAMED
            ),
        ),
    )
