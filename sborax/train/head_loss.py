"""Token cross-entropy on the tokens that count, without ever keeping a (tokens, vocab) array.

Losses are sums over tokens. The step divides once by the number of tokens that count, whatever the number of
microbatches, so that accumulation is exact.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from sborax.adapters.constraints import ROWS, dividing

CHUNK = 256
"""How many tokens have logits at one time, by default."""
Head = Callable[[Any, Int[Array, ""]], Float[Array, "chunk vocab"]]
"""Maps the states of a chunk of tokens, and the chunk's number, to float32 logits."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def frozen_head_loss(
    hidden: Float[Array, "tokens d"],
    table: Float[Array, "_ _"],
    targets: Int[Array, " tokens"],
    counts: Bool[Array, " tokens"],
    vocab_first: bool,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """sum_t counts_t (logsumexp_v(z_t) - z_t[target_t]) with z = hidden @ kernel in float32; `table` is constant.

    Loss and gradient in `hidden` are computed together, so that logits are computed once, and only for chunks with
    tokens that count. `table` gets no gradient: use `trained_head_loss` if it is trained or adapted.

    Args:
    - vocab_first: `table` is (vocab, d), as a tied embedding is, and not (d, vocab).
    - chunk: tokens at one time; None (default) for `CHUNK`.
    """
    return _loss_and_slope(hidden, table, targets, counts, vocab_first, chunk)[0]


def _forward(hidden, table, targets, counts, vocab_first, chunk):
    total, slope, _ = _loss_and_slope(hidden, table, targets, counts, vocab_first, chunk, want_slope=True)
    return total, slope


def _backward(vocab_first, chunk, slope, g):
    return slope * g.astype(slope.dtype), None, None, None


frozen_head_loss.defvjp(_forward, _backward)


def head_loss(
    hidden: Float[Array, "tokens d"],
    table: Float[Array, "_ _"],
    targets: Int[Array, " tokens"],
    counts: Bool[Array, " tokens"],
    vocab_first: bool,
) -> Float[Array, ""]:
    """`frozen_head_loss`; on a mesh each group of devices computes that of its own rows."""
    axes = dividing(hidden.shape[0], ROWS)
    if not axes:
        return frozen_head_loss(hidden, table, targets, counts, vocab_first)

    def rows_loss(hidden: Array, table: Array, targets: Array, counts: Array) -> Array:
        return jnp.expand_dims(frozen_head_loss(hidden, table, targets, counts, vocab_first), 0)

    rows, replicated = PartitionSpec(axes), PartitionSpec()
    specs = (rows, replicated, rows, rows)
    sharded = jax.shard_map(rows_loss, in_specs=specs, out_specs=rows, axis_names=set(axes), check_vma=False)
    return jnp.sum(sharded(hidden, table, targets, counts))


def head_losses(
    hidden: Float[Array, "tokens d"],
    table: Float[Array, "_ _"],
    targets: Int[Array, " tokens"],
    counts: Bool[Array, " tokens"],
    vocab_first: bool,
) -> tuple[Float[Array, ""], Float[Array, " tokens"]]:
    """`head_loss`, and its terms by token, which are 0 for tokens that do not count; without gradients."""

    def losses(hidden: Array, table: Array, targets: Array, counts: Array) -> tuple[Array, Array]:
        total, _, terms = _loss_and_slope(hidden, table, targets, counts, vocab_first, want_terms=True)
        return total, terms

    axes = dividing(hidden.shape[0], ROWS)
    if not axes:
        return losses(hidden, table, targets, counts)

    def rows_losses(hidden: Array, table: Array, targets: Array, counts: Array) -> tuple[Array, Array]:
        total, terms = losses(hidden, table, targets, counts)
        return jnp.expand_dims(total, 0), terms

    rows, replicated = PartitionSpec(axes), PartitionSpec()
    specs = (rows, replicated, rows, rows)
    sharded = jax.shard_map(rows_losses, in_specs=specs, out_specs=(rows, rows), axis_names=set(axes), check_vma=False)
    totals, terms = sharded(hidden, table, targets, counts)
    return jnp.sum(totals), terms


