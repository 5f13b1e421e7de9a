"""MonteCLoRA: Monte Carlo low-rank adaptation, arXiv:2411.04358."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractFactored,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    check_rank,
    dropout_leaf,
    hyper,
)
from sborax.methods.lowrank import PAIR_AXES, kaiming_uniform, pair_delta, pair_weight, scaling

LEAST_VARIANCE, LEAST_CONCENTRATION = 1e-3, 1e-6
"""PEFT's bounds."""


@dataclasses.dataclass(frozen=True)
class MonteCLoRA(AbstractFactored):
    """y = x W + s (x a) b, where training adds noise to a: a + t (sum_n p_n z_n) diag(v)^(1/2), drawn in every call.

    z_n (in, rank) ~ N(0, 1);  v_j = max(exp(2 d_j) c_j, 1e-3), c_j ~ chi-squared with rank degrees of freedom, as on
    the diagonal of a Wishart matrix;  p = softmax(g - mean(g) + u^(1/2) * e), e ~ N(0, 1), and
    u_n = (1 - 2/N) / exp(g_n) + sum_m 1 / exp(g_m) / N^2. p stands for a Dirichlet draw of concentrations exp(g).
    Without a key a stays as it is, as in PEFT.

    rank: width of the factors (PEFT: 8).
    samples: N, the number of z_n (PEFT: 8).
    noise: t (PEFT: 1e-4).
    alpha: s = alpha / rank; None (default) is s = 1.
    dropout: rate on the adapter's input; default 0.

    a as in LoRA, b = 0, d and g ~ U(0, 1), as PEFT. Identity at init. Exact merge W + s a b, of the mean. d and g learn
    only from the task's loss, unless `sx.MonteCLoRALoss` adds the paper's divergences from their priors. On experts the
    noise is drawn for every tile of rows. Trained parameters: rank (in + out + 1) + samples.
    """

    paper = (
        "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation, "
        "arXiv:2411.04358"
    )
    group_b = frozenset({"b", "d", "g"})
    draws = "noise that is added to a"
    sends = "rank + samples floats for the gradients of d and g, where inputs are cut"

    rank: int = 8
    samples: int = 8
    noise: float = hyper(1e-4, above=0.0)
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {**PAIR_AXES, "d": ("rank",), "g": (None,), "noise": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.samples < 1:
            raise SboraxError(f"samples must be at least 1, got {self.samples}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        of_a, of_d, of_g = jax.random.split(key, 3)
        train = {
            "a": kaiming_uniform(of_a, weight.shape[0], self.rank, hint),
            "b": jnp.zeros((self.rank, weight.shape[1])),
            "d": jax.random.uniform(of_d, (self.rank,), jnp.float32),
            "g": jax.random.uniform(of_g, (self.samples,), jnp.float32),
        }
        frozen = {"scale": scaling(self.alpha, self.rank, hint), "noise": jnp.float32(self.noise)}
        return Fitted(train, {**frozen, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        if ctx.key is not None:
            train = adapter.train
            # Not the key itself, with which `dropout` draws.
            of_z, of_v, of_p = jax.random.split(jax.random.fold_in(ctx.key, 1), 3)
            z = jax.random.normal(of_z, (self.samples, *train["a"].shape), jnp.float32)
            mean = jnp.einsum("n,nir->ir", proportions(of_p, train["g"]), z)
            sample = train["a"] + adapter.frozen["noise"] * mean * jnp.sqrt(variances(of_v, train["d"]))[None, :]
            adapter = dataclasses.replace(adapter, train={**train, "a": sample})
        return y + pair_delta(x, adapter, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        """Of the mean."""
        return adapter.frozen["scale"] * adapter.train["a"], adapter.train["b"]


def variances(key: Key[Array, ""], d: Float[Array, " rank"]) -> Float[Array, " rank"]:
    """v, drawn: exp(2 d) times the diagonal of a Wishart matrix, whose entries are independent sums of squares."""
    chi_squared = jnp.sum(jnp.square(jax.random.normal(key, (d.size, d.size), jnp.float32)), axis=1)
    return jnp.maximum(jnp.exp(2 * d) * chi_squared, LEAST_VARIANCE)


def proportions(key: Key[Array, ""], g: Float[Array, " samples"]) -> Float[Array, " samples"]:
    """p, drawn."""
    concentrations = jnp.maximum(jnp.exp(g), LEAST_CONCENTRATION)
    logs, inverse = jnp.log(concentrations), 1 / concentrations
    spread = inverse * (1 - 2 / g.size) + jnp.sum(inverse) / g.size**2
    deviations = jnp.sqrt(jnp.maximum(spread, LEAST_CONCENTRATION) + LEAST_CONCENTRATION)
    return jax.nn.softmax(logs - jnp.mean(logs) + deviations * jax.random.normal(key, g.shape, jnp.float32))
