"""Arrow: trained adapters of one base, mixed for every token by its input, without training."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key

from sborax.adapters.arithmetic import by_layer, joined
from sborax.adapters.compose import Scaled, Sum, part_context
from sborax.adapters.constraints import replicate
from sborax.adapters.core import (
    AbstractAdditive,
    AbstractComposite,
    AbstractFactored,
    AbstractKernelless,
    AbstractMethod,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    cast,
    hyper,
    pair_of,
    structure,
)
from sborax.adapters.depth import over_stack, stack_of
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.linalg import qr, svd
from sborax.adapters.tables import TABLE, leaf_of
from sborax.adapters.tree import Adapters, Params, link, nodes, tree_of

_NO_START = "Arrow mixes adapters that are trained; attach and train each of them, then give them to sx.arrow"


TIE = 1e-5
"""Two leading singular values count as equal if they differ by less than this share. Rounding alone makes < 1e-6."""


@dataclasses.dataclass(frozen=True)
class Arrow(AbstractAdditive, AbstractComposite):
    """y = x W + sum_i c_i(x) delta_i(x), c = softmax(|P x| / temperature) over the top_k entries, 0 elsewhere.

    Row i of P is the prototype of part i: the unit direction of x that delta_i stretches most. `arrow` makes it.

    parts: the methods of the parts, whose leaves nest under "0", "1", ...
    top_k: how many parts a token uses.
    """

    paper = "Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv:2405.11157"
    rank = 1
    parts: tuple[AbstractAdditive, ...]
    top_k: int
    temperature: float = hyper(1.0, above=0.0)

    @property
    def members(self) -> tuple[AbstractMethod, ...]:
        return self.parts

    @property
    def no_merge(self) -> str:
        return "it mixes its parts anew for every token"

    @property
    def axes(self) -> Axes:
        parts = {str(i): part.axes for i, part in enumerate(self.parts)}
        return {"prototypes": (None, "in"), "temperature": (), **parts}

    @property
    def summed(self) -> int:
        return len(self.parts) + sum(part.summed for part in self.parts)

    def check(self, shape: tuple[int, int]) -> None:
        raise SboraxError(_NO_START)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        raise SboraxError(_NO_START)

    def children(self, adapter: Adapter) -> list[tuple[Adapter, tuple[int, ...] | None]]:
        return [
            (Adapter(adapter.train.get(str(i), {}), adapter.frozen.get(str(i), {}), part, adapter.in_axes), None)
            for i, part in enumerate(self.parts)
        ]

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        shares = cast(_shares(x, adapter.frozen["prototypes"], self.top_k, adapter.frozen["temperature"]), x)
        for i, (part, (child, _)) in enumerate(zip(self.parts, self.children(adapter), strict=True)):
            share, of_part = shares[:, i : i + 1], part_context(self, ctx, i)
            if part.draws and of_part.key is not None:
                # What is drawn need not be linear in x.
                y = y + share * part.add_to(jnp.zeros_like(y), x, child, of_part)
            else:
                # A part is linear in x, so its share may go to its input: its output is added without a copy.
                y = part.add_to(y, share * x, child, of_part)
        return y

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        raise SboraxError(f"Arrow cannot be merged: {self.no_merge}")


def _shares(
    x: Float[Array, "tokens in"], prototypes: Float[Array, "parts in"], top_k: int, temperature: Float[Array, ""]
) -> Float[Array, "tokens parts"]:
    """The share of every part in each token's change, float32. The sign of a prototype does not matter."""
    similarity = jnp.abs(jnp.matmul(x.astype(jnp.float32), prototypes.T, precision="highest"))
    largest, indices = jax.lax.top_k(similarity, top_k)
    shares = jax.nn.softmax(largest / temperature, axis=-1)
    return jnp.sum(jax.nn.one_hot(indices, prototypes.shape[0]) * shares[..., None], axis=-2)


