"""GraLoRA: Granular Low-Rank Adaptation, arXiv:2505.20355."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
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
    cast,
    check_rank,
    dropout,
    dropout_leaf,
    hyper,
)
from sborax.methods.lowrank import HIDDEN, kaiming_uniform


@dataclasses.dataclass(frozen=True)
class GraLoRA(AbstractFactored):
    """y = x W + s x D: D is cut into blocks x blocks blocks, each a product of two factors, D_ij = a_i[:, j] b_j[i].

    a_i (in/blocks, rank) has rank/blocks columns for each j, and b_j (rank, out/blocks) as many rows for each i. So D
    has as many parameters as a LoRA of this rank, and up to blocks times its rank.

    rank: width of all a_i and b_j, a multiple of blocks (PEFT: 32).
    blocks: into how many parts each side is cut; it must divide both (PEFT: 2, and 4 from a rank of 64 on).
    alpha: s = alpha / (rank + hybrid) (PEFT: 64); None is s = 1.
    hybrid: rank of a LoRA u v that is added to D (PEFT: 0).
    dropout: rate on x; default 0.

    a_i ~ U(-sqrt(blocks/in), sqrt(blocks/in)) and u ~ U(-1/sqrt(in), 1/sqrt(in)), as PEFT; b_j = v = 0: identity at
    init. Exact merge. Trained parameters: (rank + hybrid) (in + out).
    """

    paper = "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, arXiv:2505.20355"
    group_b = frozenset({"b_j", "v"})
    sends = "x and the gradient in y, for blocks are cut in another way than tokens"

    rank: int = 32
    blocks: int = 2
    alpha: float | None = hyper(64.0, above=0.0)
    hybrid: int = 0
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        blocks: Axes = {"a_i": (None, "in", "rank"), "b_j": (None, "rank", "out")}
        return {**blocks, "u": ("in", None), "v": (None, "out"), "scale": (), "dropout": ()}

    @property
    def summed(self) -> int:
        return self.blocks * self.rank + self.hybrid

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.blocks < 1 or any(size % self.blocks for size in (*shape, self.rank)):
            raise SboraxError(f"blocks must divide both sides and the rank {self.rank}, got {self.blocks}")
        if not 0 <= self.hybrid <= min(shape):
            raise SboraxError(f"hybrid must lie in 0..{min(shape)} (the smaller side), got {self.hybrid}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        of_a, of_u = jax.random.split(key)
        bound = math.sqrt(self.blocks / fan_in)
        shape = (self.blocks, fan_in // self.blocks, self.rank)
        train = {
            "a_i": jax.random.uniform(of_a, shape, jnp.float32, -bound, bound),
            "b_j": jnp.zeros((self.blocks, self.rank, fan_out // self.blocks)),
        }
        if self.hybrid:
            train["u"] = kaiming_uniform(of_u, fan_in, self.hybrid, hint)
            train["v"] = jnp.zeros((self.hybrid, fan_out))
        scale = 1.0 if self.alpha is None else self.alpha / (self.rank + self.hybrid)
        return Fitted(train, {"scale": jnp.float32(scale), **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        inputs, train = dropout(x, adapter, ctx), adapter.train
        scale = cast(adapter.frozen["scale"], x)
        by_block = inputs.reshape(x.shape[0], self.blocks, x.shape[1] // self.blocks)
        hidden = jnp.einsum("tin,inr->tir", by_block, cast(train["a_i"], x))
        hidden = checkpoint_name(scale * hidden, HIDDEN)
        # Part j of x_i a_i is multiplied by part i of b_j.
        parts = hidden.reshape(*hidden.shape[:2], self.blocks, hidden.shape[2] // self.blocks)
        parts = parts.swapaxes(1, 2).reshape(hidden.shape)
        y = y + jnp.einsum("tjr,jro->tjo", parts, cast(train["b_j"], x)).reshape(y.shape)
        if not self.hybrid:
            return y
        return y + checkpoint_name(scale * (inputs @ cast(train["u"], x)), HIDDEN) @ cast(train["v"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        a, b = self.factors(adapter, (weight.shape[0], weight.shape[1]))
        return weight + jnp.matmul(a, b, precision="highest")

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        """Of rank blocks rank + hybrid: column (i, j, s) of the first is column (j, s) of a_i, and zero elsewhere."""
        fan_in, fan_out = shape
        train, k, identity = adapter.train, self.blocks, jnp.eye(self.blocks)
        a = (train["a_i"][:, :, None, :] * identity[:, None, :, None]).reshape(fan_in, -1)
        b = train["b_j"].reshape(k, k, self.rank // k, -1).swapaxes(0, 1)
        b = (b[:, :, :, None, :] * identity[None, :, None, :, None]).reshape(-1, fan_out)
        if self.hybrid:
            a, b = jnp.concatenate([a, train["u"]], axis=1), jnp.concatenate([b, train["v"]])
        return adapter.frozen["scale"] * a, b