def _loss_and_slope(
    hidden: Float[Array, "tokens d"],
    table: Float[Array, "_ _"],
    targets: Int[Array, " tokens"],
    counts: Bool[Array, " tokens"],
    vocab_first: bool,
    chunk: int | None = None,
    want_slope: bool = False,
    want_terms: bool = False,
) -> tuple[Float[Array, ""], Any, Any]:
    """The loss, and if wanted its gradient in `hidden` and its terms by token; None for what is not."""
    tokens, _ = hidden.shape
    chunk = min(chunk or CHUNK, tokens)
    # Tokens that count first, so that the loop ends at the last of them.
    order = jnp.pad(jnp.argsort(~counts, stable=True), (0, -tokens % chunk), constant_values=tokens)
    hidden_sorted = hidden.at[order].get(mode="fill", fill_value=0)
    targets_sorted = targets.at[order].get(mode="fill", fill_value=0)
    counts_sorted = counts.at[order].get(mode="fill", fill_value=False).astype(jnp.float32)
    vocab_axis, d_axis = (0, 1) if vocab_first else (1, 0)

    def product(x: Array, axis: int) -> Array:
        dims = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(x, table, dims, preferred_element_type=jnp.float32)

    def body(number: Array, carry: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
        total, slope, terms = carry
        start = number * chunk
        states, target, weight = (
            jax.lax.dynamic_slice_in_dim(array, start, chunk)
            for array in (hidden_sorted, targets_sorted, counts_sorted)
        )
        logits = product(states, d_axis)
        top = jnp.max(logits, axis=1, keepdims=True)
        powers = jnp.exp(logits - top)
        norm = jnp.sum(powers, axis=1, keepdims=True)
        target_logits = jnp.take_along_axis(logits, target[:, None], axis=1)
        losses = weight[:, None] * (top + jnp.log(norm) - target_logits)
        total = total + jnp.sum(losses)
        if want_terms:
            terms = jax.lax.dynamic_update_slice_in_dim(terms, losses[:, 0], start, axis=0)
        if want_slope:
            # softmax @ kernel' less the target's column. Normalised after the product, where the array is smaller.
            column = jnp.take(table, target, axis=vocab_axis).astype(jnp.float32)
            column = column if vocab_first else column.T
            mean = product(powers.astype(table.dtype), vocab_axis) / norm
            chunk_slope = (weight[:, None] * (mean - column)).astype(hidden.dtype)
            slope = jax.lax.dynamic_update_slice_in_dim(slope, chunk_slope, start, axis=0)
        return total, slope, terms

    needed = -(-jnp.sum(counts, dtype=jnp.int32) // chunk)
    empty = jnp.zeros_like(hidden_sorted) if want_slope else None
    zeros = jnp.zeros_like(counts_sorted) if want_terms else None
    total, slope, terms = jax.lax.fori_loop(0, needed, body, (jnp.float32(0), empty, zeros))
    if slope is not None:
        slope = jnp.zeros_like(hidden).at[order].set(slope, mode="drop", unique_indices=True)
    if terms is not None:
        terms = jnp.zeros(tokens, terms.dtype).at[order].set(terms, mode="drop", unique_indices=True)
    return total, slope, terms


def trained_head_loss(
    head: Head,
    states: PyTree[Shaped[Array, "tokens ..."]],
    targets: Int[Array, " tokens"],
    counts: Bool[Array, " tokens"],
    chunk: int = CHUNK,
) -> Float[Array, ""]:
    """The sum of `frozen_head_loss`, with gradients in everything that `head` depends on.

    Each chunk's logits are computed again in the backward pass.

    Args:
    - states: what `head` reads of each token, such as its hidden state.
    """

    @jax.checkpoint
    def chunk_loss(number: Array, states: Any, target: Array, weight: Array) -> Array:
        return jnp.sum(weight * -_log_probs(head(states, number), target))

    def body(total: Array, part: tuple[Any, ...]) -> tuple[Array, None]:
        return total + chunk_loss(*part), None

    parts = _in_chunks(chunk, states, targets, counts.astype(jnp.float32))
    return jax.lax.scan(body, jnp.float32(0), parts)[0]


def trained_head_losses(
    head: Head,
    states: PyTree[Shaped[Array, "tokens ..."]],
    targets: Int[Array, " tokens"],
    counts: Bool[Array, " tokens"],
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], Float[Array, " tokens"]]:
    """`trained_head_loss`, and its terms by token, which are 0 for tokens that do not count."""

    def body(total: Array, part: tuple[Any, ...]) -> tuple[Array, Array]:
        number, chunk_states, target, weight = part
        losses = weight * -_log_probs(head(chunk_states, number), target)
        return total + jnp.sum(losses), losses

    parts = _in_chunks(chunk, states, targets, counts.astype(jnp.float32))
    total, terms = jax.lax.scan(body, jnp.float32(0), parts)
    return total, terms.reshape(-1)[: len(targets)]


def head_log_probs(
    head: Head,
    states: PyTree[Shaped[Array, "tokens ..."]],
    targets: Int[Array, " tokens"],
    chunk: int = CHUNK,
) -> Float[Array, " tokens"]:
    """log softmax(head(states_t))[target_t] of every token, with gradients in everything that `head` depends on.

    Each chunk's logits are computed again in the backward pass.
    """

    @jax.checkpoint
    def chunk_log_probs(part: tuple[Any, ...]) -> Array:
        number, chunk_states, target = part
        return _log_probs(head(chunk_states, number), target)

    return jax.lax.map(chunk_log_probs, _in_chunks(chunk, states, targets)).reshape(-1)[: len(targets)]


def _log_probs(logits: Float[Array, "chunk vocab"], targets: Int[Array, " chunk"]) -> Float[Array, " chunk"]:
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return target_logits - jax.nn.logsumexp(logits, axis=1)


def _in_chunks(chunk: int, *trees: PyTree[Shaped[Array, "tokens ..."]]) -> tuple[Any, ...]:
    """The numbers of the chunks of at most `chunk` tokens, and the arrays in chunks; the last is padded with zeros."""
    tokens = len(jax.tree.leaves(trees)[0])
    chunk = min(chunk, tokens)
    ends = (0, -tokens % chunk)

    def cut(leaf: Array) -> Array:
        return jnp.pad(leaf, (ends, *((0, 0),) * (leaf.ndim - 1))).reshape(-1, chunk, *leaf.shape[1:])

    return jnp.arange((tokens + ends[1]) // chunk), *jax.tree.map(cut, trees)