def arrow(
    params: Params,
    adapters: Sequence[Adapters],
    top_k: int = 3,
    temperature: float = 1.0,
    general: Sequence[Adapters] = (),
) -> Adapters:
    """One tree of several trained adapters, mixed token by token: Arrow routing (arXiv:2405.11157). Nothing is trained.

    y = x W + sum_i c_i(x) delta_i(x). The prototype p_i of a kernel is the input direction that delta_i stretches most,
    its top singular vector on the side of the input, without the scale. c is a softmax of |x . p_i| / temperature over
    the `top_k` largest; the others are 0. x is the input of the kernel as it is, not normed.

        adapters = [sx.load_peft(place, model)[1] for place in ("one", "two", "three")]
        mixed = sx.arrow(model.params, adapters, top_k=2)
        logits = model.apply(model.params, mixed, tokens)

    This is PEFT's `create_arrow_model`, except that prototypes are exact and ranks may differ. PEFT takes one rank, and
    finds prototypes by 15 steps of a power iteration from a random vector. Its error is about (s_2 / s_1)^30, where s_1
    and s_2 are the largest singular values of the change, so the two agree if s_1 leads clearly.

    With `general` adapters, general knowledge is subtracted first (GenKnowSub, arXiv:2505.10939). The paper subtracts
    LoRAs; PEFT subtracts factors, and so does this function: the mean a of the general adapters from each a, and their
    mean b from each b. The result is not the difference of the changes. Scales of the general adapters are not used.

    Args:
    - params: the base that the adapters were trained on.
    - adapters: trees of adapters of the same kernels. Any additive method with a merged form that leaves the base as it
      is, such as LoRA, SBoRA, Bone, and sums and multiples of them.
    - top_k: how many adapters a token uses. Default 3, as PEFT.
    - temperature: default 1, as PEFT. Low values give a token to one adapter, high ones to all `top_k` equally.
    - general: adapters to subtract. Then all are LoRAs, or other pairs of factors, of one rank. Default: none.

    The result has no merged form. Its trained leaves are those of the adapters; training them leaves prototypes as they
    are.

    Raises SboraxError for no adapters, for options out of bounds, and for adapters that cannot be mixed. Among them are
    those whose two largest singular values are equal, since they have no prototype: rounding would choose among a plane
    of directions. C3A's circulant changes mostly have their singular values in pairs.
    """
    for tree in (*adapters, *general):
        tree_of(tree, "arrow")
    if not adapters:
        raise SboraxError("arrow: there is nothing to mix; give a list of trees of adapters")
    if type(top_k) is not int or not 1 <= top_k <= len(adapters):
        raise SboraxError(f"top_k={top_k} must be a whole number in 1..{len(adapters)}, the number of adapters")
    if not temperature > 0.0:
        raise SboraxError(f"temperature must be above 0, got {temperature}")
    leaves, trees = flatten(params), [nodes(link(tree)) for tree in (*adapters, *general)]
    mixed = {}
    for path in dict.fromkeys(path for tree in trees for path in tree):
        if any(path not in tree for tree in trees):
            raise SboraxError(f"{path}: only some of the adapters adapt it; a token chooses among all of them")
        mixed[path] = _mixed(path, [tree[path] for tree in trees], len(adapters), leaves, top_k, temperature)
    return nest(mixed)


def _mixed(
    path: str, adapters: Sequence[Adapter], count: int, leaves: dict[str, Weight], top_k: int, temperature: float
) -> Adapter:
    """The adapter of one kernel. adapters: those to mix, `count` of them, and those to subtract from them."""
    for node in adapters:
        _check(path, node, leaves)
    stack, in_axes = stack_of(adapters[0]), adapters[0].in_axes
    sizes = leaves[path].shape[len(stack) :]
    shape = math.prod(sizes[:in_axes]), math.prod(sizes[in_axes:])

    def of_layers(nodes: Sequence[Adapter]) -> Adapter:
        parts = _subtracted(path, nodes[:count], nodes[count:]) if len(nodes) > count else list(nodes)
        method = Arrow(tuple(part.method for part in parts), top_k, temperature)  # type: ignore[arg-type]
        train, frozen = ({str(i): getattr(part, half) for i, part in enumerate(parts)} for half in ("train", "frozen"))
        frozen["prototypes"], unique = _prototypes(tuple(parts), shape, stack)
        for part, leads in zip(parts, jnp.moveaxis(unique, -1, 0), strict=True):
            if not isinstance(leads, Tracer) and not bool(jnp.all(leads)):
                raise SboraxError(
                    f"{path}: {type(part.method).__name__} stretches two directions alike, so that neither is its "
                    "prototype; leave that adapter out"
                )
        frozen["temperature"] = jnp.full(stack, temperature, jnp.float32)
        return Adapter(train, frozen, structure(method), in_axes)

    groups: dict[tuple[int, ...], list[int]] = {}
    parts = [[(child, layers) for child, layers in by_layer(node)] for node in adapters]
    if all(layers is None for ((_, layers), *_) in parts):
        return of_layers(adapters)
    for layer in range(math.prod(stack)):
        acting = [
            [i for i, (_, layers) in enumerate(children) if layers is None or layer in layers] for children in parts
        ]
        if all(acting):
            groups.setdefault(tuple(i for (i,) in acting), []).append(layer)
        elif any(acting):
            raise SboraxError(f"{path}: only some of the adapters adapt layer {layer}; a token chooses among all")
    mixed = [of_layers([children[i][0] for children, i in zip(parts, numbers, strict=True)]) for numbers in groups]
    return joined(mixed, [tuple(layers) for layers in groups.values()], stack)


