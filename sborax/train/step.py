"""One optimiser step as one compiled function: state and batch in, state and numbers out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from sborax.core import SboraxError
from sborax.models.language_model import LanguageModel
from sborax.train.loss import frozen_head_loss, trained_head_loss
from sborax.train.state import Flat, TrainState, put_together
from sborax.tree import combine, nodes

HEAD = "lm_head/kernel"
TABLE = "embed_tokens/embedding"


def batch_loss(
    model: LanguageModel, train: PyTree, frozen: PyTree, base: Flat, batch: dict[str, Array], key: Key[Array, ""] | None
) -> Float[Array, ""]:
    """Sum of the losses of the tokens that count in one microbatch, each array (batch, length)."""
    params = put_together(base, train["base"], model.module.dtype)
    adapters = combine(train["adapters"], frozen)
    hidden = model.hidden(params, adapters, batch["tokens"], segment_ids=batch["segments"], dropout_key=key)
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets, counts = batch["targets"].reshape(-1), batch["counts"].reshape(-1)
    tied = model.config.tie_word_embeddings
    path = TABLE if tied else HEAD
    if path in train["base"] or HEAD in nodes(adapters):
        return trained_head_loss(
            lambda own: model.head(params, adapters, own[None], dropout_key=key)[0], flat, targets, counts
        )
    return frozen_head_loss(flat, base[path], targets, counts, tied)


def norms(grads: PyTree) -> dict[str, Float[Array, ""]]:
    """Gradient norm of every adapter and of every trained base leaf, by path."""
    adapters = {path: optax.tree.norm(node) for path, node in nodes(grads["adapters"]).items()}
    return adapters | {path: jnp.linalg.norm(leaf.reshape(-1)) for path, leaf in grads["base"].items()}


def make_step(
    model: LanguageModel, tx: optax.GradientTransformation, key: Key[Array, ""]
) -> Callable[[TrainState, PyTree, Flat, dict[str, Any]], tuple[TrainState, dict[str, Any]]]:
    """The compiled step: `step(state, frozen, base, batch) -> (state, numbers)`.

    batch: arrays (accumulate, batch, length), one microbatch after the other; the gradient is that of
    sum of losses / number of tokens that count over all of them. Only `state` is donated.
    key: of dropout; folded with the step's number.
    numbers: loss (nats per token), tokens that count, grad_norm before clipping, grad_norms by path.
    """
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, frozen: PyTree, base: Flat, batch: dict[str, Array]):
        step_key = jax.random.fold_in(key, state.step)
        accumulate = batch["tokens"].shape[0]
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):

            def one(number: Array | int, part: dict[str, Array]) -> tuple[Array, PyTree]:
                own_key = jax.random.fold_in(step_key, number)
                return jax.value_and_grad(lambda train: batch_loss(model, train, frozen, base, part, own_key))(
                    state.train
                )

            if accumulate == 1:
                total, grads = one(0, jax.tree.map(lambda leaf: leaf[0], batch))
            else:

                def body(carry: Any, part: Any) -> tuple[Any, None]:
                    return jax.tree.map(jnp.add, carry, one(*part)), None

                zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.train))
                (total, grads), _ = jax.lax.scan(body, zero, (jnp.arange(accumulate, dtype=jnp.int32), batch))
            tokens = jnp.sum(batch["counts"], dtype=jnp.int32)
            share = 1 / tokens.astype(jnp.float32)
            grads = jax.tree.map(lambda leaf: leaf * share, grads)
        # optax mixes integers and floats.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt = tx.update(grads, state.opt, state.train, frozen=frozen, base=base)
            train = optax.apply_updates(state.train, updates)
            numbers = {
                "loss": total * share,
                "tokens": tokens,
                "grad_norm": optax.tree.norm(grads),
                "grad_norms": norms(grads),
            }
        return TrainState(state.step + 1, train, opt), numbers

    return jax.jit(step, donate_argnums=0)


def make_loss(model: LanguageModel) -> Callable[..., tuple[Float[Array, ""], Array]]:
    """The compiled evaluation: `(train, frozen, base, batch) -> (sum of losses, tokens that count)`, no dropout."""

    @jax.jit
    def loss(train: PyTree, frozen: PyTree, base: Flat, batch: dict[str, Array]):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            total = batch_loss(model, train, frozen, base, batch, None)
            return total, jnp.sum(batch["counts"], dtype=jnp.int32)

    return loss


def check_alive(grad_norms: dict[str, float]) -> None:
    """Raise SboraxError for an adapter that got no gradient at all in a step."""
    dead = sorted(path for path, norm in grad_norms.items() if norm == 0.0)
    if dead:
        more = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
        raise SboraxError(
            f"{dead[0]}{more}: no gradient at all in the first step, the model never consumed it; "
            "adapt modules that the model reads, with a method whose start is not a stationary point"
        )
