"""Pure functions over whole trees: plan -> attach -> split / combine -> merge.

`attach` leaves the parameters alone and makes a second tree: nested dicts with an `Adapter` at the path of every kernel
that a rule covers. For `params, adapters = attach(key, params, [("q_proj", LoRA(rank=8))])`:

    params                              adapters

    layers                              layers
      self_attn                           self_attn
        q_proj                              q_proj
          kernel (22, 2048, 2048)             kernel Adapter
        o_proj                                         train  {a: (22, 2048, 8), b: (22, 8, 2048)}
          kernel (22, 2048, 2048)                      frozen {scale: (22,)}
      mlp                                              method LoRA(rank=8)
        ...
    norm
      scale (2048,)

A base checkpoint loads unchanged, and an optimiser never sees the base:

    train, frozen = split(adapters)     two trees with these paths, one with the train leaves, one with the frozen ones
    adapters = combine(train, frozen)   and back
    merged = merge(params, adapters)    `params` with W + s a b for layers/self_attn/q_proj/kernel, the rest as it was
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from sborax.adapters import bank, depth
from sborax.adapters.arithmetic import add_adapters, add_methods, scale_adapter, scale_method
from sborax.adapters.compose import simple_parts
from sborax.adapters.constraints import replicate
from sborax.adapters.core import (
    AbstractComposite,
    AbstractKernelless,
    AbstractMethod,
    Adapter,
    Fitted,
    Hint,
    SboraxError,
    Use,
    Weight,
    dense,
    is_adapter,
    leaf_axes,
    structure,
)
from sborax.adapters.depth import axes_leaves, over_stack, stack_of
from sborax.adapters.leaves import flatten, map_with_path, nest, replace_leaves, union
from sborax.adapters.paths import Plan, RuleLike, Site, bias_path, hint_of, plan, weight_keys
from sborax.adapters.rebase import as_matrix, astray, rewrite
from sborax.adapters.rebase import rebase as rebase_node
from sborax.adapters.tables import HEAD, leaf_of, weight_at
from sborax.adapters.weight import check_finite

Params = PyTree
Adapters = dict[str, Any]
"""Nested dicts with an `Adapter` at every leaf."""


def nodes(adapters: PyTree) -> dict[str, Adapter]:
    """Every adapter by the path of its kernel."""
    return {path: node for path, node in flatten(adapters, is_leaf=is_adapter).items() if is_adapter(node)}


def averages_tokens(adapters: PyTree) -> bool:
    """Whether some adapter takes a mean over the tokens of a call (`AbstractMethod.token_mean`)."""
    return any(node.method.token_mean for node in nodes(adapters).values())


def tree_of(item: Any, name: str) -> dict[str, Adapter]:
    """`nodes` of what a user gives as a tree of adapters.

    - name: of the function, for the error.

    Raises SboraxError for anything that is no tree of adapters alone.
    """
    leaves = flatten(item, is_leaf=is_adapter)
    wrong = next((leaf for leaf in leaves.values() if not is_adapter(leaf)), None)
    if wrong is not None:
        kind = type(item if "" in leaves else wrong).__name__
        raise SboraxError(f"{name}: expected a tree of adapters, as `attach` and `load_adapter` return, got a {kind}")
    return nodes(item)


def parts_of(adapters: PyTree, kind: type[AbstractMethod]) -> Iterator[Adapter]:
    """The adapters of this class, also inside composed ones, with one stack axis that has the layers they act on."""
    for node in nodes(adapters).values():
        for part, layers in simple_parts(node):
            if isinstance(part.method, kind):
                stack = stack_of(part)
                flat = jax.tree.map(lambda leaf, axes=len(stack): leaf.reshape(-1, *leaf.shape[axes:]), part)
                yield flat if layers is None else jax.tree.map(lambda leaf, at=np.asarray(layers): leaf[at], flat)


@functools.partial(jax.jit, static_argnames=("method", "stack", "in_axes", "use", "bias"))
def _fit(
    keys: Key[Array, "*stack"],
    weight: Any,
    grad: Any,
    inputs: Any,
    method: AbstractMethod,
    stack: tuple[int, ...],
    in_axes: int,
    use: Use,
    bias: bool,
):
    matrix = as_matrix(weight, len(stack), in_axes)
    positions = jnp.arange(math.prod(stack)).reshape(stack)

    def fit_layer(key: Array, position: Array, kernel: Any, grad: Any, inputs: Any) -> Fitted:
        # One layer at a time is gathered, and only for methods that read it.
        kernel, grad, inputs = replicate((kernel, grad, inputs))
        return method.init(key, kernel, Hint(position, grad, inputs, use=use, bias=bias))

    with jax.default_matmul_precision("highest"):
        grad = None if grad is None else as_matrix(grad, len(stack), in_axes)
        fitted = over_stack(fit_layer, stack)(keys, positions, matrix, grad, inputs)
    return jax.tree.map(_narrow, (fitted.train, fitted.frozen))


def _narrow(leaf: Array) -> Array:
    """A leaf in float32 or int32, also where JAX computes with 64 bits."""
    dtype = jnp.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.int32
    return leaf if leaf.dtype.itemsize <= 4 else leaf.astype(dtype)


def attach(
    key: Key[Array, ""],
    params: Params,
    rules: Iterable[RuleLike] | Plan,
    hints: Mapping[str, Hint] | None = None,
) -> tuple[Params, Adapters]:
    """Makes an adapter for every kernel that a rule covers, and returns `(params, adapters)`.

    The parameters come back as the same arrays, except for kernels whose method declares `rewrites_base`.

    Args:
    - key: each weight gets a key folded from this one, the names and numbers in its path and its position in a stack.
      Adding a target changes no other adapter, and a stack gets the adapters that its layers would get one by one.
    - params: the parameters of a model, any tree with a leaf `kernel` per projection.
    - rules: which kernels get which method, in order, as for `plan`; or a plan.
    - hints: gradients or statistics of inputs for methods that need them, by module path; see `gradient_hints` and
      `input_hints`.

    Raises SboraxError as `plan` does, and for a kernel, a gradient or a statistic that is not finite.
    """
    resolved = rules if isinstance(rules, Plan) else plan(params, rules, hints=hints)
    params, adapters = fit_plan(key, params, resolved, hints)
    return params, settle(params, adapters)


def fit_plan(
    key: Key[Array, ""], params: Params, resolved: Plan, hints: Mapping[str, Hint] | None = None
) -> tuple[Params, dict[str, Adapter]]:
    """What `attach` returns, by path and before `settle`, for code that gives the leaves other values first."""
    leaves = flatten(params)
    adapters, rewritten = {}, {}
    for site in resolved.sites:
        weight = weight_at(site.path, leaves)
        node = adapters[site.path] = fit(key, weight, site, hint_of(hints, site.path) or Hint())
        if site.method.rewrites_base:
            rewritten[site.path] = rewrite(leaves[site.path], node)
            check_finite(site.path, rewritten[site.path])
    params = replace_leaves(params, rewritten)
    return params, adapters


def settle(params: Params, adapters: Mapping[str, Adapter]) -> Adapters:
    """The tree of adapters that were made one by one, with what depends on several of them, or on the base.

    - params: the base that they are used with, as their methods left it.
    - adapters: all of them, by path, as `fit` made them.
    """
    leaves = flatten(params)

    def weight(path: str, position: int) -> Float[Array, "in out"]:
        return _weight(weight_at(path, leaves), position, stack_of(adapters[path]), adapters[path].in_axes)

    return rebase(params, nest(jax.tree.map(_narrow, bank.settle(adapters, weight))))


@functools.partial(jax.jit, static_argnames=("stack", "in_axes"))
def _weight(weight: Any, position: Any, stack: tuple[int, ...], in_axes: int) -> Float[Array, "in out"]:
    """The weight at a position of a flattened stack, float32 and dense."""
    place = jnp.unravel_index(position, stack) if stack else ()
    layer = jax.tree.map(lambda leaf: leaf[place], as_matrix(weight, len(stack), in_axes))
    return dense(replicate(layer)).astype(jnp.float32)


def rebase(params: Params, adapters: PyTree) -> PyTree:
    """The same adapters with frozen leaves that depend on the base, such as DoRA's norms, computed from `params`.

    Call it after rounding or quantising `params`; `attach`, `load_adapter` and `load_peft` do it themselves. On the
    same base every bit stays. Trained leaves, and what a method took out of its first base, never change.

    Args:
    - params: the parameters that the adapters are used with from now on.
    - adapters: a tree of adapters. Those whose kernel is not in `params` stay as they are.
    """
    leaves, by_path = flatten(params), tree_of(adapters, "rebase")

    def rebased(path: str, node: Adapter) -> Adapter:
        weight = weight_at(path, leaves)
        return node if weight is None else rebase_node(weight, node, bank.leaves_of(path, node, by_path))

    return nest({path: rebased(path, node) for path, node in by_path.items()})


def fit(key: Key[Array, ""], weight: Weight | None, site: Site, hint: Hint) -> Adapter:
    """The adapter of one site, as `attach` makes it from the same key. Sites of routers and banks have no weight.

    Raises SboraxError for a weight or a hint that is not finite, since decomposing it might never end.
    """
    check_finite(site.path, weight)
    check_finite(f"{site.path}: its gradient", hint.grad)
    check_finite(f"{site.path}: the statistics of its inputs", hint.inputs)
    weight = jnp.zeros((*site.stack, *site.shape)) if weight is None else weight
    keys = weight_keys(key, site.path, site.stack)
    of_site = site.method, site.stack, site.in_axes, site.use, site.bias
    train, frozen = _fit(keys, weight, hint.grad, hint.inputs, *of_site)
    return Adapter(train, frozen, structure(site.method), site.in_axes)


def split(adapters: PyTree) -> tuple[PyTree, PyTree]:
    """`(train, frozen)`: the tree without its frozen leaves, and without its trained ones.

    `train` is what to differentiate and to give to an optimiser.

    Raises SboraxError for something other than a tree of adapters.
    """
    tree_of(adapters, "split")

    def half(train: bool) -> PyTree:
        return jax.tree.map(
            lambda node: Adapter(node.train if train else {}, {} if train else node.frozen, node.method, node.in_axes),
            adapters,
            is_leaf=is_adapter,
        )

    return half(True), half(False)


def combine(train: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `split`.

    Args:
    - train, frozen: the halves of a tree. `frozen` may also hold trained leaves that are missing in `train`, since some
      optimisers hold a part of them fixed.

    Raises SboraxError for halves of different trees, and if they are swapped.
    """
    lone = tree_of(train, "combine").keys() ^ tree_of(frozen, "combine").keys()
    if lone:
        raise SboraxError(f"combine: {min(lone)}: is in one half only; give both halves of one tree")

    def joined(path: str, half: Adapter, other: Adapter) -> Adapter:
        if (half.method, half.in_axes) != (other.method, other.in_axes):
            raise SboraxError(f"combine: {path}: the halves have different methods; give both halves of one tree")
        if flatten(half.frozen) or flatten(half.train).keys() & flatten(other.train).keys():
            raise SboraxError(f"combine: {path}: give the half of the trained leaves first, as `split` returns them")
        return Adapter(union(other.train, half.train), other.frozen, half.method, half.in_axes)

    return map_with_path(joined, train, frozen, is_leaf=is_adapter)


