"""AdaLoRA's budget: singular values are zeroed over the run, the least important first, arXiv:2303.10512."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from sborax.adapters.core import Adapter, SboraxError, is_adapter, width
from sborax.adapters.leaves import nest
from sborax.adapters.tree import Adapters, nodes
from sborax.methods.adalora import AdaLoRA
from sborax.procedures.procedure import AbstractProcedure, Boundary, Run, check_layers


class BudgetState(NamedTuple):
    """The last gradient, the running importance of every trained entry and its uncertainty, and 0/1 for every e."""

    grads: PyTree
    importance: PyTree
    uncertainty: PyTree
    kept: dict[str, Float[Array, "*stack rank"]]


@dataclasses.dataclass(frozen=True)
class AdaLoRABudget(AbstractProcedure):
    """Zero e where the score of (column of a, e, row of b) is low, so that `target` ranks a weight are left on average.

    I = |p dp|, S <- beta1 S + (1 - beta1) I, U <- beta2 U + (1 - beta2) |I - S|; score = S U of e + mean of S U over
    the column of a + mean over the row of b. p is taken after the step, dp before it, as in PEFT.

    target: ranks left a weight, on average over all of them (PEFT's `target_r`: 8).
    warmup, cooldown: steps before the budget falls and after it has (PEFT's `tinit`, `tfinal`: 0).
    every: steps between two prunings (PEFT's `deltaT`: 1).
    beta1, beta2: of the running means (paper and PEFT: 0.85).
    orthogonality: weight of `orthogonality` in the loss (PEFT: 0.5); its gradient joins after clipping.

    What was zeroed may grow again and be kept at the next pruning, until the cool-down. All adapters must be `AdaLoRA`.
    """

    paper = "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512"
    resets = False

    target: int = 8
    warmup: int = 0
    cooldown: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        if self.target < 1 or self.every < 1 or self.warmup < 0 or self.cooldown < 0:
            raise SboraxError("AdaLoRABudget: target and every must be at least 1, warmup and cooldown at least 0")
        if not (0.0 < self.beta1 < 1.0 and 0.0 < self.beta2 < 1.0) or self.orthogonality < 0.0:
            raise SboraxError("AdaLoRABudget: beta1 and beta2 must lie in (0, 1), orthogonality must not be negative")

    def check(self, run: Run, base: dict[str, Any]) -> None:
        check_layers(self, run)
        ranks = []
        for site in run.plan.sites:
            if not isinstance(site.method, AdaLoRA):
                raise SboraxError(f"AdaLoRABudget: {site.path} has {type(site.method).__name__}; use AdaLoRA for all")
            rank, layers = site.method.rank, math.prod(site.stack)
            ranks += rank if isinstance(rank, tuple) else [width(rank)] * layers
        if not ranks:
            raise SboraxError("AdaLoRABudget: nothing is adapted; use AdaLoRA")
        if self.target * len(ranks) >= sum(ranks):
            mean = sum(ranks) / len(ranks)
            raise SboraxError(
                f"AdaLoRABudget: target={self.target} would prune nothing, since the weights begin with a rank of "
                f"{mean:g} on average; lower target, or give AdaLoRA a larger rank"
            )
        if self.warmup + self.cooldown >= run.steps:
            raise SboraxError(f"AdaLoRABudget: warmup and cooldown leave none of the {run.steps} steps")

    def watch(self, run: Run) -> optax.GradientTransformationExtraArgs:
        def init(params: PyTree) -> BudgetState:
            def zeros() -> PyTree:
                return jax.tree.map(jnp.zeros_like, params)

            kept = {path: jnp.ones_like(node.train["e"]) for path, node in _by_path(params).items()}
            return BudgetState(zeros(), zeros(), zeros(), kept)

        def update(
            updates: PyTree, state: Any, params: PyTree | None = None, **others: Any
        ) -> tuple[PyTree, BudgetState]:
            regular = jax.grad(orthogonality)(params)
            updates = jax.tree.map(lambda grad, extra: grad + self.orthogonality * extra, updates, regular)
            return updates, state._replace(grads=updates)

        return optax.GradientTransformationExtraArgs(init, update)

    def start(self, key: Key[Array, ""], run: Run, boundary: Boundary) -> Boundary:
        return boundary

    def due(self, step: int, run: Run) -> bool:
        return True

    def budget(self, step: int, steps: int, first: int, weights: int) -> int:
        """How many ranks are left after `step` of `steps` steps, of `first` in all `weights` weights: cubic decay."""
        last = self.target * weights
        if step <= self.warmup:
            return first
        left = 1 - min(1.0, (step - self.warmup) / (steps - self.cooldown - self.warmup))
        return int((first - last) * left**3 + last)

    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        found = nodes(boundary.adapters)
        live = {path: _live(node) for path, node in found.items()}
        first = int(sum(mask.sum() for mask in live.values()))
        weights = sum(mask[..., 0].size for mask in live.values())
        end = run.steps - self.cooldown
        prunes = step == end or (self.warmup < step < end and step % self.every == 0)
        gone = first - min(first, self.budget(step, run.steps, first, weights))

        def one(state: Any) -> Any:
            if not isinstance(state, BudgetState):
                return state
            state = self._seen(state, found) if step < end else state
            return state._replace(kept=pruned(_scores(state), live, gone)) if prunes else state

        opt = jax.tree.map(one, boundary.opt, is_leaf=_is_state)
        boundary = dataclasses.replace(boundary, opt=opt)
        if not prunes and step < end:
            return boundary
        (state,) = [leaf for leaf in jax.tree.leaves(opt, is_leaf=_is_state) if _is_state(leaf)]
        zeroed = {path: _with_e(node, node.train["e"] * state.kept[path]) for path, node in found.items()}
        return dataclasses.replace(boundary, adapters=nest(zeroed))

    def replay(
        self,
        key_of: Callable[[int], Key[Array, ""]],
        done: int,
        run: Run,
        boundary: Boundary,
        kept: Callable[[int], Adapters],
    ) -> Boundary:
        return boundary

    def settle(self, boundary: Boundary) -> Boundary:
        return boundary

    def whole(self, segments: list[Adapters], run: Run) -> Adapters:
        return segments[-1]

    def _seen(self, state: BudgetState, found: dict[str, Adapter]) -> BudgetState:
        """The running means after one more step."""

        def now(path: tuple[Any, ...], grads: Any) -> Any:
            if not is_adapter(grads):
                return grads
            where = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("adapters/")
            return Adapter(found[where].train, grads.frozen, grads.method, grads.in_axes)

        params = jax.tree_util.tree_map_with_path(now, state.grads, is_leaf=is_adapter)
        own = jax.tree.map(lambda p, grad: jnp.abs(p * grad), params, state.grads)
        mean = jax.tree.map(lambda old, new: self.beta1 * old + (1 - self.beta1) * new, state.importance, own)
        spread = jax.tree.map(
            lambda old, new, centre: self.beta2 * old + (1 - self.beta2) * jnp.abs(new - centre),
            state.uncertainty, own, mean,
        )  # fmt: skip
        return state._replace(importance=mean, uncertainty=spread)


def orthogonality(adapters: PyTree) -> Float[Array, ""]:
    """Mean of ||a^T a - I||_F and ||b b^T - I||_F over all weights and layers that AdaLoRA adapts.

    The regulariser of arXiv:2303.10512, eq. 4, averaged as PEFT does; padded ranks do not count.
    Raises SboraxError if there is no such adapter.
    """
    own = [node for node in nodes(adapters).values() if isinstance(node.method, AdaLoRA)]
    if not own:
        raise SboraxError("no adapter is AdaLoRA: there is nothing to keep orthogonal")

    def off(gram: Float[Array, "*stack r r"], live: np.ndarray) -> Float[Array, "..."]:
        square = jnp.sum(jnp.square(gram - live[..., None] * np.eye(gram.shape[-1], dtype=np.float32)), axis=(-2, -1))
        # The gradient of a norm at zero is not a number.
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny)).reshape(-1)

    parts = []
    for node in own:
        a, b, live = node.train["a"], node.train["b"], _live(node)
        with jax.default_matmul_precision("highest"):
            parts += [off(a.mT @ a, live), off(b @ b.mT, live)]
    return jnp.mean(jnp.concatenate(parts))


def pruned(
    scores: Mapping[str, Float[Array, "*stack rank"]], live: Mapping[str, np.ndarray], gone: int
) -> dict[str, Float[Array, "*stack rank"]]:
    """0 for the `gone` lowest scores of all weights together, and for what equals the highest of them, as PEFT."""
    flat = jnp.concatenate([jnp.where(live[path] > 0, score, jnp.inf).reshape(-1) for path, score in scores.items()])
    bound = jnp.sort(flat)[gone - 1] if gone else -jnp.inf
    return {path: (score > bound).astype(jnp.float32) for path, score in scores.items()}


def _is_state(node: Any) -> bool:
    return isinstance(node, BudgetState)


def _by_path(tree: PyTree) -> dict[str, Adapter]:
    """Adapters by path, whether the tree is theirs alone or a training state's."""
    return {path.removeprefix("adapters/"): node for path, node in nodes(tree).items()}


def _scores(state: BudgetState) -> dict[str, Float[Array, "*stack rank"]]:
    product = _by_path(jax.tree.map(jnp.multiply, state.importance, state.uncertainty))
    return {
        path: node.train["e"] + node.train["a"].mean(axis=-2) + node.train["b"].mean(axis=-1)
        for path, node in product.items()
    }


def _live(node: Adapter) -> np.ndarray:
    """1 for the ranks in use, 0 for padding, (*stack, rank) float32."""
    rank, shape = node.method.rank, node.train["e"].shape
    if not isinstance(rank, tuple):
        return np.ones(shape, np.float32)
    return (np.arange(shape[-1]) < np.reshape(rank, shape[:-1])[..., None]).astype(np.float32)


def _with_e(node: Adapter, e: Array) -> Adapter:
    return Adapter({**node.train, "e": e}, node.frozen, node.method, node.in_axes)
