"""Routers: once per sequence, a router decides how much of each adapter of its layer is used.

A router is an adapter without a kernel. Its path is that of its layer, `layers/router`, so it is split, saved, counted
and vmapped like every other adapter. The model calls it once per layer and passes its weights on in a `Context`.
"""

import abc
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from sborax.adapters.bank import banked_parts
from sborax.adapters.core import AbstractComposite, AbstractKernelless, AbstractMethod, Adapter, SboraxError
from sborax.adapters.invocation import invoked_parts

ROUTER = "router"
"""Name of a layer's router among its modules."""
GATE = "gate"
"""The name in `Context.rows` of a projection's weight, (batch,). Without a router it is absent, and the weight is 1."""


class AbstractRouter(AbstractKernelless):
    """Weighs the adapters of one layer, its experts. `init` gets zeros of shape (width of the layer, experts)."""

    no_merge = "it weighs the adapters of its layer anew for every prompt"

    experts: tuple[str, ...]
    """Paths of the projections that it weighs, relative to its layer."""

    @abc.abstractmethod
    def route(
        self, x: Float[Array, "batch seq d"], prompt: Bool[Array, "batch seq"], adapter: Adapter
    ) -> tuple[Float[Array, "batch experts"], Float[Array, ""]]:
        """The weight of every expert, and a loss per token that keeps the experts in balance.

        - x: the layer's input.
        - prompt: marks the tokens that the router may read.
        """


class AbstractRouted(AbstractMethod):
    """A method whose adapters are the experts of a router. Those of one layer share a router.

    An expert reads its weight from `ctx.rows[GATE]`. An expert alone in its layer has no router, and a weight of 1.
    """

    @abc.abstractmethod
    def router(self, experts: tuple[str, ...]) -> AbstractRouter:
        """The router of a layer with these experts. Methods may share a layer if their routers are equal."""


def routed_parts(method: AbstractMethod) -> tuple[AbstractRouted, ...]:
    """The routed methods among `method` and its parts."""
    if isinstance(method, AbstractComposite):
        return tuple(part for member in method.members for part in routed_parts(member))
    return (method,) if isinstance(method, AbstractRouted) else ()


def selective(method: AbstractMethod) -> bool:
    """Whether an adapter may get no gradient in a step.

    It gets none if no sequence selects it or has its tokens, or if what it multiplies in a bank of its kind is zero.
    The gradient of the bank then shows whether the model reads its kernels.
    """
    rests = any(part.bank_of_kind for part in banked_parts(method))
    return isinstance(method, AbstractRouter) or rests or bool(routed_parts(method) or invoked_parts(method))


class Expert(NamedTuple):
    """A planned projection: its method, the axis of layers of its kernel, if any, and whether all of it is adapted."""

    method: AbstractMethod
    stack: tuple[int, ...]
    everywhere: bool


class Placed(NamedTuple):
    """A planned router."""

    path: str
    method: AbstractRouter
    stack: tuple[int, ...]
    shape: tuple[int, int]


def layer_of(path: str, layers: str) -> str:
    """`layers/3/mlp/up_proj/kernel` -> `layers/3`, and `layers/mlp/...` -> `layers`. Elsewhere the path itself."""
    parts = path.split("/")
    if layers not in parts:
        return path
    end = parts.index(layers) + 1
    return "/".join(parts[: end + parts[end].isdecimal()])


def routers(planned: Mapping[str, Expert], widths: Mapping[str, int], layers: str) -> list[Placed]:
    """A router for every layer with two or more experts.

    Its width is the most frequent input size among the kernels of the layer: most kernels read the residual stream.

    - planned: projections by the path of their kernel.
    - widths: the input size of every kernel, by path.
    - layers: the name of the module that layers are under.

    Raises SboraxError for experts of one layer with different routers, or that are not in every layer of a stack.
    """
    by_layer: dict[str, list[str]] = {}
    for path, expert in planned.items():
        if routed_parts(expert.method):
            by_layer.setdefault(layer_of(path, layers), []).append(path)
    placed = []
    for layer, paths in by_layer.items():
        if len(paths) == 1:
            continue
        names = tuple(path.removeprefix(f"{layer}/").removesuffix("/kernel") for path in paths)
        parts = [part for path in paths for part in routed_parts(planned[path].method)]
        method, stack = parts[0].router(names), planned[paths[0]].stack
        if any(part.router(names) != method for part in parts):
            raise SboraxError(
                f"{layer}: its experts disagree about the router; give one method the same options in all"
            )
        for path in paths:
            if not planned[path].everywhere or planned[path].stack != stack:
                raise SboraxError(
                    f"{path}: one router stands for all layers of a stack, so that {type(parts[0]).__name__} cannot be "
                    "in some of them; drop `layers=`, or load the model with scan=False"
                )
        read = Counter(width for path, width in widths.items() if path.startswith(f"{layer}/"))
        (width, votes), *rivals = read.most_common(2)
        if rivals and rivals[0][1] == votes:
            raise SboraxError(f"{layer}: as many kernels read {width} as {rivals[0][0]} features: its width is unclear")
        shape = (width, len(names))
        try:
            method.check(shape)
        except SboraxError as error:
            raise SboraxError(f"{layer}/{ROUTER} {shape}: {error}") from None
        placed.append(Placed(f"{layer}/{ROUTER}", method, stack, shape))
    return placed
