"""The contract between a method and a model: what it means to adapt one (in, out) weight.

A method is a frozen dataclass of hyper-parameters with a few pure functions. An `Adapter` is a pytree node with the
leaves that a method made for one weight: `train` leaves are differentiated, `frozen` leaves never are. `linear` is the
only place where an adapter meets a model. This module depends on JAX alone.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from sborax.adapters.constraints import by_rows
from sborax.adapters.stripped import STRIPPED
from sborax.adapters.weight import AbstractWeight as AbstractWeight
from sborax.adapters.weight import Weight, dense, matmul
from sborax.adapters.weight import is_weight as is_weight
from sborax.errors import SboraxError

Leaves = dict[str, Any]
"""Arrays by name. Methods made of methods nest one level per part."""
HIDDEN = "adapter_h"
"""Name of the thin activation (tokens, rank) for rematerialisation policies, since it is cheap to save."""
Use = Literal["kernel", "lookup", "tied"]
"""The role of an adapted weight, see `Hint.use`."""
Axes = Mapping[str, Any]
"""The logical axes of every leaf, without stack axes: `{"a": ("in", "rank"), ...}`, nested like `Leaves`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The arguments of an adapter besides `x`, given by the model. All are optional; without a key nothing is dropped.

    - key: dropout key of this projection, or None.
    - rows: arrays with one entry per sequence, `(batch, ...)`, such as routing weights. If the name is a path, it
      is for the projection at that path alone.
    - prompt: `(batch, seq)`, nonzero at the tokens that routers read: neither padding nor answer.
    - mask: `(batch, seq)`, zero at padding.
    - memory: arrays `(batch, seq, ...)` by name, the values of each token that the previous layer kept (see `depth`).
      The parts of a composed method have theirs one level deeper, under their number.
    - invocations: `(batch, seq)` by a tuple of token ids, True from the last occurrence of these tokens in its text on
      (see `invocation`).
    """

    key: Key[Array, ""] | None = None
    rows: dict[str, Array] = dataclasses.field(default_factory=dict)
    # Any: a pytree node also holds shapes and specs.
    prompt: Any = None
    mask: Any = None
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    invocations: dict[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)

    def at(self, path: str, name: str) -> "Context":
        """The context of the projection at `path`: its row is called `name`, and rows of other paths are left out."""
        shared = {key: leaf for key, leaf in self.rows.items() if "/" not in key}
        row = {name: self.rows[path]} if path in self.rows else {}
        return dataclasses.replace(self, rows=shared | row)

    def flatten(self, batch: tuple[int, ...]) -> "Context":
        """The same context for `x` flattened from `(*batch, in)` to `(tokens, in)`."""
        tokens = dataclasses.replace(self, key=None, rows={})
        if not jax.tree.leaves((self.rows, tokens)):
            return self
        count = int(np.prod(batch))

        def per_row(leaf: Array) -> Array:
            features = leaf.shape[1:]
            spread = leaf.reshape(batch[0], *(1,) * (len(batch) - 1), *features)
            return jnp.broadcast_to(spread, (*batch, *features)).reshape(count, *features)

        def per_token(leaf: Array) -> Array:
            return leaf.reshape(count, *leaf.shape[len(batch) :])

        return dataclasses.replace(jax.tree.map(per_token, tokens), key=self.key, rows=jax.tree.map(per_row, self.rows))

    def map(self, function: Callable[[Array], Array]) -> "Context":
        """A flattened context with `function` of every array. The key stays."""
        return dataclasses.replace(jax.tree.map(function, dataclasses.replace(self, key=None)), key=self.key)

    def take(self, tokens: Int[Array, " rows"]) -> "Context":
        """The context of rows that are some of the tokens of a flattened context, in any order."""
        return self.map(lambda leaf: leaf[tokens])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hint:
    """The arguments of `init` besides the weight. A method's `needs` names the fields that must be given.

    - layer: position of the weight in its stack, which is flattened; 0 without a stack. Indexes a tuple of ranks.
    - grad: gradient of the loss in the un-adapted weight, of the weight's shape. A NumPy array uses no device memory
      until it is needed.
    - inputs: statistics of the weight's inputs by name, as `AbstractInformed.gather` makes them, after the stack axes.
    - ranks: the rank that these statistics give each weight of the flattened stack, 0 for no adapter. See `allotted`.
    - use: the role of the weight: "kernel"; "lookup", a table (vocab, d) whose rows are looked up; or "tied", a table
      that is the head's kernel, too.
    - bias: whether the projection has a bias, for methods with leaves that only change a bias.
    """

    layer: Int[Array, "*stack"] | int = 0
    grad: Float[Array, "..."] | Float[np.ndarray, "..."] | None = None
    inputs: Mapping[str, Any] | None = None
    ranks: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    use: Use = dataclasses.field(default="kernel", metadata={"static": True})
    bias: bool = dataclasses.field(default=False, metadata={"static": True})


class Fitted(NamedTuple):
    """The result of `init`: leaves of one weight. `weight` is the new base weight; None if the base stays as it is."""

    train: Leaves
    frozen: Leaves
    weight: Array | None = None


class RankPolicy(abc.ABC):
    """Chooses the ranks of all weights of one kernel, on the host, at planning. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def ranks(self, weights: Sequence[Callable[[], np.ndarray]], layers: Sequence[int], depth: int) -> tuple[int, ...]:
        """One rank per weight.

        - weights: functions that read one weight each, as a float32 (in, out) array.
        - layers: the layer of each weight.
        - depth: how many layers there are.
        """


