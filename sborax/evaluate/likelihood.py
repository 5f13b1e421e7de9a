"""Log-likelihoods of continuations: jitted, a prompt that several continuations share read once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sborax.adapters.core import Context
from sborax.adapters.tree import link
from sborax.models.decoder import AbstractDecoder
from sborax.models.memory import run

CHUNK = 256
"""Tokens whose logits exist at one time."""


@functools.partial(jax.jit, static_argnums=0)
def alone(
    module: AbstractDecoder,
    variables: dict[str, Any],
    tokens: Int[Array, "rows width"],
    lengths: Int[Array, " rows"],
    targets: Int[Array, "rows new"],
    counts: Int[Array, " rows"],
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """ln p(targets | prompt) of each row, and whether every target is the likeliest token.

    tokens: a prompt of `lengths` tokens (at least one), then all but the last of `counts` targets.
    """
    variables = {**variables, "adapters": link(variables["adapters"])}
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    prompt = (slots < lengths[:, None]).astype(jnp.int32)
    segments = (slots < (lengths + counts - 1)[:, None]).astype(jnp.int32)
    ctx = Context(prompt=prompt)
    (hidden, _), _ = run(module, variables, tokens, segments, None, ctx, mutable=["routing"], method="hidden")
    steps = jnp.arange(targets.shape[1], dtype=jnp.int32)[None]
    places = jnp.minimum((lengths - 1)[:, None] + steps, tokens.shape[1] - 1)
    states = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    logprobs, likeliest = _of_tokens(module, variables, states, targets)
    return _over_row(logprobs, likeliest, counts)


@functools.partial(jax.jit, static_argnums=0)
def shared(
    module: AbstractDecoder,
    variables: dict[str, Any],
    prompts: Int[Array, "rows width"],
    lengths: Int[Array, " rows"],
    targets: Int[Array, "rows options new"],
    counts: Int[Array, "rows options"],
) -> tuple[Float[Array, "rows options"], Bool[Array, "rows options"]]:
    """`alone` for several continuations of each prompt, which goes through the model once.

    Not for adapters that a router weighs.
    """
    variables = {**variables, "adapters": link(variables["adapters"])}
    slots = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None]
    segments = (slots < lengths[:, None]).astype(jnp.int32)
    hidden, cache = run(module.clone(keep=True), variables, prompts, segments, method="hidden")
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    first = jax.nn.log_softmax(_head(module, variables, last)[:, 0], axis=-1)
    begin = targets[:, :, 0]
    logprobs = jnp.take_along_axis(first, begin, axis=1)[:, :, None]
    likeliest = (jnp.argmax(first, axis=-1).astype(jnp.int32)[:, None] == begin)[:, :, None]
    if targets.shape[2] > 1:
        steps = jnp.arange(targets.shape[2] - 1, dtype=jnp.int32)[None]
        positions = lengths[:, None] + steps

        def further(
            own: Int[Array, "rows new"], count: Int[Array, " rows"]
        ) -> tuple[Float[Array, "rows rest"], Bool[Array, "rows rest"]]:
            read = (steps < (count - 1)[:, None]).astype(jnp.int32)
            states = run(
                module, variables, own[:, :-1], read, positions, past=(cache, segments), method="hidden"
            )[0]  # fmt: skip
            return _of_tokens(module, variables, states, own[:, 1:])

        # The cache is not an argument of what is mapped: no copy for each option, but one layer's at a time.
        rest = jax.vmap(further, in_axes=1, out_axes=1)(targets, counts)
        logprobs, likeliest = (jnp.concatenate(pair, axis=2) for pair in ((logprobs, rest[0]), (likeliest, rest[1])))
    return _over_row(logprobs, likeliest, counts)


def _head(module: AbstractDecoder, variables: dict[str, Any], states: Float[Array, "rows new d"]) -> Any:
    return module.apply(variables, states, method="head")


def _over_row(
    logprobs: Float[Array, "*rows new"], likeliest: Bool[Array, "*rows new"], counts: Int[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Bool[Array, "*rows"]]:
    steps = jnp.arange(logprobs.shape[-1], dtype=jnp.int32)
    real = jnp.expand_dims(steps, range(counts.ndim)) < counts[..., None]
    return jnp.sum(jnp.where(real, logprobs, 0.0), axis=-1), jnp.all(likeliest | ~real, axis=-1)


def _of_tokens(
    module: AbstractDecoder,
    variables: dict[str, Any],
    states: Float[Array, "rows new d"],
    targets: Int[Array, "rows new"],
) -> tuple[Float[Array, "rows new"], Bool[Array, "rows new"]]:
    """ln p of each target, and whether it is the likeliest, from the states before it."""
    rows, new, d = states.shape
    chunk = min(CHUNK, rows * new)
    missing = -(rows * new) % chunk

    def one(part: tuple[Any, Any]) -> tuple[Any, Any]:
        logits = _head(module, variables, part[0][None])[0]
        chosen = jnp.take_along_axis(logits, part[1][:, None], axis=1)[:, 0]
        found = jnp.argmax(logits, axis=-1).astype(jnp.int32) == part[1]
        return chosen - jax.nn.logsumexp(logits, axis=-1), found

    flat = jnp.pad(states.reshape(-1, d), ((0, missing), (0, 0))).reshape(-1, chunk, d)
    wanted = jnp.pad(targets.reshape(-1), (0, missing)).reshape(-1, chunk)
    done = jax.lax.map(one, (flat, wanted))
    logprobs, likeliest = (leaf.reshape(-1)[: rows * new].reshape(rows, new) for leaf in done)
    return logprobs, likeliest
