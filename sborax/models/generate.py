"""Text from a model: one prefill, then one token at a time over a cache of keys and values."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sborax.core import Context, SboraxError
from sborax.models.language_model import LanguageModel, Params
from sborax.models.llama import Llama
from sborax.models.memory import run
from sborax.routing import PROMPT
from sborax.tree import link

BUCKET = 32
"""Prompts are padded to a multiple of this many tokens, so that few lengths are compiled."""


def generate(
    model: LanguageModel,
    params: Params,
    adapters: Params | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Key[Array, ""] | None = None,
    eos: Sequence[int] | None = None,
    padding: str = "left",
) -> list[list[int]]:
    """New tokens for each prompt, up to and including the first end token.

    temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled with `key`.
    top_k, top_p: sample among the k likeliest (0: all), then among the likeliest that together reach p.
    eos: ids that end a text; by default the config's.
    padding: "left" or "right", the side on which shorter prompts are filled up; the result does not depend on it.
    Raises SboraxError for an empty prompt, an id outside the vocabulary, and text beyond the model's context.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, padding)
    if temperature > 0 and key is None:
        raise SboraxError(f"temperature {temperature} samples: give a key, or 0 for greedy text")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = min(-(-int(lengths.max()) // BUCKET) * BUCKET, model.config.context)
    tokens, segments = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if padding == "left" else 0
        tokens[row, start : start + len(prompt)] = prompt
        segments[row, start : start + len(prompt)] = 1
    ends = np.array(model.config.eos_token_id if eos is None else tuple(eos), np.int32)
    choice = Choice(temperature == 0, min(top_k, model.config.vocab_size), top_p)
    model.check_adapters(adapters)
    out = _generate(
        model.module.clone(keep=True, remat="none"),
        max_new_tokens,
        choice,
        {"params": params, "adapters": adapters or {}},
        jnp.asarray(tokens),
        jnp.asarray(segments),
        jnp.asarray(lengths),
        jnp.asarray(ends),
        jnp.float32(temperature),
        jax.random.key(0) if key is None else key,
    )
    return [_until(row, set(ends.tolist())) for row in np.asarray(out).tolist()]


class Choice(NamedTuple):
    """How the next token is drawn; static in the compiled program."""

    greedy: bool
    top_k: int
    top_p: float


def choose(
    logits: Float[Array, "batch vocab"], choice: Choice, temperature: Float[Array, ""], key: Key[Array, ""]
) -> Int[Array, " batch"]:
    """The next token of each row."""
    if choice.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, narrowed(logits, choice, temperature), axis=-1).astype(jnp.int32)


def narrowed(
    logits: Float[Array, "batch vocab"], choice: Choice, temperature: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Logits divided by the temperature, -inf for tokens that are not to be drawn."""
    logits = logits / temperature
    if choice.top_k:
        logits = _keep(logits, logits >= jax.lax.top_k(logits, choice.top_k)[0][:, -1:])
    if choice.top_p < 1.0:
        ranked = -jnp.sort(-logits, axis=-1)
        likely = jax.nn.softmax(ranked, axis=-1)
        inside = jnp.cumsum(likely, axis=-1) - likely < choice.top_p
        least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = _keep(logits, logits >= least)
    return logits


def _keep(logits: Float[Array, "batch vocab"], kept: Bool[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    return jnp.where(kept, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    module: Llama,
    new: int,
    choice: Choice,
    variables: dict[str, Any],
    tokens: Int[Array, "batch width"],
    segments: Int[Array, "batch width"],
    lengths: Int[Array, " batch"],
    ends: Int[Array, " ends"],
    temperature: Float[Array, ""],
    key: Key[Array, ""],
) -> Int[Array, "batch new"]:
    width = tokens.shape[1]

    def pick(hidden: Float[Array, "batch 1 d"], step: Int[Array, ""] | int) -> Int[Array, " batch"]:
        logits = jnp.asarray(module.apply(variables, hidden, method="head"))
        return choose(logits[:, 0], choice, temperature, jax.random.fold_in(key, step))

    def ended(token: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        return jnp.any(token[:, None] == ends[None], axis=-1)

    ctx = Context(tokens={PROMPT: segments})
    variables = {**variables, "adapters": link(variables["adapters"])}
    (hidden, cache), routing = run(module, variables, tokens, segments, None, ctx, mutable=["routing"], method="hidden")
    # What routers decided on the prompt holds for every token after it.
    decided = {**variables, **routing}
    last = width - 1 - jnp.argmax(segments[:, ::-1], axis=1)
    first = pick(jnp.take_along_axis(hidden, last[:, None, None], axis=1), 0)
    cache = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, new - 1), (0, 0), (0, 0))), cache)
    live = jnp.pad(segments, ((0, 0), (0, new - 1)))
    out = jnp.zeros((tokens.shape[0], new), jnp.int32).at[:, 0].set(first)

    def unfinished(state: Any) -> Bool[Array, ""]:
        step, done = state[0], state[1]
        return (step < new) & ~jnp.all(done)

    def advance(state: Any) -> Any:
        step, done, out, cache, live = state
        token = jax.lax.dynamic_index_in_dim(out, step - 1, axis=1)
        hidden, own = run(
            module, decided, token, positions=(lengths + step - 1)[:, None], past=(cache, live), method="hidden"
        )
        slot = width + step - 1
        cache = jax.tree.map(lambda all_, new_: jax.lax.dynamic_update_slice_in_dim(all_, new_, slot, 2), cache, own)
        live = jax.lax.dynamic_update_slice_in_dim(live, jnp.ones_like(token), slot, 1)
        following = pick(hidden, step)
        out = jax.lax.dynamic_update_slice_in_dim(out, following[:, None], step, 1)
        return step + 1, done | ended(following), out, cache, live

    return jax.lax.while_loop(unfinished, advance, (jnp.int32(1), ended(first), out, cache, live))[2]


def _until(row: list[int], ends: set[int]) -> list[int]:
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: stop + 1]


def _check(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    new: int,
    temperature: float,
    top_k: int,
    top_p: float,
    padding: str,
) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise SboraxError("every prompt must have at least one token")
    vocab, context = model.config.vocab_size, model.config.context
    if any(not 0 <= token < vocab for prompt in prompts for token in prompt):
        raise SboraxError(f"a prompt holds an id outside the vocabulary of {vocab}; is it this model's tokenizer?")
    longest = max(len(prompt) for prompt in prompts)
    if new < 1 or longest + new > context:
        raise SboraxError(f"a prompt of {longest} tokens and {new} new ones do not fit the context of {context}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise SboraxError(f"temperature {temperature}, top_k {top_k} and top_p {top_p}: need >= 0, >= 0, and in (0, 1]")
    if padding not in ("left", "right"):
        raise SboraxError(f"padding must be left or right, got {padding!r}")
