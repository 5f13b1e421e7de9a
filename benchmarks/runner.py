"""A compiled step that goes on from its own state, timed; two of them in turn."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Runner:
    """`compiled(state, *constants) -> (state, numbers)` with a "loss" among the numbers."""

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

    def seconds(self) -> float:
        """One step, timed."""
        began = time.perf_counter()
        self.state, numbers = self.compiled(self.state, *self.constants)
        jax.block_until_ready(numbers["loss"])
        taken = time.perf_counter() - began
        assert np.all(np.isfinite(np.asarray(numbers["loss"])))
        return taken

    @property
    def temporaries(self) -> int:
        """Bytes of temporary memory."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    def told(self) -> dict[str, float]:
        """What is known without running it. held_gib: arguments, results and temporaries as compiled."""
        memory = self.compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return {
            "compile_seconds": self.compile_seconds,
            "temp_gib": self.temporaries / 2**30,
            "held_gib": (held + self.temporaries) / 2**30,
        }


def in_turn(one: Runner, other: Runner, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of `steps` steps of each after one to warm up, in turn, so that drift of the machine meets both."""
    rounds = [(one.seconds(), other.seconds()) for _ in range(steps + 1)][1:]
    return [own for own, _ in rounds], [theirs for _, theirs in rounds]


def time_ratio(one: list[float], other: list[float]) -> float:
    """The median of `one` over that of `other`."""
    return statistics.median(one) / statistics.median(other)
