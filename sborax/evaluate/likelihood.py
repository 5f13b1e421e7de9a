"""Log-likelihoods of continuations. A prompt that several continuations share goes through the model once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sborax.adapters.core import Context
from sborax.adapters.invocation import Invocations, continuation, find, invocations_of
from sborax.adapters.tree import nodes
from sborax.models.decoder import AbstractDecoder
from sborax.models.memory import linked, run

CHUNK = 256
"""Tokens whose logits are in memory at one time."""


@functools.partial(jax.jit, static_argnums=0)
def score_rows(
    module: AbstractDecoder,
    variables: dict[str, Any],
    tokens: Int[Array, "rows width"],
    lengths: Int[Array, " rows"],
    targets: Int[Array, "rows new"],
    counts: Int[Array, " rows"],
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """ln p(targets | prompt) of each row, and whether every target is the likeliest token.

    Adapters that act depending on the text look at the prompt only, as in generation.

    - tokens: a prompt, then all targets but the last.
    - lengths: tokens of the prompt, at least 1.
    - counts: number of targets, at least 1.
    """
    variables = linked(variables)
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    prompt = (slots < lengths[:, None]).astype(jnp.int32)
    segments = (slots < (lengths + counts - 1)[:, None]).astype(jnp.int32)
    masks = find(tokens, prompt, invocations_of(nodes(variables["adapters"])))
    ahead = continuation(masks, tokens.shape[1])
    ctx = Context(prompt=prompt, invocations={key: jnp.where(prompt != 0, masks[key], ahead[key]) for key in ahead})
    (hidden, _), _ = run(module, variables, tokens, segments, None, ctx, mutable=["routing"], method="hidden")
    steps = jnp.arange(targets.shape[1], dtype=jnp.int32)[None]
    places = jnp.minimum((lengths - 1)[:, None] + steps, tokens.shape[1] - 1)
    states = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    logprobs, likeliest = _token_logprobs(module, variables, states, targets, continuation(masks))
    return _sum_row(logprobs, likeliest, counts)


@functools.partial(jax.jit, static_argnums=0)
def score_options(
    module: AbstractDecoder,
    variables: dict[str, Any],
    prompts: Int[Array, "rows width"],
    lengths: Int[Array, " rows"],
    targets: Int[Array, "rows options new"],
    counts: Int[Array, "rows options"],
) -> tuple[Float[Array, "rows options"], Bool[Array, "rows options"]]:
    """`score_rows` for several continuations of each prompt. The prompt goes through the model once.

    It does not work for adapters that a router weighs.
    """
    variables = linked(variables)
    slots = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None]
    segments = (slots < lengths[:, None]).astype(jnp.int32)
    masks = find(prompts, segments, invocations_of(nodes(variables["adapters"])))
    ctx = Context(invocations=masks)
    hidden, cache = run(module.clone(keep=True), variables, prompts, segments, None, ctx, method="hidden")
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    first = jax.nn.log_softmax(_head(module, variables, last, continuation(masks))[:, 0], axis=-1)
    begin = targets[:, :, 0]
    logprobs = jnp.take_along_axis(first, begin, axis=1)[:, :, None]
    likeliest = (jnp.argmax(first, axis=-1).astype(jnp.int32)[:, None] == begin)[:, :, None]
    if targets.shape[2] > 1:
        steps = jnp.arange(targets.shape[2] - 1, dtype=jnp.int32)[None]
        positions = lengths[:, None] + steps

        def remaining_tokens(
            option: Int[Array, "rows new"], count: Int[Array, " rows"]
        ) -> tuple[Float[Array, "rows rest"], Bool[Array, "rows rest"]]:
            read = (steps < (count - 1)[:, None]).astype(jnp.int32)
            ctx = Context(invocations=continuation(masks, read.shape[1]))
            states = run(
                module, variables, option[:, :-1], read, positions, ctx, past=(cache, segments), method="hidden"
            )[0]  # fmt: skip
            return _token_logprobs(module, variables, states, option[:, 1:], continuation(masks))

        # The cache is not an argument of the mapped function, so options do not get copies of it, only of a layer's.
        tail = jax.vmap(remaining_tokens, in_axes=1, out_axes=1)(targets, counts)
        logprobs, likeliest = (jnp.concatenate(pair, axis=2) for pair in ((logprobs, tail[0]), (likeliest, tail[1])))
    return _sum_row(logprobs, likeliest, counts)


def _head(
    module: AbstractDecoder, variables: dict[str, Any], states: Float[Array, "rows new d"], masks: Invocations
) -> Any:
    return module.apply(variables, states, Context(invocations=masks), method="head")


def _sum_row(
    logprobs: Float[Array, "*rows new"], likeliest: Bool[Array, "*rows new"], counts: Int[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Bool[Array, "*rows"]]:
    steps = jnp.arange(logprobs.shape[-1], dtype=jnp.int32)
    real = jnp.expand_dims(steps, range(counts.ndim)) < counts[..., None]
    return jnp.sum(jnp.where(real, logprobs, 0.0), axis=-1), jnp.all(likeliest | ~real, axis=-1)


def _token_logprobs(
    module: AbstractDecoder,
    variables: dict[str, Any],
    states: Float[Array, "rows new d"],
    targets: Int[Array, "rows new"],
    masks: Invocations,
) -> tuple[Float[Array, "rows new"], Bool[Array, "rows new"]]:
    """ln p of each target, and whether it is the likeliest token, from the hidden states before it.

    - masks: of each row, as `continuation` makes them of its prompt.
    """
    rows, new, d = states.shape
    chunk = min(CHUNK, rows * new)
    missing = -(rows * new) % chunk

    def chunk_logprobs(inputs: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        states, targets, masks = inputs
        logits = _head(module, variables, states[None], jax.tree.map(lambda mask: mask[None], masks))[0]
        target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32) == targets
        return target_logits - jax.nn.logsumexp(logits, axis=-1), likeliest

    state_chunks = jnp.pad(states.reshape(-1, d), ((0, missing), (0, 0))).reshape(-1, chunk, d)

    def in_chunks(leaf: Array) -> Array:
        return jnp.pad(leaf.reshape(-1), (0, missing)).reshape(-1, chunk)

    of_tokens = jax.tree.map(in_chunks, continuation(masks, new))
    chunks = jax.lax.map(chunk_logprobs, (state_chunks, in_chunks(targets), of_tokens))
    logprobs, likeliest = (leaf.reshape(-1)[: rows * new].reshape(rows, new) for leaf in chunks)
    return logprobs, likeliest
