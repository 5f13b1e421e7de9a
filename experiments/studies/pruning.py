"""Heads and hidden channels pruned by LoRA's gradients, by magnitude and at random.

What decides, fixed before anything ran. Every arm trains LoRA of rank 8 for the atlas' steps on Alpaca while groups are
pruned, in all layers alike; a model of four key-value heads loses none of them below a sparsity of a quarter. Metric
and choice of the learning rate are those of the atlas. Beside them stands the loss of WikiText-2, which no arm has
trained on. A perplexity is the exponential of a loss, so that both order arms alike.
"""

import dataclasses
from typing import Any, Literal

import sborax as sx
from experiments.studies.atlas import arm, rules
from experiments.studies.claims import Beats
from experiments.studies.study import Arm, Held, Study
from sborax.sweep.rates import half_decades

SPARSITIES = (0.5, 0.2, 0.3, 0.1)
"""Those that claims need come first."""
CLAIMED = (0.5, 0.2)
METRICS: dict[str, Literal["lora", "magnitude", "random"]] = {
    "LoRAPrune": "lora",
    "magnitude": "magnitude",
    "random": "random",
}
KEPT = Held(sx.Data("wikitext-2/test.txt", template="text", max_length=256, overlong="split"), items=32)


def label(name: str, sparsity: float) -> str:
    """The name of an arm."""
    return f"{name}, {100 * sparsity:g} %"


def pruned(name: str, **changes: Any) -> Arm:
    """An arm with LoRA, and with the loss of WikiText-2."""
    return dataclasses.replace(arm("Alpaca", name, **rules(sx.LoRA(rank=8)), **changes), kept=KEPT)


def study() -> Study:
    """The study."""
    arms = [
        pruned(label(name, sparsity), procedure=sx.LoRAPrune(ratio=sparsity, metric=metric, protect=0.0))
        for sparsity in SPARSITIES
        for name, metric in METRICS.items()
    ]
    claims = [
        Beats(f"LoRAPrune beats {other} pruning at {100 * sparsity:g} %{suffix}", "2305.18403", left, right, kind=kind)
        for sparsity in CLAIMED
        for other in ("magnitude", "random")
        for suffix, kind in (("", "items"), (", on WikiText-2", "kept"))
        for left, right in [(label("LoRAPrune", sparsity), label(other, sparsity))]
    ]
    return Study(
        name="pruning",
        title="structured pruning by three criteria, stories260k",
        protocol=__doc__ or "",
        arms=(pruned("LoRA"), *arms),
        rates=half_decades(1e-3, 5),
        seeds=(0, 1, 2),
        claims=tuple(claims),
    )