Rank = int | RankPolicy | tuple[int, ...]


def hyper(default: Any = dataclasses.MISSING, above: float | None = None, signed: bool = False) -> Any:
    """A field that `init` turns into an array leaf, so that it may differ inside one compiled program.

    The field is no part of a node's static structure (see `structure`): two values of it share a treedef, a compilation
    and a sweep.

    - above: values must be above this bound, else planning raises SboraxError. A scale of zero would never train.
    - signed: whether a negative value means something. Planning refuses those of all other fields.
    """
    return dataclasses.field(default=default, metadata={"hyper": True, "above": above, "signed": signed})


def signed(default: Any) -> Any:
    """A field in which a negative value means something. Planning refuses those of all other fields."""
    return dataclasses.field(default=default, metadata={"signed": True})


class AbstractMethod(abc.ABC):
    """Hyper-parameters, declarations for shared code, and pure functions over one (in, out) weight.

    Concrete methods are final: frozen dataclasses that override nothing concrete but the declarations below.
    """

    paper: str
    """Title and arXiv id."""
    rank: Rank
    """An int, or a policy, which planning replaces by one int, or one per layer. Methods without a rank say 1."""
    rewrites_base: bool = False
    """`init` takes s a0 b0 out of the base weight and keeps frozen leaves `a0`, `b0`, `scale`. See `rebase.LEFT`."""
    base_leaves: Mapping[str, Callable[[Weight, Leaves], Array]] = {}
    """By name, functions of (base weight, frozen leaves) that compute a frozen leaf. On another base it is recomputed.

    The function of a method with a bank finds the bank's leaves among the frozen ones."""
    identity_at_init: bool = True
    """Before training, the adapted function equals the base function."""
    scales_weight: bool = False
    """The change of an entry of W, or of a column, is proportional to it: in half precision, a merged weight is rounded
    back to W where the change is small."""
    no_merge: str = ""
    """Empty, or the reason why no weight equals the adapted function."""
    materialises: str = ""
    """Empty, or the reason why `apply` must form an (in, out) value that depends on a trained leaf."""
    approximates: str = ""
    """Empty, or the part of the backward pass that `apply` approximates. A merged weight has the same values, but other
    gradients."""
    ragged: bool = False
    """Layers of one stack may have different ranks: leaves are padded with zeros, which stay zero in training."""
    needs: frozenset[str] = frozenset()
    """Fields of `Hint` that `init` requires."""
    of_quantised: str = ""
    """Empty, or the property of a 4-bit base from which the method starts. A dense base lacks it."""
    sends: str = ""
    """Empty, or the traffic between devices that share a projection beyond `summed`, leaves and their gradients."""
    draws: str = ""
    """Empty, or the random numbers of a call with a key, besides dropout. A call without a key draws none."""
    batch_gradient: str = ""
    """Empty, or statistics of all rows of a call in the gradient of trained leaves. Accumulation is then inexact."""
    group_b: frozenset[str] = frozenset()
    """Trained leaves whose learning rate LoRA+ (arXiv:2402.12354) multiplies. As in PEFT, if it has the method."""
    linked: bool = False
    """Layers read weights or activations of earlier layers of the same projection. See `depth.AbstractLinked`."""
    adapts_bias: bool = False
    """The method changes the projection's bias, too; see `merge_bias`. Otherwise the bias is added as it is."""
    token_mean: bool = False
    """`apply` takes a mean over tokens. A model then gives it `ctx.mask`, by which padding is left out."""

    @property
    @abc.abstractmethod
    def axes(self) -> Axes:
        """Logical axes of every leaf that an adapter of this method may have: "in", "out", "rank" or None."""

    @property
    def summed(self) -> int:
        """Floats per token that devices which share a projection sum once a step, beyond what they sum for the base.

        By default the width between two thin factors.
        """
        return width(self.rank) if any("rank" in names for names in self.axes.values()) else 0

    @abc.abstractmethod
    def check(self, shape: tuple[int, int]) -> None:
        """Raise `SboraxError` if a weight of this shape cannot be adapted."""

    @abc.abstractmethod
    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        """Leaves for one weight: float32, indices int32."""

    @abc.abstractmethod
    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: "Adapter", ctx: Context
    ) -> Float[Array, "tokens out"]:
        """The adapted projection of `x`."""

    @abc.abstractmethod
    def merge(self, weight: Weight, adapter: "Adapter") -> Float[Array, "in out"]:
        """The float32 weight whose plain projection is the adapted one."""

    def merge_bias(self, bias: Float[Array, " out"], weight: Weight, adapter: "Adapter") -> Float[Array, " out"]:
        """The float32 bias that goes with the weight of `merge`: the same one, unless `adapts_bias` is declared.

        - weight: the base weight, before merging.
        """
        return bias.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of one weight, or of a stack of them: leaves may have leading stack axes.

    - train, frozen: the leaves that are trained, and those that are not.
    - method: the method without its hyper-parameters (see `structure`).
    - in_axes: how many of the kernel's axes, after the stack axes, belong to the input.
    """

    train: Leaves
    frozen: Leaves
    method: AbstractMethod = dataclasses.field(metadata={"static": True})
    in_axes: int = dataclasses.field(default=1, metadata={"static": True})


def is_adapter(node: Any) -> bool:
    """Whether `node` is an adapter; for `is_leaf`."""
    return isinstance(node, Adapter)


class AbstractAdditive(AbstractMethod):
    """y = x W + delta(x), where delta does not depend on W. Such methods can be added and scaled.

    They leave a bias as it is, since it is no part of delta.
    """

    @abc.abstractmethod
    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        """`y + delta(x)`. Methods add delta themselves, since some touch only a few columns of `y`."""

    @abc.abstractmethod
    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        """The float32 `weight` plus delta. Entries that delta does not touch keep their bits."""

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return self.add_to(by_rows(matmul(x, weight)), x, adapter, ctx)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        return self.add_to_weight(dense(weight).astype(jnp.float32), adapter)


class AbstractFactored(AbstractAdditive):
    """An additive method that changes the *original* base weight by a product of thin factors."""

    pair: bool = False
    """`merge` is W + s a b, with W as `init` left it and a constant s. Only a and b are trained. See `pair_of`."""
    masks: Mapping[str, str] = {}
    """Of a `pair`, by the name of a factor: the frozen leaf that multiplies it, in adapters that have this leaf."""

    @abc.abstractmethod
    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        """`(a, b)`, scale included, such that `a @ b` is the change since before `init`: a plain LoRA of scale 1."""


class Pair(NamedTuple):
    """s, a and b of a change s a b; stack axes in front."""

    scale: Float[Array, "*stack"]
    a: Float[Array, "*stack in r"]
    b: Float[Array, "*stack r out"]


def pair_of(adapter: Adapter) -> Pair:
    """The factors of a method that declares `pair`, as they act: without what its `masks` leave out."""
    method, train, frozen = adapter.method, adapter.train, adapter.frozen
    assert isinstance(method, AbstractFactored)
    masks = {name: frozen[leaf] for name, leaf in method.masks.items() if leaf in frozen}
    a, b = (train[name] * masks[name] if name in masks else train[name] for name in ("a", "b"))
    return Pair(frozen["scale"], a, b)


class AbstractReparametrisation(AbstractMethod):
    """A method that can take over the factors of another one: the second link of `chain`."""

    factors_trained: frozenset[str]
    """The leaves that the first link must train. It may train no others."""
    factors_frozen: frozenset[str]
    """The leaves that the first link must keep frozen. It may only add `dropout` and what it took out of the base."""

    @abc.abstractmethod
    def refit(self, weight: Weight, fitted: Fitted) -> Fitted:
        """`fitted` with this method's leaves added; `weight` is the base that `fitted` belongs to."""


