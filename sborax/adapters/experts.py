"""Experts that are trained separately and combined. Each has a subspace of a kernel that no other expert changes."""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from sborax.adapters.arithmetic import side_by_side
from sborax.adapters.compose import ByLayer, Sum
from sborax.adapters.core import AbstractFactored, Adapter, SboraxError
from sborax.adapters.leaves import nest
from sborax.adapters.tree import Adapters, nodes, tree_of

DISTINCT: dict[str, Any] = {"indices_are_sorted": True, "unique_indices": True, "mode": "promise_in_bounds"}
"""What a gather or scatter may assume of the indices of `index_block`."""


class AbstractExpert(AbstractFactored):
    """A factored method whose frozen factor is one of many blocks, which are orthogonal unless `interferes`."""

    interferes: str = ""
    """Empty, or the reason why blocks of different experts are not orthogonal. Such experts are not combined."""

    @abc.abstractmethod
    def overlaps(self, adapter: Adapter, other: Adapter) -> Bool[Array, ""]:
        """Whether two adapters of this class, on the same kernel, share a direction."""


def check_expert(expert: int | None, experts: int) -> None:
    """Raise SboraxError unless 0 <= expert < experts. A single expert may be None."""
    if expert is None and experts == 1:
        return
    if expert is None or not 0 <= expert < experts:
        raise SboraxError(f"with experts={experts}, expert must lie in 0..{experts - 1}, got {expert}")


def check_block(expert: int | None, experts: int, rank: int, size: int) -> None:
    """Raise SboraxError unless `check_expert` passes and experts * rank <= size; any rank goes with expert None."""
    check_expert(expert, experts)
    if expert is not None and experts * rank > size:
        raise SboraxError(f"{experts} experts of rank {rank} need {experts * rank} directions, there are {size}")


def basis_key(seed: int, size: int) -> Key[Array, ""]:
    """The key of what all experts on kernels of one size share. It depends on the seed and the size alone."""
    return jax.random.fold_in(jax.random.key(seed), size)


def index_block(key: Key[Array, ""], size: int, rank: int, expert: int | None, basis_seed: int) -> Int[Array, " rank"]:
    """`rank` distinct indices below `size`, ascending.

    - expert: None draws them by `key`; a number takes that expert's block of a permutation, which depends on
      `basis_seed` and `size` alone.
    """
    first = 0 if expert is None else expert * rank
    shuffled = jax.random.permutation(key if expert is None else basis_key(basis_seed, size), size)
    return jnp.sort(shuffled[first : first + rank]).astype(jnp.int32)


def _parts(path: str, node: Adapter) -> list[Adapter]:
    parts = [part for part, _ in node.method.children(node)] if isinstance(node.method, Sum) else [node]
    for part in parts:
        if not isinstance(part.method, AbstractExpert):
            name = type(part.method).__name__
            why = "owns no block of the weight"
            if isinstance(part.method, ByLayer):
                name, why = (
                    "a rule with layers=",
                    "puts its expert on a part of the stack, and only whole stacks combine",
                )
            raise SboraxError(f"{path}: {name} {why}; sborax.add sums any additive adapters")
        if part.method.interferes:
            raise SboraxError(
                f"{path}: {type(part.method).__name__}: {part.method.interferes}, so that experts interfere; "
                "sborax.add sums them all the same"
            )
    return parts


def _overlap(adapter: Adapter, other: Adapter) -> bool:
    assert isinstance(adapter.method, AbstractExpert)
    return type(adapter.method) is not type(other.method) or bool(adapter.method.overlaps(adapter, other))


def combine_experts(experts: Sequence[Adapters]) -> Adapters:
    """One tree of adapters for several experts: delta = sum of their deltas.

    The experts' blocks are disjoint, so no expert changes what another one wrote: with SBoRA every entry of a weight is
    that of one expert or of the base, bit for bit. `remove_expert` takes an expert out again.

    Args:
    - experts: trees of adapters of the same model, with the same method, rank and basis_seed, and each with its own
      `expert=`. A tree that was combined before counts as its experts.

    Raises SboraxError for no experts, for a method that has no blocks, or only blocks that interfere, and for two
    experts whose blocks overlap.
    """
    if not experts:
        raise SboraxError("combine_experts needs at least one expert")
    by_path: dict[str, list[Adapter]] = {}
    for number, expert in enumerate(experts):
        for path, node in tree_of(expert, "combine_experts").items():
            earlier, parts = by_path.setdefault(path, []), _parts(path, node)
            if any(_overlap(part, block) for part in parts for block in earlier):
                raise SboraxError(
                    f"{path}: expert number {number} of the list overlaps an earlier one; give each its own expert=, "
                    "and all the same method, rank and basis_seed"
                )
            earlier.extend(parts)
    return nest({path: _together(parts) for path, parts in by_path.items()})


def remove_expert(combined: Adapters, expert: Adapters) -> Adapters:
    """`combined` without one expert: bit for bit what `combine_experts` makes of the others.

    Args:
    - combined: what `combine_experts` returned.
    - expert: a tree of adapters with the blocks of the expert to remove, such as the one that was combined.

    Raises SboraxError for a kernel on which no expert in `combined` has those blocks.
    """
    remaining = {path: _parts(path, node) for path, node in nodes(combined).items()}
    for path, node in nodes(expert).items():
        for removed in _parts(path, node):
            present = remaining.get(path, [])
            remaining[path] = [part for part in present if not _overlap(part, removed)]
            if len(remaining[path]) == len(present):
                raise SboraxError(f"{path}: no such expert among the {len(present)} combined here")
    return nest({path: _together(parts) for path, parts in remaining.items() if parts})


def _together(parts: list[Adapter]) -> Adapter:
    return parts[0] if len(parts) == 1 else side_by_side(parts)
