"""Every method at its best learning rate, on a model of 260 thousand parameters.

What decides, fixed before anything ran. The metric is the loss of held-out answers after the last step, in nats a
token, a mean over items. The learning rate of an arm is the one whose mean over seeds is lowest on the selecting half
of the items; numbers are those of the other half. Arms are compared to LoRA of rank 8, paired by item and by seed.
Three seeds try every rate, two more run at the best one. Parameters are matched to LoRA's as nearly as a method can.

Some arms were added after the first results. TinyLoRA of rank 32, VBLoRA of rank 8 and DeLoRA of strength 5 are there
because these methods came out far behind: TinyLoRA's default rank leaves four numbers a kernel to train, VBLoRA with
eight vectors has LoRA's parameters at rank 4, and DeLoRA's default strength, 15, is too large for this model. AdaLoRA,
KaSA, MonteCLoRA and PRILoRA now have the procedures and losses of their papers, and SARA and PRILoRA their ranks by
layer; their uniform ranks are in the study `ranks`.
"""

import dataclasses
import json
from typing import Any

import sborax as sx
from experiments.studies.claims import Beats, RateCosts, RateRatio, Within
from experiments.studies.matching import STORED, matched, sized
from experiments.studies.study import Arm, Held, Study
from sborax import methods
from sborax.adapters.core import AbstractMethod
from sborax.models.config import LlamaConfig
from sborax.sweep.rates import half_decades

MODEL = "stories260k"
SHAPE = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
LINEARS = "self_attn|mlp"
RANK = 8
BUDGET = 46_240
"""Trained parameters of LoRA, to which the others are matched."""
TEXT: dict[str, Any] = {"max_length": 128}
E2E = sx.Data("e2e_nlg/trainset.csv", template="{mr}\n", answer="{ref}", limit=4000, **TEXT)
ALPACA = sx.Data(
    "alpaca_en_demo", template="{instruction}\n{input}\n", answer="{output}", overlong="truncate", limit=880, **TEXT
)
SETTINGS = {
    "E2E": (E2E, Held(dataclasses.replace(E2E, name="e2e_nlg/devset.csv", limit=None))),
    # The records after those that are trained on.
    "Alpaca": (ALPACA, Held(dataclasses.replace(ALPACA, limit=None), skip=880)),
}
"""Data that the model, which has read children's stories, does not know."""

VARIANTS: dict[str, AbstractMethod] = {
    "SBoRA-FA": sx.SBoRA(),
    "SBoRA-FB": sx.SBoRA(variant="FB"),
    "rsLoRA": sx.LoRA(alpha=16.0, rslora=True),
    # Sized by a share, which nothing searches: 48,455 and 46,195 trained parameters.
    "OSF": sx.OSF(kept=0.87),
    "SuperTuning": sx.SuperTuning(sparsity=0.796),
    # Their defaults, 8 blocks and groups of 16, do not divide 172 outputs or inputs.
    "BDLoRA": sx.BDLoRA(blocks=4),
    "QALoRA": sx.QALoRA(group=4),
    # Sized by a share, too: 46,095.
    "FRoD": sx.FRoD(density=0.16),
    # At two sizes, 46,350.
    "AdaMSS": sx.AdaMSS(subspace_rank=6),
    # Vectors as long as all sides allow, and every coefficient twice: 46,272 and 46,240.
    "VBLoRA": sx.VBLoRA(vectors=8, length=4),
    "VBLoRA, rank 8": sx.VBLoRA(vectors=4, length=4),
    # A mixture of 2 components, its default, has four entries, however many coefficients make it.
    "TinyLoRA": sx.TinyLoRA(rank=32),
    "TinyLoRA, rank 2": sx.TinyLoRA(),
    "UniLoRA": sx.UniLoRA(rank=16),
    "DeLoRA, strength 5": sx.DeLoRA(strength=5.0),
    # Ranks by layer, of LoRA's size in all; AdaLoRA's begin at 12.
    "PRILoRA": sx.PRILoRA(),
    "SARA": sx.SARA(rank=sx.SingularMass(0.25)),
    "AdaLoRA": sx.AdaLoRA(),
    "AdaLoRA, rank 8": sx.AdaLoRA(),
    "MoSARA": sx.MoSARA(rank=8),
    "KaSA without regulariser": sx.KaSA(),
    "MonteCLoRA without regulariser": sx.MonteCLoRA(),
}
"""Options that make another method of a class, or its size."""
UNSIZED = ("AdaLoRA", "PRILoRA", "SARA")
"""Methods that choose a rank for each layer, whose ranks are left as they are."""
COMPANIONS: dict[str, dict[str, Any]] = {
    "AdaLoRA": {"procedure": sx.AdaLoRABudget(warmup=20, cooldown=40, every=5)},
    "KaSA": {"loss": sx.KaSALoss()},
    "MonteCLoRA": {"loss": sx.MonteCLoRALoss()},
    "PRILoRA": {"procedure": sx.PRILoRAPruning(every=20)},
}
"""Procedures and losses that belong to a method."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "LoRA+": {"b_ratio": 16.0},
    "LoRA-RITE": {"name": "lora_rite"},
    "LoRA-FA": {"name": "lora_fa"},
}
"""Other optimisers of LoRA's factors."""
TUNING: dict[str, Any] = {"rates": half_decades(3e-4, 7), "seeds": (0, 1, 2, 3, 4), "tuned": (0, 1, 2)}
"""Learning rates and seeds, here and in the studies that share them."""
NAMED = ("SBoRA-FA", "SBoRA-FB", "Bone", "DoRA", "PiSSA")
"""Methods that are also compared to LoRA at its rank."""


