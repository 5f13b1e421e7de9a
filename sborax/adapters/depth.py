"""Layers linked in depth: methods whose layers read weights or activations of earlier layers of the same projection.

Weights are copied: `link` puts those of other layers into a layer's own leaves before the model runs. Activations are
handed on: the model passes what a projection remembers to the same projection of the next layer, in `Context.memory`.
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
"""What a projection remembers of every token, (batch, seq, ...). All zeros where a chain begins."""
Chained = Callable[[Adapter, tuple[int, ...], Any], Adapter]


class AbstractLinked(AbstractMethod):
    """A method whose layers are linked. It declares `linked`.

    A chain is a run of adjacent layers with the same method on the same projection, as one rule makes it. A layer on
    its own is the first of a chain.
    """

    @abc.abstractmethod
    def link(self, adapter: Adapter, earlier: tuple[int, ...]) -> Adapter:
        """An equivalent adapter of the same stack whose layers do not need each other's weights. Differentiable.

        - adapter: an adapter whose leaves have one stack axis.
        - earlier: for each layer, how many layers of its chain come before it.
        """

    @abc.abstractmethod
    def remember(self, x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context) -> Memory:
        """What the next layer finds in its `ctx.memory`, one entry per token. Empty if it needs no activations."""


def axes_leaves(axes: Any) -> list[tuple[str | None, ...]]:
    """The leaves of `core.leaf_axes`, in tree order."""
    return jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))


def stack_of(node: Adapter) -> tuple[int, ...]:
    """The leading stack axes of an adapter's leaves."""
    # Not one dict of both: a part has train and frozen leaves under one name.
    for half in (node.train, node.frozen):
        names = axes_leaves(leaf_axes(node.method.axes, half))
        for leaf, name in zip(jax.tree.leaves(half), names, strict=True):
            return leaf.shape[: leaf.ndim - len(name)]
    return ()


def over_stack(function: Callable[..., Any], stack: tuple[int, ...]) -> Callable[..., Any]:
    """`function` of one layer, run for the layers of a stack one after the other, with the workspace of one layer."""
    if not stack:
        return function

    def mapped(*args: Any) -> Any:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(stack) :]), args)
        out = jax.lax.map(lambda layer: function(*layer), flat)
        return jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), out)

    return mapped


def continues(before: Adapter, after: Adapter) -> bool:
    """Whether two adapters of adjacent layers belong to one chain."""
    shapes = [[leaf.shape for leaf in jax.tree.leaves(node)] for node in (before, after)]
    return before.method == after.method and shapes[0] == shapes[1]


def remember(x: Float[Array, "*batch in"], adapter: Adapter, ctx: Context) -> Memory:
    """What the same projection of the next layer will find in its `ctx.memory`. Empty for most methods.

    Parts of a composite method remember under their number; a part that does not act on this layer forgets.
    """
    batch = x.shape[:-1]
    memory = _remember(x.reshape(-1, x.shape[-1]), adapter, ctx.flatten(batch))
    return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), memory)


def _remember(x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context) -> Memory:
    method = adapter.method
    if isinstance(method, AbstractLinked):
        return method.remember(x, adapter, ctx)
    if not isinstance(method, AbstractComposite):
        return {}
    memory = {}
    for i, (child, _) in enumerate(method.children(adapter)):
        of_part = _remember(x, child, part_context(method, ctx, i))
        if isinstance(method, ByLayer):
            acts = adapter.frozen["branch"] == i + 1
            of_part = jax.tree.map(lambda leaf, acts=acts: jnp.where(acts, leaf, jnp.zeros_like(leaf)), of_part)
        if of_part:
            memory[str(i)] = of_part
    return memory


def link(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Equivalent adapters by path, in which no layer needs the weights of another one."""

    def linked(node: Adapter, earlier: tuple[int, ...], _: Any) -> Adapter:
        assert isinstance(node.method, AbstractLinked)
        return node.method.link(node, earlier)

    return over_chains(adapters, linked)


def over_chains(
    adapters: Mapping[str, Adapter], function: Chained, beside: Mapping[str, Any] | None = None
) -> dict[str, Adapter]:
    """`function(stacked adapter, earlier, beside)` in place of every adapter whose method is linked.

    Layers that are adapters of their own are stacked first and separated again.

    - adapters: by path.
    - function: gets an adapter whose leaves have one stack axis, for each layer how many of its chain come before it,
      and the entry of `beside`.
    - beside: further arrays by path, with the leading axes of the adapter. Part 0 of a composite method gets the
      entries under "0".
    """
    changed, extras = dict(adapters), beside or {}
    for run in _runs(adapters):
        layers = [(adapters[path], extras.get(path, {})) for path in run]
        if stack := stack_of(layers[0][0]):
            ((node, arrays),) = layers
            changed[run[0]] = _over_parts(node, tuple(range(stack[0])), arrays, function)
        else:
            node, arrays = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
            node = _over_parts(node, tuple(range(len(run))), arrays, function)
            changed |= {path: jax.tree.map(lambda leaf, i=i: leaf[i], node) for i, path in enumerate(run)}
    return changed


def _over_parts(node: Adapter, earlier: tuple[int, ...], beside: Any, function: Chained) -> Adapter:
    """`over_chains` for one stacked adapter, or for the parts that it has."""
    method = node.method
    if isinstance(method, AbstractLinked):
        return function(node, earlier, beside) if method.linked else node
    if not isinstance(method, AbstractComposite):
        return node
    parts = []
    for i, (child, layers) in enumerate(method.children(node)):
        of_part = earlier if layers is None else _earlier(layers, len(earlier))
        parts.append(_over_parts(child, of_part, {**beside, **beside.get(str(i), {})}, function))
    return with_parts(node, parts)


def _earlier(layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """For each layer, how many of `layers` come directly before it; 0 for a layer that is none of them."""
    counts = np.full(depth + 1, -1)
    for layer in sorted(layers):
        counts[layer] = counts[layer - 1] + 1
    return tuple(int(count) for count in np.maximum(counts[:depth], 0))


def _runs(adapters: Mapping[str, Adapter]) -> list[list[str]]:
    """The paths of linked adapters in groups: each stack on its own, and adapters of single layers chain by chain."""
    numbered: dict[tuple[str, ...], dict[int, str]] = {}
    runs: list[list[str]] = []
    for path, node in adapters.items():
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
            if number - 1 in layers and continues(adapters[layers[number - 1]], adapters[layers[number]]):
                runs[-1].append(layers[number])
            else:
                runs.append([layers[number]])
    return runs
