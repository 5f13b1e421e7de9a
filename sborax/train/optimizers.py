"""The optimisers of sborax, one frozen dataclass each, and `Optimizer`, which picks one of them by name."""

import dataclasses
from typing import Literal

import jax
import optax
from jaxtyping import PyTree

from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import map_with_path
from sborax.data.options import above, at_least
from sborax.layout.state import Halves
from sborax.optim import lora_fa, lora_plus, lora_rite, split_lora_fa
from sborax.optim.lora_rite import balance_pairs
from sborax.train.optimizer import AbstractOptimizer


@dataclasses.dataclass(frozen=True)
class AbstractScheduled(AbstractOptimizer):
    """An optimiser with warm-up, a schedule, clipping and LoRA+'s ratio. A class that extends it adds `build`.

    Args:
    - lr: peak learning rate. 2e-4 is LoRA's usual one (arXiv:2305.14314); in LoRA+ that of a.
    - schedule: after the warm-up: "constant", or "linear" or "cosine" decay down to `final` times the peak.
    - warmup: number of steps if 1 or more, else the fraction of all steps.
    - final: learning rate after the decay over the peak.
    - clip: largest global norm of the gradient, above 0; None for no clipping.
    - b_ratio: LoRA+'s learning rate of b over that of a (arXiv:2402.12354; 16 is usual there); 1 for plain LoRA.

    Raises SboraxError for a value out of range.
    """

    lr: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: int | float = 0.03
    final: float = 0.0
    clip: float | None = 1.0
    b_ratio: float = 1.0

    def __post_init__(self) -> None:
        at_least(0, lr=self.lr, warmup=self.warmup, final=self.final)
        above(0, clip=self.clip)
        at_least(1, b_ratio=self.b_ratio)

    def rate(self, steps: int) -> optax.Schedule:
        """Linear warm-up from `lr / warmup` to `lr`, then constant, linear or cosine decay over the rest of `steps`."""
        warmup = int(self.warmup) if self.warmup >= 1 else round(self.warmup * steps)
        decay = max(1, steps - warmup)
        if self.schedule == "constant":
            after = optax.constant_schedule(self.lr)
        elif self.schedule == "linear":
            after = optax.linear_schedule(self.lr, self.final * self.lr, decay)
        else:
            after = optax.cosine_decay_schedule(self.lr, decay, alpha=self.final)
        if not warmup:
            return after
        # The first step moves: the ramp starts at lr / warmup, where transformers' starts at 0.
        ramp = optax.linear_schedule(self.lr / warmup, self.lr, max(1, warmup - 1))
        return optax.join_schedules([ramp, after], [warmup])

    def before(self) -> tuple[optax.GradientTransformation, ...]:
        return () if self.clip is None else (optax.clip_by_global_norm(self.clip),)

    def after(self) -> tuple[optax.GradientTransformation, ...]:
        return () if self.b_ratio == 1.0 else (lora_plus(self.b_ratio),)

    def without_rate(self) -> "AbstractScheduled":
        return dataclasses.replace(self, lr=0.0, schedule="constant", warmup=0, final=0.0)

    def label(self) -> str:
        return f"{type(self).__name__} at {self.lr:g} ({self.schedule})"


@dataclasses.dataclass(frozen=True)
class AdamW(AbstractScheduled):
    """Adam with decoupled weight decay, arXiv:1711.05101. The fields of `AbstractScheduled`, and:

    - betas, eps: as in `optax.adamw`.
    - decay: weight decay; norm scales and biases of the base do not decay.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self.betas, self.eps, self.decay)

    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(lr, *self.betas, self.eps, weight_decay=self.decay, mask=decayed)


@dataclasses.dataclass(frozen=True)
class Adam(AbstractScheduled):
    """Adam, arXiv:1412.6980. The fields of `AbstractScheduled`, and:

    - betas, eps: as in `optax.adam`.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self.betas, self.eps)

    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        return optax.adam(lr, *self.betas, self.eps)


@dataclasses.dataclass(frozen=True)
class SGD(AbstractScheduled):
    """Gradient descent with momentum. The fields of `AbstractScheduled`, and:

    - momentum: decay of the running sum of gradients, which is the direction; 0 for the gradient itself.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0:
            raise SboraxError(f"momentum must lie in [0, 1), got {self.momentum}")

    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        return optax.sgd(lr, momentum=self.momentum or None)


@dataclasses.dataclass(frozen=True)
class Lion(AbstractScheduled):
    """Lion, arXiv:2302.06675: the sign of an interpolated momentum. The fields of `AbstractScheduled`, and:

    - betas: of the interpolation and of the momentum (paper: 0.9 and 0.99).
    - decay: weight decay; norm scales and biases of the base do not decay.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self.betas, decay=self.decay)

    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        return optax.lion(lr, *self.betas, weight_decay=self.decay, mask=decayed)


@dataclasses.dataclass(frozen=True)
class Adafactor(AbstractScheduled):
    """Adafactor, arXiv:1804.04235: second moments by rows and columns, as in `optax.adafactor`.

    It has the fields of `AbstractScheduled` alone.
    """

    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        return optax.adafactor(lr)