def link(adapters: PyTree) -> PyTree:
    """Equivalent adapters in which every layer has a copy of the weights that it needs of other layers and of banks.

    Only methods with linked layers (ResLoRA) or a bank (VB-LoRA, Uni-LoRA, Lily, FRoD) change; banks are left out.
    Call it in models of your own, before the adapters are used; `LanguageModel`, `merge`, `apply_linen` and `save_peft`
    do it themselves. Differentiable; linking twice changes nothing.

    Raises SboraxError for an adapter whose bank is missing, and for something other than a tree of adapters.
    """
    return nest(depth.link(bank.link(tree_of(adapters, "link"))))


def merge(params: Params, adapters: PyTree) -> Params:
    """Plain parameters of the adapted model: W' = method.merge(W, adapter) for every adapted kernel.

    Computed in float32, then cast to the dtype of W. Differentiable. Other leaves are the same arrays. Quantised
    kernels come back dense. A method that adapts the bias changes the leaf `bias` beside its kernel.

    Args:
    - params: what `attach` returned, or any parameters with the same paths, such as a copy in another precision.
    - adapters: a tree of adapters.

    Raises SboraxError for a method without a merged form, for an adapter whose kernel is not in `params`, and for
    `params` from before `attach` if a method rewrote them. The last error cannot be detected inside a trace.
    """
    leaves = flatten(params)
    merged = {}
    readers, shared = bank.separate(tree_of(adapters, "merge"))
    for path, node in depth.link(readers).items():
        if node.method.no_merge:
            raise SboraxError(f"{path}: {_unmerged(node.method)} cannot be merged: {node.method.no_merge}")
        if leaf_of(path, leaves) != path:
            raise SboraxError(
                f"{path}: the head is tied to the embedding and does not have its adapter, so no single table is both"
            )
        if path not in leaves:
            raise SboraxError(f"{path}: there is an adapter but no kernel at this path")
        weight = leaves[path]
        check_base(path, weight, node)
        merged[path] = merged_node(weight, node, shared.get(path))
        bias = bias_path(path)
        if node.method.adapts_bias and bias in leaves:
            merged[bias] = merge_bias(bias, leaves[bias], weight, node, shared.get(path)).astype(leaves[bias].dtype)
    return replace_leaves(params, merged)


