"""Optimisers as a config says them, and the optax transformations that they are."""

import abc
import dataclasses
from typing import Literal

import jax
import optax
from jaxtyping import PyTree

from sborax.adapters.core import SboraxError
from sborax.adapters.tree import split
from sborax.config.codec import LiveObject
from sborax.data.options import above, at_least
from sborax.layout.state import Halves
from sborax.optim import lora_fa, lora_plus, lora_rite, split_lora_fa


class AbstractOptimizer(abc.ABC):
    """An optimiser: a frozen dataclass whose fields are its numbers. Extend it for one of your own."""

    @abc.abstractmethod
    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate by step, of a run of so many."""

    @abc.abstractmethod
    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        """The transformation on these learning rates."""

    def before(self) -> tuple[optax.GradientTransformation, ...]:
        """What gradients go through first, such as clipping: a procedure watches what comes out."""
        return ()

    def after(self) -> tuple[optax.GradientTransformation, ...]:
        """What updates go through last."""
        return ()

    def halves(self) -> Halves:
        """How adapters are split into what is trained and what is held fixed."""
        return split

    def without_rate(self) -> "AbstractOptimizer":
        """The same for every learning rate, where `build` asks for no other numbers of the schedule.

        Members of a sweep that share it share a program.
        """
        return self

    def label(self) -> str:
        """In a line for people."""
        return type(self).__name__


@dataclasses.dataclass(frozen=True)
class Optimizer(AbstractOptimizer):
    """An optax optimiser with warm-up, decay and clipping.

    name: "adamw", "adam", "sgd" (momentum betas[0]), "lion", "adafactor", "lora_rite" (arXiv:2410.20625) or "lora_fa"
        (arXiv:2308.03303); see `sborax.optim` for the last two.
    lr: peak learning rate. 2e-4 is LoRA's usual one (arXiv:2305.14314), of a in LoRA+.
    b_ratio: LoRA+'s lr of b over that of a (arXiv:2402.12354; 16 is usual there); 1 (default) for plain LoRA.
    schedule: after the warm-up: "constant", or "linear" or "cosine" down to `final` times the peak.
    warmup: number of steps if 1 or more, else the fraction of all steps.
    eps: None for 1e-8, with lora_rite and lora_fa 1e-6.
    decay: decoupled weight decay (norm scales and biases excepted).
    clip: largest global gradient norm, above 0, or None; with lora_rite that of the unmagnified gradients.
    """

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor", "lora_rite", "lora_fa"] = "adamw"
    lr: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: int | float = 0.03
    final: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    decay: float = 0.0
    clip: float | None = 1.0
    b_ratio: float = 1.0

    def __post_init__(self) -> None:
        at_least(0, lr=self.lr, warmup=self.warmup, final=self.final, decay=self.decay)
        above(0, eps=self.eps, clip=self.clip)
        at_least(1, b_ratio=self.b_ratio)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise SboraxError(f"betas must lie in [0, 1), got {list(self.betas)}")
        if self.decay and self.name in ("adam", "sgd", "adafactor"):
            raise SboraxError(f"{self.name} takes no decay here; use adamw or lion, or set decay=0")
        if self.eps is not None and self.name in ("sgd", "lion", "adafactor"):
            raise SboraxError(f"{self.name} takes no eps; set eps to None")

    def label(self) -> str:
        return f"{self.name} at {self.lr:g} ({self.schedule})"

    def rate(self, steps: int) -> optax.Schedule:
        """Linear warm-up from 0 to `lr`, then constant, linear or cosine decay over `steps`."""
        warmup = int(self.warmup) if self.warmup >= 1 else round(self.warmup * steps)
        rest = max(1, steps - warmup)
        last = self.final * self.lr
        if self.schedule == "constant":
            after = optax.constant_schedule(self.lr)
        elif self.schedule == "linear":
            after = optax.linear_schedule(self.lr, last, rest)
        else:
            after = optax.cosine_decay_schedule(self.lr, rest, alpha=self.final)
        if not warmup:
            return after
        # The first step moves: the ramp starts at lr / warmup, where transformers' starts at 0.
        ramp = optax.linear_schedule(self.lr / warmup, self.lr, max(1, warmup - 1))
        return optax.join_schedules([ramp, after], [warmup])

    def halves(self) -> Halves:
        return split_lora_fa if self.name == "lora_fa" else split

    def without_rate(self) -> "Optimizer":
        return dataclasses.replace(self, lr=0.0, schedule="constant", warmup=0, final=0.0)

    def before(self) -> tuple[optax.GradientTransformation, ...]:
        # lora_rite clips gradients that do not depend on the sizes of a and b; a clip in front would.
        if self.clip is None or self.name == "lora_rite":
            return ()
        return (optax.clip_by_global_norm(self.clip),)

    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        first, second = self.betas
        if self.name == "adamw":
            return optax.adamw(lr, first, second, self.eps or 1e-8, weight_decay=self.decay, mask=decayed)
        if self.name == "adam":
            return optax.adam(lr, first, second, self.eps or 1e-8)
        if self.name == "lion":
            return optax.lion(lr, first, second, weight_decay=self.decay, mask=decayed)
        if self.name == "adafactor":
            return optax.adafactor(lr)
        if self.name == "lora_rite":
            return lora_rite(lr, first, second, self.eps or 1e-6, self.decay, self.clip, mask=decayed)
        if self.name == "lora_fa":
            return lora_fa(lr, first, second, self.eps or 1e-6, self.decay)
        return optax.sgd(lr, momentum=first or None)

    def after(self) -> tuple[optax.GradientTransformation, ...]:
        return () if self.b_ratio == 1.0 else (lora_plus(self.b_ratio),)


def decayed(train: PyTree) -> PyTree:
    """Which leaves weight decay acts on: all but the norm scales and biases of the base."""

    def one(path: tuple, leaf: jax.Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return not (name.startswith("base/") and name.endswith(("/scale", "/bias")))

    return jax.tree_util.tree_map_with_path(one, train)


AnyOptimizer = AbstractOptimizer | LiveObject | optax.GradientTransformation
"""What an experiment takes: an optax transformation becomes a `LiveObject`."""


def halves(optimizer: AnyOptimizer) -> Halves:
    """How adapters are split for this optimiser into what it trains and what it holds fixed."""
    return optimizer.halves() if isinstance(optimizer, AbstractOptimizer) else split


def schedule(optimizer: AnyOptimizer, steps: int) -> optax.Schedule | None:
    """Learning rate by step; None for an optax transformation, which does not tell."""
    return optimizer.rate(steps) if isinstance(optimizer, AbstractOptimizer) else None


def make_optimizer(
    optimizer: AnyOptimizer,
    steps: int,
    watch: optax.GradientTransformation | None = None,
    lr: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """What comes before, `watch`, which is shown the gradients, then the optimiser on its schedule or on `lr`.

    Raises SboraxError for an optax transformation that was given to another program.
    """
    watched = () if watch is None else (watch,)
    if isinstance(optimizer, AbstractOptimizer):
        rule = optimizer.build(optimizer.rate(steps) if lr is None else lr)
        return optax.chain(*optimizer.before(), *watched, rule, *optimizer.after())
    return optax.chain(*watched, optimizer.require("optimizer") if isinstance(optimizer, LiveObject) else optimizer)
