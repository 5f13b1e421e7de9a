"""Invocation: adapters that act on a text from the last occurrence of some tokens on.

A model finds these places once a call, before its layers, and hands them on in `Context.invocations`. A token that is
read over a cache of keys and values gets what was found in the text before it, see `continuation`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sborax.adapters.core import AbstractComposite, AbstractMethod, Adapter, Context, SboraxError
from sborax.adapters.informed import links

Tokens = tuple[int, ...]
"""Ids of the tokens of an invocation, in order."""
Invocations = dict[Tokens, Any]
"""Arrays by invocation, as in `Context.invocations`."""


class AbstractInvoked(AbstractMethod):
    """A method that acts on a text from the start of the last occurrence of its tokens on, and on no text without them.

    Where it does not act, the projection is the base's, bit for bit. `mask_of` says where it acts.
    """

    tokens: Tokens


def invoked_parts(method: AbstractMethod) -> tuple[AbstractInvoked, ...]:
    """The invoked methods among `method` and its parts."""
    members = method.members if isinstance(method, AbstractComposite) else links(method)
    parts = tuple(part for member in members for part in invoked_parts(member))
    return (method, *parts) if isinstance(method, AbstractInvoked) else parts


def invocations(methods: Iterable[AbstractMethod]) -> tuple[Tokens, ...]:
    """The tokens of all invoked methods, each once, in order."""
    return tuple(sorted({part.tokens for method in methods for part in invoked_parts(method)}))


def mask_of(method: AbstractInvoked, ctx: Context) -> Bool[Array, " tokens"]:
    """Where the method acts. Raises SboraxError for a context that does not say."""
    if method.tokens not in ctx.invocations:
        raise SboraxError(
            f"{type(method).__name__} acts from the tokens {method.tokens} on, and this call does not say where they "
            "are: give ctx=Context(invocations=...), from sborax.adapters.invocation.find, or call the LanguageModel"
        )
    return ctx.invocations[method.tokens]


def find(
    tokens: Int[Array, "batch seq"], segment_ids: Int[Array, "batch seq"] | None, invocations: Iterable[Tokens]
) -> Invocations:
    """For each of `invocations`, (batch, seq): True from the start of its last occurrence in a text on.

    Args:
    - tokens: token ids.
    - segment_ids: a text is a run of one segment; 0 is padding, which is no text. None: each row is one text.
    - invocations: the tokens of each invocation.
    """
    segments = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    change = segments[:, 1:] != segments[:, :-1]
    begins = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
    begin = jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, slots, tokens.shape[1]), axis=1, reverse=True)

    def since(invocation: Tokens) -> Bool[Array, "batch seq"]:
        occurs = (segments != 0) & (slots + (len(invocation) - 1) <= end)
        for offset, token in enumerate(invocation):
            later = tokens[:, offset:]
            occurs &= jnp.pad(later, ((0, 0), (0, tokens.shape[1] - later.shape[1]))) == token
        latest = jax.lax.cummax(jnp.where(occurs, slots, -1), axis=1)
        last = jnp.take_along_axis(latest, end, axis=1)
        return (begin <= last) & (last <= slots)

    return {invocation: since(invocation) for invocation in invocations}


def continuation(masks: Invocations, seq: int = 1) -> Invocations:
    """The masks of the next `seq` tokens of each row, which has one text: True for all if the text has the tokens."""

    def of_row(mask: Bool[Array, "batch _"]) -> Bool[Array, "batch seq"]:
        return jnp.broadcast_to(jnp.any(mask, axis=1, keepdims=True), (mask.shape[0], seq))

    return {invocation: of_row(mask) for invocation, mask in masks.items()}


def invocations_of(adapters: Mapping[str, Adapter]) -> tuple[Tokens, ...]:
    """`invocations` of the methods of adapters by path."""
    return invocations(node.method for node in adapters.values())