def _unmerged(method: AbstractMethod) -> str:
    """The name of the method that does not merge: the part whose reason a composed method has."""
    parts = method.members if isinstance(method, AbstractComposite) else ()
    part = next((part for part in parts if part.no_merge == method.no_merge), None)
    return type(method).__name__ if part is None else _unmerged(part)


def check_base(path: str, weight: Weight, node: Adapter) -> None:
    """Raise SboraxError if a method rewrites the base and `weight` is not what it left. Traced values always pass."""
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((weight, node)))
    if node.method.rewrites_base and not traced and bool(astray(weight, node)):
        method = node.method
        while isinstance(method, AbstractComposite):
            method = next(part for part in method.members if part.rewrites_base)
        raise SboraxError(
            f"{path}: {type(method).__name__} took its start out of the base, and these parameters still have it; "
            "give those that came with the adapters"
        )


def merged_node(weight: Weight, node: Adapter, shared: Adapter | None = None) -> Array:
    """The merged kernel of one adapter, in the shape and dtype of `weight`.

    - shared: leaves that all layers of a stack share, as `bank.separate` gives them.
    """
    stack = stack_of(node)
    matrix = as_matrix(weight, len(stack), node.in_axes)
    with jax.default_matmul_precision("highest"):
        merged = over_stack(lambda w, n: n.method.merge(w, bank.joined(n, shared)), stack)(matrix, node)
    return merged.astype(weight.dtype).reshape(weight.shape)


