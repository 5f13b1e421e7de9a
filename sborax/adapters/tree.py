"""The verbs over whole trees: plan -> attach -> split / combine -> merge. All pure.

`adapters` is a nested dict with the paths of the kernels it adapts, an `Adapter` at every leaf. It travels beside
the parameters and never inside them, so a base checkpoint loads unchanged and the optimiser never sees the base.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from sborax.adapters import depth
from sborax.adapters.arithmetic import add_adapters, add_methods, scale_adapter, scale_method
from sborax.adapters.constraints import whole
from sborax.adapters.core import (
    AbstractComposite,
    AbstractMethod,
    Adapter,
    Fitted,
    Hint,
    Leaves,
    SboraxError,
    Weight,
    dense,
    is_adapter,
    leaf_axes,
    structure,
)
from sborax.adapters.depth import axes_leaves, over_stack, stack_of
from sborax.adapters.leaves import flatten, map_with_path, nest, replace_leaves
from sborax.adapters.paths import Plan, RuleLike, Site, bias_path, hint_of, kernels, plan, weight_keys
from sborax.adapters.rebase import as_matrix, astray, rewrite
from sborax.adapters.rebase import rebase as rebase_node
from sborax.adapters.routing import AbstractRouter
from sborax.adapters.weight import check_finite

Params = PyTree
Adapters = dict[str, Any]
"""Nested dicts with an `Adapter` at every leaf."""


def nodes(adapters: PyTree) -> dict[str, Adapter]:
    """Every adapter by the path of its kernel."""
    return {path: node for path, node in flatten(adapters, is_leaf=is_adapter).items() if is_adapter(node)}


@functools.partial(jax.jit, static_argnames=("method", "stack", "in_axes"))
def _fit(
    keys: Key[Array, "*stack"], weight: Any, grad: Any, method: AbstractMethod, stack: tuple[int, ...], in_axes: int
):
    matrix = as_matrix(weight, len(stack), in_axes)
    positions = jnp.arange(math.prod(stack)).reshape(stack)

    def one(key: Array, position: Array, kernel: Any, grad: Any) -> Fitted:
        # One layer at a time is gathered, and only for methods that read it.
        kernel, grad = whole((kernel, grad))
        return method.init(key, kernel, Hint(position, grad))

    with jax.default_matmul_precision("highest"):
        grad = None if grad is None else as_matrix(grad, len(stack), in_axes)
        fitted = over_stack(one, stack)(keys, positions, matrix, grad)
    return fitted.train, fitted.frozen


def attach(
    key: Key[Array, ""],
    params: Params,
    rules: Iterable[RuleLike] | Plan,
    hints: Mapping[str, Hint] | None = None,
) -> tuple[Params, Adapters]:
    """Fit an adapter to every kernel that a rule covers: `(params, adapters)`.

    The base comes back untouched (the same arrays) unless a method declares `rewrites_base`. Keys are folded from
    the module path, its numbers and the position in a stack: adding a target reshuffles no other, and a stack equals
    its layers.

    Raises SboraxError as `plan` does, and for a kernel or a gradient that is not finite.
    """
    settled = rules if isinstance(rules, Plan) else plan(params, rules, hints=hints)
    found = kernels(params)
    adapters, rewritten = {}, {}
    for site in settled.sites:
        node = adapters[site.path] = fit(key, found.get(site.path), site, hint_of(hints, site.path) or Hint())
        if site.method.rewrites_base:
            rewritten[site.path] = rewrite(found[site.path], node)
            check_finite(site.path, rewritten[site.path])
    params = replace_leaves(params, rewritten)
    return params, rebase(params, nest(adapters))


def rebase(params: Params, adapters: PyTree) -> PyTree:
    """The same adapters on another base: their frozen leaves that follow from it are taken from `params`.

    `attach`, `load_adapter` and `load_peft` do it themselves; it is for who then rounds or quantises `params`. On the
    same base every bit stays. What a method trains, and what it took out of its first base, is never touched.
    """
    found = kernels(params)

    def one(path: str, node: Adapter) -> Adapter:
        return rebase_node(found[path], node) if path in found else node

    return nest({path: one(path, node) for path, node in nodes(adapters).items()})


def fit(key: Key[Array, ""], weight: Weight | None, site: Site, hint: Hint) -> Adapter:
    """The adapter of one site, as `attach` makes it from the same key. A router's site has no weight.

    Raises SboraxError for a weight or a gradient that is not finite: a decomposition of it might never end.
    """
    check_finite(site.path, weight)
    check_finite(f"{site.path}: its gradient", hint.grad)
    weight = jnp.zeros((*site.stack, *site.shape)) if weight is None else weight
    keys = weight_keys(key, site.path, site.stack)
    train, frozen = _fit(keys, weight, hint.grad, site.method, site.stack, site.in_axes)
    return Adapter(train, frozen, structure(site.method), site.in_axes)


def split(adapters: PyTree) -> tuple[PyTree, PyTree]:
    """`(train, frozen)`: two trees of the same nodes, one without frozen leaves, one without trained ones."""

    def half(train: bool) -> PyTree:
        return jax.tree.map(
            lambda node: Adapter(node.train if train else {}, {} if train else node.frozen, node.method, node.in_axes),
            adapters,
            is_leaf=is_adapter,
        )

    return half(True), half(False)


def combine(train: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `split`, also where the frozen half holds some of the leaves that a method trains."""

    def joined(half: Adapter, rest: Adapter) -> Adapter:
        return Adapter(_union(rest.train, half.train), rest.frozen, half.method, half.in_axes)

    return jax.tree.map(joined, train, frozen, is_leaf=is_adapter)


