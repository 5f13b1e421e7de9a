"""EVA: Explained Variance Adaptation, a start from the principal components of the inputs, arXiv:2410.07170."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractFactored,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Leaves,
    Rank,
    SboraxError,
    Weight,
    check_rank,
    check_repetitions,
    dropout_leaf,
    hyper,
    live,
    width,
)
from sborax.adapters.informed import AbstractInformed, Gathered, Inputs, Place
from sborax.methods.lowrank import PAIR_AXES, pair_delta, pair_weight, scaling
from sborax.methods.shared_ranks import Request, shared_ranks


@dataclasses.dataclass(frozen=True)
class EVA(AbstractFactored, AbstractInformed):
    """y = x W + s (x a) b, where a starts as the leading principal components of x on the data, and b = 0.

    Ranks follow the data: over all weights, the components that explain most of their inputs' variance are kept.

    rank: mean rank of the weights (default 8). Ranks by layer are kept as they are.
    alpha: s = alpha / rank for the mean rank, whatever ranks the weights get; None (default) is s = 1.
    adjust: False divides alpha by the rank of each weight instead (PEFT: `adjust_scaling_factors`; default True).
    rho: a weight's rank is at most rho * rank, and may be 0 (default 2, as in PEFT); 1 leaves all ranks equal.
    tau: a component has settled once a batch leaves its cosine to the old direction at tau or more (PEFT: 0.99).
    whiten: divide each component by the root of its singular value; default False. PEFT divides again, in place, for
        every projection that shares the inputs; here each is divided once.
    niter: None (default) for exact decompositions, else iterations of randomised ones of twice the width (PEFT: 4).
    dropout: rate on the adapter's input in training (default 0).
    mean: the rank by which alpha is divided, once the data have chosen the ranks; leave it None.

    Needs `Hint.inputs`, see `input_hints`. The components are those of the centred inputs, decomposed incrementally,
    batch by batch, over and over until all have settled. Only inputs at tokens of answers count, as in PEFT. Where
    projections share their inputs, ties go to the first of them. Identity at init. Exact merge W + s a b.
    Trained parameters: rank (in + out).
    """

    paper = "Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv:2410.07170"
    group_b = frozenset({"b"})
    ragged = True
    pair = True
    needs = frozenset({"inputs"})
    joint = True

    rank: Rank = 8
    alpha: float | None = hyper(None, above=0.0)
    adjust: bool = True
    rho: float = 2.0
    tau: float = 0.99
    whiten: bool = False
    niter: int | None = None
    dropout: float = hyper(0.0)
    mean: int | None = None

    @property
    def axes(self) -> Axes:
        return PAIR_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, shape[0], "the inputs")  # A component more may be of use beyond the outputs.
        if not 1.0 <= self.rho or not 0.0 < self.tau < 1.0 or (self.mean is not None and self.mean < 1):
            raise SboraxError(f"needs rho >= 1, tau in (0, 1), mean >= 1, got {self.rho}, {self.tau} and {self.mean}")
        check_repetitions("niter", self.niter, 0)

    def blank(self, shape: tuple[int, int]) -> Leaves:
        count = min(round(width(self.rank) * self.rho), shape[0])
        return {"components": jnp.zeros((count, shape[0])), "singular": jnp.ones(count)}

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        assert hint.inputs is not None
        wide = width(self.rank)
        components = jnp.asarray(hint.inputs["components"], jnp.float32)[:wide]
        if len(components) < wide:
            raise SboraxError(f"EVA: rank {wide} needs as many components of the inputs, got {len(components)}")
        if self.whiten:
            components = components / jnp.sqrt(jnp.asarray(hint.inputs["singular"], jnp.float32)[:wide, None])
        _, mask = live(self.rank, hint)
        # A rank of 0 leaves no component, whatever its whitened length.
        a = jnp.where(mask[None, :] > 0, components.T, 0.0)
        scale = scaling(self.alpha, self.rank if self.mean is None or not self.adjust else self.mean, hint)
        return Fitted({"a": a, "b": jnp.zeros((wide, weight.shape[1]))}, {"scale": scale, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + pair_delta(x, adapter, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        return adapter.frozen["scale"] * adapter.train["a"], adapter.train["b"]

    @classmethod
    def gather(
        cls, methods: Mapping[Place, AbstractInformed], batches: Sequence[Callable[[], Inputs]]
    ) -> dict[Place, Gathered]:
        requests = {place: cast(EVA, method)._request(place[1]) for place, method in methods.items()}
        return shared_ranks(requests, batches)

    def with_ranks(self, ranks: Rank) -> "EVA":
        mean = self.rank if isinstance(self.rank, int) else self.mean
        return dataclasses.replace(self, rank=ranks, mean=mean, rho=1.0)

    def _request(self, position: int) -> Request:
        """The request of the weight at a position of the stack."""
        if isinstance(self.rank, int):
            return Request(self.rank, round(self.rank * self.rho), self.tau, self.niter)
        rank = self.rank[position] if isinstance(self.rank, tuple) else width(self.rank)
        return Request(rank, rank, self.tau, self.niter)
