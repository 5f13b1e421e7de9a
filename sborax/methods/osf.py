"""OSF: Orthogonal Subspace Fine-tuning, the small singular directions trained, arXiv:2504.07097."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    HIDDEN,
    AbstractFactored,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    cast,
    dense,
)
from sborax.adapters.linalg import svd
from sborax.methods.lowrank import pair_weight, taken_from_base


@dataclasses.dataclass(frozen=True)
class OSF(AbstractFactored):
    """y = x W_high + (x a * e) b: W_high keeps the largest singular values of W; a, e and b train the rest.

    W = W_high + a diag(e) b at init. Gradients of a and b lose their parts along the singular vectors of W_high, as in
    PEFT; an optimiser such as Adam does not keep the leaves themselves orthogonal to these.

    kept: how many singular values stay: a number, a share of the smaller side, or None (default, as PEFT), half of it.

    Identity at init. Rewrites the base; a0 e0 and b0 are kept, so the change against the original base is exact. Exact
    merge W_high + a diag(e) b. The factors are as wide as what is left, k = min(in, out) - kept: this method is for
    learning task after task, and is not small. Trained parameters: k (in + out + 1).
    """

    paper = "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, arXiv:2504.07097"
    sends = "the width between its factors, which depends on the weight, and gradients along the kept vectors"
    group_b = frozenset({"e"})
    rewrites_base = True
    rank = 1

    kept: int | float | None = None

    @property
    def axes(self) -> Axes:
        pair = {"a": ("in", "rank"), "b": ("rank", "out")}
        offset = {"a0": ("in", "rank"), "b0": ("rank", "out"), "scale": (), "left": ()}
        return {**pair, "e": ("rank",), **offset, "v": ("in", None), "u": (None, "out")}

    def check(self, shape: tuple[int, int]) -> None:
        count = self._count(shape)
        if not 1 <= count < min(shape):
            raise SboraxError(f"kept must leave 1..{min(shape) - 1} of {min(shape)} singular values, got {self.kept}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        wide = dense(weight).astype(jnp.float32)
        v, s, u = svd(wide)
        count = self._count(wide.shape)
        # The trained vectors do not span the rest of the longer side, so projecting there needs the kept vectors.
        longer = {"v": v[:, :count]} if wide.shape[0] > wide.shape[1] else {"u": u[:count]}
        longer = {} if wide.shape[0] == wide.shape[1] else longer
        fitted = taken_from_base(wide, v[:, count:] * s[None, count:], u[count:], jnp.float32(1.0), longer)
        return fitted._replace(train={"a": v[:, count:], "e": s[count:], "b": u[count:]})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        a, b = self._factors(adapter)
        return y + checkpoint_name(x @ cast(a, x), HIDDEN) @ cast(b, x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + pair_weight(*self._factors(adapter), jnp.float32(1.0))

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r2"], Float[Array, "r2 out"]]:
        a, b = self._factors(adapter)
        left = jnp.concatenate([a, -adapter.frozen["a0"]], axis=-1)
        return left, jnp.concatenate([b, adapter.frozen["b0"]], axis=-2)

    def _factors(self, adapter: Adapter) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        """(a diag(e), b), with the gradients of a and b projected."""
        frozen = adapter.frozen
        rows = frozen["u"].T if "u" in frozen else frozen["b0"].T
        # Columns of a0 have the lengths of the singular values.
        lengths = jnp.linalg.norm(frozen["a0"], axis=0, keepdims=True)
        columns = frozen["v"] if "v" in frozen else frozen["a0"] / jnp.maximum(lengths, 1e-30)
        a = _steered(adapter.train["a"], columns, "v" in frozen)
        b = _steered(adapter.train["b"].T, rows, "u" in frozen).T
        return a * adapter.train["e"][None, :], b

    def _count(self, shape: tuple[int, ...]) -> int:
        if self.kept is None:
            return min(shape) // 2
        return int(min(shape) * self.kept) if isinstance(self.kept, float) else self.kept


def _steered(leaf: Float[Array, "side rank"], basis: Float[Array, "side n"], away: bool) -> Float[Array, "side rank"]:
    """`leaf`, whose gradient is projected onto the span of `basis`, or away from it."""

    def backward(basis: Array, g: Array) -> tuple[Array, Array]:
        along = jnp.matmul(basis, jnp.matmul(basis.T, g, precision="highest"), precision="highest")
        return (g - along if away else along), jnp.zeros_like(basis)

    steer = jax.custom_vjp(lambda leaf, basis: leaf)
    steer.defvjp(lambda leaf, basis: (leaf, basis), backward)
    return steer(leaf, basis)
