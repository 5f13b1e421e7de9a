"""What a run tells: lines and a progress bar while it runs, `metrics.jsonl` and `summary.json` for later."""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from sborax.adapters.core import AbstractComposite, AbstractMethod, SboraxError
from sborax.adapters.paths import Plan, module_path
from sborax.config.documents import check_plain, parse, read_object
from sborax.records.disk import replace, writing

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PLAIN_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Metrics:
    """The lines of `metrics.jsonl`, which one process `writes`. Lines after a restored step are taken back."""

    def __init__(self, run: epath.Path, restored: int, writes: bool = True) -> None:
        self.path, self.writes = run / METRICS, writes
        self.lines: list[dict[str, Any]] = []
        if restored and writes and self.path.exists():
            check_plain(self.path)
            for text in self.path.read_bytes().splitlines():
                # A killed run may leave half a line, which belongs to a step that is done again.
                try:
                    line = parse(text, str(self.path))
                except SboraxError:
                    break
                if not _sound(line):
                    break
                if line["step"] <= restored:
                    self.lines.append(line)
        if writes:
            replace(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, line: dict[str, Any]) -> None:
        """Append one line, on disk at once.

        Raises SboraxError if the disk refuses.
        """
        self.lines.append(line)
        if self.writes:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def eval_loss(self) -> float | None:
        """The last loss on held-out data; None if there is none."""
        return next((float(line["eval_loss"]) for line in reversed(self.lines) if "eval_loss" in line), None)

    def losses(self) -> list[float]:
        """Every training loss so far."""
        return [float(line["loss"]) for line in self.lines if "loss" in line]


def _sound(line: Any) -> bool:
    """Whether a line says a step, and numbers where it says losses."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    losses = [line.get(name, 0.0) for name in ("loss", "eval_loss")]
    return all(type(loss) is float or (type(loss) is int and abs(loss) <= sys.float_info.max) for loss in losses)


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int, done: int, echo: Callable[[str], None]) -> None:
        self.steps, self.echo = steps, echo
        self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self.started, self.first, self.spoke = time.monotonic(), done, 0.0

    def say(self, text: str) -> None:
        """A line that a bar does not overwrite."""
        if self.bar is None:
            self.echo(text)
        else:
            with self.bar.external_write_mode():
                self.echo(text)

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """The state after `step` steps."""
        numbers = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.spoke >= PLAIN_EVERY or step == self.steps:
            self.spoke = now
            left = (now - self.started) / max(1, step - self.first) * (self.steps - step)
            self.echo(f"step {step:,}/{self.steps:,}: {numbers}, {clock(left)} left")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


class Speed:
    """Tokens a second, steps that compiled left out."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.last = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One step."""
        self.tokens += tokens
        self.seconds += seconds
        self.last = tokens / seconds

    def mean(self) -> float | None:
        """Over all steps; None before the first."""
        return self.tokens / self.seconds if self.seconds else None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came out of a run. Times in seconds, memory in bytes, losses in nats per token.

    tokens_per_second: padding and steps that compiled left out. finished: False if stopped by a signal.
    """

    finished: bool
    steps: int
    trainable_parameters: int
    base_parameters: int
    first_loss: float | None
    last_loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    seconds: float
    peak_memory: int
    samples: str
    device: str
    versions: dict[str, str]
    git_revision: str | None

    @classmethod
    def of(
        cls, metrics: Metrics, speed: Speed, began: float, finished: bool, steps: int, trained: int, total: int,
        samples: str, devices: int,
    ) -> "Summary":  # fmt: skip
        """Of a run that ends now. began: by `time.monotonic`; trained, total: parameters, these of the base."""
        losses = metrics.losses()
        return cls(
            finished=finished,
            steps=steps,
            trainable_parameters=trained,
            base_parameters=total,
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            eval_loss=metrics.eval_loss(),
            tokens_per_second=speed.mean(),
            seconds=time.monotonic() - began,
            peak_memory=peak_memory(),
            samples=samples,
            device=f"{devices} x {jax.devices()[0].device_kind}",
            versions=versions(),
            git_revision=git_revision(),
        )

    @classmethod
    def read(cls, run: epath.Path) -> "Summary | None":
        """What `write` wrote; None if nothing is there, or something else."""
        if not (run / SUMMARY).exists():
            return None
        try:
            content = read_object(run / SUMMARY)
        except SboraxError:
            return None
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**content) if content.keys() == names else None

    def write(self, run: epath.Path) -> None:
        """Write `summary.json`. Raises SboraxError if the disk refuses."""
        replace(run / SUMMARY, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def name(method: AbstractMethod) -> str:
    """A method in one line: the options that differ from their defaults."""
    if isinstance(method, AbstractComposite):
        return type(method).__name__
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(method)  # type: ignore[arg-type]
    given = [(field, getattr(method, field.name)) for field in fields]
    shown = [
        f"{field.name}={name(value) if isinstance(value, AbstractMethod) else value}"
        for field, value in given
        if field.name == "rank" or value != field.default
    ]
    return f"{type(method).__name__}({', '.join(shown)})"


def describe(plan: Plan) -> list[str]:
    """One line for every adapted kernel and one for those left alone."""
    lines = []
    for site in plan.sites:
        stack = "".join(f"{size} x " for size in site.stack)
        lines.append(f"  {module_path(site.path)[0]}: {stack}({site.shape[0]}, {site.shape[1]}), {name(site.method)}")
    if plan.untouched and plan.sites:
        lines.append(f"  not adapted: {', '.join(sorted({module_path(path)[0] for path in plan.untouched}))}")
    return lines


@functools.cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    packages = ("sborax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            continue
    return found


@functools.cache
def git_revision() -> str | None:
    """The commit of the checkout that this package runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory() -> int:
    """Bytes: of the device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
