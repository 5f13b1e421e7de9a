"""An xprof trace of a few steps of a run."""

import dataclasses

import jax
from etils import epath
from jaxtyping import PyTree

from sborax.adapters.core import SboraxError

PROFILE = "profile"
SKIPPED, TRACED = 2, 3
"""Steps before the trace (the first compiles), and steps in the trace."""


@dataclasses.dataclass
class Trace:
    """Steps `first` to `first + TRACED - 1` of a run, written to `place` for xprof, TensorBoard or Perfetto."""

    place: epath.Path
    first: int
    running: bool = False

    def before(self, number: int, state: PyTree) -> None:
        """Begin or end the trace before step `number` is dispatched, once `state`, of the step before, is computed."""
        if number == self.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.place))
            self.running = True
        elif self.running and number == self.first + TRACED:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """End the trace if it is still running."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False


def make_trace(run: epath.Path, done: int, steps: int) -> Trace:
    """The trace of a run that has made `done` of its `steps`.

    Raises SboraxError if too few steps are left.
    """
    if steps - done <= SKIPPED:
        raise SboraxError(f"--profile: skips {SKIPPED} steps for compilation, and only {steps - done} are left to make")
    return Trace(run / PROFILE, done + SKIPPED)
