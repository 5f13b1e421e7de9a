"""Reports of a run: lines and a progress bar on the terminal, `metrics.jsonl` and `summary.json` on disk."""

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
from sborax.config.documents import check_plain, is_number, parse, read_object
from sborax.records.disk import replace, writing

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PLAIN_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""


class Metrics:
    """The lines of `metrics.jsonl`.

    - run: the run directory.
    - restored: the step that the run resumes from; later lines are dropped. 0 for a new run.
    - writes: whether this process writes the file.
    """

    def __init__(self, run: epath.Path, restored: int, writes: bool = True) -> None:
        self.path, self.writes = run / METRICS, writes
        self.lines: list[dict[str, Any]] = []
        if restored and writes and self.path.exists():
            check_plain(self.path)
            for text in self.path.read_bytes().splitlines():
                # A killed run may leave half a line. Its step is made again.
                try:
                    line = parse(text, str(self.path))
                except SboraxError:
                    break
                if not _is_valid(line):
                    break
                if line["step"] <= restored:
                    self.lines.append(line)
        if writes:
            replace(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, line: dict[str, Any]) -> None:
        """Append a line and write it at once.

        Raises SboraxError if it cannot be written.
        """
        self.lines.append(line)
        if self.writes:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def eval_loss(self, step: int | None = None) -> float | None:
        """The loss on held-out data after a step, by default after the last that has one; None if there is none."""
        lines = (line for line in reversed(self.lines) if "eval_loss" in line and step in (None, line["step"]))
        return next((float(line["eval_loss"]) for line in lines), None)

    def dropped(self) -> str | None:
        """A line about the choices of experts that were dropped beyond a capacity; None if none was."""
        shares = [float(line["dropped"]) for line in self.lines if "dropped" in line]
        if not any(shares):
            return None
        mean, most = sum(shares) / len(shares), max(shares)
        sentence = f"experts dropped {mean:.2%} of the choices of tokens, {most:.2%} in a step at most"
        return f"{sentence}; a larger expert_capacity drops fewer"

    def losses(self) -> list[float]:
        """Every training loss so far."""
        return [float(line["loss"]) for line in self.lines if "loss" in line]


def _is_valid(line: Any) -> bool:
    """Whether a line has a step, and whether what is read from it later are numbers."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    return all(is_number(line.get(name, 0.0)) for name in ("loss", "eval_loss", "dropped"))


class Progress:
    """Progress of a run: a bar on a terminal, elsewhere a line every `PLAIN_EVERY` seconds.

    - steps: of the whole run.
    - done: made by earlier processes.
    - echo: prints a line.
    """

    def __init__(self, steps: int, done: int, echo: Callable[[str], None]) -> None:
        self.steps, self.echo = steps, echo
        self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self.started, self.first, self.spoke = time.monotonic(), done, 0.0

    def say(self, text: str) -> None:
        """Print a line that the bar does not overwrite."""
        if self.bar is None:
            self.echo(text)
        else:
            with self.bar.external_write_mode():
                self.echo(text)

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show the state after `step` steps."""
        numbers = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        moment = time.monotonic()
        if moment - self.spoke >= PLAIN_EVERY or step == self.steps:
            self.spoke = moment
            left = (moment - self.started) / max(1, step - self.first) * (self.steps - step)
            self.echo(f"step {step:,}/{self.steps:,}: {numbers}, {clock(left)} left")

    def close(self) -> None:
        """Stop updating the bar."""
        if self.bar is not None:
            self.bar.close()


class Speed:
    """Tokens per second, without the steps that compiled."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.last = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count a step."""
        self.tokens += tokens
        self.seconds += seconds
        self.last = tokens / seconds

    def mean(self) -> float | None:
        """The mean over all steps; None before the first."""
        return self.tokens / self.seconds if self.seconds else None


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of a run, as in `summary.json`. Seconds, bytes, nats per token.

    - finished: False if a signal stopped the run.
    - tokens_per_second: without padding, and without the steps that compiled.
    - samples: what became of the records of the data, in words.
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
        """The summary of a run that ends now.

        - began: when the process began, by `time.monotonic`.
        - trained, total: numbers of trained parameters and of the base's.
        """
        losses = metrics.losses()
        return cls(
            finished=finished,
            steps=steps,
            trainable_parameters=trained,
            base_parameters=total,
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            # The end of a run may have no held-out loss while an earlier step has.
            eval_loss=metrics.eval_loss(steps if finished else None),
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
        """Read what `write` wrote; None if there is no file or it has other fields."""
        if not (run / SUMMARY).exists():
            return None
        try:
            content = read_object(run / SUMMARY)
        except SboraxError:
            return None
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**content) if content.keys() == names else None

    def write(self, run: epath.Path) -> None:
        """Write `summary.json`. Raises SboraxError if it cannot be written."""
        replace(run / SUMMARY, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def clock(seconds: float) -> str:
    """A time such as `1:02:03` or `2:03`."""
    minutes, remainder = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{remainder:02}" if hours else f"{minutes}:{remainder:02}"


def method_line(method: AbstractMethod) -> str:
    """A method in one line: its rank, and the options that differ from their defaults."""
    if isinstance(method, AbstractComposite):
        return type(method).__name__
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(method)  # type: ignore[arg-type]
    options = [(field, getattr(method, field.name)) for field in fields]
    settings = [
        f"{field.name}={method_line(value) if isinstance(value, AbstractMethod) else value}"
        for field, value in options
        if field.name == "rank" or value != field.default
    ]
    return f"{type(method).__name__}({', '.join(settings)})"


def plan_lines(plan: Plan) -> list[str]:
    """A line for every adapted kernel, and one for the kernels that no rule adapts."""
    lines = []
    for site in plan.sites:
        stack = "".join(f"{size} x " for size in site.stack)
        lines.append(
            f"  {module_path(site.path)[0]}: {stack}({site.shape[0]}, {site.shape[1]}), {method_line(site.method)}"
        )
    if plan.untouched and plan.sites:
        lines.append(f"  not adapted: {', '.join(sorted({module_path(path)[0] for path in plan.untouched}))}")
    return lines


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of the packages that determine results."""
    packages = ("sborax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            continue
    return installed


@functools.cache
def git_revision() -> str | None:
    """The git commit of the checkout that this package runs from; None elsewhere."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory() -> int:
    """The peak memory in bytes: of the device where JAX reports it, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
