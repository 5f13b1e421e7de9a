"""CorDA: Context-Oriented Decomposition Adaptation, a start from the covariance of the inputs, arXiv:2406.05223."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

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
    dense,
    dropout_leaf,
    hyper,
    width,
)
from sborax.adapters.informed import AbstractInformed, Gathered, Inputs, Place
from sborax.adapters.linalg import svd
from sborax.methods import lowrank
from sborax.methods.covariance import covariances, invertible


@dataclasses.dataclass(frozen=True)
class CorDA(AbstractFactored, AbstractInformed):
    """y = x W_res + s (x a) b, where s a b starts as r components of C W, C the covariance of x on the data.

    C W = V S U^T, by falling S;  a = C^-1 V_r sqrt(S_r / s), b = sqrt(S_r / s) U_r^T;  W_res = W - s a b.

    rank: how many components are trained.
    alpha: s = alpha / rank; None (default) is s = 1, the paper's alpha = rank.
    mode: "ipm" (default, as in PEFT; instruction-previewed) trains the first r components, for data like the task's.
        "kpm" (knowledge-preserved) trains the last r, for data whose knowledge should be kept.
    dropout: rate on the adapter's input in training (paper 0; default 0).

    C is the mean over samples of X^T X / max(X)^2, where X are the sample's inputs without padding; as published, max
    takes entries with their sign. d mean(diag C) I is added to C, with d = 0.01, doubled until |C C^-1 - I| < 0.05.
    Needs `Hint.inputs`, see `input_hints`. Identity at init. Rewrites the base; `a0`, `b0` are kept, so the change
    against the original base is exact at rank 2r. Exact merge W_res + s a b. Trained parameters: rank (in + out).
    """

    paper = "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, arXiv:2406.05223"
    group_b = frozenset({"b"})
    rewrites_base = True
    pair = True
    needs = frozenset({"inputs"})

    rank: int = 16
    alpha: float | None = hyper(None, above=0.0)
    mode: Literal["ipm", "kpm"] = "ipm"
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return lowrank.OFFSET_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.mode not in ("ipm", "kpm"):
            raise SboraxError(f"mode must be 'ipm' or 'kpm', got {self.mode!r}")

    def blank(self, shape: tuple[int, int]) -> Leaves:
        return {"covariance": jnp.eye(shape[0])}

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        assert hint.inputs is not None
        wide = dense(weight).astype(jnp.float32)
        scale = lowrank.scaling(self.alpha, self.rank, hint)
        c, inverse = invertible(jnp.asarray(hint.inputs["covariance"], jnp.float32))
        v, s, ut = svd(jnp.matmul(c, wide, precision="highest"))
        part = slice(None, self.rank) if self.mode == "ipm" else slice(min(wide.shape) - self.rank, None)
        root = jnp.sqrt(s[part] / scale)
        a = jnp.matmul(inverse, v[:, part], precision="highest") * root[None, :]
        return lowrank.taken_from_base(wide, a, root[:, None] * ut[part], scale, dropout_leaf(self.dropout))

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + lowrank.pair_delta(x, adapter, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + lowrank.pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r2"], Float[Array, "r2 out"]]:
        return lowrank.offset_factors(adapter)

    @classmethod
    def gather(
        cls, methods: Mapping[Place, AbstractInformed], batches: Sequence[Callable[[], Inputs]]
    ) -> dict[Place, Gathered]:
        by_place = covariances(methods, batches)
        return {place: Gathered({"covariance": covariance}) for place, covariance in by_place.items()}

    def with_ranks(self, ranks: Rank) -> "CorDA":
        return dataclasses.replace(self, rank=width(ranks))