@dataclasses.dataclass(frozen=True)
class LoRARITE(AbstractScheduled):
    """LoRA-RITE, arXiv:2410.20625: steps that depend on a and b through their product alone; see `sx.lora_rite`.

    The fields of `AbstractScheduled` (the authors' lr is 1e-3), and:

    - clip: largest global norm of the unmagnified gradients, not of the gradients themselves.
    - betas, eps, skip, escape, cap, balance: as in `sx.lora_rite`.
    - decay: weight decay; norm scales and biases of the base do not decay.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    decay: float = 0.0
    skip: float | None = 1.0
    escape: bool = False
    cap: float | None = None
    balance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self.betas, self.eps, self.decay)
        above(0, skip=self.skip, cap=self.cap)

    def before(self) -> tuple[optax.GradientTransformation, ...]:
        # Clipping happens inside: here it would depend on the sizes of a and b.
        return ()

    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        return lora_rite(
            lr,
            *self.betas,
            self.eps,
            self.decay,
            clip=self.clip,
            skip=self.skip,
            escape=self.escape,
            cap=self.cap,
            mask=decayed,
        )

    def after(self) -> tuple[optax.GradientTransformation, ...]:
        # Balancing goes by the step as it is made, so it comes last.
        return (*super().after(), *((balance_pairs(),) if self.balance else ()))


@dataclasses.dataclass(frozen=True)
class LoRAFA(AbstractScheduled):
    """LoRA-FA, arXiv:2308.03303: a is frozen, b follows the projected gradient; see `sx.lora_fa`.

    The fields of `AbstractScheduled`, and:

    - betas, eps, decay: as in `sx.lora_fa`.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self.betas, self.eps, self.decay)

    def halves(self) -> Halves:
        return split_lora_fa

    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        return lora_fa(lr, *self.betas, self.eps, self.decay)


OPTIMIZERS: dict[str, type[AbstractScheduled]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": SGD,
    "lion": Lion,
    "adafactor": Adafactor,
    "lora_rite": LoRARITE,
    "lora_fa": LoRAFA,
}
"""By the name that `Optimizer` takes."""


@dataclasses.dataclass(frozen=True)
class Optimizer(AbstractOptimizer):
    """An optimiser picked by name, for sweeps and command lines: `optimizer.name=lion`.

    `Optimizer(name="adamw", lr=1e-3)` makes the steps of `AdamW(lr=1e-3)`. The dataclasses have defaults of their own
    and more fields; this one has those that most share.

    Args:
    - name: "adamw" (`AdamW`), "adam" (`Adam`), "sgd" (`SGD`), "lion" (`Lion`), "adafactor" (`Adafactor`), "lora_rite"
        (`LoRARITE`) or "lora_fa" (`LoRAFA`).
    - lr, schedule, warmup, final, clip, b_ratio: as in `AbstractScheduled`.
    - betas: decay rates of moments; betas[0] is the momentum of sgd. Adafactor has none.
    - eps: None (default) for 1e-8, with lora_rite and lora_fa for 1e-6.
    - decay: decoupled weight decay; with adamw, lion, lora_rite and lora_fa.

    Raises SboraxError for a value out of range, and for an eps or a decay that the optimiser does not have.
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
        if self.name not in OPTIMIZERS:
            raise SboraxError(f"name must be one of {', '.join(OPTIMIZERS)}, got {self.name!r}")
        _check_moments(self.betas, self.eps, self.decay)
        fields = {field.name for field in dataclasses.fields(OPTIMIZERS[self.name])}
        if self.decay and "decay" not in fields:
            raise SboraxError(f"{self.name} takes no decay here; use adamw or lion, or set decay=0")
        if self.eps is not None and "eps" not in fields:
            raise SboraxError(f"{self.name} takes no eps; set eps to None")
        # The rule checks the ranges of the other fields.
        _ = self.rule

    @property
    def rule(self) -> AbstractScheduled:
        """The dataclass of this name, with these fields."""
        kind = OPTIMIZERS[self.name]
        options = {**vars(self), "momentum": self.betas[0]}
        if self.eps is None:
            del options["eps"]
        return kind(**{field.name: options[field.name] for field in dataclasses.fields(kind) if field.name in options})

    def rate(self, steps: int) -> optax.Schedule:
        return self.rule.rate(steps)

    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        return self.rule.build(lr)

    def before(self) -> tuple[optax.GradientTransformation, ...]:
        return self.rule.before()

    def after(self) -> tuple[optax.GradientTransformation, ...]:
        return self.rule.after()

    def halves(self) -> Halves:
        return self.rule.halves()

    def without_rate(self) -> AbstractScheduled:
        return self.rule.without_rate()

    def label(self) -> str:
        return f"{self.name} at {self.lr:g} ({self.schedule})"


def decayed(train: PyTree) -> PyTree:
    """The mask of weight decay: True for all leaves but the norm scales and biases of the base."""

    def decays(path: str, leaf: jax.Array) -> bool:
        return not (path.startswith("base/") and path.endswith(("/scale", "/bias")))

    return map_with_path(decays, train)


def _check_moments(betas: tuple[float, float], eps: float | None = None, decay: float = 0.0) -> None:
    """Raise SboraxError for a value out of range."""
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise SboraxError(f"betas must lie in [0, 1), got {list(betas)}")
    above(0, eps=eps)
    at_least(0, decay=decay)
