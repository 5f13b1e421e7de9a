"""Chains, boosting, shortcuts and other starts against LoRA, by the end of a run and by the way to it.

What decides, fixed before anything ran. Every arm has LoRA's steps, and its parameters at rank 8. XGBLoRA alone has
fewer: rank 1 on a third of the layers at a time, as in its paper. The end is the loss of held-out answers as in the
atlas. The way is the mean training loss over the steps, at the learning rate that is best for the end. Learning rate
and seeds are those of the atlas.
"""

import sborax as sx
from experiments.studies.atlas import OPTIMIZERS, TUNING, in_every_setting, rules
from experiments.studies.claims import Beats
from experiments.studies.study import Study

PAPERS = {
    "COLA": "2401.04151",
    "XGBLoRA": "2410.19694",
    "ResLoRA": "2402.18039",
    "LoRA-GA": "2407.05000",
    "PiSSA": "2404.02948",
    "OLoRA": "2406.01775",
    "LoRA+": "2402.12354",
}


def study() -> Study:
    """The study."""
    lora = rules(sx.LoRA(rank=8))
    arms = {
        "LoRA": lora,
        "COLA": {**lora, "procedure": sx.COLA(every=25)},
        "XGBLoRA": {**rules(sx.LoRA(rank=1)), "procedure": sx.XGBLoRA()},
        "ResLoRA": rules(sx.ResLoRA(rank=8)),
        "LoRA-GA": rules(sx.LoRAGA(rank=8)),
        "PiSSA": rules(sx.PiSSA(rank=8)),
        "OLoRA": rules(sx.OLoRA(rank=8)),
        "LoRA+": {**lora, "optimizer": OPTIMIZERS["LoRA+"]},
    }
    return Study(
        name="composed",
        title="the end of a run and the way to it, stories260k",
        protocol=__doc__ or "",
        arms=in_every_setting(arms),
        **TUNING,
        claims=(
            *(Beats(f"{name} ends below LoRA", paper, name) for name, paper in PAPERS.items()),
            *(
                Beats(f"{name} learns faster than LoRA (mean training loss)", paper, name, kind="area")
                for name, paper in PAPERS.items()
            ),
        ),
    )