class AbstractComposite(AbstractMethod):
    """A method made of methods. Its declarations follow from those of its members."""

    @property
    @abc.abstractmethod
    def members(self) -> "tuple[AbstractMethod, ...]":
        """The methods it is made of."""

    @abc.abstractmethod
    def children(self, adapter: Adapter) -> list[tuple[Adapter, tuple[int, ...] | None]]:
        """The adapter's parts, each with the positions of the stack that it acts on; None for all."""

    @property
    def rewrites_base(self) -> bool:
        return any(part.rewrites_base for part in self.members)

    @property
    def scales_weight(self) -> bool:
        return any(part.scales_weight for part in self.members)

    @property
    def no_merge(self) -> str:
        return next((part.no_merge for part in self.members if part.no_merge), "")

    @property
    def materialises(self) -> str:
        return next((part.materialises for part in self.members if part.materialises), "")

    @property
    def of_quantised(self) -> str:
        return next((part.of_quantised for part in self.members if part.of_quantised), "")

    @property
    def approximates(self) -> str:
        return next((part.approximates for part in self.members if part.approximates), "")

    @property
    def ragged(self) -> bool:
        return all(part.ragged for part in self.members)

    @property
    def summed(self) -> int:
        return sum(part.summed for part in self.members)

    @property
    def sends(self) -> str:
        return next((part.sends for part in self.members if part.sends), "")

    @property
    def draws(self) -> str:
        return next((part.draws for part in self.members if part.draws), "")

    @property
    def batch_gradient(self) -> str:
        return next((part.batch_gradient for part in self.members if part.batch_gradient), "")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.needs for part in self.members))

    @property
    def linked(self) -> bool:
        return any(part.linked for part in self.members)

    @property
    def adapts_bias(self) -> bool:
        return any(part.adapts_bias for part in self.members)

    @property
    def token_mean(self) -> bool:
        return any(part.token_mean for part in self.members)

    def check(self, shape: tuple[int, int]) -> None:
        for part in self.members:
            part.check(shape)


