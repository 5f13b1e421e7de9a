"""Files and arguments of runs: configs, overrides, meshes, and the files that a resumed run reads."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from etils import epath

from sborax.adapters.paths import plan
from sborax.cli.layout import read_mesh
from sborax.cli.targets import is_run
from sborax.config.codec import encode, override
from sborax.records.adapter import LEAVES, PLAN
from sborax.records.best import best_so_far
from sborax.records.disk import CONFIG
from sborax.records.report import METRICS, Metrics
from sborax.sweep.grid import Sweep, read_grid
from sborax.sweep.results import SWEEP, check_same
from sborax.train.experiment import load_experiment

from .mutations import RAW, TEXTS, harm, harm_text, places, write
from .seeds import Prepare, abstract_tiny, experiment, put


def run(home: Path) -> Prepare:
    """A run's `config.json`, and the plan that follows from its rules."""
    seed = encode(experiment())

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        put(place, config__json=write(random, harm(random, seed)))

        def read() -> Any:
            is_run(str(place))
            result = load_experiment(str(place / CONFIG) if random.randrange(2) else str(place))
            return plan(abstract_tiny(), result.rules)

        return read

    return prepare


def overrides(home: Path) -> Prepare:
    """The `key=value` arguments of `sborax train` and `sborax sweep`."""
    raw = encode(experiment())
    keys = [".".join(map(str, place)) for place in places(raw)]

    def word(random: Random) -> str:
        key = random.choice(keys)
        place = tuple(int(part) if part.isdecimal() else part for part in key.split(".")) if key else ()
        value = raw
        for part in place:
            value = value[part]
        if random.randrange(6) == 0:
            key = harm_text(random, key, (*TEXTS, *keys, ".", "*", "=", "[0]"))
        kind = random.randrange(6)
        if kind == 0:
            return f"{key}={random.choice((*TEXTS, *RAW.values()))}"
        if kind == 1:
            return f"{key}={harm(random, value)!r}"
        text = write(random, harm(random, value)).decode("utf-8", "replace")
        if kind == 2:
            return f"{key}={text},{json.dumps(value)}"
        return f"{key}={text}" if kind < 5 else harm_text(random, f"{key}={text}", TEXTS)

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        words = [word(random) for _ in range(random.choice((1, 1, 2, 3)))]

        def read() -> Any:
            if random.randrange(2):
                return override(experiment(), words)
            changes, grid = read_grid(words)
            changed = override(experiment(), ["save.best=false", "mesh=null", *changes])
            return Sweep(changed, grid or {"optimizer.lr": (1e-3, 1e-4)}).members()

        return read

    return prepare


def meshes(home: Path) -> Prepare:
    """The argument of `sborax plan --mesh`."""

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        text = harm_text(random, "fsdp=8,tensor=2,data=4,slices=2", (*TEXTS, "²", "٣", "=", ",", "9" * 5_000))
        return lambda: read_mesh([text])

    return prepare


def leftovers(home: Path) -> Prepare:
    """Files that a resumed run or sweep reads: `sweep.json`, `metrics.jsonl`, `best/plan.json`."""
    members = Sweep(override(experiment(), ["save.best=false", "mesh=null"]), {"optimizer.lr": (1e-3, 1e-4)}).members()
    listed = {"members": [{"name": member.name, "changes": list(member.changes)} for member in members]}
    lines = [{"step": step, "loss": 2.0, "eval_loss": 1.5} for step in range(1, 5)]
    about = {"format": 1, "rules": [], "sites": [], "trained_base": [], "base": {}, "eval_loss": 1.0, "eval_data": {}}

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        (place / SWEEP).write_bytes(write(random, harm(random, listed)))
        (place / METRICS).write_bytes(b"\n".join(write(random, harm(random, line)) for line in lines))
        (place / "best").mkdir()
        (place / "best" / PLAN).write_bytes(write(random, harm(random, about)))
        (place / "best" / LEAVES).write_bytes(struct.pack("<Q", 2) + b"{}")
        case = random.randrange(3)

        def read() -> Any:
            if case == 0:
                return check_same(epath.Path(place), members, bool(random.randrange(2)))
            if case == 1:
                metrics = Metrics(epath.Path(place), 3)
                return metrics.losses(), metrics.eval_loss()
            return best_so_far(epath.Path(place), {}, 3, lambda line: None)

        return read

    return prepare