def _check(path: str, node: Adapter, leaves: dict[str, Weight]) -> None:
    """Raise SboraxError for an adapter that cannot be mixed with others."""
    if isinstance(node.method, AbstractKernelless) or leaf_of(path, leaves) == TABLE:
        reason = "weighs other adapters" if isinstance(node.method, AbstractKernelless) else "is of the table of tokens"
        raise SboraxError(f"{path}: this adapter {reason}, and only those of projections can be mixed by token")
    if path not in leaves:
        raise SboraxError(f"{path}: there is an adapter but no kernel at this path")
    for child, _ in by_layer(node):
        method = child.method
        name = type(method).__name__
        if not isinstance(method, AbstractAdditive):
            raise SboraxError(f"{path}: {name} rewrites the weight as a whole; only what is added to it can be mixed")
        if method.no_merge or method.linked:
            raise SboraxError(f"{path}: {name} has no single change of the weight: {method.no_merge or 'links layers'}")
        if method.rewrites_base:
            raise SboraxError(
                f"{path}: {name} took its start out of the base, which the other adapters need; write it by "
                "save_peft(as_='lora'), and load that LoRA"
            )


def _subtracted(path: str, adapters: Sequence[Adapter], general: Sequence[Adapter]) -> list[Adapter]:
    """The adapters minus the mean of the general ones, separately for a and b, as these act: without masks."""
    first = adapters[0]
    for node in (*adapters, *general):
        method, sizes = node.method, {name: leaf.shape for name, leaf in node.train.items()}
        if not (isinstance(method, AbstractFactored) and method.pair and {"a", "b"} <= sizes.keys()):
            raise SboraxError(
                f"{path}: {type(method).__name__} is more than a pair of factors, and general needs pairs"
            )
        if sizes["a"] != first.train["a"].shape or method.rank != first.method.rank:
            ranks = " and ".join(str(rank) for rank in (first.method.rank, method.rank))
            raise SboraxError(f"{path}: ranks {ranks}; general subtracts factors, so that all must have one rank")

    a, b = (
        jnp.mean(jnp.stack(factors), axis=0) for factors in zip(*(pair_of(node)[1:] for node in general), strict=True)
    )

    def subtracted(node: Adapter) -> Adapter:
        assert isinstance(node.method, AbstractFactored)
        pair, masks = pair_of(node), node.method.masks.values()
        frozen = {name: leaf for name, leaf in node.frozen.items() if name not in masks}
        return dataclasses.replace(node, train={**node.train, "a": pair.a - a, "b": pair.b - b}, frozen=frozen)

    return [subtracted(node) for node in adapters]


@functools.partial(jax.jit, static_argnames=("shape", "stack"))
def _prototypes(
    parts: tuple[Adapter, ...], shape: tuple[int, int], stack: tuple[int, ...]
) -> tuple[Float[Array, "*stack parts in"], Bool[Array, "*stack parts"]]:
    """The prototype of every part, for every layer of a stack, and whether its direction is unique."""

    def of_layer(parts: tuple[Adapter, ...]) -> tuple[Float[Array, "parts in"], Bool[Array, " parts"]]:
        directions, unique = zip(*(_prototype(part, shape) for part in replicate(parts)), strict=True)
        return jnp.stack(directions), jnp.stack(unique)

    with jax.default_matmul_precision("highest"):
        return over_stack(of_layer, stack)(parts)


def _prototype(part: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, " in"], Bool[Array, ""]]:
    """The leading left singular vector of the (in, out) change, zeros if nothing changed, and whether it is unique."""
    factors = _factors(part, shape)
    if factors is None:
        method = part.method
        assert isinstance(method, AbstractAdditive)
        basis, core = None, method.add_to_weight(jnp.zeros(shape, jnp.float32), part)
    else:
        basis, triangle = qr(factors[0].astype(jnp.float32))
        core = triangle @ factors[1].astype(jnp.float32)
    u, s, _ = svd(core)
    leading = u[:, 0] if basis is None else basis @ u[:, 0]
    unique = (s[0] == 0.0) | (s[1] < (1.0 - TIE) * s[0]) if s.size > 1 else jnp.bool_(True)
    return jnp.where(s[0] > 0.0, leading, jnp.zeros_like(leading)), unique


def _factors(part: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r"], Float[Array, "r out"]] | None:
    """Thin factors of the change of a part, or None."""
    method = part.method
    if isinstance(method, AbstractFactored):
        return method.factors(part, shape)
    if isinstance(method, Scaled):
        ((child, _),) = method.children(part)
        factors = _factors(child, shape)
        return None if factors is None else (part.frozen["factor"] * factors[0], factors[1])
    if isinstance(method, Sum):
        pairs = [pair for child, _ in method.children(part) if (pair := _factors(child, shape)) is not None]
        if len(pairs) == len(method.parts):
            return jnp.concatenate([a for a, _ in pairs], axis=1), jnp.concatenate([b for _, b in pairs], axis=0)
    return None
