"""Adapters inside Linen models that are not ours."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sborax.adapters.bank import link as link_banks
from sborax.adapters.core import AbstractKernelless, Adapter, Context, SboraxError, linear
from sborax.adapters.invocation import invoked_parts
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.tree import Adapters, Params, merge, nodes

MARK = "kernel of an adapter"
"""Name of an adapter's leaves beside its kernel, so that whatever splits the kernel by layers splits them too."""


def apply_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    adapters: Adapters,
    *args: Any,
    method: Callable[..., Any] | str | None = None,
    **options: Any,
) -> Any:
    """`module.apply(variables, *args, method=method, **options)` with adapters on its projections.

    Equal to `module.apply` on `merge(params, adapters)`, without forming merged weights in `Dense` and `DenseGeneral`.
    Gradients are those of `linear` (DoRA takes its norms as constants). Other modules, and projections with another
    product (`dot_general`), get the merged kernel. Layers stacked by `nn.scan` or `nn.vmap` along the first axis of
    "params" are adapted one by one. Code that reads a kernel without its module, such as a tied head, gets that of the
    base.

        params, adapters = sx.attach(key, variables["params"], [("query|value", sx.LoRA(rank=8))])
        logits = sx.apply_linen(model, {"params": params}, adapters, images)

    - variables: the collections of the model; "params" is the base that `attach` returned.
    - adapters: by the paths of the kernels, as `attach` returns them.
    - options: those of `module.apply`. An rng "dropout" turns the adapters' dropout on, too.

    Raises SboraxError for an adapter that the call never reaches, for routers, and for methods that link layers, act
    from some tokens on or take means over tokens. With an rng "dropout" also for dropout in a module that gets the
    merged kernel.
    """
    flat = link_banks(nodes(adapters))
    check_independent(flat)
    params, reached = variables["params"], {}

    def run(params: Params, inside: Mapping[str, Adapter], reached: dict[str, bool]) -> Any:
        collections = {**variables, "params": _beside(params, inside)}
        with nn.intercept_methods(_interceptor(inside, reached)):
            return module.apply(collections, *args, method=method, **options)

    # Find out, without computing, which projections can take their adapter as it is.
    jax.eval_shape(lambda params: run(params, flat, reached), params)
    lost = sorted(flat.keys() - reached.keys())
    if lost:
        raise SboraxError(f"{lost[0]}: the model never reads this kernel in such a call; adapt others")
    inside = {path: node for path, node in flat.items() if reached[path]}
    return run(merge(params, nest({path: flat[path] for path in flat.keys() - inside.keys()})), inside, {})


def check_independent(adapters: Mapping[str, Adapter]) -> None:
    """Raise SboraxError for adapters (by path) that need more of the model than their own projection."""
    for path, node in adapters.items():
        method = node.method
        if isinstance(method, AbstractKernelless) or method.linked or method.token_mean or invoked_parts(method):
            raise SboraxError(f"{path}: {type(method).__name__} needs a model that knows it, such as ours")


def check_deterministic(where: str, node: Adapter) -> None:
    """Raise SboraxError for an adapter with dropout or noise, which a merged kernel does not have."""
    dropped = next((path for path in flatten(node.frozen) if path.endswith("dropout")), None)
    if dropped or node.method.draws:
        raise SboraxError(
            f"{where}: computes with the merged kernel, which has no {dropped or node.method.draws}; attach without it"
        )


def _beside(params: Params, inside: Mapping[str, Adapter]) -> Params:
    """The parameters with the leaves of adapters beside their kernels."""
    marked = nest({f"{path.removesuffix('kernel')}{MARK}": (node.train, node.frozen) for path, node in inside.items()})

    def joined(tree: Any, branch: Any) -> Any:
        return {**tree, **{name: joined(tree[name], leaf) if name in tree else leaf for name, leaf in branch.items()}}

    return joined(params, marked)


def _interceptor(inside: Mapping[str, Adapter], reached: dict[str, bool]) -> Callable[..., Any]:
    """The function that Flax calls in place of every method.

    - reached: by path of its kernel, whether a projection takes its adapter; filled by the call.
    """

    def intercept(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        layer = context.module
        path = "/".join((*layer.path, "kernel")) if layer.scope is not None else ""
        if context.method_name != "__call__" or path not in inside:
            return proceed(*args, **kwargs)
        train, frozen = layer.get_variable("params", MARK)
        node = Adapter(train, frozen, inside[path].method, inside[path].in_axes)
        (x,) = args or tuple(kwargs.values())
        # A module may be called more than once. It gets the merged kernel if one of the calls needs it.
        reached[path] = _is_plain_product(layer, x, node) and reached.get(path, True)
        if not reached[path] and layer.has_rng("dropout"):
            check_deterministic(path, node)
        return _project(layer, x, node) if reached[path] else proceed(*args, **kwargs)

    return intercept


def _is_plain_product(layer: nn.Module, x: Any, node: Adapter) -> bool:
    """Whether a module multiplies the last axes of `x` by a single kernel."""
    if type(layer) not in (nn.Dense, nn.DenseGeneral) or layer.dot_general or layer.dot_general_cls:
        return False
    kernel = layer.get_variable("params", "kernel")
    features = 1 if isinstance(layer, nn.Dense) or isinstance(layer.features, int) else len(layer.features)
    return (
        layer.precision is None
        and not getattr(layer, "batch_dims", ())
        and are_last(getattr(layer, "axis", -1), node.in_axes, x.ndim)
        and kernel.ndim == node.in_axes + features
    )


def are_last(axes: int | Sequence[int], count: int, ndim: int) -> bool:
    """Whether `axes`, one or several, are the last `count` of `ndim` axes, in order."""
    positions = (axes,) if isinstance(axes, int) else axes
    return tuple(axis % ndim for axis in positions) == tuple(range(ndim - count, ndim))


def _project(layer: Any, x: Float[Array, "..."], node: Adapter) -> Float[Array, "..."]:
    """The module's output, by `linear`."""
    kernel, bias = layer.get_variable("params", "kernel"), layer.get_variable("params", "bias")
    x, kernel, bias = layer.promote_dtype(x, kernel, bias, dtype=layer.dtype)
    ctx = Context(layer.make_rng("dropout")) if layer.has_rng("dropout") else Context()
    return project(x, kernel, bias, node, ctx)


def project(
    x: Float[Array, "..."], kernel: Float[Array, "..."], bias: PyTree, node: Adapter, ctx: Context
) -> Float[Array, "..."]:
    """`linear` over the last `node.in_axes` axes of `x`, with a kernel of any number of axes."""
    inner, outer = kernel.shape[: node.in_axes], kernel.shape[node.in_axes :]
    batch = x.shape[: x.ndim - node.in_axes]
    size = math.prod(inner)
    flat = None if bias is None else jnp.reshape(bias, -1)
    return linear(x.reshape(*batch, size), kernel.reshape(size, -1), node, ctx, flat).reshape(*batch, *outer)
