"""Gradients of a model's un-adapted weights, and statistics of their inputs, for initialisations that need them."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.compose import ByLayer
from sborax.adapters.core import AbstractMethod, Hint, SboraxError, dense
from sborax.adapters.informed import AbstractInformed, Gathered, Inputs, Place, informed
from sborax.adapters.leaves import replace_leaves
from sborax.adapters.paths import Site, kernels, module_path
from sborax.adapters.tree import Params


def gradient_hints(
    loss: Callable[[Params, Any], Float[Array, ""]],
    params: Params,
    patterns: str | Iterable[str],
    batches: Iterable[Any],
) -> dict[str, Hint]:
    """The mean of dL/dW over `batches`, a `Hint(grad=...)` by path, for the `hints` of `attach`.

    Kernels, which may be whole stacks of layers, are differentiated one at a time: the device holds one gradient at
    once, and the means are NumPy arrays in float32. A quantised kernel is differentiated at its dense value.

    Args:
    - loss: `(params, batch) -> scalar`, the loss of the un-adapted model. It is jitted.
    - params: the parameters of the un-adapted model.
    - patterns: regular expressions; kernels whose module path one of them matches get a hint, as in rules.
    - batches: a few batches, which all weigh the same. Each is used once per kernel, so they are held in a list.

    Raises SboraxError for no match, no batch, and a gradient that is not finite.
    """
    patterns, batches = [patterns] if isinstance(patterns, str) else list(patterns), list(batches)
    paths = [path for path in kernels(params) if any(re.search(pattern, module_path(path)[0]) for pattern in patterns)]
    if not paths:
        raise SboraxError(f"no kernel matches {patterns}; the kernels are {', '.join(kernels(params)) or 'none'}")
    if not batches:
        raise SboraxError("gradient_hints needs at least one batch")
    return {path.removesuffix("/kernel"): Hint(grad=_mean(loss, params, path, batches)) for path in paths}


def _mean(loss: Callable[..., Any], params: Params, path: str, batches: list[Any]) -> Float[np.ndarray, "..."]:
    def of_kernel(weight: Array, params: Params, batch: Any) -> Float[Array, ""]:
        return loss(replace_leaves(params, {path: weight}), batch)

    weight = dense(kernels(params)[path])
    gradient = jax.jit(jax.grad(of_kernel))
    total = np.zeros(weight.shape, np.float32)
    for batch in batches:
        total += np.asarray(gradient(weight, params, batch).astype(jnp.float32))
    if not np.isfinite(total).all():
        raise SboraxError(f"{path}: its gradient is not finite; check the loss and the batches")
    return total / np.float32(len(batches))


Observe = Callable[[Collection[str]], Sequence[Callable[[], Inputs]]]
"""Given paths of kernels: for every batch, a function that computes the inputs of these kernels."""


def is_joint(site: Site) -> bool:
    """Whether statistics of a site's inputs are compared with those of other sites."""
    return any(method.joint for method in _informed(site, 0) + _informed(site, math.prod(site.stack) - 1))


def statistics(sites: Sequence[Site], observe: Observe) -> dict[str, Hint]:
    """What the methods of some sites make of the inputs of their weights: a `Hint` by path, without `/kernel`.

    Args:
    - sites: in the order of the model.
    - observe: gives the inputs.

    Raises SboraxError as the methods' `gather` does.
    """
    classes: dict[type[AbstractInformed], dict[Place, AbstractInformed]] = {}
    for position, site in _weights(sites):
        for method in _informed(site, position):
            classes.setdefault(type(method), {})[site.path, position] = method
    gathered: dict[Place, list[Gathered]] = {}
    for kind, methods in classes.items():
        paths = dict.fromkeys(path for path, _ in methods)
        for group in [list(paths)] if kind.joint else [[path] for path in paths]:
            of_group = {place: method for place, method in methods.items() if place[0] in group}
            for place, result in kind.gather(of_group, observe(group)).items():
                gathered.setdefault(place, []).append(result)
    return {site.path.removesuffix("/kernel"): _stacked(site, gathered) for site in sites}


def _weights(sites: Sequence[Site]) -> list[tuple[int, Site]]:
    """Every weight as (position, site): layer after layer, and in a layer in the order of the sites."""
    weights = [(position, site) for site in sites for position in range(math.prod(site.stack))]
    return sorted(weights, key=lambda weight: weight[1].layers[weight[0]])


def _informed(site: Site, position: int) -> list[AbstractInformed]:
    """The methods of one weight that start from its inputs."""
    parts: list[AbstractMethod] = [site.method]
    if isinstance(site.method, ByLayer):
        by_part = zip(site.method.parts, site.method.layers, strict=True)
        parts = [part for part, positions in by_part if position in positions]
    return [method for part in parts for method in informed(part)]


def _stacked(site: Site, gathered: Mapping[Place, Sequence[Gathered]]) -> Hint:
    """The statistics of a site's weights, stacked. Weights without have zeros."""
    by_position = [gathered.get((site.path, position), ()) for position in range(math.prod(site.stack))]
    leaves = [{name: leaf for result in of_weight for name, leaf in result.inputs.items()} for of_weight in by_position]
    shapes = {name: np.shape(leaf) for of_weight in leaves for name, leaf in of_weight.items()}
    inputs = {}
    for name, shape in shapes.items():
        filled = [np.asarray(of_weight.get(name, np.zeros(shape)), np.float32) for of_weight in leaves]
        inputs[name] = np.stack(filled).reshape(*site.stack, *shape)
    ranks = [next((result.rank for result in of_weight if result.rank is not None), 0) for of_weight in by_position]
    has_ranks = any(result.rank is not None for of_weight in by_position for result in of_weight)
    return Hint(inputs=inputs, ranks=tuple(ranks) if has_ranks else None)
