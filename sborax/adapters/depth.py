"""Layers linked in depth: methods whose layers read what earlier layers of the same projection have, or saw.

What a layer *has* is weights: `link` puts them into every layer's own leaves before the model runs. What it *saw* is
values: the model hands what a projection remembers to the same projection of the next layer, in `Context.memory`.
"""

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.compose import ByLayer, part_context, with_parts
from sborax.adapters.core import AbstractComposite, AbstractMethod, Adapter, Context, leaf_axes

Memory = dict[str, Any]
"""What a projection remembers of every token, (batch, seq, ...); all zeros where a chain begins."""
Chained = Callable[[Adapter, tuple[int, ...], Any], Adapter]


class AbstractLinked(AbstractMethod):
    """A method whose layers are linked: it declares `linked`, and a layer by itself is the first of its chain.

    A chain is a run of adjacent layers with one method on one projection, as one rule makes it.
    """

    @abc.abstractmethod
    def link(self, adapter: Adapter, earlier: tuple[int, ...]) -> Adapter:
        """An adapter of the same stack whose layers need the weights of no other. Differentiable.

        adapter: leaves with one stack axis. earlier: how many layers of its chain lie before each layer.
        """

    @abc.abstractmethod
    def remember(self, x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context) -> Memory:
        """What the next layer finds in its `ctx.memory`, one entry a token. Empty if it needs no values."""


def axes_leaves(axes: Any) -> list[tuple[str | None, ...]]:
    """The leaves of `core.leaf_axes`, in tree order."""
    return jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))


def stack_of(node: Adapter) -> tuple[int, ...]:
    """The leading stack axes of an adapter's leaves."""
    both = {**node.train, **node.frozen}
    leaves, names = jax.tree.leaves(both), axes_leaves(leaf_axes(node.method.axes, both))
    return next((leaf.shape[: leaf.ndim - len(name)] for leaf, name in zip(leaves, names, strict=True)), ())


def over_stack(function: Callable[..., Any], stack: tuple[int, ...]) -> Callable[..., Any]:
    """`function` of one layer, run for every layer of a stack in turn, so that workspace is that of one layer."""
    if not stack:
        return function

    def mapped(*args: Any) -> Any:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(stack) :]), args)
        out = jax.lax.map(lambda one: function(*one), flat)
        return jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), out)

    return mapped


def continues(before: Adapter, after: Adapter) -> bool:
    """Whether two adapters of adjacent layers belong to one chain."""
    shapes = [[leaf.shape for leaf in jax.tree.leaves(node)] for node in (before, after)]
    return before.method == after.method and shapes[0] == shapes[1]


def remember(x: Float[Array, "*batch in"], adapter: Adapter, ctx: Context) -> Memory:
    """What the projection of the next layer is to find in its context; empty for most methods.

    Parts of a composed method keep theirs under their number, and a part that does not act on this layer forgets.
    """
    batch = x.shape[:-1]
    kept = _remember(x.reshape(-1, x.shape[-1]), adapter, ctx.flatten(batch))
    return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), kept)


def _remember(x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context) -> Memory:
    method = adapter.method
    if isinstance(method, AbstractLinked):
        return method.remember(x, adapter, ctx)
    if not isinstance(method, AbstractComposite):
        return {}
    kept = {}
    for i, (child, _) in enumerate(method.children(adapter)):
        own = _remember(x, child, part_context(method, ctx, i))
        if isinstance(method, ByLayer):
            acts = adapter.frozen["branch"] == i + 1
            own = jax.tree.map(lambda leaf, acts=acts: jnp.where(acts, leaf, jnp.zeros_like(leaf)), own)
        if own:
            kept[str(i)] = own
    return kept


def link(found: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Adapters by path, of which no layer needs the weights of another any more: the same function of x."""

    def one(node: Adapter, earlier: tuple[int, ...], _: Any) -> Adapter:
        assert isinstance(node.method, AbstractLinked)
        return node.method.link(node, earlier)

    return over_chains(found, one)


def over_chains(
    found: Mapping[str, Adapter], function: Chained, beside: Mapping[str, Any] | None = None
) -> dict[str, Adapter]:
    """`function(stacked adapter, earlier, beside)` in place of every adapter whose method is linked.

    Layers that are nodes of their own are stacked for it and taken apart again.
    beside: by path, arrays with the same leading axes as the adapter. What lies under "0" is lifted for part 0.
    """
    done, given = dict(found), beside or {}
    for run in _runs(found):
        together = [(found[path], given.get(path, {})) for path in run]
        if stack_of(together[0][0]):
            (whole,), depth = together, stack_of(together[0][0])[0]
            done[run[0]] = _inside(whole[0], tuple(range(depth)), whole[1], function)
        else:
            whole = jax.tree.map(lambda *leaves: jnp.stack(leaves), *together)
            node = _inside(whole[0], tuple(range(len(run))), whole[1], function)
            done |= {path: jax.tree.map(lambda leaf, i=i: leaf[i], node) for i, path in enumerate(run)}
    return done


def _inside(node: Adapter, earlier: tuple[int, ...], beside: Any, function: Chained) -> Adapter:
    method = node.method
    if isinstance(method, AbstractLinked):
        return function(node, earlier, beside) if method.linked else node
    if not isinstance(method, AbstractComposite):
        return node
    parts = []
    for i, (child, layers) in enumerate(method.children(node)):
        own = earlier if layers is None else _earlier(layers, len(earlier))
        parts.append(_inside(child, own, {**beside, **beside.get(str(i), {})}, function))
    return with_parts(node, parts)


def _earlier(layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """For each layer, how many of `layers` lie directly before it, if it is one of them."""
    counts = np.full(depth + 1, -1)
    for layer in sorted(layers):
        counts[layer] = counts[layer - 1] + 1
    return tuple(int(count) for count in np.maximum(counts[:depth], 0))


def _runs(found: Mapping[str, Adapter]) -> list[list[str]]:
    """The paths of linked adapters: a stack alone, layers that are nodes of their own with those they continue."""
    numbered: dict[tuple[str, ...], dict[int, str]] = {}
    runs: list[list[str]] = []
    for path, node in found.items():
        parts = path.split("/")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if not node.method.linked:
            continue
        if place is None or stack_of(node):
            runs.append([path])
        else:
            numbered.setdefault((*parts[:place], "*", *parts[place + 1 :]), {})[int(parts[place])] = path
    for layers in numbered.values():
        for number in sorted(layers):
            if number - 1 in layers and continues(found[layers[number - 1]], found[layers[number]]):
                runs[-1].append(layers[number])
            else:
                runs.append([layers[number]])
    return runs
