"""Text from a model: one prefill, then one token at a time over a cache of keys and values."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sborax.adapters.core import Context, SboraxError
from sborax.adapters.invocation import Invocations, continuation, find, invocations_of
from sborax.adapters.tree import nodes
from sborax.models.decoder import AbstractDecoder
from sborax.models.language_model import LanguageModel, Params
from sborax.models.memory import linked, run

BUCKET = 32
"""Prompts are padded to a multiple of this many tokens, so that few lengths are compiled."""
STRIDE = 8
"""Tokens that are written between two calls of `finished`."""


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
    finished: Callable[[list[list[int]]], Sequence[bool]] | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, up to and including the first end token.

    - temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled with `key`.
    - top_k, top_p: sample among the k likeliest (0: all), then among the likeliest that together reach p.
    - eos: ids that end a text; by default the model's `end_tokens`.
    - padding: "left" or "right", the side on which shorter prompts are padded. The result does not depend on it.
    - finished: a function of the tokens of every text, called every STRIDE tokens. It returns which texts are done.
      Generation stops when all are, so a finished text may go on while others do.

    Raises SboraxError for an empty prompt, an id outside the vocabulary, and text beyond the model's context.
    """
    check_request(model, prompts, max_new_tokens, temperature, top_k, top_p, padding)
    if temperature > 0 and key is None:
        raise SboraxError(f"temperature {temperature} samples: give a key, or 0 for greedy text")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = min(-(-int(lengths.max()) // BUCKET) * BUCKET, model.config.context)
    tokens, segments = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if padding == "left" else 0
        tokens[row, start : start + len(prompt)] = prompt
        segments[row, start : start + len(prompt)] = 1
    ends = np.array(model.end_tokens if eos is None else tuple(eos), np.int32)
    choice = Choice(temperature == 0, min(top_k, model.config.vocab_size), top_p)
    model.check_adapters(adapters)
    module = model.module.clone(keep=True, remat="none", expert_capacity=None)
    variables = {"params": params, "adapters": adapters or {}}
    rule = Rule(jnp.asarray(ends), jnp.float32(temperature), jax.random.key(0) if key is None else key)
    inputs = [jnp.asarray(array) for array in (tokens, segments, lengths)]
    texts, state = _prefill(module, max_new_tokens, choice, variables, rule, *inputs)
    endings = set(ends.tolist())
    stride = max_new_tokens if finished is None else STRIDE
    for until in range(stride, max_new_tokens + stride, stride):
        until = min(until, max_new_tokens)
        texts = _decode(module, choice, variables, rule, state, texts, jnp.int32(until))
        rows = [until_end(row, endings) for row in np.asarray(texts.out)[:, :until].tolist()]
        if finished is not None:
            texts = texts._replace(done=texts.done | np.array(finished(rows), bool))
            if texts.done.all():
                break
    return rows


class Choice(NamedTuple):
    """How the next token is drawn: the static part of the program."""

    greedy: bool
    top_k: int
    top_p: float


class Rule(NamedTuple):
    """The tokens that end a text, and how tokens are drawn: arguments of the program."""

    ends: Int[Array, " ends"]
    temperature: Float[Array, ""]
    key: Key[Array, ""]


class PromptState(NamedTuple):
    """What the prompt decides for all tokens that follow it."""

    routing: dict[str, Any]
    """Of routers."""
    invocations: Invocations
    """`Context.invocations` of one token."""


class Texts(NamedTuple):
    """The first `step` tokens of each text, and the keys and values of all tokens before the last."""

    step: Int[Array, ""]
    done: Bool[Array, " batch"]
    out: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    """Tokens of the prompts."""
    cache: Any
    live: Int[Array, "batch width"]
    """1 where the cache holds a token."""


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
    """Logits divided by the temperature; -inf for tokens that must not be drawn."""
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


def _keep(logits: Float[Array, "batch vocab"], mask: Bool[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    return jnp.where(mask, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    module: AbstractDecoder,
    new: int,
    choice: Choice,
    variables: dict[str, Any],
    rule: Rule,
    tokens: Int[Array, "batch width"],
    segments: Int[Array, "batch width"],
    lengths: Int[Array, " batch"],
) -> tuple[Texts, PromptState]:
    """The first token of each text, and what its prompt decides."""
    variables = linked(variables)
    masks = find(tokens, segments, invocations_of(nodes(variables["adapters"])))
    ctx = Context(prompt=segments, invocations=masks)
    (hidden, cache), routing = run(module, variables, tokens, segments, None, ctx, mutable=["routing"], method="hidden")
    last = tokens.shape[1] - 1 - jnp.argmax(segments[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    state = PromptState(routing, continuation(masks))
    first = _pick(module, choice, variables, rule, hidden, jnp.int32(0), state)
    cache = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, new - 1), (0, 0), (0, 0))), cache)
    live = jnp.pad(segments, ((0, 0), (0, new - 1)))
    out = jnp.zeros((tokens.shape[0], new), jnp.int32).at[:, 0].set(first)
    return Texts(jnp.int32(1), _ended(first, rule), out, lengths, cache, live), state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _decode(
    module: AbstractDecoder,
    choice: Choice,
    variables: dict[str, Any],
    rule: Rule,
    state: PromptState,
    texts: Texts,
    until: Int[Array, ""],
) -> Texts:
    """The texts with `until` tokens each, or fewer if all have ended."""
    width = texts.live.shape[1] - texts.out.shape[1] + 1
    variables = linked({**variables, **state.routing})
    ctx = Context(invocations=state.invocations)

    def unfinished(texts: Texts) -> Bool[Array, ""]:
        return (texts.step < until) & ~jnp.all(texts.done)

    def advance(texts: Texts) -> Texts:
        step, done, out, lengths, cache, live = texts
        token = jax.lax.dynamic_index_in_dim(out, step - 1, axis=1)
        hidden, new_cache = run(
            module, variables, token, None, (lengths + step - 1)[:, None], ctx, past=(cache, live), method="hidden"
        )
        slot = width + step - 1
        cache = jax.tree.map(
            lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, slot, 2), cache, new_cache
        )
        live = jax.lax.dynamic_update_slice_in_dim(live, jnp.ones_like(token), slot, 1)
        following = _pick(module, choice, variables, rule, hidden, step, state)
        out = jax.lax.dynamic_update_slice_in_dim(out, following[:, None], step, 1)
        return Texts(step + 1, done | _ended(following, rule), out, lengths, cache, live)

    return jax.lax.while_loop(unfinished, advance, texts)


def _pick(
    module: AbstractDecoder,
    choice: Choice,
    variables: dict[str, Any],
    rule: Rule,
    hidden: Float[Array, "batch 1 d"],
    step: Int[Array, ""],
    state: PromptState,
) -> Int[Array, " batch"]:
    logits = jnp.asarray(module.apply(variables, hidden, Context(invocations=state.invocations), method="head"))
    return choose(logits[:, 0], choice, rule.temperature, jax.random.fold_in(rule.key, step))


def _ended(token: Int[Array, " batch"], rule: Rule) -> Bool[Array, " batch"]:
    return jnp.any(token[:, None] == rule.ends[None], axis=-1)


def until_end(row: list[int], ends: set[int]) -> list[int]:
    """A row of tokens up to its first end token, which stays."""
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: stop + 1]


def check_request(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    new: int,
    temperature: float,
    top_k: int,
    top_p: float,
    padding: str,
) -> None:
    """Raise SboraxError for what `generate` refuses."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise SboraxError("every prompt must have at least one token")
    vocab, context = model.config.vocab_size, model.config.context
    if any(not 0 <= token < vocab for prompt in prompts for token in prompt):
        raise SboraxError(f"a prompt holds an id outside the vocabulary of {vocab}; is it this model's tokenizer?")
    longest = max(len(prompt) for prompt in prompts)
    if new < 1 or longest + new > context:
        raise SboraxError(f"a prompt of {longest} tokens and {new} new ones do not fit the context of {context}")
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise SboraxError(
            f"needs temperature in [0, inf), top_k >= 0 and top_p in (0, 1], got {temperature}, {top_k} and {top_p}"
        )
    if padding not in ("left", "right"):
        raise SboraxError(f"padding must be left or right, got {padding!r}")
