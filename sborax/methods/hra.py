"""HRA: Householder Reflection Adaptation, arXiv:2405.17484."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    HIDDEN,
    AbstractMethod,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Weight,
    cast,
    check_rank,
    dense,
    matmul,
)
from sborax.adapters.linalg import inverse


@dataclasses.dataclass(frozen=True)
class HRA(AbstractMethod):
    """y = (x H) W, H = (I - 2 u_r u_r^T) ... (I - 2 u_1 u_1^T), with u_k the normalised columns of u (in, rank).

    The product is one thin update: H = I - u S^-T u^T, S upper triangular with u^T u above the diagonal and 1/2 on
    it (the compact WY form). So x is reflected by two thin products, and W is never touched.

    rank: how many reflections (PEFT: 8). If it is even, they start as pairs that undo each other.

    Pairs of equal columns ~ U(-1/sqrt(rank/2), 1/sqrt(rank/2)), as PEFT. Identity at init. An odd number of reflections
    has no such start: its columns are independent, ~ U(-1/sqrt(rank), 1/sqrt(rank)), and training begins away from the
    base, as in PEFT, which warns of it. Exact merge H W. The Gram-Schmidt variant, which cannot start at the identity,
    is left out. Trained parameters: rank in.
    """

    paper = "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection, arXiv:2405.17484"
    sends = "the reflections' gradient once more, rank in floats a kernel"

    rank: int = 8

    @property
    def axes(self) -> Axes:
        return {"u": ("in", "rank")}

    @property
    def identity_at_init(self) -> bool:
        return self.rank % 2 == 0

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, shape[0], "rows of W")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        repeats = 2 if self.identity_at_init else 1
        columns = self.rank // repeats
        u = jax.random.uniform(key, (weight.shape[0], columns), jnp.float32, -1.0, 1.0) / columns**0.5
        return Fitted({"u": jnp.repeat(u, repeats, axis=1)}, {})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        left, right = _reflection(adapter.train["u"])
        return matmul(x - checkpoint_name(x @ cast(left, x), HIDDEN) @ cast(right, x), weight)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        wide = dense(weight).astype(jnp.float32)
        left, right = _reflection(adapter.train["u"])
        return wide - jnp.matmul(left, jnp.matmul(right, wide, precision="highest"), precision="highest")


def _reflection(u: Float[Array, "in rank"]) -> tuple[Float[Array, "in rank"], Float[Array, "rank in"]]:
    """`(u, S^-T u^T)`, whose product taken from the identity is H."""
    u = u / jnp.linalg.norm(u, axis=0, keepdims=True)
    s = jnp.triu(jnp.matmul(u.T, u, precision="highest"), 1) + 0.5 * jnp.eye(u.shape[1])
    return u, jnp.matmul(inverse(s).T, u.T, precision="highest")
