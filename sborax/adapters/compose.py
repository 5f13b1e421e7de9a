"""Methods made of methods: sums, multiples, chains, and different methods on different layers of one stack."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractAdditive,
    AbstractComposite,
    AbstractMethod,
    AbstractReparametrisation,
    AbstractWeight,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Leaves,
    Rank,
    SboraxError,
    Weight,
    cast,
    dense,
    hyper,
    matmul,
)
from sborax.adapters.informed import blank_hint

TAKEN = frozenset({"a0", "b0", "scale"})
"""Frozen leaves of a method that rewrites the base: it took s a0 b0 out of it."""


def _key(key: Key[Array, ""] | None, part: int) -> Key[Array, ""] | None:
    return None if key is None else jax.random.fold_in(key, part)


def part_context(method: AbstractComposite, ctx: Context, part: int) -> Context:
    """The context of one part: its own memory, and in a sum its own dropout."""
    key = _key(ctx.key, part) if isinstance(method, Sum) else ctx.key
    return dataclasses.replace(ctx, key=key, memory=ctx.memory.get(str(part), {}))


def with_fields(method: AbstractMethod, **fields: Any) -> AbstractMethod:
    """A copy with other fields, made without the constructor: an adapter's method has no hyper-parameters to check."""
    changed = copy.copy(method)
    for name, value in fields.items():
        object.__setattr__(changed, name, value)
    return changed


def with_parts(adapter: Adapter, parts: Sequence[Adapter]) -> Adapter:
    """The adapter of a composite method with other parts, in the order of its `children`."""
    method = adapter.method
    if hasattr(method, "part"):
        names, fields = ["part"], {"part": parts[0].method}
    else:
        names, fields = [str(i) for i in range(len(parts))], {"parts": tuple(part.method for part in parts)}
    train = {**adapter.train, **{name: part.train for name, part in zip(names, parts, strict=True)}}
    frozen = {**adapter.frozen, **{name: part.frozen for name, part in zip(names, parts, strict=True)}}
    return Adapter(train, frozen, with_fields(method, **fields), adapter.in_axes)


def simple_parts(
    adapter: Adapter, layers: Sequence[int] | None = None
) -> Iterator[tuple[Adapter, Sequence[int] | None]]:
    """The adapters that a composite one is made of, down to those that are not composite, each with its layers.

    - layers: positions of the flattened stack that the adapter acts on; None for all.
    """
    if not isinstance(adapter.method, AbstractComposite):
        yield adapter, layers
        return
    for child, positions in adapter.method.children(adapter):
        yield from simple_parts(child, layers if positions is None else positions)


def taken(adapter: Adapter) -> list[tuple[Float[Array, "in r"], Float[Array, "r out"]]]:
    """What the parts of an additive adapter took out of the base, as pairs (s a0, b0)."""
    method = adapter.method
    if not method.rewrites_base:
        return []
    if isinstance(method, AbstractComposite):
        return [pair for child, _ in method.children(adapter) for pair in taken(child)]
    return [(adapter.frozen["scale"] * adapter.frozen["a0"], adapter.frozen["b0"])]


@dataclasses.dataclass(frozen=True)
class Sum(AbstractAdditive, AbstractComposite):
    """y = x W + sum_i delta_i(x): several methods on one kernel. Leaves nest under "0", "1", ..."""

    paper = "composition"
    rank = 1
    parts: tuple[AbstractAdditive, ...]

    @property
    def members(self) -> tuple[AbstractMethod, ...]:
        return self.parts

    @property
    def axes(self) -> Axes:
        return {str(i): part.axes for i, part in enumerate(self.parts)}

    @property
    def identity_at_init(self) -> bool:
        return all(part.identity_at_init for part in self.parts)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        train, frozen, base = {}, {}, None
        for i, part in enumerate(self.parts):
            fitted = part.init(jax.random.fold_in(key, i), weight if base is None else base, hint)
            train[str(i)], frozen[str(i)] = fitted.train, fitted.frozen
            base = base if fitted.weight is None else fitted.weight
        return Fitted(train, frozen, base)

    def children(self, adapter: Adapter) -> list[tuple[Adapter, tuple[int, ...] | None]]:
        return [
            (Adapter(adapter.train.get(str(i), {}), adapter.frozen.get(str(i), {}), part, adapter.in_axes), None)
            for i, part in enumerate(self.parts)
        ]

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        for i, (part, (child, _)) in enumerate(zip(self.parts, self.children(adapter), strict=True)):
            y = part.add_to(y, x, child, part_context(self, ctx, i))
        return y

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        for part, (child, _) in zip(self.parts, self.children(adapter), strict=True):
            weight = part.add_to_weight(weight, child)
        return weight


