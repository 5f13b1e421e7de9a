"""The description of a run: one frozen dataclass, built in a Python file or read from an earlier `config.json`."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import optax
from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.paths import RuleLike, as_rules
from sborax.adapters.routing import routed_parts
from sborax.adapters.tree import split
from sborax.adapters.vectors import OF_EMBEDDING, by_module
from sborax.config.classes import EXPERIMENT, check_imported, execute, import_source
from sborax.config.codec import LiveObject, decode, encode, override, sources
from sborax.config.documents import read_object
from sborax.data.options import Data, at_least
from sborax.layout.mesh import check_mesh
from sborax.procedures import AbstractProcedure
from sborax.records.disk import CONFIG, replace
from sborax.train.loss import AbstractLoss, CrossEntropy
from sborax.train.optimizer import AnyOptimizer, halves
from sborax.train.optimizers import Optimizer

Also = Literal["norm", "bias", "adapted_bias", "router", "embed_tokens", "lm_head"]


@dataclasses.dataclass(frozen=True)
class Eval:
    """Held-out data and tasks of a run.

    Args:
    - data: held-out data; its loss is measured at the end of the run. None (default) for none.
    - every: steps between two measurements of that loss during the run; None (default) for none.
    - tasks: names as `sborax eval --tasks` takes them; `sborax train` and `sborax sweep` score finished runs on them.
    """

    data: Data | None = None
    every: int | None = None
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, every=self.every)


@dataclasses.dataclass(frozen=True)
class Save:
    """Checkpoints of a run, and its best adapter.

    Args:
    - every: steps between two checkpoints (default 100); another is made at the end.
    - keep: how many checkpoints stay, the newest ones (default 2).
    - best: whenever the held-out loss is the lowest so far, write the adapter to `best/` of the run directory.
    """

    every: int = 100
    keep: int = 2
    best: bool = False

    def __post_init__(self) -> None:
        at_least(1, every=self.every, keep=self.keep)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A fine-tuning run.

    Args:
    - model: a Hugging Face directory, hub id or `.gguf` file.
    - data: the training data, a `Data`.
    - rules: which kernels are adapted and how; the first match wins. `("q_proj", LoRA(rank=8))` is a rule.
    - optimizer: an optimiser such as `AdamW(lr=1e-4)`, an `Optimizer`, which picks one by name, a class of yours that
        extends `AbstractOptimizer`, or an optax transformation, which no `config.json` holds: a run with one is
        repeated and resumed from Python alone.
    - loss: the loss to minimise, a `CrossEntropy` or a class of yours that extends `AbstractLoss`.
    - steps, epochs: length of the run, in optimiser steps or in passes over the data. Give one of them.
    - batch_size: rows of one forward pass (default 4).
    - accumulate: forward passes of one step (default 1). The step equals that of one batch with all their rows.
    - precision: dtype of the base and of activations; trained leaves are float32.
    - quant: "nf4" for a 4-bit base.
    - mesh: sizes of the axes "data", "fsdp", "expert" and "tensor" over which the devices of all processes are laid
        out, such as {"fsdp": 4, "tensor": 2}; None (default) for one device. Rows of a batch lie on data, fsdp and
        expert, and experts of a mixture on expert. "slices" is the number of device groups with a slow network between
        them; the other sizes are then those within a group.
    - remat: the values of a layer that the backward pass recomputes: "cheap" (all but the results of matmuls: less
        memory, and faster on a CPU), "none", "full", or a list of names to keep while all else is recomputed, such as
        "attended,offload:gate_up" (`offload:` keeps the value in the host's memory).
    - attention: the program that computes attention: "xla" on any device, "cudnn" on NVIDIA GPUs (bfloat16 only),
        "splash" on TPUs, or "auto" (default) for the one that suits the device. Each keeps packed samples apart.
    - expert_capacity: how many tokens of a device each expert of a mixture takes in a training step, as a multiple of
        those at balanced load, such as 1.25 (GShard and Switch take 1 to 2). Tokens beyond this are dropped
        for that expert, `metrics.jsonl` has their share as `dropped`, and on a mesh with an "expert" axis rows go to
        the devices of their experts by all-to-all. None (default) drops no token. Held-out losses and tasks are
        computed without dropping any.
    - eval: held-out loss and tasks, an `Eval`.
    - save: checkpoints, a `Save`.
    - procedure: acts between steps: `COLA(every=...)`, `XGBLoRA`, `LoRAPrune`, `AdaLoRABudget`, `PRILoRAPruning`; None
        (default) for no procedure.
    - hint_batches: microbatches of the run's own data for methods that start from data: from gradients, as LoRAGA
        (default 8; its authors: 8 of one sample, later 64 of two), or from inputs, as EVA and CorDA (PEFT advises 256
        samples for CorDA).
    - seed_data: order of the data, in [0, 2^32).
    - seed_adapter: initial adapters, dropout, and draws of the procedure, in [0, 2^32).
    - log: logs beside `metrics.jsonl`: "tensorboard", "wandb".
    - train_base: train all leaves of the base: full fine-tuning.
    - train_also: leaves of the base to train beside the adapters: "norm", "bias", "adapted_bias" (biases of adapted
        projections, in all layers of a stack), "router", "embed_tokens", "lm_head".
    - train_tokens: ids of tokens whose vectors in the embedding are trained beside the adapters, and no others. A tied
        head shares them. For an untied head give the tokens by module: {"embed_tokens": (3, 5), "lm_head": (3, 5)}, or
        either. The optimiser and the adapter's file hold these vectors alone.
    - imports: modules, or paths of `.py` files, with classes of yours, as `--import` takes them. Those of the classes
        used in the experiment are added to them.

    Raises SboraxError for fields that are out of range or do not go together.
    """

    model: str
    data: Data
    rules: Sequence[RuleLike] = ()
    optimizer: AnyOptimizer = Optimizer()
    loss: AbstractLoss = CrossEntropy()
    steps: int | None = None
    epochs: int | float | None = None
    batch_size: int = 4
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    quant: Literal["nf4"] | None = None
    mesh: dict[str, int] | None = None
    remat: str = "cheap"
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    expert_capacity: int | float | None = None
    eval: Eval = Eval()
    save: Save = Save()
    procedure: AbstractProcedure | None = None
    hint_batches: int = 8
    seed_data: int = 0
    seed_adapter: int = 0
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    train_base: bool = False
    train_also: Sequence[Also] = ()
    train_tokens: Sequence[int] | dict[str, Sequence[int]] = ()
    imports: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, optax.GradientTransformation):
            object.__setattr__(self, "optimizer", LiveObject("an optax transformation", self.optimizer))
        if isinstance(self.data, list | tuple):
            object.__setattr__(self, "data", Data(self.data))
        object.__setattr__(self, "rules", as_rules(self.rules))
        object.__setattr__(self, "train_also", tuple(self.train_also))
        tokens = by_module(self.train_tokens)
        # As they were given: a list is of the embedding.
        of_modules = isinstance(self.train_tokens, Mapping)
        object.__setattr__(self, "train_tokens", tokens if of_modules else tokens.get(OF_EMBEDDING, ()))
        object.__setattr__(self, "imports", tuple(dict.fromkeys([*self.imports, *sources(self)])))
        at_least(1, steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate)
        at_least(1, hint_batches=self.hint_batches)
        for name, seed in (("seed_data", self.seed_data), ("seed_adapter", self.seed_adapter)):
            if not 0 <= seed < 2**32:
                raise SboraxError(f"{name} must lie in 0..2**32 - 1, got {seed}")
        if (self.steps is None) == (self.epochs is None):
            raise SboraxError("give steps or epochs, and set the other to None")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise SboraxError(f"epochs must be positive and finite, got {self.epochs}")
        trained = next((module for module in tokens if self.train_base or module in self.train_also), None)
        if trained is not None:
            raise SboraxError(f"train_tokens: all vectors of {trained} are trained; leave one of the two out")
        if not (self.rules or self.train_base or self.train_also or self.train_tokens):
            raise SboraxError("nothing to train: give rules, or train_base=True for full fine-tuning")
        if self.quant and (self.train_base or self.rules == ()):
            raise SboraxError("quant: a 4-bit base cannot be trained itself; give rules and leave train_base off")
        if self.save.best and (self.eval.data is None or self.eval.every is None):
            raise SboraxError("save.best: needs held-out losses to compare; set eval.data and eval.every")
        if self.expert_capacity is not None and not 0 < self.expert_capacity < math.inf:
            raise SboraxError(f"expert_capacity must be positive, got {self.expert_capacity}")
        check_mesh(self.mesh or {})
        if halves(self.optimizer) is not split and self.procedure is not None and not self.procedure.resets:
            name = type(self.procedure).__name__
            raise SboraxError(f"optimizer: it holds factors fixed whose gradients {name} needs; use another one")
        for method in (rule.method for rule in as_rules(self.rules) if rule.method is not None and not self.quant):
            if method.of_quantised:
                raise SboraxError(f'{type(method).__name__} starts from {method.of_quantised}; set quant="nf4"')
        if any(routed_parts(rule.method) for rule in as_rules(self.rules) if rule.method is not None):
            _check_prompts("data", self.data)
            if self.eval.data is not None:
                _check_prompts("eval.data", self.eval.data)