def _union(held: Leaves, trained: Leaves) -> Leaves:
    """The leaves of both, nested alike; no leaf is in both."""
    shared = {name: _union(held[name], trained[name]) for name in held.keys() & trained.keys()}
    return {**held, **trained, **shared}


def link(adapters: PyTree) -> PyTree:
    """The same adapters, with what a layer needs of other layers' weights in its own leaves. For models of your own.

    `LanguageModel`, `merge` and `save_peft` do it themselves. Differentiable; nothing changes for methods whose
    layers are not linked (`ResLoRA`'s are), nor when done again.
    """
    linked = depth.link(nodes(adapters))
    return map_with_path(lambda path, node: linked[path], adapters, is_leaf=is_adapter)


def merge(params: Params, adapters: PyTree) -> Params:
    """Parameters whose plain model is the adapted one: W' = method.merge(W, adapter), computed in float32.

    Pure and differentiable, over any parameter tree with the same paths; kernels that no adapter touches are the
    same arrays. Quantised kernels come back dense. A method that adapts the bias changes the leaf `bias` beside its
    kernel.

    Raises SboraxError for a method without a merged form, for an adapter whose kernel is not in `params`, and, unless
    traced, for a method that rewrites the base and stands on one that was not rewritten.
    """
    found = flatten(params)
    linked = nodes(link(adapters))
    new = {}
    for path, node in linked.items():
        if node.method.no_merge:
            raise SboraxError(f"{path}: {type(node.method).__name__} cannot be merged: {node.method.no_merge}")
        if path not in found:
            raise SboraxError(f"{path}: there is an adapter but no kernel at this path")
        weight = found[path]
        check_base(path, weight, node)
        new[path] = merged_node(weight, node)
        beside = bias_path(path)
        if node.method.adapts_bias and beside in found:
            new[beside] = merge_bias(beside, found[beside], weight, node).astype(found[beside].dtype)
    return replace_leaves(params, new)


def check_base(path: str, weight: Weight, node: Adapter) -> None:
    """Raise SboraxError if `weight` is not what a method that rewrites the base left. Traced values tell nothing."""
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((weight, node)))
    if node.method.rewrites_base and not traced and bool(astray(weight, node)):
        method = node.method
        while isinstance(method, AbstractComposite):
            method = next(part for part in method.members if part.rewrites_base)
        raise SboraxError(
            f"{path}: {type(method).__name__} took its start out of the base, and these parameters still have it; "
            "give those that came with the adapters"
        )


def merged_node(weight: Weight, node: Adapter) -> Array:
    """One kernel whose plain projection is the adapted one, in the dtype of `weight`."""
    stack = stack_of(node)
    matrix = as_matrix(weight, len(stack), node.in_axes)
    with jax.default_matmul_precision("highest"):
        merged = over_stack(lambda w, n: n.method.merge(w, n), stack)(matrix, node)
    return merged.astype(weight.dtype).reshape(weight.shape)


def merge_bias(path: str, bias: Float[Array, "..."], weight: Weight, node: Adapter) -> Float[Array, "..."]:
    """The float32 bias at `path` that goes with the merged `weight` of `node`, in its shape.

    Raises SboraxError for a bias that has not one entry an output.
    """
    stack = stack_of(node)
    expected = weight.shape[: len(stack)] + weight.shape[len(stack) + node.in_axes :]
    if tuple(bias.shape) != tuple(expected):
        raise SboraxError(
            f"{path}: {type(node.method).__name__} adapts the bias, which has shape {tuple(bias.shape)} here and not "
            f"that of the outputs, {tuple(expected)}"
        )
    merged = over_stack(lambda b, n: n.method.merge_bias(b, n), stack)(bias.reshape(*stack, -1), node)
    return merged.reshape(bias.shape)


def specs(adapters: PyTree, base_specs: PyTree) -> PyTree:
    """Partition specs of every adapter leaf, derived from those of the kernels: `base_specs` mirrors the params.

    "in" and "out" copy the kernel's entry, stack axes copy theirs, "rank" and None are replicated, and so are routers.
    """
    flat = flatten(base_specs, is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec))

    def one(path: str, node: Adapter) -> Adapter:
        spec = () if isinstance(node.method, AbstractRouter) else tuple(flat[path])
        stack = len(stack_of(node))
        whole = spec + (None,) * (stack + 2)
        entries: dict[str | None, Any] = {"in": whole[stack], "out": whole[stack + 1], "rank": None, None: None}

        def leaf(names: tuple[str | None, ...]) -> jax.sharding.PartitionSpec:
            return jax.sharding.PartitionSpec(*whole[:stack], *(entries[name] for name in names))

        def halves(leaves):
            axes = leaf_axes(node.method.axes, leaves)
            return jax.tree.map(leaf, axes, is_leaf=lambda item: isinstance(item, tuple))

        return Adapter(halves(node.train), halves(node.frozen), node.method, node.in_axes)

    return map_with_path(one, adapters, is_leaf=is_adapter)