@dataclasses.dataclass(frozen=True)
class Scaled(AbstractAdditive, AbstractComposite):
    """y = x W + factor * delta(x): factor 1 is the part itself, factor 0 the base.

    Where the part took s a0 b0 out of the base, delta is the change since before that, so a share of it is put back:
    y = x W + factor * term(x) + rest * s (x a0) b0, rest = 1 - factor. Adapters without a leaf `rest` put nothing back.
    """

    paper = "composition"
    rank = 1
    part: AbstractAdditive
    factor: float = hyper(signed=True)

    @property
    def members(self) -> tuple[AbstractMethod, ...]:
        return (self.part,)

    @property
    def axes(self) -> Axes:
        return {"part": self.part.axes, "factor": (), "rest": ()}

    @property
    def identity_at_init(self) -> bool:
        return self.part.identity_at_init

    @property
    def summed(self) -> int:
        return self.part.summed * (2 if self.part.rewrites_base else 1)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fitted = self.part.init(key, weight, hint)
        frozen = {"part": fitted.frozen, **self.multipliers(self.factor, ())}
        return Fitted({"part": fitted.train}, frozen, fitted.weight)

    def multipliers(self, factor: float | Array, stack: tuple[int, ...]) -> Leaves:
        """The frozen leaves beside those of the part."""
        factor = jnp.full(stack, factor, jnp.float32)
        return {"factor": factor, **({"rest": 1.0 - factor} if self.part.rewrites_base else {})}

    def children(self, adapter: Adapter) -> list[tuple[Adapter, tuple[int, ...] | None]]:
        return [
            (Adapter(adapter.train.get("part", {}), adapter.frozen.get("part", {}), self.part, adapter.in_axes), None)
        ]

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        ((child, _),) = self.children(adapter)
        y = y + cast(adapter.frozen["factor"], y) * self.part.add_to(
            jnp.zeros_like(y), x, child, part_context(self, ctx, 0)
        )
        for a, b in self._put_back(adapter):
            y = y + (x @ cast(a, x)) @ cast(b, x)
        return y

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        ((child, _),) = self.children(adapter)
        weight = weight + adapter.frozen["factor"] * self.part.add_to_weight(jnp.zeros_like(weight), child)
        for a, b in self._put_back(adapter):
            weight = weight + jnp.matmul(a, b, precision="highest")
        return weight

    def _put_back(self, adapter: Adapter) -> list[tuple[Array, Array]]:
        ((child, _),) = self.children(adapter)
        return [(adapter.frozen["rest"] * a, b) for a, b in taken(child)] if "rest" in adapter.frozen else []


@dataclasses.dataclass(frozen=True)
class Chain(AbstractMethod):
    """The factors that `first` initialises, trained as `second` does. One adapter has the leaves of both."""

    paper = "composition"
    first: AbstractMethod
    second: AbstractReparametrisation

    def __post_init__(self) -> None:
        if self.first.linked:
            raise SboraxError(f"chain: {type(self.first).__name__} links layers, which its second link would not see")
        if self.first.no_merge:
            raise SboraxError(f"chain: {type(self.first).__name__} is no starting point: {self.first.no_merge}")
        missing = sorted((self.second.factors_trained | self.second.factors_frozen) - set(self.first.axes))
        if missing:
            raise SboraxError(f"chain: {type(self.first).__name__} has no leaf {missing[0]!r} to stand on")

    @property
    def axes(self) -> Axes:
        return {**self.second.axes, **self.first.axes}

    @property
    def rank(self) -> Rank:
        return self.first.rank

    @property
    def rewrites_base(self) -> bool:
        return self.first.rewrites_base

    @property
    def base_leaves(self) -> Mapping[str, Callable[[Weight, Leaves], Array]]:  # type: ignore[override]
        return {**self.first.base_leaves, **self.second.base_leaves}

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs

    @property
    def of_quantised(self) -> str:
        return self.first.of_quantised

    @property
    def approximates(self) -> str:
        return self.second.approximates

    @property
    def ragged(self) -> bool:
        return self.first.ragged and self.second.ragged

    @property
    def sends(self) -> str:
        return self.second.sends

    @property
    def group_b(self) -> frozenset[str]:
        return self.first.group_b | self.second.group_b

    @property
    def adapts_bias(self) -> bool:
        return self.second.adapts_bias

    def check(self, shape: tuple[int, int]) -> None:
        self.first.check(shape)
        self._check_fields()
        self._check_leaves(shape)

    def _check_fields(self) -> None:
        """Raise SboraxError for a field of the second link that has no effect, since the first makes the factors."""
        first, second = type(self.first).__name__, type(self.second).__name__
        for field in dataclasses.fields(self.second):  # type: ignore[arg-type]
            value, of_first = getattr(self.second, field.name), getattr(self.first, field.name, None)
            if value not in (field.default, of_first):
                raise SboraxError(
                    f"chain: {second}'s {field.name}={value} would not be used, since {first} makes the factors; "
                    f"set it on {first} and leave it out of {second}"
                )

    def _check_leaves(self, shape: tuple[int, int]) -> None:
        """Raise SboraxError for a leaf of the first link that the second does not know."""

        def make(key: Key[Array, ""], weight: Array) -> tuple[Leaves, Leaves]:
            return self.first.init(key, weight, blank_hint(self.first, shape))[:2]

        weight = jax.ShapeDtypeStruct(shape, jnp.float32)
        train, frozen = jax.eval_shape(make, jax.random.key(0), weight)
        allowed = self.second.factors_frozen | {"dropout", *(TAKEN if self.first.rewrites_base else ())}
        stray = sorted((set(train) ^ self.second.factors_trained) | (set(frozen) - allowed))
        if stray:
            first, second = type(self.first).__name__, type(self.second).__name__
            if stray[0] in self.second.factors_trained:
                raise SboraxError(f"chain: {second} trains {stray[0]!r}, which {first} keeps frozen")
            raise SboraxError(f"chain: {second} would ignore {stray[0]!r}, with which {first} computes or trains")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fitted = self.first.init(key, weight, hint)
        if fitted.weight is None:
            return self.second.refit(weight, fitted)
        # The second link must see the base that will be kept: quantised again, if it was.
        base = weight.encode(fitted.weight) if isinstance(weight, AbstractWeight) else fitted.weight
        return self.second.refit(base, fitted)

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return self.second.apply(x, weight, adapter, ctx)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        return self.second.merge(weight, adapter)

    def merge_bias(self, bias: Float[Array, " out"], weight: Weight, adapter: Adapter) -> Float[Array, " out"]:
        return self.second.merge_bias(bias, weight, adapter)


