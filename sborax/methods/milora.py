"""MiLoRA: prompt-aware mixture of LoRA experts, arXiv:2410.18035 (not the MiLoRA of minor singular components)."""

import dataclasses

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractAdditive,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Rank,
    SboraxError,
    Weight,
    cast,
    check_rank,
    dropout,
    dropout_leaf,
    hyper,
    width,
)
from sborax.adapters.routing import GATE, AbstractRouted, AbstractRouter
from sborax.methods.lowrank import HIDDEN, PAIR_AXES, kaiming_uniform, scaling
from sborax.methods.prompt_router import Pooler, PromptRouter


@dataclasses.dataclass(frozen=True)
class MiLoRA(AbstractAdditive, AbstractRouted):
    """y = x W + g s (x a) b, with g the weight that the layer's router gives this projection for the whole prompt.

    p = softmax(ra(h) w), h pooled over the prompt; g = p for the `top_k` largest of the layer, else 0.
    ra(t) = sum_j n_j t^j / (1 + |sum_i d_i t^i|), degrees 6 and 5, starts as GELU.

    rank: width of the factors (paper: 32), an int or a `RankPolicy`.
    top_k: experts in use per layer; default 1, which fits the paper's counts (its text says 1 and 3).
    pooler: "attention" (default, the paper's), h = sum_t softmax_t(u_t . pool) u_t; "mean", "max" or "last" token.
        u_t is the layer's input with its root mean square set to 1, since ra grows like t^2 beyond 3: our choice.
    balance: lambda of the loss lambda N sum_i f_i p_i, which is added to the step's loss per token. f_i is the share of
        prompts whose largest p is that of expert i, and p_i is the mean of its p. The loss is a mean over layers; the
        paper's is their sum. Default 1e-2.
    renormalise: divide g by the sum of the kept ones; default False.
    alpha: s = alpha / rank; None (default, the paper's) is s = 1. dropout: rate on the adapter's input (default 0).

    The adapted projections of a layer are its experts, which share one router. The router decides once per prompt, and
    this holds for the text that is generated from the prompt. In training the prompt ends at the first answer. A layer
    with a single expert has no router: g = 1, plain LoRA.
    a as in LoRA, b = 0, pool = 0, w ~ N(0, 0.01 / in). Identity at init. No merge: weights depend on the prompt.
    ra is trained along with the rest; the paper alternates it, on held-out batches, as examples/milora_bilevel.py does.
    Trained parameters:
    rank (in + out) per expert, d N + 12 per router and d more for attention; d the layer's width, N its experts.
    """

    paper = "MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning, arXiv:2410.18035"
    group_b = frozenset({"b"})
    no_merge = "a router weighs it anew for every prompt"
    ragged = True

    rank: Rank = 32
    top_k: int = 1
    pooler: Pooler = "attention"
    balance: float = hyper(1e-2)
    renormalise: bool = False
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return PAIR_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        # The router's options are checked even if the layer gets no router.
        least = max(self.top_k, 1)
        self.router(("",) * least).check((shape[0], least))

    def router(self, experts: tuple[str, ...]) -> AbstractRouter:
        return PromptRouter(experts, self.top_k, self.pooler, self.renormalise, self.balance)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        a = kaiming_uniform(key, weight.shape[0], self.rank, hint)
        b = jnp.zeros((width(self.rank), weight.shape[1]))
        return Fitted({"a": a, "b": b}, {"scale": scaling(self.alpha, self.rank, hint), **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        hidden = cast(adapter.frozen["scale"], x) * (dropout(x, adapter, ctx) @ cast(adapter.train["a"], x))
        if GATE in ctx.rows:
            hidden = cast(ctx.rows[GATE], x)[:, None] * hidden
        return y + checkpoint_name(hidden, HIDDEN) @ cast(adapter.train["b"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        raise SboraxError(f"MiLoRA cannot be merged: {self.no_merge}")