def _check_prompts(name: str, data: Data) -> None:
    """Raise SboraxError unless every row begins with a prompt and has no other, as routing needs."""
    reasons = {
        "packing=True puts several prompts into a row; set packing=False": data.packing,
        "loss_on='all' leaves no prompt; set loss_on='answer'": data.loss_on == "all",
        "template='text' has no prompt; use one with an answer": data.template == "text",
        "overlong='split' cuts rows off from their prompt; use 'drop' or 'truncate'": data.overlong == "split",
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise SboraxError(f"{name}: a method that routes by the prompt needs one in every row: {reason}")


def load_experiment(source: str, overrides: Sequence[str] = (), imports: Sequence[str] = ()) -> Experiment:
    """Read an experiment and change it.

    Args:
    - source: a Python file with `def experiment()`, a `config.json`, or a run directory.
    - overrides: dotted changes, `optimizer.lr=1e-4`.
    - imports: modules, or paths of `.py` files, with classes of yours; they are imported first. Those that a
        `config.json` names are not imported: the file may be a stranger's.

    Raises SboraxError for a missing file, a file without that function, an error inside it, classes that are not
    imported, and as `override` does.
    """
    for name in imports:
        import_source(name)
    path = epath.Path(source)
    if (path / CONFIG).exists():
        path = path / CONFIG
    if not path.exists() or path.is_dir():
        raise SboraxError(f"{source}: no such experiment; give a Python file, a config.json or a run directory")
    if path.suffix == ".py":
        built = override(_from_python(Path(path)), overrides)
    else:
        try:
            raw = read_object(path)
        except SboraxError as error:
            raise SboraxError(f"{error}; an experiment is a .py or .json file") from None
        recorded = raw.get("imports")
        if isinstance(recorded, list):
            check_imported(map(str, recorded), str(path))
        try:
            built = override(decode(Experiment, raw), overrides)
        except SboraxError as error:
            raise SboraxError(f"{path}: {error}") from None
    added = [str(Path(name).expanduser().absolute()) if name.endswith(".py") else name for name in imports]
    return dataclasses.replace(built, imports=(*built.imports, *added)) if added else built


def _from_python(path: Path) -> Experiment:
    try:
        build = vars(execute(path, f"{EXPERIMENT}{path.stem}")).get("experiment")
        if not callable(build):
            raise SboraxError(f"{path}: needs a function `def experiment() -> sborax.Experiment`")
        built = build()
    except SboraxError as error:
        raise SboraxError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (TypeError, NameError, AttributeError, SyntaxError, ImportError) as error:
        raise SboraxError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(built, Experiment):
        raise SboraxError(f"{path}: experiment() returned a {type(built).__name__}, not an Experiment")
    return built


def save_experiment(experiment: Experiment, run: epath.Path) -> None:
    """Write the `config.json` of a run, which is enough to repeat it. Raises SboraxError if the disk refuses."""
    replace(run / CONFIG, json.dumps(encode(experiment), indent=2) + "\n")
