"""AdaLoRA's budget: the least important singular values are zeroed over the run, arXiv:2303.10512."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from sborax.adapters.core import Adapter, SboraxError, is_adapter, width
from sborax.adapters.leaves import map_with_path, nest
from sborax.adapters.tree import nodes
from sborax.methods.adalora import AdaLoRA
from sborax.procedures.in_place import AbstractInPlace, adapters_by_path, check_layers, find_state, replace_state
from sborax.procedures.procedure import Boundary, Run


class BudgetState(NamedTuple):
    """What the budget is decided by.

    - grads: of the last step.
    - importance, uncertainty: running means of every trained entry.
    - kept: by path of the kernel, 0 for every e that is pruned, else 1.
    """

    grads: PyTree
    importance: PyTree
    uncertainty: PyTree
    kept: dict[str, Float[Array, "*stack rank"]]


@dataclasses.dataclass(frozen=True)
class AdaLoRABudget(AbstractInPlace):
    """Zero e where the score of (column of a, e, row of b) is low, so that `target` ranks a weight are left on average.

    I = |p dp|, S <- beta1 S + (1 - beta1) I, U <- beta2 U + (1 - beta2) |I - S|; score = S U of e + mean of S U over
    the column of a + mean over the row of b. p is taken after the step, dp before it, as in PEFT.

    - target: ranks left a weight, on average over all of them (PEFT's `target_r`: 8).
    - warmup, cooldown: steps before the budget falls and after it has (PEFT's `tinit`, `tfinal`: 0).
    - every: steps between two prunings (PEFT's `deltaT`: 1).
    - beta1, beta2: of the running means (paper and PEFT: 0.85).
    - orthogonality: weight of `orthogonality` in the loss (PEFT: 0.5).

    Entries that were zeroed may grow again and be kept at the next pruning, until the cool-down. All adapters must be
    `AdaLoRA`.
    """

    paper = "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512"

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
        if not (0.0 < self.beta1 < 1.0 and 0.0 < self.beta2 < 1.0) or not 0.0 <= self.orthogonality < math.inf:
            raise SboraxError("AdaLoRABudget: beta1 and beta2 must lie in (0, 1), and orthogonality in [0, inf)")

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

    def regularise(self, grads: PyTree, train: PyTree) -> PyTree:
        return jax.tree.map(
            lambda grad, extra: grad + self.orthogonality * extra, grads, jax.grad(orthogonality)(train)
        )

    def watch(self, run: Run) -> optax.GradientTransformationExtraArgs:
        def init(params: PyTree) -> BudgetState:
            def zeros() -> PyTree:
                return jax.tree.map(jnp.zeros_like, params)

            masks = {path: jnp.ones_like(node.train["e"]) for path, node in adapters_by_path(params).items()}
            return BudgetState(zeros(), zeros(), zeros(), masks)

        def update(
            updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
        ) -> tuple[PyTree, BudgetState]:
            return updates, state._replace(grads=updates)

        return optax.GradientTransformationExtraArgs(init, update)

    def due(self, step: int, run: Run) -> bool:
        return True

    def budget(self, step: int, steps: int, first: int, weights: int) -> int:
        """The ranks left in all `weights` weights after `step` of `steps` steps, from `first` down: cubic decay."""
        last = self.target * weights
        if step <= self.warmup:
            return first
        left = 1 - min(1.0, (step - self.warmup) / (steps - self.cooldown - self.warmup))
        return int((first - last) * left**3 + last)

    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        adapters = nodes(boundary.adapters)
        live = {path: _live(node) for path, node in adapters.items()}
        first = int(sum(mask.sum() for mask in live.values()))
        weights = sum(mask[..., 0].size for mask in live.values())
        end = run.steps - self.cooldown
        prunes = step == end or (self.warmup < step < end and step % self.every == 0)
        state = find_state(boundary.opt, BudgetState)
        assert state is not None
        if step < end:
            state = self._with_means(state, adapters)
        if prunes:
            zeroed = first - min(first, self.budget(step, run.steps, first, weights))
            state = state._replace(kept=pruned(_scores(state), live, zeroed))
        boundary = dataclasses.replace(boundary, opt=replace_state(boundary.opt, state))
        if not prunes and step < end:
            return boundary
        masked = {path: _with_e(node, node.train["e"] * state.kept[path]) for path, node in adapters.items()}
        return dataclasses.replace(boundary, adapters=nest(masked))

    def _with_means(self, state: BudgetState, adapters: Mapping[str, Adapter]) -> BudgetState:
        """The running means after one more step."""

        def trained_now(path: str, grads: Any) -> Any:
            if not is_adapter(grads):
                return grads
            return Adapter(adapters[path.removeprefix("adapters/")].train, grads.frozen, grads.method, grads.in_axes)

        params = map_with_path(trained_now, state.grads, is_leaf=is_adapter)
        importance = jax.tree.map(lambda p, grad: jnp.abs(p * grad), params, state.grads)
        mean = jax.tree.map(lambda old, new: self.beta1 * old + (1 - self.beta1) * new, state.importance, importance)
        spread = jax.tree.map(
            lambda old, new, centre: self.beta2 * old + (1 - self.beta2) * jnp.abs(new - centre),
            state.uncertainty, importance, mean,
        )  # fmt: skip
        return state._replace(importance=mean, uncertainty=spread)


def orthogonality(adapters: PyTree) -> Float[Array, ""]:
    """Mean of ||a^T a - I||_F and ||b b^T - I||_F over all weights and layers that AdaLoRA adapts.

    The regulariser of arXiv:2303.10512, eq. 4, averaged as PEFT does; padded ranks do not count.
    Raises SboraxError if there is no such adapter.
    """
    adapted = [node for node in nodes(adapters).values() if isinstance(node.method, AdaLoRA)]
    if not adapted:
        raise SboraxError("no adapter is AdaLoRA: there is nothing to keep orthogonal")

    def distance(gram: Float[Array, "*stack r r"], live: np.ndarray) -> Float[Array, "..."]:
        square = jnp.sum(jnp.square(gram - live[..., None] * np.eye(gram.shape[-1], dtype=np.float32)), axis=(-2, -1))
        # The gradient of a norm at zero is not a number.
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny)).reshape(-1)

    parts = []
    for node in adapted:
        a, b, live = node.train["a"], node.train["b"], _live(node)
        with jax.default_matmul_precision("highest"):
            parts += [distance(a.mT @ a, live), distance(b @ b.mT, live)]
    return jnp.mean(jnp.concatenate(parts))


def pruned(
    scores: Mapping[str, Float[Array, "*stack rank"]], live: Mapping[str, np.ndarray], count: int
) -> dict[str, Float[Array, "*stack rank"]]:
    """0 for the `count` lowest scores of all weights together, and for ties with the highest of them, as in PEFT."""
    flat = jnp.concatenate([jnp.where(live[path] > 0, score, jnp.inf).reshape(-1) for path, score in scores.items()])
    bound = jnp.sort(flat)[count - 1] if count else -jnp.inf
    return {path: (score > bound).astype(jnp.float32) for path, score in scores.items()}


def _scores(state: BudgetState) -> dict[str, Float[Array, "*stack rank"]]:
    product = adapters_by_path(jax.tree.map(jnp.multiply, state.importance, state.uncertainty))
    return {
        path: node.train["e"] + node.train["a"].mean(axis=-2) + node.train["b"].mean(axis=-1)
        for path, node in product.items()
    }


def _live(node: Adapter) -> np.ndarray:
    """1 for ranks in use, 0 for padding: (*stack, rank), float32."""
    rank, shape = node.method.rank, node.train["e"].shape
    if not isinstance(rank, tuple):
        return np.ones(shape, np.float32)
    return (np.arange(shape[-1]) < np.reshape(rank, shape[:-1])[..., None]).astype(np.float32)


def _with_e(node: Adapter, e: Array) -> Adapter:
    return Adapter({**node.train, "e": e}, node.frozen, node.method, node.in_axes)