def merge_bias(
    path: str, bias: Float[Array, "..."], weight: Weight, node: Adapter, shared: Adapter | None = None
) -> Float[Array, "..."]:
    """The float32 bias that goes with the merged kernel, in the shape of `bias`.

    - path: where the bias is, for the error.
    - weight: the kernel before merging.
    - shared: leaves that all layers of a stack share, as `bank.separate` gives them.

    Raises SboraxError for a bias that does not have one entry per output.
    """
    stack = stack_of(node)
    expected = weight.shape[: len(stack)] + weight.shape[len(stack) + node.in_axes :]
    if tuple(bias.shape) != tuple(expected):
        raise SboraxError(
            f"{path}: {type(node.method).__name__} adapts the bias, which has shape {tuple(bias.shape)} here and not "
            f"that of the outputs, {tuple(expected)}"
        )
    matrix = as_matrix(weight, len(stack), node.in_axes)
    with jax.default_matmul_precision("highest"):
        merged = over_stack(lambda b, w, n: n.method.merge_bias(b, w, bank.joined(n, shared)), stack)(
            bias.reshape(*stack, -1), matrix, node
        )
    return merged.reshape(bias.shape)


def specs(adapters: PyTree, base_specs: PyTree) -> PyTree:
    """Partition specs of every adapter leaf, a tree like `adapters`, from those of the kernels.

    Axes "in" and "out" of a leaf are cut as those of the kernel, stack axes as the kernel's. Where several axes of the
    kernel are one of the leaf, it is cut as the first of them, if that is the only one that is cut, and else not. Axes
    "rank" and None are replicated, and so are routers and banks.

    Args:
    - adapters: a tree of adapters; their shapes will do.
    - base_specs: a `jax.sharding.PartitionSpec` for every parameter, a tree like the parameters.
    """
    kernel_specs = flatten(base_specs, is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec))

    def spec_at(path: str) -> tuple[Any, ...]:
        leaf = leaf_of(path, kernel_specs)
        spec = tuple(kernel_specs[leaf])
        return (spec + (None, None))[1::-1] if leaf != path == HEAD else spec

    def node_specs(path: str, node: Adapter) -> Adapter:
        kernel_spec = () if isinstance(node.method, AbstractKernelless) else spec_at(path)
        stack = len(stack_of(node))
        inputs = stack + node.in_axes
        spec = kernel_spec + (None,) * inputs
        entries: dict[str | None, Any] = {
            "in": _flattened(spec[stack:inputs]),
            "out": _flattened(spec[inputs:]),
            "rank": None,
            None: None,
        }

        def leaf_spec(names: tuple[str | None, ...]) -> jax.sharding.PartitionSpec:
            return jax.sharding.PartitionSpec(*spec[:stack], *(entries[name] for name in names))

        def half_specs(leaves):
            axes = leaf_axes(node.method.axes, leaves)
            return jax.tree.map(leaf_spec, axes, is_leaf=lambda item: isinstance(item, tuple))

        return Adapter(half_specs(node.train), half_specs(node.frozen), node.method, node.in_axes)

    return map_with_path(node_specs, adapters, is_leaf=is_adapter)


