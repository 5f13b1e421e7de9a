"""Checkpoints of what a run trains: orbax writes them, digests of our own say whether they came back whole.

The base is never in one. orbax restores arrays whose bytes have flipped without noticing, hence the digests.
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

# orbax reports every save, and every failure at length; failures are our own to word.
logging.getLogger("absl").setLevel(logging.CRITICAL)

FOLDER = "checkpoints"


def digest(leaf: np.ndarray) -> str:
    """sha256 of dtype, shape and bytes."""
    head = f"{leaf.dtype.name} {leaf.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(leaf).tobytes()).hexdigest()


def flat(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path, the form in which a checkpoint holds them."""
    return {path.replace("/", "."): leaf for path, leaf in flatten(tree, is_leaf=None).items()}


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    manager: ocp.training.Checkpointer

    def save(self, step: int, tree: PyTree, position: dict[str, int]) -> None:
        """Write one checkpoint in the background; a former one still being written is awaited.

        Raises SboraxError if the disk refuses.
        """
        # A copy, since the next step overwrites the buffers that a view would show.
        if several():
            host = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), flat(tree))
            # Digests are of whole leaves, on however many hosts these are read later.
            digests = {name: digest(gathered(leaf)) for name, leaf in host.items()}
        else:
            host = {name: np.array(leaf, copy=True) for name, leaf in jax.device_get(flat(tree)).items()}
            digests = {name: digest(leaf) for name, leaf in host.items()}
        notes = {"digests": digests, "position": position}
        self._attempt(lambda: self.manager.save_async(step, host, force=True, overwrite=True, custom_metadata=notes))

    def wait(self) -> None:
        """Wait until every checkpoint is on disk.

        Raises SboraxError if the disk refuses.
        """
        self._attempt(self.manager.wait)

    @property
    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        return [one.step for one in self.manager.checkpoints]

    def restore(self, like: PyTree, echo: Callable[[str], None]) -> tuple[PyTree, int] | None:
        """The newest checkpoint that is whole, in the structure and on the devices of `like`, and its step.

        A damaged one is passed over with a message; None if there is none at all.
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
        wanted = flat(like)
        try:
            about = self.manager.metadata(step)
            notes = about.custom_metadata
            # Whole and on the host, by whichever devices they were written.
            found = self.manager.load(step, jax.tree.map(_on_host, about.metadata))
        # orbax and tensorstore raise whatever their parsers raise.
        except (ValueError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise _Damaged(str(error).strip().partition("\n")[0] or type(error).__name__) from error
        digests = notes.get("digests") if isinstance(notes, dict) else None
        if not isinstance(digests, dict) or not isinstance(found, dict):
            raise _Damaged("its digests are missing")
        for name, expected in digests.items():
            if name not in found or digest(np.asarray(found[name])) != expected:
                raise _Damaged(f"{name} has changed since it was written")
        _compare(wanted, found, f"{self.manager.directory}: checkpoint {step}")
        made = _steps_of(jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted]))
        if made not in (None, step):
            raise _Damaged(f"it holds the state after step {made}")
        leaves = [put(found[name], leaf.sharding) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        """Wait for what is being written and stop.

        Raises SboraxError if the disk refuses.
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
    """orbax treats leaves side by side. Where several fail it forgets all errors but one, which Python would print.

    It does so when the errors are collected, so that whoever meets one collects garbage in this block.
    """
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    log.disabled, sys.unraisablehook = True, lambda _: None
    try:
        yield
    finally:
        log.disabled, sys.unraisablehook = False, hook


@dataclasses.dataclass(frozen=True)
class _OnHost:
    """What orbax reads as an array of numpy: a shape and a dtype without a sharding."""

    shape: tuple[int, ...]
    dtype: Any


def _on_host(leaf: Any) -> _OnHost:
    return _OnHost(tuple(leaf.shape), leaf.dtype)


class _Damaged(Exception):
    """A checkpoint that is not what was written."""


def _steps_of(tree: PyTree) -> int | None:
    """How many steps the run in `tree` has made, of several the one that went on the longest; None without a run."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, TrainState))
    return max((int(np.max(node.step)) for node in leaves if isinstance(node, TrainState)), default=None)


def _compare(wanted: dict[str, Any], found: dict[str, Any], where: str) -> None:
    for name in sorted(wanted.keys() ^ found.keys()):
        what = "lacks" if name in wanted else "holds an unknown"
        raise SboraxError(f"{where} {what} {name}; resume with the config that the run was started with")
    for name, leaf in wanted.items():
        if found[name].shape != leaf.shape or found[name].dtype != leaf.dtype:
            raise SboraxError(
                f"{where}: {name} is {found[name].dtype}{list(found[name].shape)}, this experiment has "
                f"{leaf.dtype}{list(leaf.shape)}; resume with the config that the run was started with"
            )


def open_checkpoints(run: str | epath.PathLike, keep: int) -> Checkpoints:
    """The checkpoints of the run directory `run`, of which the newest `keep` stay."""
    policy = ocp.training.preservation_policies.LatestN(keep)
    folder = epath.Path(run) / FOLDER
    manager = ocp.training.Checkpointer(
        # orbax refuses relative paths, and a remote one is absolute as it is.
        folder if folder.is_absolute() else folder.absolute(),
        preservation_policy=policy,  # type: ignore[arg-type]  (orbax's own policies do not fit its own annotation)
        cleanup_tmp_directories=True,
    )
    return Checkpoints(manager)
