"""Several adapters of one base in one batch: each acts on rows of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.bank import link
from sborax.adapters.core import (
    AbstractKernelless,
    AbstractMethod,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Leaves,
    SboraxError,
    Weight,
)
from sborax.adapters.depth import stack_of
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.paths import STACKED_UNDER
from sborax.adapters.routing import routed_parts
from sborax.adapters.tree import Adapters, Params, averages_tokens, nodes


@dataclasses.dataclass(frozen=True)
class ByRow(AbstractMethod):
    """y_i = part_i(x_i), where x_1, x_2, ... are equal shares of the rows, in order. Leaves have an axis of adapters.

    part: the method of all. count: how many adapters. The base projection of all rows is one product.
    """

    paper = "composition"
    rank = 1
    no_merge = "each of several adapters acts on rows of its own"
    part: AbstractMethod
    count: int

    @property
    def axes(self) -> Axes:
        return _with_axis(self.part.axes)

    @property
    def token_mean(self) -> bool:
        return self.part.token_mean

    def check(self, shape: tuple[int, int]) -> None:
        self.part.check(shape)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        raise SboraxError("ByRow has no start of its own; make it of adapters, with by_row")

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        if x.shape[0] % self.count:
            raise SboraxError(f"{x.shape[0]} tokens cannot be shared out among {self.count} adapters")

        def share(leaf: Array) -> Array:
            return leaf.reshape(self.count, -1, *leaf.shape[1:])

        def projected(x: Array, train: Leaves, frozen: Leaves, ctx: Context) -> Array:
            return self.part.apply(x, weight, Adapter(train, frozen, self.part, adapter.in_axes), ctx)

        inputs = share(x), adapter.train, adapter.frozen, jax.tree.map(share, dataclasses.replace(ctx, key=None))
        return jax.vmap(projected)(*inputs).reshape(x.shape[0], -1)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        raise SboraxError(f"ByRow cannot be merged: {self.no_merge}")


def _with_axis(axes: Axes) -> dict[str, Any]:
    return {
        name: (None, *names) if isinstance(names, tuple) else _with_axis(names) if isinstance(names, dict) else names
        for name, names in axes.items()
    }


def by_row(trees: Sequence[Adapters]) -> Adapters:
    """One tree of several: in a batch of n rows, the first n / len(trees) rows have the first tree's adapters, ...

    Args:
    - trees: adapters of one base with the same methods and shapes (see `together`), for inference: nothing is dropped,
      and each has a copy of its bank.

    Raises SboraxError for trees that cannot share a batch.
    """
    if len(trees) == 1:
        return trees[0]
    if _form(trees[0]) is None or any(_form(tree) != _form(trees[0]) for tree in trees):
        raise SboraxError("these adapters differ in method or shape, or are more than a change of each projection")

    def joined(*items: Adapter) -> Adapter:
        stack, first = len(stack_of(items[0])), items[0]
        train, frozen = (
            jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=stack), *halves)
            for halves in zip(*((item.train, item.frozen) for item in items), strict=True)
        )
        return Adapter(train, frozen, ByRow(first.method, len(items)), first.in_axes)

    linked = [link(nodes(tree)) for tree in trees]
    return nest({path: joined(*(tree[path] for tree in linked)) for path in linked[0]})


def together(params: Sequence[Params], adapters: Sequence[Adapters | None]) -> list[list[int]]:
    """The numbers of adapters that can share a batch, in groups, in the order of their first members.

    Those of a group have the same methods, the same shapes, and the same arrays for a base. An adapter is a group by
    itself if it rewrites the base, links layers, routes by the prompt, takes means over tokens, changes biases, or
    adapts more than the projections of the layers. So is the base without an adapter.

    Args:
    - params: what goes with each of `adapters`.
    - adapters: trees of adapters; None for the base alone.
    """
    groups: list[tuple[Any, Any, list[int]]] = []
    for number, (base, tree) in enumerate(zip(params, adapters, strict=True)):
        # Copies of a row, which make up for the rows that an adapter lacks, would enter its means.
        form = None if tree is None or averages_tokens(tree) else _form(tree)
        for of_group, arrays, group in groups if form is not None else ():
            if of_group == form and _is_same(arrays, base):
                group.append(number)
                break
        else:
            groups.append((form, base, [number]))
    return [group for _, _, group in groups]


def _is_same(left: Params, right: Params) -> bool:
    """Whether two trees have the same arrays, and not just equal ones."""
    leaves = flatten(left), flatten(right)
    return leaves[0].keys() == leaves[1].keys() and all(leaves[0][path] is leaves[1][path] for path in leaves[0])


def _form(tree: Adapters) -> Any:
    """All but the numbers of a tree, to compare; None for one that cannot share a batch."""
    form = {}
    for path, node in link(nodes(tree)).items():
        method = node.method
        shares = not (method.rewrites_base or method.linked or method.adapts_bias or routed_parts(method))
        if not shares or isinstance(method, AbstractKernelless) or not path.startswith(f"{STACKED_UNDER}/"):
            return None
        leaves, structure = jax.tree.flatten((node.train, node.frozen))
        form[path] = method, node.in_axes, structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
    return form or None
