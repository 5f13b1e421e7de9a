"""Checkpoints of a run's trained state, written by orbax, with digests that detect damage.

The base model is never part of a checkpoint. orbax does not notice bytes that flipped on the disk; the digests do.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import flatten
from sborax.layout.hosts import gathered, several
from sborax.layout.sharding import put
from sborax.layout.state import TrainState
from sborax.records.disk import refusal

# orbax logs every save, and every failure at length. Failures are reported by this module.
logging.getLogger("absl").setLevel(logging.CRITICAL)

CHECKPOINTS = "checkpoints"


def digest(leaf: np.ndarray) -> str:
    """The sha256 of an array's dtype, shape and bytes."""
    head = f"{leaf.dtype.name} {leaf.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(leaf).tobytes()).hexdigest()


def flat(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path, the form in which a checkpoint holds them."""
    return {path.replace("/", "."): leaf for path, leaf in flatten(tree, is_leaf=None).items()}


def newest(run: epath.Path) -> int:
    """The step of the newest checkpoint of a run, damaged or not; 0 without one."""
    place = run / CHECKPOINTS
    names = [entry.name for entry in place.iterdir()] if place.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    manager: ocp.training.Checkpointer

    def save(self, step: int, tree: PyTree, position: dict[str, int]) -> None:
        """Write a checkpoint in the background, after the one before is on disk.

        Args:
        - step: steps made so far.
        - tree: what to keep, such as a `TrainState`. It is copied before this returns.
        - position: of the data, for people to read: epoch and row.

        Raises SboraxError if a file cannot be written.
        """
        # A copy: the next step donates, hence overwrites, these buffers.
        if several():
            host = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), flat(tree))
            # Digests of whole leaves: the checkpoint may be read on another number of hosts.
            digests = {name: digest(gathered(leaf)) for name, leaf in host.items()}
        else:
            host = {name: np.array(leaf, copy=True) for name, leaf in jax.device_get(flat(tree)).items()}
            digests = {name: digest(leaf) for name, leaf in host.items()}
        notes = {"digests": digests, "position": position}
        self._attempt(lambda: self.manager.save_async(step, host, force=True, overwrite=True, custom_metadata=notes))

    def wait(self) -> None:
        """Wait until every checkpoint is on disk.

        Raises SboraxError if a file cannot be written.
        """
        self._attempt(self.manager.wait)

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return [checkpoint.step for checkpoint in self.manager.checkpoints]

    def restore(self, like: PyTree, echo: Callable[[str], None]) -> tuple[PyTree, int] | None:
        """The newest undamaged checkpoint.

        Args:
        - like: a tree with the structure, shapes, dtypes and shardings that the result has.
        - echo: told of each damaged checkpoint, which is skipped.

        Returns the tree and its step; None if there is no checkpoint.
        Raises SboraxError if all are damaged, or if they belong to another experiment.
        """
        steps = self.steps
        for step in reversed(steps):
            with _quietly():
                try:
                    return self._read(step, like), step
                except _Damaged as damage:
                    echo(f"checkpoint {step} is damaged ({damage}); trying the one before")
                gc.collect()
        if steps:
            raise SboraxError(f"{self.manager.directory}: all {len(steps)} checkpoints are damaged; start the run anew")
        return None

    def _read(self, step: int, like: PyTree) -> PyTree:
        flat_like = flat(like)
        try:
            about = self.manager.metadata(step)
            notes = about.custom_metadata
            # Whole arrays on the host, whatever devices wrote them.
            leaves = self.manager.load(step, jax.tree.map(_on_host, about.metadata))
        # orbax and tensorstore raise whatever their parsers raise.
        except (ValueError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise _Damaged(str(error).strip().partition("\n")[0] or type(error).__name__) from error
        digests = notes.get("digests") if isinstance(notes, dict) else None
        if not isinstance(digests, dict) or not isinstance(leaves, dict):
            raise _Damaged("its digests are missing")
        for name, expected in digests.items():
            if name not in leaves or digest(np.asarray(leaves[name])) != expected:
                raise _Damaged(f"{name} has changed since it was written")
        _compare(flat_like, leaves, f"{self.manager.directory}: checkpoint {step}")
        steps = _steps_of(jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flat_like]))
        if steps not in (None, step):
            raise _Damaged(f"it holds the state after step {steps}")
        placed = [put(leaves[name], leaf.sharding) for name, leaf in flat_like.items()]
        return jax.tree.unflatten(jax.tree.structure(like), placed)

    def close(self) -> None:
        """Wait until every checkpoint is on disk, then stop orbax.

        Raises SboraxError if a file cannot be written.
        """
        try:
            self.wait()
        finally:
            self._attempt(self.manager.close)

    def _attempt(self, act: Callable[[], Any]) -> None:
        problem = None
        with _quietly():
            try:
                act()
            # tensorstore, which orbax writes with, raises ValueError for a full disk.
            except (OSError, ValueError) as error:
                problem = refusal(self.manager.directory, error)
            if problem is not None:
                gc.collect()
        if problem is not None:
            raise problem


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppress what Python prints for errors that nobody retrieved.

    orbax handles leaves concurrently and raises the first error of several. Python prints the others once they are
    garbage, so whoever catches an error collects garbage inside this block.
    """
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    log.disabled, sys.unraisablehook = True, lambda _: None
    try:
        yield
    finally:
        log.disabled, sys.unraisablehook = False, hook


@dataclasses.dataclass(frozen=True)
class _OnHost:
    """A shape and a dtype without a sharding, which orbax restores as a NumPy array."""

    shape: tuple[int, ...]
    dtype: Any


def _on_host(leaf: Any) -> _OnHost:
    return _OnHost(tuple(leaf.shape), leaf.dtype)


class _Damaged(Exception):
    """The checkpoint differs from what was written."""


def _steps_of(tree: PyTree) -> int | None:
    """Steps made by the `TrainState` in `tree`, the most of several members; None without a `TrainState`."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, TrainState))
    return max((int(np.max(node.step)) for node in leaves if isinstance(node, TrainState)), default=None)


def _compare(expected: dict[str, Any], stored: dict[str, Any], where: str) -> None:
    """Raise SboraxError unless the leaves have the names, shapes and dtypes of those expected."""
    for name in sorted(expected.keys() ^ stored.keys()):
        problem = "lacks" if name in expected else "holds an unknown"
        raise SboraxError(f"{where} {problem} {name}; resume with the config that the run was started with")
    for name, leaf in expected.items():
        if stored[name].shape != leaf.shape or stored[name].dtype != leaf.dtype:
            raise SboraxError(
                f"{where}: {name} is {stored[name].dtype}{list(stored[name].shape)}, this experiment has "
                f"{leaf.dtype}{list(leaf.shape)}; resume with the config that the run was started with"
            )


def open_checkpoints(run: str | epath.PathLike, keep: int) -> Checkpoints:
    """The checkpoints of a run.

    Args:
    - run: the run directory; checkpoints are in `checkpoints/` of it.
    - keep: how many of the newest to keep; older ones are deleted.

    Returns an object with `save`, `restore`, `wait` and `close`.
    """
    policy = ocp.training.preservation_policies.LatestN(keep)
    folder = epath.Path(run) / CHECKPOINTS
    manager = ocp.training.Checkpointer(
        # orbax refuses relative paths; a remote one is absolute already.
        folder if folder.is_absolute() else folder.absolute(),
        preservation_policy=policy,  # type: ignore[arg-type]  (orbax's own policies do not fit its own annotation)
        cleanup_tmp_directories=True,
    )
    return Checkpoints(manager)