def trainable(tree: PyTree) -> PyTree:
    """Booleans, True for the trained leaves of adapters. Whatever else is in the tree, the base say, is False."""

    def one(node: Any) -> Any:
        if not is_adapter(node):
            return jax.tree.map(lambda _: False, node)
        return Adapter(
            jax.tree.map(lambda _: True, node.train),
            jax.tree.map(lambda _: False, node.frozen),
            node.method,
            node.in_axes,
        )

    return jax.tree.map(one, tree, is_leaf=is_adapter)


def labels(tree: PyTree, train: str = "train", freeze: str = "freeze") -> PyTree:
    """`trainable` as labels for `optax.partition`."""
    return jax.tree.map(lambda flag: train if flag else freeze, trainable(tree))


def value_and_grad(function: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """`jax.value_and_grad` in the first argument, for a tree that mixes trained, frozen and integer leaves.

    Only the trained leaves of adapters are differentiated; every other leaf's gradient is zeros of its own dtype,
    so the result fits `optax.partition` with `labels`.
    """

    def wrapped(tree: PyTree, *args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        flags = jax.tree.leaves(trainable(tree))
        trained = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

        def inner(trained: list[Array]) -> Any:
            source = iter(trained)
            full = [next(source) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            return function(jax.tree.unflatten(treedef, full), *args, **kwargs)

        value, grads = jax.value_and_grad(inner, has_aux=has_aux)(trained)
        source = iter(grads)
        full = [next(source) if flag else jnp.zeros_like(leaf) for leaf, flag in zip(leaves, flags, strict=True)]
        return value, jax.tree.unflatten(treedef, full)

    return wrapped


def count_node(node: Adapter, layers: tuple[int, ...] | None = None) -> int:
    """Trained parameters of one adapter at the given positions of its stack, padding left out."""
    if isinstance(node.method, AbstractComposite):
        return sum(count_node(child, layers if own is None else own) for child, own in node.method.children(node))
    rank = node.method.rank
    total = 0
    names = axes_leaves(leaf_axes(node.method.axes, node.train))
    for leaf, name in zip(jax.tree.leaves(node.train), names, strict=True):
        stack = leaf.shape[: leaf.ndim - len(name)]
        one, ranked = math.prod(leaf.shape[len(stack) :]), name.count("rank")
        chosen = layers if layers is not None else range(math.prod(stack))
        if isinstance(rank, tuple):
            total += sum(one // max(rank) ** ranked * rank[layer] ** ranked for layer in chosen)
        else:
            total += one * len(chosen)
    return total


def count(adapters: PyTree) -> int:
    """Trainable parameters, from static ranks: padded columns and unselected layers do not count."""
    return sum(count_node(node) for node in nodes(adapters).values())


def add(*items: Any) -> Any:
    """The sum of methods (one method), or of adapter trees (one tree, with what each has where only some have it).

    Delta of the result = sum of the deltas. A tree that rewrote its base stands on that; so does the sum.
    Raises SboraxError unless every method involved is additive, and if several trees rewrote the base of one kernel.
    """
    if all(isinstance(item, AbstractMethod) for item in items):
        return add_methods(*items)
    by_path: dict[str, list[Adapter]] = {}
    for item in items:
        for path, node in nodes(item).items():
            by_path.setdefault(path, []).append(node)
    return nest({path: _summed(path, found) if len(found) > 1 else found[0] for path, found in by_path.items()})


def _summed(path: str, found: Sequence[Adapter]) -> Adapter:
    if isinstance(found[0].method, AbstractRouter):
        raise SboraxError(f"{path}: each tree has its own router, and a layer has one; add the methods instead")
    try:
        return add_adapters(found, stack_of(found[0]))
    except SboraxError as error:
        raise SboraxError(f"{path}: {error}") from None


def scale(item: Any, factor: float) -> Any:
    """A method, or a tree of adapters, with its delta multiplied by `factor` (0: the base as it was before `attach`).

    Raises SboraxError unless every method involved is additive.
    """
    if isinstance(item, AbstractMethod):
        return scale_method(item, factor)

    def one(node: Adapter) -> Adapter:
        # A router has no delta: those that it weighs are scaled.
        return node if isinstance(node.method, AbstractRouter) else scale_adapter(node, factor, stack_of(node))

    return nest({path: one(node) for path, node in nodes(item).items()})


__all__ = [
    "Adapters",
    "Params",
    "Plan",
    "Site",
    "add",
    "attach",
    "combine",
    "count",
    "dense",
    "labels",
    "link",
    "merge",
    "nodes",
    "plan",
    "scale",
    "specs",
    "split",
    "stack_of",
    "trainable",
    "value_and_grad",
]
