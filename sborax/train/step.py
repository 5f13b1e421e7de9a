"""One optimiser step as one compiled function: state and batch in, state and numbers out."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Num, PyTree

from sborax.adapters.core import Context, SboraxError
from sborax.adapters.routing import AbstractRouter
from sborax.adapters.tree import combine, nodes
from sborax.layout.state import Flat, TrainState, put_together
from sborax.models.language_model import LanguageModel
from sborax.train.loss import AbstractLoss, CrossEntropy
from sborax.train.outputs import Outputs

WATCHED = ("loss", "grad_norm", "update_norm")
"""Numbers of a step that have to be finite."""


def prompt_of(segments: Int[Array, "batch length"], counts: Bool[Array, "batch length"]) -> Bool[Array, "batch length"]:
    """The tokens up to the one from which the first that counts is predicted, padding left out."""
    before = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts.astype(jnp.int32)
    return (segments > 0) & (before == 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What a microbatch comes to.

    - losses: sums over items of what is minimised: `loss`, and with routers `balance_loss`.
    - items: how many items the loss is a sum over.
    - norms: with `observe`, ||X_j|| of every projection's input features j by path, padding left out.
    """

    # Any: a pytree node also holds arrays with an axis of microbatches in front.
    losses: Any
    items: Any
    norms: Any


def sums(
    model: LanguageModel,
    train: PyTree,
    frozen: PyTree,
    base: Flat,
    batch: dict[str, Array],
    key: Key[Array, ""] | None,
    loss: AbstractLoss = CrossEntropy(),
    observe: bool = False,
) -> Sums:
    """The sums of one microbatch of arrays (batch, length). key: of dropout; None without."""
    params = put_together(base, train["base"], model.module.dtype)
    adapters = combine(train["adapters"], frozen)
    tokens, segments = batch["tokens"], batch["segments"]
    routed = any(isinstance(node.method, AbstractRouter) for node in nodes(adapters).values())
    ctx = Context(prompt=prompt_of(segments, batch["counts"])) if routed else Context()
    what = ["balance"] * routed + ["inputs"] * observe
    hidden, told = model.collect(params, adapters, tokens, what, segment_ids=segments, dropout_key=key, ctx=ctx)
    total, items = loss(Outputs(hidden, batch, model, params, adapters, frozenset(train["base"]), key))
    losses = {"loss": total}
    if routed:
        losses["balance_loss"] = told.balance * items.astype(jnp.float32)
    return Sums(losses, items, told.inputs)


def forward_backward(
    model: LanguageModel,
    train: PyTree,
    frozen: PyTree,
    base: Flat,
    batch: dict[str, Any],
    key: Key[Array, ""],
    loss: AbstractLoss = CrossEntropy(),
    observe: bool = False,
) -> tuple[Sums, PyTree]:
    """The sums of a batch of arrays (accumulate, batch, length), and the gradient of sum of losses / items.

    The gradient is that of one batch as large as all microbatches together; norms are over all of them.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    accumulate = batch["tokens"].shape[0]

    def one(number: Array | int, part: dict[str, Array]) -> tuple[Sums, PyTree]:
        part_key = jax.random.fold_in(key, number)

        def objective(train: PyTree) -> tuple[Array, Sums]:
            made = sums(model, train, frozen, base, part, part_key, loss, observe)
            return jax.tree.reduce(jnp.add, made.losses), made

        (_, made), grads = jax.value_and_grad(objective, has_aux=True)(train)
        return made, grads

    if accumulate == 1:
        made, grads = one(0, jax.tree.map(lambda leaf: leaf[0], batch))
    else:

        def body(carry: PyTree, part: Any) -> tuple[PyTree, Sums]:
            made, grads = one(*part)
            return jax.tree.map(jnp.add, carry, grads), made

        zero = jax.tree.map(jnp.zeros_like, train)
        grads, each = jax.lax.scan(body, zero, (jnp.arange(accumulate, dtype=jnp.int32), batch))
        made = Sums(
            jax.tree.map(jnp.sum, each.losses),
            jnp.sum(each.items, dtype=each.items.dtype),
            jax.tree.map(lambda leaf: jnp.linalg.norm(leaf, axis=0), each.norms),
        )
    share = 1 / made.items.astype(jnp.float32)
    return made, jax.tree.map(lambda leaf: leaf * share, grads)


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
    loss: AbstractLoss = CrossEntropy(),
) -> Callable[[TrainState, PyTree, Flat, dict[str, Any]], tuple[TrainState, dict[str, Any]]]:
    """The compiled step: `step(state, frozen, base, batch) -> (state, numbers)`.

    - batch: arrays (accumulate, batch, length), one microbatch after the other; the gradient is that of
      sum of losses / items over all of them. Only `state` is donated.
    - key: of dropout; folded with the step's number.
    - observe: whether `tx` is given `norms=` of inputs by path.
    - shardings: on a mesh, where the state lies, now and after the step.
    - numbers: loss (the mean over items), tokens that count, grad_norm before clipping, update_norm of what the
      optimiser adds, grad_norms and update_norms by path; with routers balance_loss, which is minimised too: a mean
      over microbatches, by their items.
    """
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, frozen: PyTree, base: Flat, batch: dict[str, Array]):
        step_key = jax.random.fold_in(key, state.step)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            made, grads = forward_backward(model, state.train, frozen, base, batch, step_key, loss, observe)
            share = 1 / made.items.astype(jnp.float32)
        # optax mixes integers and floats.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt = tx.update(grads, state.opt, state.train, frozen=frozen, base=base, norms=made.norms)
            train = optax.apply_updates(state.train, updates)
            numbers = {
                **{name: total * share for name, total in made.losses.items()},
                "tokens": jnp.sum(batch["counts"], dtype=jnp.int32),
                "grad_norm": optax.tree.norm(grads),
                "update_norm": optax.tree.norm(updates),
                "grad_norms": norms(grads),
                "update_norms": norms(updates),
            }
        return TrainState(state.step + 1, train, opt), numbers

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_loss(
    model: LanguageModel, loss: AbstractLoss = CrossEntropy()
) -> Callable[..., tuple[Float[Array, ""], Num[Array, ""]]]:
    """The compiled evaluation: `(train, frozen, base, batch) -> (sum of losses, items)`, without dropout."""

    @jax.jit
    def evaluate(train: PyTree, frozen: PyTree, base: Flat, batch: dict[str, Array]):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            made = sums(model, train, frozen, base, batch, None, loss)
            return made.losses["loss"], made.items

    return evaluate


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
