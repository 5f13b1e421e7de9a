"""Steps of several cases over one base, in turn in one process; compiled at the same time."""

import collections
import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks.ours import Case, plain_model, random_params, workload
from benchmarks.runner import Runner, calls_for

COMPILED_AT_ONCE = 6


def measure(cases: list[Case], steps: int, profile: bool = False) -> dict[str, Any]:
    """Seconds of every step, facts of the compiled program and trained parameters of each case, in order.

    cases: of one shape, dtype and number of layers.
    profile: list the kernels that take most of the time of a step.
    """

    @functools.cache
    def params(four_bit: bool) -> Any:
        return random_params(plain_model(cases[0].sizes, cases[0].dtype), four_bit)

    works = [workload(case, params(case.method.startswith("Q"))) for case in cases]
    lowered = [work.lower() for work in works]
    with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
        compiled = list(pool.map(lambda program: program.compile(), lowered))
    runners = [
        Runner(program, work.state, (work.parts.frozen, work.parts.base, work.batch), 0.0)
        for program, work in zip(compiled, works, strict=True)
    ]
    for runner in runners:
        runner.seconds()
    calls = [calls_for(runner.seconds()) for runner in runners]
    rounds = [[runner.seconds(count) for runner, count in zip(runners, calls, strict=True)] for _ in range(steps)]
    results = []
    for number, (runner, work) in enumerate(zip(runners, works, strict=True)):
        facts = runner.compiled_facts()
        del facts["compile_seconds"]
        result = {"seconds": [seconds[number] for seconds in rounds], **facts, "trainable": work.parts.count}
        results.append(result | ({"kernels": busiest(runner)} if profile else {}))
    return {"cases": results}


def busiest(runner: Runner, steps: int = 2, most: int = 40) -> list[dict[str, Any]]:
    """The kernels of a step that take longest: name, milliseconds a step and launches a step."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            runner.seconds(steps)
        (path,) = Path(directory).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(path))
        spent: collections.defaultdict[str, float] = collections.defaultdict(float)
        launches = spent.copy()
        for plane in data.planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                # Lines of streams hold kernels; others repeat them by XLA's modules and operations.
                for event in line.events if line.name.startswith("Stream") else ():
                    spent[event.name] += event.duration_ns / 1e6 / steps
                    launches[event.name] += 1 / steps
    return [
        {"kernel": name, "ms": milliseconds, "launches": launches[name]}
        for name, milliseconds in sorted(spent.items(), key=lambda item: -item[1])[:most]
    ]