@dataclasses.dataclass(frozen=True)
class ByLayer(AbstractComposite):
    """Different methods, or none, on different layers of one stack.

    The leaf `frozen["branch"]` selects the part at run time; branch 0 is the base projection, bit for bit.

    - parts: the methods.
    - layers: for each part, the positions of the stack that it acts on.
    """

    paper = "composition"
    rank = 1
    parts: tuple[AbstractMethod, ...]
    layers: tuple[tuple[int, ...], ...]

    @property
    def members(self) -> tuple[AbstractMethod, ...]:
        return self.parts

    @property
    def axes(self) -> Axes:
        return {"branch": (), **{str(i): part.axes for i, part in enumerate(self.parts)}}

    @property
    def identity_at_init(self) -> bool:
        return all(part.identity_at_init for part in self.parts)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        branches = np.zeros(1 + max(map(max, self.layers)), np.int32)
        for i, positions in enumerate(self.layers):
            branches[list(positions)] = i + 1
        # Layers after the last covered one have branch 0, too.
        branch = jnp.asarray(branches).at[hint.layer].get(mode="fill", fill_value=0)
        train: Leaves = {}
        frozen: Leaves = {"branch": branch}
        # Only a part that rewrites the weight sees it as it is now; the others see it as it will be stored.
        base, stored = None, weight.stored() if isinstance(weight, AbstractWeight) else weight
        for i, part in enumerate(self.parts):
            fitted = part.init(key, weight if part.rewrites_base else stored, hint)
            train[str(i)], frozen[str(i)] = fitted.train, fitted.frozen
            if fitted.weight is not None:
                original = dense(weight).astype(fitted.weight.dtype) if base is None else base
                base = jnp.where(branch == i + 1, fitted.weight, original)
        return Fitted(train, frozen, base)

    def children(self, adapter: Adapter) -> list[tuple[Adapter, tuple[int, ...] | None]]:
        # The method of an adapter that is read from a file was not constructed.
        if len(self.parts) != len(self.layers):
            raise SboraxError(f"ByLayer: {len(self.parts)} methods, and positions of layers for {len(self.layers)}")
        return [
            (Adapter(adapter.train.get(str(i), {}), adapter.frozen.get(str(i), {}), part, adapter.in_axes), positions)
            for i, (part, positions) in enumerate(zip(self.parts, self.layers, strict=True))
        ]

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        def adapted(part: int, child: Adapter):
            return lambda: child.method.apply(x, weight, child, part_context(self, ctx, part))

        parts = (adapted(i, child) for i, (child, _) in enumerate(self.children(adapter)))
        branches = [lambda: matmul(x, weight), *parts]
        return jax.lax.switch(adapter.frozen["branch"], branches)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        def merged(child: Adapter):
            return lambda: child.method.merge(weight, child)

        branches = [
            lambda: dense(weight).astype(jnp.float32),
            *(merged(child) for child, _ in self.children(adapter)),
        ]
        return jax.lax.switch(adapter.frozen["branch"], branches)

    def merge_bias(self, bias: Float[Array, " out"], weight: Weight, adapter: Adapter) -> Float[Array, " out"]:
        def merged(child: Adapter):
            return lambda: child.method.merge_bias(bias, weight, child)

        branches = [lambda: bias.astype(jnp.float32), *(merged(child) for child, _ in self.children(adapter))]
        return jax.lax.switch(adapter.frozen["branch"], branches)


def chain(first: AbstractMethod, second: AbstractMethod) -> Chain:
    """The factors that `first` initialises, trained as `second` does: `chain(PiSSA(...), DoRA(...))`.

    Args:
    - first: a method that trains two factors, such as LoRA, PiSSA or OLoRA. Its options apply to them.
    - second: a method that can take over the factors of another one, such as DoRA.

    Raises SboraxError if `second` cannot take over the leaves of `first`.
    """
    if not isinstance(second, AbstractReparametrisation):
        raise SboraxError(f"chain: {type(second).__name__} cannot stand on another method's factors")
    return Chain(first, second)
