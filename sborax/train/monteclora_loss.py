"""Cross-entropy with the divergences that MonteCLoRA's paper adds, arXiv:2411.04358."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln
from jaxtyping import Array, Float, Key, Num, PyTree

from sborax.adapters.core import SboraxError
from sborax.adapters.tree import parts_of
from sborax.data.options import above, at_least
from sborax.methods import MonteCLoRA
from sborax.methods.monteclora import proportions, variances
from sborax.train.loss import AbstractLoss, CrossEntropy

if TYPE_CHECKING:
    from sborax.train.outputs import Outputs


def monteclora_penalty(
    adapters: PyTree, key: Key[Array, ""], kl_weight: float, entropy: bool, prior: float
) -> Float[Array, ""]:
    """kl_weight (kl_p + kl_d + kl_v) + |p|^2 if entropy, its mean over all weights that have MonteCLoRA.

    For n samples of concentrations c = exp(g), each with the prior q, and for r = rank:

        kl_p = log G(sum c) - log G(n q) + sum_n (log G(c_n) - log G(q) + (c_n - q) (psi(c_n) - psi(sum c)))
        kl_d = r/2 sum_j (exp(2 d_j) - 2 d_j - 1)
        kl_v = n/2 sum_j (v_j - log v_j - 1)

    As PEFT's `LoraModel._get_monteclora_loss`. (G is the gamma function and psi its logarithm's derivative. In the
    divergence of two Dirichlet distributions, log G(c_n) - log G(q) would be subtracted; PEFT adds it.)
    v and p are drawn anew, where PEFT takes those of the forward pass: the mean is the same.

    Parts of composed methods count, too. Raises SboraxError without such a weight.
    """
    penalties = []
    for number, part in enumerate(parts_of(adapters, MonteCLoRA)):
        d, g = part.train["d"], part.train["g"]
        keys = jax.random.split(jax.random.fold_in(key, number), d.shape[0])
        of_weight = functools.partial(_penalty, kl_weight=kl_weight, entropy=entropy, prior=prior)
        penalties.append(jax.vmap(of_weight)(keys, d, g))
    if not penalties:
        raise SboraxError("MonteCLoRALoss: no kernel has MonteCLoRA; give it by the rules")
    return jnp.mean(jnp.concatenate(penalties))


def _penalty(
    key: Key[Array, ""],
    d: Float[Array, " rank"],
    g: Float[Array, " samples"],
    kl_weight: float,
    entropy: bool,
    prior: float,
) -> Float[Array, ""]:
    of_v, of_p = jax.random.split(key)
    rank, samples = d.size, g.size
    c, v = jnp.exp(g), variances(of_v, d)
    total = jnp.sum(c)
    kl_p = gammaln(total) - gammaln(jnp.float32(samples * prior))
    kl_p += jnp.sum(gammaln(c) - gammaln(jnp.float32(prior)) + (c - prior) * (digamma(c) - digamma(total)))
    kl_d = 0.5 * rank * jnp.sum(jnp.exp(2 * d) - 2 * d - 1)
    kl_v = 0.5 * samples * jnp.sum(v - jnp.log(v) - 1)
    penalty = kl_weight * (kl_p + kl_d + kl_v)
    return penalty + jnp.sum(jnp.square(proportions(of_p, g))) if entropy else penalty


@dataclasses.dataclass(frozen=True)
class MonteCLoRALoss(AbstractLoss):
    """`CrossEntropy`, plus `monteclora_penalty` in training. Held-out losses are without it.

    kl_weight: weight of the divergences (PEFT's `kl_loss_weight`: 1e-5). entropy: whether to add the sum of squares of
        the proportions, which keeps them even (PEFT's `use_entropy`: False). prior: concentration of the proportions
        before training (PEFT's `dirichlet_prior`: 0.1).

    Raises SboraxError for a negative weight, and for a prior that is not positive. arXiv:2411.04358
    """

    kl_weight: float = 1e-5
    entropy: bool = False
    prior: float = 0.1

    def __post_init__(self) -> None:
        at_least(0, kl_weight=self.kl_weight)
        above(0, prior=self.prior)

    def __call__(self, outputs: "Outputs") -> tuple[Float[Array, ""], Num[Array, ""]]:
        total, tokens = CrossEntropy()(outputs)
        if outputs.key is None:
            return total, tokens
        key = jax.random.fold_in(outputs.key, 1)
        penalty = monteclora_penalty(outputs.adapters, key, self.kl_weight, self.entropy, self.prior)
        # The step divides by the number of tokens.
        return total + tokens.astype(jnp.float32) * penalty, tokens

    def by_token(self, outputs: "Outputs") -> tuple[Float[Array, ""], Num[Array, ""], Float[Array, "batch length"]]:
        return CrossEntropy().by_token(outputs)
