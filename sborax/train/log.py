"""Logs beside `metrics.jsonl`: TensorBoard and Weights & Biases, each an optional extra."""

import abc
import contextlib
import importlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.config.codec import encode
from sborax.config.documents import read_object
from sborax.records.disk import replace, writing
from sborax.train.experiment import Experiment


class AbstractLog(abc.ABC):
    """Takes the numbers of a run, step by step."""

    @abc.abstractmethod
    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the numbers of one step. Raises SboraxError if they cannot be written."""

    @abc.abstractmethod
    def close(self) -> None:
        """Write what is still buffered."""


class TensorBoard(AbstractLog):
    """Event files under `tensorboard/` of the run directory."""

    def __init__(self, run: epath.Path, config: Mapping[str, Any], done: int) -> None:
        protocol = importlib.import_module("tensorboardX.proto.event_pb2")
        self.place, self.event = run / "tensorboard", protocol.Event
        self.scalar = importlib.import_module("tensorboardX.summary").scalar
        # Not `SummaryWriter`: its thread dies on a full disk, and the run would then wait for it without end.
        with writing(self.place):
            self.place.mkdir(parents=True, exist_ok=True)
            writer = importlib.import_module("tensorboardX.event_file_writer").EventsWriter
            # Files of two processes that begin in the same second would have one name.
            self.writer = writer(str(self.place / "events"), f".{done}")
            if done:
                # Steps that a former process made after its last checkpoint are made again.
                start = protocol.SessionLog(status=protocol.SessionLog.START)
                self.writer.write_event(self.event(wall_time=time.time(), step=done + 1, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        with writing(self.place):
            for name, value in scalars.items():
                event = self.event(wall_time=time.time(), step=step, summary=self.scalar(name, value))
                self.writer.write_event(event)
            self.writer.flush()

    def close(self) -> None:
        with writing(self.place):
            self.writer.close()


class WeightsAndBiases(AbstractLog):
    """A run of Weights & Biases, which a resumed run continues. WANDB_* variables set project, entity and mode."""

    def __init__(self, run: epath.Path, config: Mapping[str, Any], done: int) -> None:
        wandb = importlib.import_module("wandb")
        self.note = run / "wandb.json"
        run_id = read_object(self.note).get("id") if done and self.note.exists() else None
        try:
            # By default wandb returns the run that another member of a sweep has opened.
            self.run = wandb.init(
                dir=str(run), name=run.name, id=run_id, resume="allow", config=dict(config), reinit="create_new"
            )
        except wandb.Error as error:
            raise SboraxError(f"log: wandb did not start ({error}); `wandb login`, or WANDB_MODE=offline") from error
        replace(self.note, json.dumps({"id": self.run.id}) + "\n")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


LOGS = {"tensorboard": ("tensorboardX", TensorBoard), "wandb": ("wandb", WeightsAndBiases)}
"""By the name of the extra: the package that it installs, and the log that uses it."""


def check_logs(names: Sequence[str]) -> None:
    """Raise SboraxError for an unknown log, or one whose package cannot be imported."""
    for name in names:
        if name not in LOGS:
            raise SboraxError(f"log: there is no {name!r}; there are {', '.join(LOGS)}")
        try:
            importlib.import_module(LOGS[name][0])
        except ImportError as error:
            raise SboraxError(f"log: {name} needs a package ({error}); pip install 'sborax[{name}]'") from None


def open_logs(
    experiment: Experiment, run: epath.Path, done: int, ends: contextlib.ExitStack
) -> tuple[AbstractLog, ...]:
    """The logs of a run that has made `done` steps; `ends` closes them."""
    opened = tuple(LOGS[name][1](run, encode(experiment), done) for name in experiment.log)
    for log in opened:
        ends.callback(log.close)
    return opened


def scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line of `metrics.jsonl` by name; nested names have a slash: `methods/LoRA/grad_norm`."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif not isinstance(value, (str, bool)) and f"{prefix}{name}" != "step":
            yield f"{prefix}{name}", float(value)
