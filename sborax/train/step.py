"""One optimiser step as one compiled function: (state, batch) -> (state, numbers)."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Num, PyTree

from sborax.adapters.core import Context, SboraxError
from sborax.adapters.routing import AbstractRouter
from sborax.adapters.tree import combine, nodes
from sborax.adapters.vectors import VECTORS
from sborax.layout.state import Flat, TrainState, put_together
from sborax.models.decoder import balance_share, z_share
from sborax.models.language_model import LanguageModel
from sborax.models.sparse import ROUTER_WEIGHT
from sborax.train.loss import AbstractLoss, CrossEntropy
from sborax.train.outputs import Outputs

WATCHED = ("loss", "grad_norm", "update_norm")
"""Numbers of a step that must be finite."""
BALANCE, Z_LOSS = "balance_loss", "z_loss"
ROUTER_LOSSES = (BALANCE, Z_LOSS)
"""Losses of routers by name, each times its share."""
DROPPED = "dropped"
"""The share of the choices of experts that were dropped beyond a capacity."""


def prompt_mask(
    segments: Int[Array, "batch length"], counts: Bool[Array, "batch length"]
) -> Bool[Array, "batch length"]:
    """True for tokens of the prompt: up to the one from which the first target that counts is predicted."""
    before = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts.astype(jnp.int32)
    return (segments > 0) & (before == 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """The sums of a microbatch.

    - losses: the minimised losses, summed over items: `loss`, and with routers, of adapters or trained ones of experts,
      those in `ROUTER_LOSSES`.
    - items: number of items that the loss is a sum over.
    - norms: with `observe`, ||X_j|| of every projection's input features j by path, without padding.
    - base_grads: with `differentiated`, the gradients of (sum of losses) / items by these kernels, by path.
    - dropped: with a capacity of experts, how many of their choices were dropped, and how many there were; else None.
    """

    # Any: a pytree node also holds arrays with an axis of microbatches in front.
    losses: Any
    items: Any
    norms: Any
    base_grads: Any = dataclasses.field(default_factory=dict)
    dropped: Any = None


def sums(
    model: LanguageModel,
    train: PyTree,
    frozen: PyTree,
    base: Flat,
    batch: dict[str, Array],
    key: Key[Array, ""] | None,
    loss: AbstractLoss = CrossEntropy(),
    observe: bool = False,
    folded: Collection[str] = (),
) -> Sums:
    """The sums of one microbatch of arrays (batch, length).

    - key: of dropout; None for no dropout.
    - folded: paths of kernels in `base` that change between steps.
    """
    outputs, collected, of_routers = _outputs(model, train, frozen, base, batch, key, observe, folded)
    total, items = loss(outputs)
    losses = {"loss": total}
    losses |= {name: value * items.astype(jnp.float32) for name, value in of_routers.items()}
    dropped = None
    if model.module.expert_capacity is not None:
        if collected.load is None or collected.load.dropped is None:
            raise SboraxError(f"expert_capacity: {type(model.module).__name__} has no mixture that reads it")
        dropped = collected.load.dropped, jnp.sum(collected.load.chosen)
    return Sums(losses, items, collected.inputs, dropped=dropped)


def _outputs(
    model: LanguageModel,
    train: PyTree,
    frozen: PyTree,
    base: Flat,
    batch: dict[str, Array],
    key: Key[Array, ""] | None,
    observe: bool = False,
    folded: Collection[str] = (),
) -> tuple[Outputs, Any, dict[str, Array]]:
    """The model at a microbatch, what it collected, and the losses of its routers by name."""
    params = put_together(base, train["base"], model.module.dtype)
    adapters = combine(train["adapters"], frozen)
    tokens, segments = batch["tokens"], batch["segments"]
    routed = any(isinstance(node.method, AbstractRouter) for node in nodes(adapters).values())
    ctx = Context(prompt=prompt_mask(segments, batch["counts"])) if routed else Context()
    trained = any(path.endswith(ROUTER_WEIGHT) for path in train["base"])
    balance, z_loss = (share(model.config) if trained else 0.0 for share in (balance_share, z_share))
    load = balance > 0 or z_loss > 0 or model.module.expert_capacity is not None
    names = ["balance"] * routed + ["load"] * load + ["inputs"] * observe
    hidden, collected = model.collect(params, adapters, tokens, names, segment_ids=segments, dropout_key=key, ctx=ctx)
    losses: dict[str, Any] = {BALANCE: collected.balance} if routed else {}
    if balance > 0:
        losses[BALANCE] = losses.get(BALANCE, jnp.float32(0)) + balance * collected.load.imbalance()
    if z_loss > 0:
        losses[Z_LOSS] = z_loss * collected.load.z_loss()
    changed = frozenset(VECTORS[path] if path in VECTORS else path for path in train["base"])
    outputs = Outputs(hidden, batch, model, params, adapters, changed, key, frozenset(folded))
    return outputs, collected, losses


def forward_backward(
    model: LanguageModel,
    train: PyTree,
    frozen: PyTree,
    base: Flat,
    batch: dict[str, Any],
    key: Key[Array, ""],
    loss: AbstractLoss = CrossEntropy(),
    observe: bool = False,
    differentiated: Sequence[str] = (),
    folded: Collection[str] = (),
) -> tuple[Sums, PyTree]:
    """The sums of a batch of arrays (accumulate, batch, length), and the gradient of (sum of losses) / items.

    The gradient is that of one batch as large as all microbatches together, and norms are over all of them.

    - differentiated: paths of kernels in `base`, whose gradients are among the sums, in the kernels' precision.
    - folded: paths of kernels in `base` that change between steps.
    """
    kernels = {path: base[path] for path in differentiated}
    batch = jax.tree.map(jnp.asarray, batch)
    accumulate = batch["tokens"].shape[0]

    def microbatch(number: Array | int, part: dict[str, Array]) -> tuple[Sums, PyTree]:
        part_key = jax.random.fold_in(key, number)

        def objective(trees: tuple[PyTree, Flat]) -> tuple[Array, Sums]:
            train, kernels = trees
            part_sums = sums(model, train, frozen, {**base, **kernels}, part, part_key, loss, observe, folded)
            return jax.tree.reduce(jnp.add, part_sums.losses), part_sums

        (_, part_sums), grads = jax.value_and_grad(objective, has_aux=True)((train, kernels))
        return part_sums, grads

    if accumulate == 1:
        total, grads = microbatch(0, jax.tree.map(lambda leaf: leaf[0], batch))
    else:

        def body(carry: PyTree, part: Any) -> tuple[PyTree, Sums]:
            part_sums, grads = microbatch(*part)
            return jax.tree.map(jnp.add, carry, grads), part_sums

        zero = jax.tree.map(jnp.zeros_like, (train, kernels))
        grads, parts = jax.lax.scan(body, zero, (jnp.arange(accumulate, dtype=jnp.int32), batch))
        total = Sums(
            jax.tree.map(jnp.sum, parts.losses),
            jnp.sum(parts.items, dtype=parts.items.dtype),
            jax.tree.map(lambda leaf: jnp.linalg.norm(leaf, axis=0), parts.norms),
            dropped=jax.tree.map(jnp.sum, parts.dropped),
        )
    share = 1 / total.items.astype(jnp.float32)
    grads, base_grads = jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), grads)
    return dataclasses.replace(total, base_grads=base_grads), grads


def norms(grads: PyTree) -> dict[str, Float[Array, ""]]:
    """The norm of the gradients of every adapter with trained leaves and of every trained base leaf, by path."""
    trained = {path: node for path, node in nodes(grads["adapters"]).items() if jax.tree.leaves(node.train)}
    adapters = {path: optax.tree.norm(node) for path, node in trained.items()}
    return adapters | {path: jnp.linalg.norm(leaf.reshape(-1)) for path, leaf in grads["base"].items()}


def make_step(
    model: LanguageModel,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    observe: bool = False,
    shardings: TrainState | None = None,
    loss: AbstractLoss = CrossEntropy(),
    differentiated: Sequence[str] = (),
    folded: Collection[str] = (),
) -> Callable[[TrainState, PyTree, Flat, dict[str, Any]], tuple[TrainState, dict[str, Any]]]:
    """The compiled step: `step(state, frozen, base, batch) -> (state, numbers)`.

    Args:
    - key: of dropout; folded with the step's number.
    - observe: give `tx` the norms of inputs by path, as `norms=`.
    - shardings: on a mesh, of the state, before and after the step.
    - loss: what is minimised.
    - differentiated: paths of base kernels; give `tx` their gradients by path, as `base_grads=`.
    - folded: paths of base kernels that a procedure changes between steps.

    The step takes a batch of arrays (accumulate, batch, length), one microbatch after the other, and follows the
    gradient of (sum of losses) / items over all of them. Only `state` is donated. Its numbers are `loss` (the mean over
    items), `tokens` that count, `grad_norm` before clipping, `update_norm` of what the optimiser adds, `grad_norms` and
    `update_norms` by path; with routers also those in `ROUTER_LOSSES`, which are minimised too: their means over
    microbatches, weighted by their items; and with a capacity of experts `dropped`, the share of choices that were
    dropped in all layers, padding left out.
    """
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, frozen: PyTree, base: Flat, batch: dict[str, Array]):
        step_key = jax.random.fold_in(key, state.step)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            total, grads = forward_backward(
                model, state.train, frozen, base, batch, step_key, loss, observe, differentiated, folded
            )
            share = 1 / total.items.astype(jnp.float32)
        # optax mixes integers and floats.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            extra = {"frozen": frozen, "base": base, "norms": total.norms, "base_grads": total.base_grads}
            updates, opt = tx.update(grads, state.opt, state.train, **extra)
            train = optax.apply_updates(state.train, updates)
            numbers = {
                **{name: value * share for name, value in total.losses.items()},
                **({} if total.dropped is None else {DROPPED: total.dropped[0] / total.dropped[1]}),
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
    """The compiled loss: `(train, frozen, base, batch) -> (sum of losses, items)`, without dropout.

    Experts drop no token.
    """
    evaluate = make_evaluation(model, loss)
    return jax.jit(lambda train, frozen, base, batch: evaluate(train, frozen, base, batch)[:2])


def make_evaluation(
    model: LanguageModel, loss: AbstractLoss = CrossEntropy(), folded: Collection[str] = ()
) -> Callable[..., tuple[Float[Array, ""], Num[Array, ""], Float[Array, "batch length"] | None]]:
    """The compiled evaluation of a run, without dropout and without a capacity of experts.

    `(train, frozen, base, batch) -> (sum of losses, items, terms)`, with the sum's terms by token as
    `AbstractLoss.by_token` gives them. folded: as in `make_step`.
    """

    model = model.dropless()

    @jax.jit
    def evaluate(train: PyTree, frozen: PyTree, base: Flat, batch: dict[str, Array]):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            return loss.by_token(_outputs(model, train, frozen, base, batch, None, folded=folded)[0])

    return evaluate


def not_finite(numbers: Mapping[str, float]) -> str | None:
    """An error message if one of the numbers in `WATCHED` is not finite, else None."""
    if all(math.isfinite(numbers[name]) for name in WATCHED):
        return None
    problems = (f"{name.replace('_', ' ').replace('grad', 'gradient')} {numbers[name]}" for name in WATCHED)
    return f"{', '.join(problems)}: not finite, stopped"


def check_alive(grad_norms: dict[str, float]) -> None:
    """Raise SboraxError for an adapter whose gradient is zero."""
    dead = sorted(path for path, norm in grad_norms.items() if norm == 0.0)
    if dead:
        tail = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
        raise SboraxError(
            f"{dead[0]}{tail}: no gradient at all in the first step: the model never consumed it, or a row is a single "
            "token; adapt modules that the model reads, with a method whose start is not a stationary point"
        )