def _flattened(entries: tuple[Any, ...]) -> Any:
    """The entry of an axis into which axes with these entries are flattened: parts of later ones are no runs of it."""
    first, *others = entries or (None,)
    return None if any(others) else first


def trainable(tree: PyTree) -> PyTree:
    """A tree like `tree` of booleans: True for trained leaves of adapters, False for all others, such as the base."""

    def flags(node: Any) -> Any:
        if not is_adapter(node):
            return jax.tree.map(lambda _: False, node)
        return Adapter(
            jax.tree.map(lambda _: True, node.train),
            jax.tree.map(lambda _: False, node.frozen),
            node.method,
            node.in_axes,
        )

    return jax.tree.map(flags, tree, is_leaf=is_adapter)


def labels(tree: PyTree, train: str = "train", freeze: str = "freeze") -> PyTree:
    """A tree like `tree` of labels for `optax.partition`.

    Args:
    - tree: adapters, or any tree that has them in it.
    - train: the label of trained leaves of adapters.
    - freeze: the label of all other leaves.
    """
    return jax.tree.map(lambda flag: train if flag else freeze, trainable(tree))


def value_and_grad(function: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """`jax.value_and_grad` for a function of a tree with trained, frozen and integer leaves.

    Only the trained leaves of adapters are differentiated. The gradient of every other leaf is zeros of its dtype, so
    that the result fits `optax.partition` with `labels`.

    Args:
    - function: its first argument is the tree, and it returns a scalar loss.
    - has_aux: whether it returns `(loss, aux)`. Default False.
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


def count_node(node: Adapter) -> int:
    """Trained parameters of one adapter, padding and layers that a part of it does not act on left out."""
    return sum(_count_part(part, layers) for part, layers in simple_parts(node))


def _count_part(node: Adapter, layers: Sequence[int] | None) -> int:
    """Trained parameters at some positions of the stack; None: at all of them."""
    rank, total = node.method.rank, 0
    leaves_names = axes_leaves(leaf_axes(node.method.axes, node.train))
    for leaf, names in zip(jax.tree.leaves(node.train), leaves_names, strict=True):
        stack = leaf.shape[: leaf.ndim - len(names)]
        size, ranked = math.prod(leaf.shape[len(stack) :]), names.count("rank")
        positions = layers if layers is not None else range(math.prod(stack))
        if isinstance(rank, tuple):
            total += sum(size // max(rank) ** ranked * rank[position] ** ranked for position in positions)
        else:
            total += size * len(positions)
    return total


def count(adapters: PyTree) -> int:
    """How many parameters a tree of adapters trains. Padding, and layers that no rule covers, do not count."""
    return sum(count_node(node) for node in nodes(adapters).values())


def add(*items: Any) -> Any:
    """The sum of methods, a method, or the sum of adapter trees, a tree. Its delta is the sum of the deltas.

    A kernel may have adapters in some of the trees only. A tree whose method rewrote the base belongs to that base, and
    so does the sum.

    Args:
    - items: methods, or trees of adapters.

    Raises SboraxError for a method that is not additive, and if several trees rewrote the base of one kernel.
    """
    if all(isinstance(item, AbstractMethod) for item in items):
        return add_methods(*items)
    by_path: dict[str, list[Adapter]] = {}
    for item in items:
        for path, node in tree_of(item, "add").items():
            by_path.setdefault(path, []).append(node)
    return nest({path: _summed(path, terms) if len(terms) > 1 else terms[0] for path, terms in by_path.items()})


def _summed(path: str, terms: Sequence[Adapter]) -> Adapter:
    if isinstance(terms[0].method, AbstractKernelless):
        raise SboraxError(f"{path}: each tree has its own, and the sum has room for one; add the methods instead")
    try:
        return add_adapters(terms, stack_of(terms[0]))
    except SboraxError as error:
        raise SboraxError(f"{path}: {error}") from None


def scale(item: Any, factor: float) -> Any:
    """A method, or a tree of adapters, whose delta is multiplied by `factor`.

    Delta is the change since before `attach`: with factor 0 the result is the original base, also for methods that
    rewrite it.

    Args:
    - item: a method or a tree of adapters.
    - factor: any number; for a tree it may be traced.

    Raises SboraxError for a method that is not additive, and for something other than a method or a tree of adapters.
    """
    if isinstance(item, AbstractMethod):
        return scale_method(item, factor)

    def scaled(node: Adapter) -> Adapter:
        # Without a kernel there is no delta; the adapters that it serves are scaled.
        return node if isinstance(node.method, AbstractKernelless) else scale_adapter(node, factor, stack_of(node))

    return nest({path: scaled(node) for path, node in tree_of(item, "scale").items()})


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
