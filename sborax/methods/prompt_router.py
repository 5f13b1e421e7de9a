"""The router of prompt-aware mixtures: pooling over the prompt, a learnable activation, softmax, top k."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from sborax.adapters.core import Adapter, Axes, Fitted, Hint, SboraxError, Weight, hyper
from sborax.adapters.routing import AbstractRouter

NUMERATOR = (2.8e-5, 0.5, 0.398502, 0.162302, 0.064052, 0.018317, 0.0021)
DENOMINATOR = (0.0, 0.324603, 0.0, 0.036634, 0.0)
"""Initial coefficients of `rational`: GELU within 1.3e-4 on [-3, 3]. The paper gives none."""
Pooler = Literal["attention", "mean", "max", "last"]


@dataclasses.dataclass(frozen=True)
class PromptRouter(AbstractRouter):
    """The router that `MiLoRA` puts into every layer with two or more experts. See there for equation and options."""

    paper = "MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning, arXiv:2410.18035"

    experts: tuple[str, ...]
    top_k: int
    pooler: Pooler
    renormalise: bool
    balance: float = hyper()

    @property
    def axes(self) -> Axes:
        return {"w": ("in", None), "pool": ("in",), "numerator": (None,), "denominator": (None,), "balance": ()}

    def check(self, shape: tuple[int, int]) -> None:
        if not 1 <= self.top_k <= shape[1]:
            raise SboraxError(f"top_k must lie in 1..{shape[1]} (the layer's experts), got {self.top_k}")
        if self.pooler not in ("attention", "mean", "max", "last"):
            raise SboraxError(f"pooler must be attention, mean, max or last, got {self.pooler!r}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        d, _ = weight.shape
        pool = {"pool": jnp.zeros(d)} if self.pooler == "attention" else {}
        curve = {"numerator": jnp.asarray(NUMERATOR), "denominator": jnp.asarray(DENOMINATOR)}
        w = 0.1 * jax.random.normal(key, weight.shape) / jnp.sqrt(jnp.float32(d))
        return Fitted({"w": w, **pool, **curve}, {"balance": jnp.float32(self.balance)})

    def route(
        self, x: Float[Array, "batch seq d"], prompt: Bool[Array, "batch seq"], adapter: Adapter
    ) -> tuple[Float[Array, "batch experts"], Float[Array, ""]]:
        wide, has_prompt = x.astype(jnp.float32), jnp.any(prompt, axis=1)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
        # Rows that only fill up a batch have no prompt. They do not count, and must not be NaN.
        pooled = jnp.where(has_prompt[:, None], self._pool(wide, prompt, adapter), 0.0)
        chances = jax.nn.softmax(rational(pooled, adapter) @ adapter.train["w"], axis=-1)
        places = jax.lax.top_k(chances, self.top_k)[1]
        gates = chances * jnp.sum(jax.nn.one_hot(places, len(self.experts)), axis=1)
        if self.renormalise:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        share = has_prompt.astype(jnp.float32) / jnp.maximum(jnp.sum(has_prompt), 1).astype(jnp.float32)
        first = jax.nn.one_hot(jnp.argmax(chances, axis=-1), len(self.experts))
        loss = adapter.frozen["balance"] * len(self.experts) * jnp.sum((share @ first) * (share @ chances))
        return gates, loss

    def _pool(
        self, x: Float[Array, "batch seq d"], prompt: Bool[Array, "batch seq"], adapter: Adapter
    ) -> Float[Array, "batch d"]:
        if self.pooler == "max":
            return jnp.max(jnp.where(prompt[:, :, None], x, jnp.finfo(jnp.float32).min), axis=1)
        if self.pooler == "last":
            place = x.shape[1] - 1 - jnp.argmax(prompt[:, ::-1], axis=1)
            return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]
        scores = x @ adapter.train["pool"] if self.pooler == "attention" else jnp.zeros(prompt.shape)
        weights = jax.nn.softmax(jnp.where(prompt, scores, jnp.finfo(jnp.float32).min), axis=1)
        return jnp.einsum("bs,bsd->bd", weights, x)


def rational(x: Float[Array, "batch d"], adapter: Adapter) -> Float[Array, "batch d"]:
    """sum_j n_j x^j / (1 + |sum_i d_i x^i|), i from 1."""
    below = x * jnp.polyval(adapter.train["denominator"][::-1], x)
    return jnp.polyval(adapter.train["numerator"][::-1], x) / (1.0 + jnp.abs(below))
