"""Beam search over a cache of keys and values, with the rules of transformers' `generate(num_beams=...)`."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sborax.adapters.core import Context, SboraxError
from sborax.adapters.invocation import continuation, find, invocations_of
from sborax.adapters.routing import routed_parts
from sborax.adapters.tree import nodes
from sborax.models.decoder import AbstractDecoder
from sborax.models.generate import BUCKET, check_request, until_end
from sborax.models.language_model import LanguageModel, Params
from sborax.models.memory import linked, run

NEVER = -1e9
"""The score of a text that must not be chosen, or an addend of that."""


def beam_search(
    model: LanguageModel,
    params: Params,
    adapters: Params | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    beams: int,
    *,
    eos: Sequence[int] | None = None,
) -> list[list[int]]:
    """The best text that `beams` beams find for each prompt, with its end token. Scores are means of ln p over tokens.

    The search of a prompt ends when its best running beam, at its present length, is no better than the worst of
    `beams` finished texts (transformers' `early_stopping=False`, `length_penalty=1`).

    - eos: ids that end a text; by default the model's `end_tokens`.

    Raises SboraxError as `generate` does, and for fewer than two beams.
    """
    check_request(model, prompts, max_new_tokens, 0.0, 0, 1.0, "left")
    if beams < 2:
        raise SboraxError(f"a search needs 2 beams or more, got {beams}; generate is greedy")
    model.check_adapters(adapters)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = min(-(-int(lengths.max()) // BUCKET) * BUCKET, model.config.context)
    tokens, segments = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :], segments[row, width - len(prompt) :] = prompt, 1
    ends = np.array(model.end_tokens if eos is None else tuple(eos), np.int32)
    routed = any(routed_parts(node.method) for node in nodes(adapters or {}).values())
    out = _search(
        model.module.clone(keep=True, remat="none", expert_capacity=None),
        max_new_tokens,
        beams,
        routed,
        {"params": params, "adapters": adapters or {}},
        jnp.asarray(tokens),
        jnp.asarray(segments),
        jnp.asarray(lengths),
        jnp.asarray(ends),
    )
    return [until_end(row, set(ends.tolist())) for row in np.asarray(out).tolist()]


class Beams(NamedTuple):
    """Running and finished texts of each row, best first. `scores` are sums of ln p, `done_scores` means."""

    tokens: Int[Array, "rows beams new"]
    scores: Float[Array, "rows beams"]
    done: Int[Array, "rows beams new"]
    done_scores: Float[Array, "rows beams"]
    finished: Bool[Array, "rows beams"]
    hopeful: Bool[Array, " rows"]
    """Whether a running text may still become better than the finished ones."""
    exhausted: Bool[Array, ""]
    """Whether no text can go on."""


def _empty(rows: int, beams: int, new: int) -> Beams:
    # One beam at first, or else all would find the same texts.
    scores = jnp.full((rows, beams), NEVER).at[:, 0].set(0.0)
    tokens = jnp.zeros((rows, beams, new), jnp.int32)
    unfinished = jnp.zeros((rows, beams), bool)
    return Beams(
        tokens, scores, tokens, jnp.full((rows, beams), NEVER), unfinished, jnp.ones(rows, bool), jnp.array(False)
    )


def _take(array: Array, index: Int[Array, "rows chosen"]) -> Array:
    return jnp.take_along_axis(array, jnp.expand_dims(index, tuple(range(2, array.ndim))), axis=1)


def _extend(
    old: Beams, logprobs: Float[Array, "rows beams vocab"], step: Int[Array, ""], ends: Int[Array, " ends"]
) -> tuple[Beams, Int[Array, "rows beams"]]:
    """The beams with one more token, the `step`-th, and the beam that each running one continues."""
    rows, beams, vocab = logprobs.shape
    new = old.tokens.shape[2]
    candidates = min(max(2, 1 + ends.shape[0]) * beams, beams * vocab)
    top, index = jax.lax.top_k((logprobs + old.scores[:, :, None]).reshape(rows, -1), candidates)
    parents, tokens = index // vocab, (index % vocab).astype(jnp.int32)
    texts = jax.lax.dynamic_update_slice_in_dim(_take(old.tokens, parents), tokens[:, :, None], step, axis=2)
    length = step + 1
    ended = jnp.any(tokens[:, :, None] == ends[None, None], axis=-1) | (length >= new)
    running, places = jax.lax.top_k(top + jnp.where(ended, NEVER, 0.0), beams)
    # Finished texts come from the best candidates alone; the others are there so that enough beams run on.
    counted = ended & (jnp.arange(candidates) < beams)[None]
    mean = top / length.astype(jnp.float32)
    mean = mean + jnp.where(old.hopeful, 0.0, NEVER)[:, None] + jnp.where(counted, 0.0, NEVER)
    done_scores, best = jax.lax.top_k(jnp.concatenate([old.done_scores, mean], axis=1), beams)
    done, finished = (
        _take(jnp.concatenate(pair, axis=1), best) for pair in ((old.done, texts), (old.finished, counted))
    )
    worst = jnp.where(finished, jnp.min(done_scores, axis=1, keepdims=True), NEVER)
    better = jnp.any(running[:, :1] / length.astype(jnp.float32) > worst, axis=1)
    extended = Beams(
        _take(texts, places), running, done, done_scores, finished, old.hopeful & better, jnp.all(ended)
    )  # fmt: skip
    return extended, _take(parents, places)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _search(
    module: AbstractDecoder,
    new: int,
    beams: int,
    routed: bool,
    variables: dict[str, Any],
    tokens: Int[Array, "batch width"],
    segments: Int[Array, "batch width"],
    lengths: Int[Array, " batch"],
    ends: Int[Array, " ends"],
) -> Int[Array, "batch new"]:
    rows, width = tokens.shape
    variables = linked(variables)
    # A router decides for each row, so each beam needs the prompt in a row of its own.
    prompt_copies, mask_copies = (beams, 1) if routed else (1, beams)
    tokens, segments = (jnp.repeat(array, prompt_copies, axis=0) for array in (tokens, segments))
    masks = find(tokens, segments, invocations_of(nodes(variables["adapters"])))
    ctx = Context(prompt=segments, invocations=masks)
    (hidden, cache), routing = run(module, variables, tokens, segments, None, ctx, mutable=["routing"], method="hidden")
    decided = {**variables, **routing}
    # All beams of a row go on from its prompt.
    ctx = Context(invocations=jax.tree.map(lambda mask: jnp.repeat(mask, mask_copies, axis=0), continuation(masks)))

    def logprobs(hidden: Float[Array, "flat 1 d"]) -> Float[Array, "rows beams vocab"]:
        logits = jnp.asarray(module.apply(variables, hidden, ctx, method="head"))
        return jax.nn.log_softmax(logits[:, 0], axis=-1).reshape(rows, beams, -1)

    first, _ = _extend(
        _empty(rows, beams, new), logprobs(jnp.repeat(hidden[:, -1:], mask_copies, axis=0)), jnp.int32(0), ends
    )
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, mask_copies, axis=1), cache)
    cache = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, new - 1), (0, 0), (0, 0))), cache)
    live = jnp.pad(jnp.repeat(segments, mask_copies, axis=0), ((0, 0), (0, new - 1)))
    starts = jnp.repeat(lengths, beams)

    def unfinished(state: Any) -> Bool[Array, ""]:
        return jnp.any(state[1].hopeful) & ~state[1].exhausted

    def advance(state: Any) -> Any:
        step, texts, cache, live = state
        token = jax.lax.dynamic_index_in_dim(texts.tokens, step - 1, axis=2).reshape(rows * beams, 1)
        hidden, new_cache = run(
            module, decided, token, None, (starts + step - 1)[:, None], ctx, past=(cache, live), method="hidden"
        )
        slot = width + step - 1
        cache = jax.tree.map(
            lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, slot, 2), cache, new_cache
        )
        live = jax.lax.dynamic_update_slice_in_dim(live, jnp.ones_like(token), slot, 1)
        texts, parents = _extend(texts, logprobs(hidden), step, ends)
        flat = (parents + beams * jnp.arange(rows, dtype=parents.dtype)[:, None]).reshape(-1)
        return step + 1, texts, jax.tree.map(lambda leaf: jnp.take(leaf, flat, axis=1), cache), live

    _, texts, _, _ = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), first, cache, live))
    return texts.done[:, 0]
