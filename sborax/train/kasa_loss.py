"""Cross-entropy with the penalties that KaSA's paper adds, arXiv:2412.06071."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from sborax.adapters.core import SboraxError
from sborax.adapters.tree import parts_of
from sborax.data.options import at_least
from sborax.methods import KaSA
from sborax.train.loss import AbstractLoss, CrossEntropy

if TYPE_CHECKING:
    from sborax.train.outputs import Outputs


def kasa_penalty(adapters: PyTree, beta: float, gamma: float) -> Float[Array, ""]:
    """beta |e|^2 + gamma (|a^T a - I| + |b b^T - I|) in Frobenius norms, summed over all weights that have KaSA.

    As PEFT's `LoraModel._get_kasa_loss`. Parts of composed methods count, too. Raises SboraxError if there is none.
    """
    penalties = []
    for part in parts_of(adapters, KaSA):
        a, b, e = part.train["a"], part.train["b"], part.train["e"]
        apart = _from_identity(jnp.swapaxes(a, -1, -2)) + _from_identity(b)
        penalties.append(beta * jnp.sum(jnp.square(e)) + gamma * jnp.sum(apart))
    if not penalties:
        raise SboraxError("KaSALoss: no kernel has KaSA; give it by the rules")
    return jnp.sum(jnp.stack(penalties))


def _from_identity(rows: Float[Array, "*stack rank width"]) -> Float[Array, "*stack"]:
    """How far the products of the rows are from the identity."""
    gram = jnp.matmul(rows, jnp.swapaxes(rows, -1, -2), precision="highest")
    return jnp.linalg.norm(gram - jnp.broadcast_to(jnp.eye(rows.shape[-2]), gram.shape), axis=(-2, -1))


@dataclasses.dataclass(frozen=True)
class KaSALoss(AbstractLoss):
    """`CrossEntropy`, plus `kasa_penalty` in training. Held-out losses are without it.

    beta: weight of the singular values' squares. Default: PEFT's, 1e-4. gamma: weight of the distance of a and b from
        orthonormal. Default: PEFT's, 1e-3.

    Raises SboraxError for a negative weight. arXiv:2412.06071
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        at_least(0, beta=self.beta, gamma=self.gamma)

    def __call__(self, outputs: "Outputs") -> tuple[Float[Array, ""], Num[Array, ""]]:
        total, tokens = CrossEntropy()(outputs)
        # Some methods start from the gradient of the model without adapters. A step has a key.
        if outputs.key is None and not outputs.adapters:
            return total, tokens
        # The step divides by the number of tokens.
        return total + tokens.astype(jnp.float32) * kasa_penalty(outputs.adapters, self.beta, self.gamma), tokens

    def by_token(self, outputs: "Outputs") -> tuple[Float[Array, ""], Num[Array, ""], Float[Array, "batch length"]]:
        return CrossEntropy().by_token(outputs)