class AbstractKernelless(AbstractMethod):
    """A method whose adapter has no kernel of its own: it serves the adapters of several kernels.

    Planning places it for the methods that need it, at a path that no kernel has. It is split, saved and counted like
    every other adapter, it is on every device, and neither rules nor sums of trees take it.
    """

    rank = 1

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        raise SboraxError(f"{type(self).__name__} projects nothing; give rules the method it belongs to")

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        raise SboraxError(f"{type(self).__name__} has no kernel that could be merged")


def linear(
    x: Float[Array, "*batch in"],
    weight: Weight,
    adapter: Adapter | None = None,
    ctx: Context = Context(),
    bias: Float[Array, " out"] | None = None,
) -> Float[Array, "*batch out"]:
    """y = x W + bias, adapted or not. The only place where an adapter meets a model.

    Args:
    - x: inputs, any float dtype, which is that of the result.
    - weight: the base weight, a plain array or a quantised one.
    - adapter: the adapter of this weight; None for the base projection.
    - ctx: the dropout key and other values that the adapter reads. Default: none, hence no dropout.
    - bias: give it here rather than add it to the result, because some methods adapt it, too (IA3 scales it).
    """
    batch = x.shape[:-1]
    # With more than two axes XLA:CPU copies transposed operands for thin gradients.
    flat = by_rows(x.reshape(-1, x.shape[-1]))
    if adapter is None:
        y = matmul(flat, weight)
    else:
        y = adapter.method.apply(flat, weight, adapter, ctx.flatten(batch))
    y = y.reshape(*batch, y.shape[-1])
    if bias is None:
        return y
    if adapter is not None and adapter.method.adapts_bias:
        bias = adapter.method.merge_bias(bias, weight, adapter)
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def in_float32(
    function: Callable[[Float[Array, "tokens n"]], Float[Array, "tokens n"]], y: Float[Array, "tokens n"]
) -> Float[Array, "tokens n"]:
    """`function(y)`, rounded to the dtype of `y` once: for factors near 1, which half precision rounds to 1.

    - function: keeps the shape. It casts leaves to the dtype of its argument, which is at least float32.
    """
    if y.dtype.itemsize >= 4:
        return function(y)

    # The backward pass keeps `y` as it is, not a copy of twice the size.
    @jax.checkpoint
    def rounded(y: Array) -> Array:
        return function(y.astype(jnp.float32)).astype(y.dtype)

    return rounded(y)


def dropout(x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context) -> Float[Array, "tokens in"]:
    """`x` with entries dropped at the adapter's rate, if it has one and the context has a key."""
    if ctx.key is None or "dropout" not in adapter.frozen:
        return x
    rate = adapter.frozen["dropout"]
    keep = jax.random.bernoulli(ctx.key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), jnp.zeros((), x.dtype))


