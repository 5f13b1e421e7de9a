"""Activated LoRA: Fine-tuned LLMs for Intrinsics, arXiv:2504.12397."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.compose import part_context
from sborax.adapters.core import (
    AbstractAdditive,
    AbstractComposite,
    AbstractMethod,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
)
from sborax.adapters.invocation import AbstractInvoked, Tokens, mask_of


@dataclasses.dataclass(frozen=True)
class Activated(AbstractAdditive, AbstractComposite, AbstractInvoked):
    """y = x W + delta(x) from the last occurrence of the invocation tokens on, and y = x W before it: aLoRA.

        sx.Activated(sx.LoRA(rank=32, alpha=32.0), tokens=tuple(tokenizer("<|assess|>").input_ids))

    part: the method of delta, an additive one that leaves the base as it is. The paper's is LoRA.
    tokens: ids of the invocation, in order, as the tokenizer writes them inside a text.

    Outputs for a text without the tokens are the base's, bit for bit. So are the keys and values of all tokens before
    the invocation, so several adapters and the base can share one cache of them. In training and in `apply` the last
    occurrence in the whole text counts, separately for each segment of a packed row. Generation and the scoring of an
    answer search only the prompt. If it has the tokens, every token after the prompt is adapted, as in PEFT.
    Starts as `part` does. No merge: the change depends on the text. Trained parameters: those of `part`.
    """

    paper = "Activated LoRA: Fine-tuned LLMs for Intrinsics, arXiv:2504.12397"
    rank = 1
    # No property, so that the class says so, too.
    rewrites_base = False  # type: ignore[assignment]
    part: AbstractAdditive
    tokens: Tokens

    def __post_init__(self) -> None:
        name = type(self.part).__name__
        if not isinstance(self.part, AbstractAdditive):
            raise SboraxError(f"Activated needs an additive method; {name} rewrites the weight as a whole")
        if self.part.rewrites_base:
            raise SboraxError(
                f"Activated: {name} takes its start out of the base, which a text before its tokens would lack"
            )
        ids = isinstance(self.tokens, tuple) and all(type(token) is int and token >= 0 for token in self.tokens)
        if not ids or not self.tokens:
            raise SboraxError(f"Activated: tokens must be a tuple of one token id or more, got {self.tokens!r}")

    @property
    def members(self) -> tuple[AbstractMethod, ...]:
        return (self.part,)

    @property
    def axes(self) -> Axes:
        return {"part": self.part.axes}

    @property
    def identity_at_init(self) -> bool:
        return self.part.identity_at_init

    @property
    def no_merge(self) -> str:
        return "it acts from its invocation tokens on, so its change depends on the text"

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fitted = self.part.init(key, weight, hint)
        return Fitted({"part": fitted.train}, {"part": fitted.frozen})

    def children(self, adapter: Adapter) -> list[tuple[Adapter, tuple[int, ...] | None]]:
        return [
            (Adapter(adapter.train.get("part", {}), adapter.frozen.get("part", {}), self.part, adapter.in_axes), None)
        ]

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        ((child, _),) = self.children(adapter)
        acts = mask_of(self, ctx).astype(bool)
        # Not a product with the mask: a sum with zero would turn -0 into 0.
        return jnp.where(acts[:, None], self.part.add_to(y, x, child, part_context(self, ctx, 0)), y)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        raise SboraxError(f"Activated cannot be merged: {self.no_merge}")
