"""A compiled step that keeps its state between calls, and the timing of one or two of them."""

import dataclasses
import math
import statistics
import time
from typing import Any

import jax
import numpy as np

TIMED = 0.4
"""Seconds that one timing on an accelerator takes at least."""


@dataclasses.dataclass
class Runner:
    """A step `compiled(state, *constants) -> (state, numbers)`, with the latest state.

    `numbers` must have a "loss". compile_seconds: how long compilation took.
    """

    compiled: Any
    state: Any
    constants: tuple[Any, ...]
    compile_seconds: float

    @classmethod
    def of(cls, step: Any, state: Any, *constants: Any) -> "Runner":
        """Compile a jitted step for these arguments."""
        began = time.perf_counter()
        compiled = step.lower(state, *constants).compile()
        return cls(compiled, state, constants, time.perf_counter() - began)

    def seconds(self, calls: int = 1) -> float:
        """Seconds of one step, over `calls` steps of which only the last is waited for, as in a run."""
        began = time.perf_counter()
        for _ in range(calls):
            self.state, numbers = self.compiled(self.state, *self.constants)
        jax.block_until_ready(numbers["loss"])
        seconds = (time.perf_counter() - began) / calls
        assert np.all(np.isfinite(np.asarray(numbers["loss"])))
        return seconds

    @property
    def temporaries(self) -> int:
        """Bytes of temporary memory."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    def compiled_facts(self) -> dict[str, float]:
        """Facts of the compiled program, without running it: seconds of compilation, and memory in GiB.

        held_gib: arguments, results and temporaries together.
        """
        memory = self.compiled.memory_analysis()
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return {
            "compile_seconds": self.compile_seconds,
            "temp_gib": self.temporaries / 2**30,
            "held_gib": (total + self.temporaries) / 2**30,
        }


def calls_for(seconds: float) -> int:
    """How many steps of so many seconds are timed as one, so that launching them and waiting costs little."""
    return max(1, math.ceil(TIMED / seconds))


def in_turn(first: Runner, second: Runner, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of every step of two runners, which alternate so that drift of the machine affects both alike.

    The first step of each warms up and is left out.
    """
    rounds = [(first.seconds(), second.seconds()) for _ in range(steps + 1)][1:]
    return [seconds for seconds, _ in rounds], [seconds for _, seconds in rounds]


def time_ratio(seconds: list[float], reference: list[float]) -> float:
    """The median of `seconds` over the median of `reference`."""
    return statistics.median(seconds) / statistics.median(reference)
