"""A study as data: arms that are compared, the learning rates and seeds of each, and the claims they answer."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sborax as sx
from sborax.config.codec import encode

if TYPE_CHECKING:
    from experiments.studies.claims import AbstractClaim

FORMAT = 1
"""Changes when the same config would give other numbers."""


@dataclasses.dataclass(frozen=True)
class Held:
    """Held-out items: samples of `data`, spaced evenly over all but the first `skip`.

    Those with an even number select the learning rate; the others are reported.
    """

    data: sx.Data
    items: int = 64
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained, at every learning rate and with every seed of its study.

    - name: within its setting; `reference` of the study is the name to which the others of a setting are compared.
    - setting: the conditions that it shares with the arms it is compared to, such as the data.
    - experiment: with any learning rate and seed, which the study replaces.
    - held: the items whose answer losses are the result.
    - kept: text that the base knew; its loss after training says what was forgotten. None for none.
    """

    name: str
    setting: str
    experiment: sx.Experiment
    held: Held
    kept: Held | None = None

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """All that its numbers depend on beside seed and learning rate, without fields that have their default."""
        config = {"format": FORMAT, "experiment": sparse(self.experiment), "held": sparse(self.held)}
        return config if self.kept is None else {**config, "kept": sparse(self.kept)}


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms, how each is tuned, and what the results are to decide.

    - name: of its folder of results.
    - title: one line.
    - protocol: what decides, written before anything ran.
    - arms: in the order in which they run.
    - rates: learning rates that every arm tries, half a decade apart, ascending.
    - seeds: each sets the order of the data and the start of the adapters.
    - tuned: the seeds with which all rates are tried; the others run at the best rate alone. Empty for all seeds.
    - extensions: how often half a decade may be added on the side where the best rate is the last.
    - refined: whether the two rates halfway between an interior best one and those beside it are tried as well.
    - reference: the name of the arm that others of its setting are compared to.
    - claims: what the results decide.
    - prepare: writes data sets that its arms name, below a folder. None where all are under `$SBORAX_DATA`.
    """

    name: str
    title: str
    protocol: str
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tuned: tuple[int, ...] = ()
    extensions: int = 3
    refined: bool = False
    reference: str = "LoRA"
    claims: "tuple[AbstractClaim, ...]" = ()
    prepare: Callable[[Path], None] | None = None

    @property
    def tuning(self) -> tuple[int, ...]:
        """The seeds with which all rates are tried."""
        return self.tuned or self.seeds


def settings(study: Study) -> list[str]:
    """The settings of a study, in order."""
    return list(dict.fromkeys(arm.setting for arm in study.arms))


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is run and stored at once: a sweep of one arm over learning rates with one seed, or a single run of it."""

    arm: Arm
    rates: tuple[float, ...]
    seed: int

    @property
    def experiment(self) -> sx.Experiment:
        """The experiment with the piece's seed and its first learning rate."""
        plain = dataclasses.replace(self.arm.experiment, seed_data=self.seed, seed_adapter=self.seed)
        return with_rate(plain, self.rates[0])

    @property
    def config(self) -> dict[str, Any]:
        """All that its numbers depend on, as JSON values, without fields that have their default."""
        experiment, lr = dict(self.arm.config["experiment"]), self.rates[0]
        experiment["optimizer"] = {**experiment.get("optimizer", {"type": "Optimizer"}), "lr": lr}
        if self.seed:
            experiment |= {"seed_data": self.seed, "seed_adapter": self.seed}
        return {**self.arm.config, "experiment": experiment, "rates": list(self.rates)}

    @property
    def label(self) -> str:
        """What it is, for people."""
        return f"{self.arm.setting}, {self.arm.name}, seed {self.seed}, {len(self.rates)} rates"

    @functools.cached_property
    def digest(self) -> str:
        """The name of its result."""
        return digest_of(self.config)


@dataclasses.dataclass(frozen=True)
class Base:
    """A model before training. Its losses of `kept` text, measured once, tell what each arm has forgotten."""

    model: str
    precision: str
    kept: Held

    @classmethod
    def of(cls, arm: Arm) -> "Base | None":
        """That of an arm, dense where the arm's is in 4 bits; None for an arm without kept text."""
        return None if arm.kept is None else cls(arm.experiment.model, arm.experiment.precision, arm.kept)

    @property
    def config(self) -> dict[str, Any]:
        """All that its numbers depend on."""
        return {"format": FORMAT, "base": self.model, "precision": self.precision, "kept": sparse(self.kept)}

    @property
    def label(self) -> str:
        """What it is, for people."""
        return f"{self.model} before training, {self.kept.data.label()}"

    @functools.cached_property
    def digest(self) -> str:
        """The name of its result."""
        return digest_of(self.config)


def digest_of(config: Mapping[str, Any]) -> str:
    """Sixteen digits for a config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def with_rate(experiment: sx.Experiment, rate: float) -> sx.Experiment:
    """The experiment at another learning rate."""
    assert dataclasses.is_dataclass(experiment.optimizer)
    optimizer: Any = dataclasses.replace(experiment.optimizer, lr=rate)  # pyright: ignore
    return dataclasses.replace(experiment, optimizer=optimizer)


def sparse(value: Any) -> Any:
    """`encode(value)` without the fields that have their default, so that a field added later changes no digest."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if isinstance(value, tuple | list):
            return [sparse(item) for item in value]
        return {key: sparse(item) for key, item in value.items()} if isinstance(value, Mapping) else encode(value)
    fields: dict[str, Any] = {"type": type(value).__name__}
    for field in dataclasses.fields(value):
        option = getattr(value, field.name)
        if option != field.default:
            fields[field.name] = sparse(option)
    return fields
