"""Rank policies choose one rank per weight, on the host, while a run is planned. Any method with a rank takes one."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sborax.adapters.core import RankPolicy, SboraxError

Reader = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SingularMass(RankPolicy):
    """The least rank whose leading singular values sum to `threshold` of the sum of all, arXiv:2408.03290.

    k = min(max_rank, 1 + #{j : s_1 + ... + s_j < threshold * sum_i s_i}), s the singular values, descending.
    The values themselves count, not their squares. One layer's weight is read at a time.

    - threshold: a share in (0, 1].
    - max_rank: an upper bound on the rank, at least 1. Default None: no bound.

    Raises SboraxError for values outside of these ranges.
    """

    threshold: float
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise SboraxError(f"threshold must lie in (0, 1], got {self.threshold}")
        if self.max_rank is not None and self.max_rank < 1:
            raise SboraxError(f"max_rank must be None or at least 1, got {self.max_rank}")

    def ranks(self, weights: Sequence[Reader], layers: Sequence[int], depth: int) -> tuple[int, ...]:
        """One rank per weight."""
        return tuple(self._rank(np.linalg.svd(read(), compute_uv=False)) for read in weights)

    def _rank(self, singular: np.ndarray) -> int:
        mass = np.cumsum(singular.astype(np.float64))
        rank = 1 + int(np.sum(mass < self.threshold * mass[-1]))
        return rank if self.max_rank is None else min(rank, self.max_rank)


@dataclasses.dataclass(frozen=True)
class LinearRanks(RankPolicy):
    """Ranks that grow, or shrink, linearly with depth, arXiv:2401.11316.

    r_i = floor(first + (last - first) i / (depth - 1) + 1/2), i = 0 .. depth - 1. 4 to 12 over 12 layers sums to 96.

    - first: rank of the first layer, at least 1, and of a model with one layer.
    - last: rank of the last layer, at least 1.

    Raises SboraxError for an end below 1.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if min(self.first, self.last) < 1:
            raise SboraxError(f"both ends must be at least 1, got {self.first} and {self.last}")

    def ranks(self, weights: Sequence[Reader], layers: Sequence[int], depth: int) -> tuple[int, ...]:
        """One rank per weight."""
        gaps = max(depth - 1, 1)
        # In integers, since a float would round some halves down.
        return tuple((2 * (self.first * gaps + (self.last - self.first) * i) + gaps) // (2 * gaps) for i in layers)


@dataclasses.dataclass(frozen=True)
class ShuffledRanks(RankPolicy):
    """The ranks of another policy, shuffled among the layers of each kernel: the control for an adaptive rank.

    - policy: the policy whose ranks are shuffled.
    - seed: of the shuffle. Default 0.

    Raises SboraxError for a negative seed, and for a kernel that is not stacked over layers, since there is nothing to
    shuffle.
    """

    policy: RankPolicy
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise SboraxError(f"seed must be at least 0, got {self.seed}")

    def ranks(self, weights: Sequence[Reader], layers: Sequence[int], depth: int) -> tuple[int, ...]:
        """One rank per weight."""
        ranks = self.policy.ranks(weights, layers, depth)
        if len(set(layers)) < 2:
            raise SboraxError("ShuffledRanks needs a kernel stacked over layers: there is one layer's rank to shuffle")
        return tuple(ranks[i] for i in np.random.default_rng(self.seed).permutation(len(ranks)))
