"""Adapters inside NNX models that are not ours."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sborax.adapters.core import Adapter, Context, SboraxError
from sborax.adapters.leaves import nest
from sborax.adapters.tree import Adapters, merge_bias, merged_node, nodes, stack_of
from sborax.models.linen import are_last, check_deterministic, check_independent, project


class Trained(nnx.Variable):
    """A trained leaf of an adapter: `nnx.Optimizer(model, tx, wrt=sx.Trained)`."""


class Constant(nnx.Variable):
    """A leaf of an adapter that is not trained."""


def adapt_nnx(model: nnx.Module, adapters: Adapters, rngs: nnx.Rngs | None = None) -> Any:
    """A copy of an NNX model whose projections have adapters.

    Equal to the model with the kernels of `merge(params, adapters)`, gradients as of `linear` (DoRA takes its norms as
    constants), without forming merged weights in `Linear` and `LinearGeneral`. Other modules compute with the merged
    kernel. Layers stacked by `nnx.vmap` along the first axis are adapted one by one under `nnx.scan`. Code that reads a
    kernel without its module, such as a tied head, gets the one of the base.

        graph, state = nnx.split(model)
        params, adapters = sx.attach(key, nnx.to_pure_dict(state), [("hidden", sx.LoRA(rank=8))])
        adapted = sx.adapt_nnx(model, adapters)
        optimizer = nnx.Optimizer(adapted, optax.adam(1e-3), wrt=sx.Trained)

    - model: its kernels are the base. If `attach` rewrote the base, replace the kernels first.
    - adapters: by the paths of the kernels, as `attach` returns them.
    - rngs: keys of the adapters' dropout, from the stream "dropout". They drop after `model.train()`, the default, and
      not after `model.eval()`, also where it was called before. Without `rngs` they never drop.

    Raises SboraxError for an adapter without a module, for a module that has an adapter or shares its kernel with
    another one, for routers and banks, and for methods that link layers or act from some tokens on. A call raises it
    for dropout in a module that computes with the merged kernel.
    """
    model, flat = nnx.clone(model), nodes(adapters)
    check_independent(flat)
    modules: dict[str, Any] = {
        "/".join(map(str, (*path, "kernel"))): module for path, module in nnx.iter_modules(model)
    }
    # An attribute of `nnx.Dropout`, which `train` and `eval` set.
    flags = [module.deterministic for module in modules.values() if hasattr(module, "deterministic")]
    deterministic = bool(flags) and all(flags)
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        owners.setdefault(id(getattr(module, "kernel", None)), []).append(path)
    for path, node in flat.items():
        if path not in modules:
            raise SboraxError(f"{path}: the model has no module with this kernel")
        module = modules[path]
        if hasattr(module, "adapter_method"):
            raise SboraxError(f"{path}: has an adapter; adapt the model with the sum of both, sx.add(first, second)")
        others = [other for other in owners[id(module.kernel)] if other != path]
        if others:
            raise SboraxError(f"{path}: is also the kernel of {others[0]}; give each module a kernel of its own")
        if not hasattr(module, "deterministic"):
            module.deterministic = deterministic
        _equip(module, node, rngs)
    return model


def adapters_nnx(model: nnx.Module) -> Adapters:
    """The adapters of a model that `adapt_nnx` made, as they are trained so far."""
    modules = ((path, module) for path, module in nnx.iter_modules(model) if hasattr(module, "adapter_method"))
    return nest({"/".join(map(str, (*path, "kernel"))): _adapter(module) for path, module in modules})


def _equip(module: Any, node: Adapter, rngs: nnx.Rngs | None) -> None:
    module.adapter_train = nnx.data(jax.tree.map(Trained, node.train))
    module.adapter_frozen = nnx.data(jax.tree.map(Constant, node.frozen))
    module.adapter_method, module.adapter_in_axes = node.method, node.in_axes
    module.adapter_rngs = nnx.data(None if rngs is None else _stream(rngs, stack_of(node)))
    # Only the class changes, so that paths and names of parameters stay.
    module.__class__ = _adapted(type(module))


def _stream(rngs: nnx.Rngs, stack: tuple[int, ...]) -> nnx.RngStream:
    """A stream of dropout keys, or one for each layer of a stack."""
    stream = rngs["dropout"].fork()
    if stack:
        stream = stream.split(stack)
        stream.count[...] = jnp.zeros(stack, jnp.uint32)
    return stream


def _adapter(module: Any) -> Adapter:
    """The adapter of an adapted module, as arrays."""
    train, frozen = (
        jax.tree.map(lambda leaf: leaf[...], leaves, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        for leaves in (module.adapter_train, module.adapter_frozen)
    )
    return Adapter(train, frozen, module.adapter_method, module.adapter_in_axes)


@functools.cache
def _adapted(kind: type) -> type:
    """The class of an adapted module of this kind.

    An instance of `kind` can become one of it, because it has no other base and adds no slots.
    """

    def call(self: Any, inputs: Float[Array, "..."], *args: Any, **options: Any) -> Float[Array, "..."]:
        node, kernel, bias = _adapter(self), self.kernel, getattr(self, "bias", None)
        stream: nnx.RngStream | None = None if self.deterministic else self.adapter_rngs
        plain = kind in (nnx.Linear, nnx.LinearGeneral) and _is_plain_product(self, inputs, node)
        if plain and not args and all(option is None for option in options.values()):
            arrays = inputs, kernel[...], None if bias is None else bias[...]
            x, weight, offset = self.promote_dtype(arrays, dtype=self.dtype)
            return project(x, weight, offset, node, Context(None if stream is None else stream()))
        if stream is not None:
            check_deterministic(kind.__name__, node)
        self.kernel = nnx.Param(merged_node(kernel[...], node))
        if bias is not None and node.method.adapts_bias:
            self.bias = nnx.Param(merge_bias("bias", bias[...], kernel[...], node).astype(bias[...].dtype))
        try:
            return kind.__call__(self, inputs, *args, **options)
        finally:
            self.kernel = kernel
            if bias is not None:
                self.bias = bias

    return type(f"Adapted{kind.__name__}", (kind,), {"__call__": call})


def _is_plain_product(module: nnx.Linear | nnx.LinearGeneral, x: Any, node: Adapter) -> bool:
    """Whether a module multiplies the last axes of `x` by a single kernel."""
    return (
        module.dot_general in (None, jax.lax.dot_general)
        and getattr(module, "dot_general_cls", None) is None
        and module.precision is None
        and module.preferred_element_type is None
        and not getattr(module, "batch_axis", ())
        and are_last(getattr(module, "axis", -1), node.in_axes, x.ndim)
    )
