"""Cross-entropy with the penalties that KaSA's paper adds, arXiv:2412.06071."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from sborax.adapters.core import SboraxError
from sborax.adapters.tree import nodes
from sborax.methods import KaSA
from sborax.train.loss import AbstractLoss, CrossEntropy

if TYPE_CHECKING:
    from sborax.train.outputs import Outputs


def kasa_penalty(adapters: PyTree, beta: float, gamma: float) -> Float[Array, ""]:
    """beta |e|^2 + gamma (|a^T a - I| + |b b^T - I|) in Frobenius norms, summed over all adapters that are KaSA.

    As PEFT's `LoraModel._get_kasa_loss`. Raises SboraxError without such an adapter.
    """
    penalties = []
    for node in nodes(adapters).values():
        if isinstance(node.method, KaSA):
            a, b, e = node.train["a"], node.train["b"], node.train["e"]
            apart = _from_identity(jnp.swapaxes(a, -1, -2)) + _from_identity(b)
            penalties.append(beta * jnp.sum(jnp.square(e)) + gamma * jnp.sum(apart))
    if not penalties:
        raise SboraxError("KaSALoss: no kernel has KaSA on all of its layers; give it by the rules")
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

    arXiv:2412.06071
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __call__(self, outputs: "Outputs") -> tuple[Float[Array, ""], Num[Array, ""]]:
        total, tokens = CrossEntropy()(outputs)
        # The step divides by the number of tokens.
        return total + tokens.astype(jnp.float32) * kasa_penalty(outputs.adapters, self.beta, self.gamma), tokens

    def by_token(self, outputs: "Outputs") -> tuple[Float[Array, ""], Num[Array, ""], Float[Array, "batch length"]]:
        return CrossEntropy().by_token(outputs)
