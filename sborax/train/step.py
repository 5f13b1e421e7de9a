"""One optimiser step as one compiled function: state and batch in, state and numbers out."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from sborax.adapters.core import Context, SboraxError
from sborax.adapters.routing import PROMPT, AbstractRouter
from sborax.adapters.tree import combine, nodes
from sborax.layout.state import Flat, TrainState, put_together
from sborax.models.language_model import LanguageModel
from sborax.train.loss import head_loss, trained_head_loss

HEAD = "lm_head/kernel"
TABLE = "embed_tokens/embedding"
WATCHED = ("loss", "grad_norm", "update_norm")
"""Numbers of a step that have to be finite."""


def prompt_of(segments: Int[Array, "batch length"], counts: Bool[Array, "batch length"]) -> Bool[Array, "batch length"]:
    """The tokens up to the one from which the first that counts is predicted, padding left out."""
    before = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts.astype(jnp.int32)
    return (segments > 0) & (before == 0)


def observed_losses(
    model: LanguageModel,
    train: PyTree,
    frozen: PyTree,
    base: Flat,
    batch: dict[str, Array],
    key: Key[Array, ""] | None,
    observe: bool = False,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, "*stack in"]]]:
    """What a step minimises the sum of, for one microbatch of arrays (batch, length), summed over tokens that count.

    loss: cross-entropy. balance_loss: what routers add, where there are any.
    Also, to `observe`, the norms of every projection's input features by path, padding left out.
    """
    params = put_together(base, train["base"], model.module.dtype)
    adapters = combine(train["adapters"], frozen)
    found = nodes(adapters)
    tokens, segments = batch["tokens"], batch["segments"]
    extra: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    if any(isinstance(node.method, AbstractRouter) for node in found.values()):
        ctx = Context(tokens={PROMPT: prompt_of(segments, batch["counts"])})
        hidden, balance = model.routed(params, adapters, tokens, segment_ids=segments, dropout_key=key, ctx=ctx)
        extra["balance_loss"] = balance * jnp.sum(batch["counts"], dtype=jnp.float32)
    elif observe:
        hidden, seen = model.observed(params, adapters, tokens, segment_ids=segments, dropout_key=key)
    else:
        hidden = model.hidden(params, adapters, tokens, segment_ids=segments, dropout_key=key)
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets, counts = batch["targets"].reshape(-1), batch["counts"].reshape(-1)
    tied = model.config.tie_word_embeddings
    path = TABLE if tied else HEAD
    if path in train["base"] or HEAD in found:
        loss: Any = trained_head_loss(
            lambda own: model.head(params, adapters, own[None], dropout_key=key)[0], flat, targets, counts
        )
    else:
        loss = head_loss(flat, base[path], targets, counts, tied)
    return {"loss": loss, **extra}, seen


def batch_losses(
    model: LanguageModel, train: PyTree, frozen: PyTree, base: Flat, batch: dict[str, Array], key: Key[Array, ""] | None
) -> dict[str, Float[Array, ""]]:
    """The losses of `observed_losses` alone."""
    return observed_losses(model, train, frozen, base, batch, key)[0]


def norms(grads: PyTree) -> dict[str, Float[Array, ""]]:
    """Norm of every adapter's part of a tree, and of every trained base leaf's, by path."""
    adapters = {path: optax.tree.norm(node) for path, node in nodes(grads["adapters"]).items()}
    return adapters | {path: jnp.linalg.norm(leaf.reshape(-1)) for path, leaf in grads["base"].items()}


def make_step(
    model: LanguageModel,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    observe: bool = False,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, PyTree, Flat, dict[str, Any]], tuple[TrainState, dict[str, Any]]]:
    """The compiled step: `step(state, frozen, base, batch) -> (state, numbers)`.

    batch: arrays (accumulate, batch, length), one microbatch after the other; the gradient is that of
    sum of losses / number of tokens that count over all of them. Only `state` is donated.
    key: of dropout; folded with the step's number. observe: whether `tx` is given `norms=` of inputs by path.
    shardings: on a mesh, where the state lies, now and after the step.
    numbers: loss (nats per token), tokens that count, grad_norm before clipping, update_norm of what the optimiser
        adds, grad_norms and update_norms by path; with routers balance_loss, which is minimised too: a mean over
        microbatches, by their tokens that count.
    """
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, frozen: PyTree, base: Flat, batch: dict[str, Array]):
        step_key = jax.random.fold_in(key, state.step)
        accumulate = batch["tokens"].shape[0]
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):

            def one(number: Array | int, part: dict[str, Array]) -> tuple[Any, PyTree]:
                own_key = jax.random.fold_in(step_key, number)

                def objective(train: PyTree) -> tuple[Array, Any]:
                    losses, seen = observed_losses(model, train, frozen, base, part, own_key, observe)
                    return jax.tree.reduce(jnp.add, losses), (losses, seen)

                (_, told), grads = jax.value_and_grad(objective, has_aux=True)(state.train)
                return told, grads

            if accumulate == 1:
                (losses, seen), grads = one(0, jax.tree.map(lambda leaf: leaf[0], batch))
            else:

                def body(carry: PyTree, part: Any) -> tuple[PyTree, Any]:
                    told, grads = one(*part)
                    return jax.tree.map(jnp.add, carry, grads), told

                zero = jax.tree.map(jnp.zeros_like, state.train)
                grads, (each, seen) = jax.lax.scan(body, zero, (jnp.arange(accumulate, dtype=jnp.int32), batch))
                losses = jax.tree.map(jnp.sum, each)
                seen = jax.tree.map(lambda leaf: jnp.linalg.norm(leaf, axis=0), seen)
            tokens = jnp.sum(batch["counts"], dtype=jnp.int32)
            share = 1 / tokens.astype(jnp.float32)
            grads = jax.tree.map(lambda leaf: leaf * share, grads)
        # optax mixes integers and floats.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt = tx.update(grads, state.opt, state.train, frozen=frozen, base=base, norms=seen)
            train = optax.apply_updates(state.train, updates)
            numbers = {
                **{name: total * share for name, total in losses.items()},
                "tokens": tokens,
                "grad_norm": optax.tree.norm(grads),
                "update_norm": optax.tree.norm(updates),
                "grad_norms": norms(grads),
                "update_norms": norms(updates),
            }
        return TrainState(state.step + 1, train, opt), numbers

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_loss(model: LanguageModel) -> Callable[..., tuple[Float[Array, ""], Array]]:
    """The compiled evaluation: `(train, frozen, base, batch) -> (sum of losses, tokens that count)`, no dropout."""

    @jax.jit
    def loss(train: PyTree, frozen: PyTree, base: Flat, batch: dict[str, Array]):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            total = batch_losses(model, train, frozen, base, batch, None)["loss"]
            return total, jnp.sum(batch["counts"], dtype=jnp.int32)

    return loss


def not_finite(numbers: Mapping[str, float]) -> str | None:
    """What a step says of its numbers if one that must be finite is not."""
    if all(math.isfinite(numbers[name]) for name in WATCHED):
        return None
    told = (f"{name.replace('_', ' ').replace('grad', 'gradient')} {numbers[name]}" for name in WATCHED)
    return f"{', '.join(told)}: not finite, stopped"


def check_alive(grad_norms: dict[str, float]) -> None:
    """Raise SboraxError for an adapter that got no gradient at all in a step."""
    dead = sorted(path for path, norm in grad_norms.items() if norm == 0.0)
    if dead:
        more = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
        raise SboraxError(
            f"{dead[0]}{more}: no gradient at all in the first step: the model never consumed it, or a row is a single "
            "token; adapt modules that the model reads, with a method whose start is not a stationary point"
        )