def output_dropout(
    change: Float[Array, "tokens out"], adapter: Adapter, ctx: Context, rescaled: bool
) -> Float[Array, "tokens out"]:
    """`change` without some outputs, and sometimes without any, at the adapter's rates, if the context has a key.

    At `rank_dropout`, outputs are dropped for all tokens at once; at `module_dropout`, the whole change is.

    Args:
    - change: what the adapter adds to the output.
    - rescaled: whether the outputs that are left are divided by their share, which is drawn as well. If none is left,
      the change is zero.
    """
    if ctx.key is None or not OUTPUT_DROPOUTS & adapter.frozen.keys():
        return change
    of_outputs, of_all = jax.random.split(ctx.key)
    if "rank_dropout" in adapter.frozen:
        keep = jax.random.bernoulli(of_outputs, 1.0 - adapter.frozen["rank_dropout"], change.shape[1:])
        gains = keep.astype(jnp.float32)
        if rescaled:
            gains = gains / jnp.maximum(jnp.mean(gains), 1.0 / change.shape[1])
        change = change * cast(gains, change)[None, :]
    if "module_dropout" in adapter.frozen:
        keep_all = jax.random.bernoulli(of_all, 1.0 - adapter.frozen["module_dropout"])
        change = jnp.where(keep_all, change, jnp.zeros((), change.dtype))
    return change


OUTPUT_DROPOUTS = frozenset({"rank_dropout", "module_dropout"})
"""The frozen leaves that `output_dropout` reads."""
INPUT_DROPOUTS = frozenset({"dropout", "block_dropout"})
"""Frozen leaves for what is dropped of an adapter's input: entries, by `dropout`, or rotations of blocks."""


def dropout_leaf(rate: float, name: str = "dropout") -> Leaves:
    """The frozen leaf that `dropout` reads, or `output_dropout`. A rate of 0 makes no leaf and costs nothing.

    Raises SboraxError for a rate outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise SboraxError(f"{name} must lie in [0, 1), got {rate}")
    return {name: jnp.float32(rate)} if rate > 0.0 else {}


def width(rank: Rank) -> int:
    """The largest rank of a stack, to which leaves are padded. Raises SboraxError for a policy."""
    if isinstance(rank, RankPolicy):
        raise SboraxError("the rank policy is resolved by `plan`; attach through it")
    return max(rank) if isinstance(rank, tuple) else rank


def live(rank: Rank, hint: Hint) -> tuple[Float[Array, ""], Float[Array, " r"]]:
    """The rank of this weight, and a 0/1 mask that is 0 in padded columns."""
    columns = jnp.arange(width(rank))
    of_layer = jnp.asarray(rank)[hint.layer] if isinstance(rank, tuple) else jnp.asarray(rank)
    return of_layer.astype(jnp.float32), (columns < of_layer).astype(jnp.float32)


UNROLLED = 100
"""The largest number of repetitions that a program has one by one. More of them would take hours to compile."""


def check_repetitions(name: str, count: int | None, least: int) -> None:
    """Raise SboraxError unless count is None or least <= count <= `UNROLLED`."""
    if count is not None and not least <= count <= UNROLLED:
        raise SboraxError(f"{name} must lie in {least}..{UNROLLED}, got {count}")


def check_rank(rank: Rank, limit: int, of: str) -> None:
    """Raise SboraxError unless 1 <= rank <= limit; `of` says in words what the limit is."""
    ranks = rank if isinstance(rank, tuple) else (width(rank),)
    if not ranks or min(ranks) < 1 or max(ranks) > limit:
        raise SboraxError(f"rank must lie in 1..{limit} ({of}), got {rank}")


def _fields(method: AbstractMethod) -> dict[str, dataclasses.Field]:
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(method)  # type: ignore[arg-type]
    return {field.name: field for field in fields}


def structure(method: AbstractMethod) -> AbstractMethod:
    """The static part of a method: every `hyper` field, parts included, holds `STRIPPED`."""

    def strip(value: Any) -> Any:
        if isinstance(value, AbstractMethod):
            return structure(value)
        return tuple(strip(part) for part in value) if isinstance(value, tuple) else value

    # Not through the constructor, which would check values.
    bare = object.__new__(type(method))
    for name, field in _fields(method).items():
        value = STRIPPED if field.metadata.get("hyper") else strip(getattr(method, name))
        object.__setattr__(bare, name, value)
    return bare


def leaf_axes(axes: Axes, leaves: Leaves) -> Any:
    """The axes of `leaves`, nested alike: a tuple of axis names for every leaf."""
    return {
        name: leaf_axes(axes[name], leaf) if isinstance(leaf, dict) else tuple(axes[name])
        for name, leaf in leaves.items()
    }


def cast(leaf: Shaped[Array, "..."], like: Array) -> Array:
    """A float leaf in the compute dtype of `like`."""
    return leaf.astype(like.dtype)
