"""Experts trained apart that live together: each owns a subspace of one kernel that no other expert touches."""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from sborax.adapters.arithmetic import side_by_side
from sborax.adapters.compose import Sum
from sborax.adapters.core import AbstractFactored, Adapter, SboraxError
from sborax.adapters.leaves import nest
from sborax.adapters.tree import Adapters, nodes

DISTINCT: dict[str, Any] = {"indices_are_sorted": True, "unique_indices": True, "mode": "promise_in_bounds"}
"""What `index_block` lets a gather or scatter assume."""


class AbstractExpert(AbstractFactored):
    """A factored method whose frozen factor is one of many mutually orthogonal blocks."""

    @abc.abstractmethod
    def overlaps(self, mine: Adapter, other: Adapter) -> Bool[Array, ""]:
        """Whether two adapters of this class, on one kernel, share a direction."""


def check_block(expert: int | None, experts: int, rank: int, size: int) -> None:
    """Raise SboraxError unless 0 <= expert < experts and that many blocks of `rank` fit into `size`; None: no block."""
    if expert is None and experts == 1:
        return
    if expert is None or not 0 <= expert < experts:
        raise SboraxError(f"with experts={experts}, expert must lie in 0..{experts - 1}, got {expert}")
    if experts * rank > size:
        raise SboraxError(f"{experts} experts of rank {rank} need {experts * rank} directions, there are {size}")


def basis_key(seed: int, size: int) -> Key[Array, ""]:
    """The key of what all experts on kernels of one size share: of the seed and the size alone."""
    return jax.random.fold_in(jax.random.key(seed), size)


def index_block(key: Key[Array, ""], size: int, rank: int, expert: int | None, basis_seed: int) -> Int[Array, " rank"]:
    """`rank` distinct indices below `size`, ascending: drawn by `key`, or an expert's share of one permutation."""
    first = 0 if expert is None else expert * rank
    shuffled = jax.random.permutation(key if expert is None else basis_key(basis_seed, size), size)
    return jnp.sort(shuffled[first : first + rank]).astype(jnp.int32)


def _parts(path: str, node: Adapter) -> list[Adapter]:
    parts = [part for part, _ in node.method.children(node)] if isinstance(node.method, Sum) else [node]
    for part in parts:
        if not isinstance(part.method, AbstractExpert):
            name = type(part.method).__name__
            raise SboraxError(f"{path}: {name} owns no block of the weight; sborax.add sums any additive adapters")
    return parts


def _overlap(mine: Adapter, other: Adapter) -> bool:
    assert isinstance(mine.method, AbstractExpert)
    return type(mine.method) is not type(other.method) or bool(mine.method.overlaps(mine, other))


def combine_experts(experts: Sequence[Adapters]) -> Adapters:
    """One tree of adapters that is all the experts at once: delta = sum of their deltas.

    The experts' blocks are disjoint, so each delta can be told from the sum, and none changes what another wrote:
    with SBoRA every entry of the weight is one expert's or the base's, bit for bit. A combined tree may be given too.
    `remove_expert` takes one out again.

    Raises SboraxError for no experts, an adapter that owns no block, and two experts whose blocks overlap.
    """
    if not experts:
        raise SboraxError("combine_experts needs at least one expert")
    by_path: dict[str, list[Adapter]] = {}
    for number, expert in enumerate(experts):
        for path, node in nodes(expert).items():
            earlier, own = by_path.setdefault(path, []), _parts(path, node)
            if any(_overlap(mine, other) for mine in own for other in earlier):
                raise SboraxError(
                    f"{path}: expert number {number} of the list overlaps an earlier one; give each its own expert=, "
                    "and all the same method, rank and basis_seed"
                )
            earlier.extend(own)
    return nest({path: _together(parts) for path, parts in by_path.items()})


def remove_expert(combined: Adapters, expert: Adapters) -> Adapters:
    """`combined` without the expert that owns the same blocks as `expert`: bit for bit what the others alone make.

    Raises SboraxError for a kernel on which no part of `combined` has those blocks.
    """
    kept = {path: _parts(path, node) for path, node in nodes(combined).items()}
    for path, node in nodes(expert).items():
        for gone in _parts(path, node):
            before = kept.get(path, [])
            kept[path] = [part for part in before if not _overlap(part, gone)]
            if len(kept[path]) == len(before):
                raise SboraxError(f"{path}: no such expert among the {len(before)} combined here")
    return nest({path: _together(parts) for path, parts in kept.items() if parts})


def _together(parts: list[Adapter]) -> Adapter:
    return parts[0] if len(parts) == 1 else side_by_side(parts)