LIKE_LORA = ("rsLoRA", "DoRA", "PiSSA", "OLoRA", "LoRAGA", "LoRA+", "LoRA-RITE")
"""Methods that differ from LoRA in scale, start or optimiser."""
BEATS = (
    Beats("SBoRA-FA beats LoRA at equal parameters", "2407.05413", "SBoRA-FA"),
    Beats("SBoRA-FB beats LoRA at equal parameters", "2407.05413", "SBoRA-FB"),
    Beats("SBoRA-FA is as good as LoRA with half the parameters", "2407.05413", "SBoRA-FA, rank 8", slack=0.01),
    Beats("SBoRA-FB is as good as LoRA with half the parameters", "2407.05413", "SBoRA-FB, rank 8", slack=0.01),
    Beats("Bone beats LoRA at equal parameters", "2409.15371", "Bone"),
    Beats("Bat beats Bone", "2409.15371", "Bat", "Bone at Bat's parameters"),
    Beats("DoRA beats LoRA", "2402.09353", "DoRA"),
    Beats("PiSSA beats LoRA", "2404.02948", "PiSSA"),
    Beats("OLoRA beats LoRA", "2406.01775", "OLoRA"),
    Beats("LoRA-GA beats LoRA", "2407.05000", "LoRAGA"),
    Beats("LoRA+ beats LoRA", "2402.12354", "LoRA+"),
    Beats("LoRA-RITE beats LoRA", "2410.20625", "LoRA-RITE"),
    Beats("rsLoRA beats LoRA", "2312.03732", "rsLoRA"),
    Beats("ResLoRA beats LoRA", "2402.18039", "ResLoRA"),
)
SHARE = 0.02
"""The share of LoRA's loss within which its variants are said to end, and that a wrong learning rate costs."""
RATES = (
    RateCosts("half a decade below its best learning rate LoRA loses more than 2 %", "", False, SHARE),
    RateCosts("half a decade above its best learning rate LoRA loses more than 2 %", "", True, SHARE),
)


def everything() -> dict[str, AbstractMethod]:
    """Every method of the package with its defaults, but for those of a quantised base, and the variants."""
    plain = {name: getattr(sx, name)() for name in methods.__all__ if name != "SBoRA"}
    return {**{name: method for name, method in plain.items() if not method.of_quantised}, **VARIANTS}


def method_arms() -> dict[str, dict[str, Any]]:
    """What each arm changes in the common experiment: every method of the package at LoRA's parameters, and more."""
    sizes, plain = json.loads(STORED.read_text()), everything()
    at_budget = {
        name: sized(method, sizes[name]) if name in sizes else matched(SHAPE, LINEARS, method, BUDGET)
        for name, method in plain.items()
        if name not in UNSIZED
    }
    at_budget |= {name: plain[name] for name in UNSIZED}
    arms: dict[str, dict[str, Any]] = {"LoRA": rules(at_budget.pop("LoRA")), "full fine-tuning": {"train_base": True}}
    arms |= {name: {**rules(sx.LoRA(rank=RANK)), "optimizer": changes} for name, changes in OPTIMIZERS.items()}
    names = (*NAMED, *sorted(at_budget.keys() - set(NAMED)))
    arms |= {name: {**rules(at_budget[name]), **COMPANIONS.get(name, {})} for name in names}
    arms |= {
        f"{name}, rank {RANK}": rules(sized(plain[name], RANK))
        for name in NAMED
        if at_budget[name] != sized(plain[name], RANK)
    }
    # A block of Bat must divide every side of a kernel, so Bat reaches no more than a quarter of LoRA's parameters.
    # Bone trains as many as Bat at equal rank.
    return arms | {"Bone at Bat's parameters": rules(sized(sx.Bone(), sizes["Bat"]))}


def rules(method: AbstractMethod) -> dict[str, Any]:
    """The experiment's rules for one method on all linear layers."""
    return {"rules": (sx.Rule(LINEARS, method),)}


def arm(setting: str, name: str, optimizer: dict[str, Any] | None = None, **changes: Any) -> Arm:
    """An arm of the common experiment with some fields changed."""
    data, held_out = SETTINGS[setting]
    common: dict[str, Any] = {"steps": 100, "batch_size": 8, "save": sx.Save(every=50, keep=1)}
    experiment = sx.Experiment(MODEL, data, optimizer=sx.Optimizer(**(optimizer or {})), **{**common, **changes})
    return Arm(name, setting, experiment, held_out)


def in_every_setting(arms: dict[str, dict[str, Any]]) -> tuple[Arm, ...]:
    """The arms on all data, by what each changes in the common experiment."""
    return tuple(arm(setting, name, **changes) for setting in SETTINGS for name, changes in arms.items())


def study() -> Study:
    """The study."""
    arms = method_arms()
    claimed = {"full fine-tuning", *LIKE_LORA, *(name for claim in BEATS for name in (claim.arm, claim.other))}
    # Arms run in this order.
    first = [name for name in arms if name in claimed]
    unclaimed = [name for name in arms if name not in claimed]
    return Study(
        name="atlas",
        title="every method at its best learning rate, stories260k",
        protocol=__doc__ or "",
        arms=(
            *in_every_setting({name: arms[name] for name in first}),
            *(arm("E2E", name, **arms[name]) for name in unclaimed),
        ),
        **TUNING,
        claims=(
            *BEATS,
            RateRatio("LoRA's best learning rate is 10 times that of full fine-tuning", "", "full fine-tuning", 10.0),
            RateRatio("LoRA's best learning rate is 3 times that of full fine-tuning", "", "full fine-tuning", 3.0),
            Within("all variants of LoRA are within 2 % of it once tuned", "2602.04998", LIKE_LORA, SHARE),
            *RATES,
        ),
    )
