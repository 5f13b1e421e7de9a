"""XGBLoRA: gradient boosting with rank-1 LoRA, arXiv:2410.19694."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key, PyTree

from sborax.adapters.compose import ByLayer
from sborax.adapters.core import Adapter, SboraxError
from sborax.adapters.leaves import nest
from sborax.adapters.paths import module_path
from sborax.adapters.tree import Adapters, nodes
from sborax.optim.pairs import sides
from sborax.procedures.procedure import Boundary, Run
from sborax.procedures.segment import AbstractSegmented, check_segments, fold, fresh, widened


@dataclasses.dataclass(frozen=True)
class XGBLoRA(AbstractSegmented):
    """Train boosters in turn: a few steps on random layers, then W <- W + rate s a b in float32, and new adapters.

    - every: steps of a booster, kappa (the paper's values are not known; default 8).
    - layers: how many layers a booster has, drawn anew without replacement; None (default): a third of them, the
        paper's best being 11 of LLaMA3-8B's 32.
    - rate: of the merge, alpha_t (paper: 1). With 1 the function does not change at a boundary.
    - penalty: of |a|^2 / 2 and |b|^2 / 2 in the loss (paper's eq. 7, value unknown; default 0).
    - requantise: allow a quantised base, whose rounding errors then add up.

    Use `LoRA(rank=1)`, the paper's best rank. Layers that are not drawn have a = b = 0, which stay zero in training.
    Adapted kernels are held in float32. The total change of a weight has at most the rank of the boosters that drew its
    layer. One booster with all layers is plain LoRA.
    """

    paper = "Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs, arXiv:2410.19694"
    rests = True

    every: int = 8
    layers: int | None = None
    rate: float = 1.0
    penalty: float = 0.0
    requantise: bool = False

    def __post_init__(self) -> None:
        if self.every < 1 or (self.layers is not None and self.layers < 1):
            raise SboraxError(f"XGBLoRA: every and layers must be at least 1, got {self.every} and {self.layers}")
        if not 0.0 <= self.penalty < math.inf:
            raise SboraxError(f"XGBLoRA: penalty must be 0 or more, and finite, got {self.penalty}")
        if not 0.0 < self.rate < math.inf:
            raise SboraxError(f"XGBLoRA: rate must be finite and above 0, got {self.rate}: 0 would change nothing")

    def check(self, run: Run, base: dict[str, Any]) -> None:
        check_segments(self, run, base, self.requantise)
        for site in run.plan.sites:
            if isinstance(site.method, ByLayer):
                names = " and ".join(dict.fromkeys(type(part).__name__ for part in site.method.members))
                raise SboraxError(f"XGBLoRA: {site.path}: draws the layers itself; leave layers= out of {names}'s rule")
            if not {"a", "b"} <= set(site.method.axes):
                raise SboraxError(f"XGBLoRA: {site.path}: {type(site.method).__name__} has no pair a, b; use LoRA")
            if site.method.draws:
                raise SboraxError(
                    f"XGBLoRA: {site.path}: {type(site.method).__name__} draws {site.method.draws}, which would train "
                    "layers that are not drawn; use LoRA"
                )
            if not site.stack and module_path(site.path)[1] is None:
                raise SboraxError(f"XGBLoRA: {site.path}: only weights of layers are drawn; leave it out of the rules")
        if self.layers is not None and self.layers > depth(run):
            raise SboraxError(f"XGBLoRA: layers={self.layers}, but only {depth(run)} layers are adapted")

    def regularise(self, grads: PyTree, train: PyTree) -> PyTree:
        def added(side: str, grad: Array, leaf: Array) -> Array:
            return grad if side == "rest" else grad + self.penalty * leaf

        return jax.tree.map(added, sides(train), grads, train)

    def start(self, key: Key[Array, ""], run: Run, boundary: Boundary) -> Boundary:
        for path, node in nodes(boundary.adapters).items():
            # If one of them were frozen, the other would train in layers that are not drawn, too.
            if not {"a", "b"} <= set(node.train):
                raise SboraxError(f"XGBLoRA: {path}: {type(node.method).__name__} trains no pair a, b; use LoRA")
        adapters = self._draw(key, run, boundary.adapters)
        return dataclasses.replace(boundary, adapters=adapters, base=widened(boundary.base, run))

    def due(self, step: int, run: Run) -> bool:
        return step % self.every == 0 and step < run.steps

    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        base = fold(boundary.base, boundary.adapters, self.rate)
        adapters = self._draw(jax.random.fold_in(key, 1), run, fresh(key, run, base))
        return dataclasses.replace(boundary, adapters=adapters, base=base)

    def _draw(self, key: Key[Array, ""], run: Run, adapters: Adapters) -> Adapters:
        count = self.layers or math.ceil(depth(run) / 3)
        order = jax.random.permutation(key, depth(run))
        mask = jnp.zeros(depth(run), bool).at[order[:count]].set(True)
        sites = {site.path: site for site in run.plan.sites}

        def zero_others(path: str, node: Adapter) -> Adapter:
            layers = jnp.asarray(sites[path].layers).reshape(sites[path].stack)
            return _only(mask[layers], node)

        return nest({path: zero_others(path, node) for path, node in nodes(adapters).items()})


def depth(run: Run) -> int:
    """The number of layers up to the last adapted one."""
    return 1 + max(max(site.layers) for site in run.plan.sites)


def _only(layers: Bool[Array, "*stack"], node: Adapter) -> Adapter:
    """The adapter with zeros in the layers that are not drawn."""

    def masked_leaf(leaf: Array) -> Array:
        mask = layers.reshape(*layers.shape, *[1] * (leaf.ndim - layers.ndim))
        return jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return dataclasses.replace(node, train=jax.tree.map(masked_leaf, node.train))
