"""PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation, arXiv:2401.11316."""

import dataclasses
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
    Rank,
    SboraxError,
    Weight,
    check_rank,
    dropout_leaf,
    hyper,
    live,
    pair_of,
    width,
)
from sborax.adapters.ranks import LinearRanks
from sborax.methods.lowrank import PAIR_AXES, kaiming_uniform, pair_delta, pair_weight, scaling


@dataclasses.dataclass(frozen=True)
class PRILoRA(AbstractFactored):
    """y = x W + s_i (x a) b, the rank r_i growing with depth; a is pruned in training by `procedures.prilora`.

    rank: `LinearRanks(first, last)`, another policy or an int. Default 4 to 12 (8 on average).
    alpha: s_i = alpha / r_i for scale_mode "alpha_over_rank" (default), s = alpha for "constant"; None is s = 1.
    persistent_mask: entries pruned once stay out (default False: they may grow again until the next pruning).
    dropout: rate on the adapter's input; default 0.

    a ~ U(-1/sqrt(in), 1/sqrt(in)), b = 0. `norm` holds the running norms of the input features. The paper's constants
    were not confirmed. Identity at init. Exact merge. Trained parameters: r_i (in + out), zeros counted.
    """

    paper = "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation, arXiv:2401.11316"
    group_b = frozenset({"b"})
    ragged = True
    pair = True
    masks = {"a": "mask"}

    rank: Rank = LinearRanks(4, 12)
    alpha: float | None = hyper(None, above=0.0)
    scale_mode: Literal["alpha_over_rank", "constant"] = hyper("alpha_over_rank")
    persistent_mask: bool = hyper(False)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {**PAIR_AXES, "norm": ("in",), "mask": ("in", "rank")}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.scale_mode not in ("alpha_over_rank", "constant"):
            raise SboraxError(f"scale_mode must be 'alpha_over_rank' or 'constant', got {self.scale_mode!r}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        _, columns = live(self.rank, hint)
        train = {"a": kaiming_uniform(key, fan_in, self.rank, hint), "b": jnp.zeros((width(self.rank), fan_out))}
        if self.scale_mode == "constant" and self.alpha is not None:
            scale = jnp.float32(self.alpha)
        else:
            scale = scaling(self.alpha, self.rank, hint)
        mask = {"mask": jnp.tile(columns, (fan_in, 1))} if self.persistent_mask else {}
        return Fitted(train, {"scale": scale, "norm": jnp.zeros(fan_in), **mask, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        masked = dataclasses.replace(adapter, train={**adapter.train, "a": pair_of(adapter).a})
        return y + pair_delta(x, masked, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        scale, a, b = pair_of(adapter)
        return weight + pair_weight(a, b, scale)

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        scale, a, b = pair_of(adapter)
        return scale * a, b
