"""The form of a row of PEFT's table: how one kind of adapter is read and written."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sborax.adapters.bank import banked_parts
from sborax.adapters.core import AbstractMethod, Adapter, Hint, SboraxError
from sborax.adapters.leaves import flatten
from sborax.interop.peft_layout import EMBEDDING, PREFIX, ROOT

Fields = Mapping[str, Any]
"""The config fields of one module, with its patterns resolved."""

LARGEST_RANK = 65_536
"""Larger than any model is wide. Larger ranks in a file are refused before any array is made."""

TRANSPOSED = (1, 0)
"""The axes of an (in, out) matrix in PEFT's order, which is torch's: (out, in)."""
ANY_START = {"init_weights": (True, False)}
"""For kinds whose start leaves the base as it is, however it is drawn."""
START_OPTIONS = {"init_weights": True, "init_lora_weights": True}
"""PEFT's defaults of the starts in `Row.known_by`."""
NO_BIAS: dict[str, Any] = {}
"""For kinds whose config has no field `bias`."""


class Tensor(NamedTuple):
    """A tensor of one module in PEFT's file. It is present if our method has the leaf, trained or frozen.

    - suffix: its name behind the module's.
    - leaf: the name of our leaf, `part/a` for leaf `a` of a part.
    - axes: the axes of our leaf in PEFT's order; None for an axis of size 1 that ours lacks, and several axes for one
      that holds all of them, the last of which varies fastest.
    - times: a frozen scalar leaf that PEFT multiplies into the tensor.
    - shared: the file has one tensor for all modules, sized for the largest, and each module reads its first part.
    - repeated: shared, and PEFT also writes a copy for every module.
    - places: whether it holds indices of columns and rows of W.
    - numbered: the file keeps it outside the modules, by the module's number among those that are adapted.
    - into: it holds indices into the leaf of this name in the bank.
    - at: it holds the entries of the leaf, which is the bank's, at the indices in the leaf of this name.
    - embedding: its name behind the embedding's; empty if PEFT does not adapt an embedding in this way.
    - begins: what PEFT writes before training, of our leaf. Such a tensor holds what PEFT saw last in training, or what
      follows from shapes. It changes no function, so it is not read.
    - of_kind: the file has one tensor for the modules of a kind, such as the q_proj of all layers, as the bank here.
    - over: a frozen leaf that PEFT adds to the tensor. It follows from the base.
    """

    suffix: str
    leaf: str
    axes: tuple[int | tuple[int, ...] | None, ...]
    times: str | None = None
    shared: bool = False
    repeated: bool = False
    places: bool = False
    numbered: bool = False
    into: str | None = None
    at: str | None = None
    embedding: str = ""
    begins: Callable[[np.ndarray], np.ndarray] | None = None
    of_kind: bool = False
    over: str | None = None

    def key(self, module: str, numbers: Mapping[str, int]) -> str:
        """The tensor's name in the file. numbers: those of the adapted modules, see `HFLayout.numbers`."""
        if self.numbered:
            return f"{ROOT}{self.suffix}.{numbers[module]}"
        if self.of_kind:
            return f"{ROOT}{self.suffix}.{kind_of(module)}"
        suffix = self.embedding if module == EMBEDDING else self.suffix
        return ROOT + suffix if self.shared else f"{PREFIX}{module}.{suffix}"

    def copies(self, modules: Iterable[str]) -> dict[str, str]:
        """`{name of the copy: name of the tensor}` for the copies that PEFT writes for modules."""
        return {f"{PREFIX}{module}.{self.suffix}": ROOT + self.suffix for module in modules if self.repeated}

    def shape(self, ours: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """PEFT's shape from those of our leaves."""
        shape = ours[self.at or self.leaf]
        return self._tensor_shape(shape if self.begins is None else self.begins(np.zeros(shape)).shape)

    def _tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(math.prod(shape[axis] for axis in axes) for axes in self._axis_groups())

    def _axis_groups(self) -> list[tuple[int, ...]]:
        """The axes of our leaf that each axis of PEFT's tensor holds."""
        return [() if axis is None else (axis,) if isinstance(axis, int) else axis for axis in self.axes]

    def _order(self) -> list[int]:
        return [axis for axes in self._axis_groups() for axis in axes]

    def outward(self, leaves: Mapping[str, Any]) -> np.ndarray:
        """Our leaf as PEFT keeps it, float32 or int32."""
        leaf = np.asarray(leaves[self.leaf], np.int32 if self.places or self.into else np.float32)
        if self.begins is not None:
            leaf = self.begins(leaf)
        if self.over is not None:
            leaf = leaf + np.asarray(leaves[self.over], np.float32)
        if self.at is not None:
            leaf = leaf[np.asarray(leaves[self.at])]
        if self.times is not None:
            leaf = leaf * np.asarray(leaves[self.times], np.float32)
        return np.ascontiguousarray(np.transpose(leaf, self._order()).reshape(self._tensor_shape(leaf.shape)))

    def inward(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """PEFT's tensor as our leaf. shape: the leaf's, without stack axes; padding of ranks may make it larger."""
        sizes: list[int] = []
        for size, axes in zip(value.shape, self._axis_groups(), strict=True):
            sizes += [shape[axis] for axis in axes] if len(axes) > 1 else [size] * len(axes)
        return np.transpose(value.reshape(sizes), np.argsort(self._order()))


def kind_of(module: str) -> str:
    """What PEFT calls the modules that do the same in different layers: the last two names, `self_attn_q_proj`."""
    names = module.split(".")[-2:]
    return names[-1] if names[0].isdecimal() else "_".join(names)


class Fit(NamedTuple):
    """A method, and the values of the frozen leaves that the config gives."""

    method: AbstractMethod
    frozen: Mapping[str, float]


class Completed(NamedTuple):
    """What a file has instead of tensors that it lacks.

    - tensors: the missing tensors, by their names.
    - spent: names of the tensors that they were made of.
    """

    tensors: Mapping[str, np.ndarray]
    spent: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of PEFT adapter, and the method that it is here.

    - method: the method.
    - peft_type: PEFT's name of the kind.
    - known_by: the config fields that tell this row from others, with the values that mean it, or a class of values;
      the first is written.
    - defaults: the other fields that the row reads, with PEFT's defaults.
    - tensors: the tensors of a module.
    - read: the method and its frozen scalars, from the fields of a module.
    - write: the fields of a module, from its adapter; None from an adapter that PEFT has no setting for. A row without
      `write` is only read.
    - patterns: fields that may differ by module, with the config field that keeps the exceptions; only those that PEFT
      itself follows.
    - pattern_form: the regular expression into which a key of a pattern is put.
    - any_rank: whether PEFT accepts ranks above the size of the matrix, which planning refuses.
    - by_module: (config, module) -> further fields of the module, for kinds that keep them in a form of their own.
    - by_shape: (fields, (in, out)) -> further fields of a module, for kinds whose sizes follow from the weight's.
    - in_config: the inverse of both: {module: fields} -> config fields. `shape` is among the fields: (in, out).
    - reads: further config fields that are read, by `by_module` or by `load_peft` itself.
    - inert: config fields that do not change the function of a saved adapter, with the reason.
    - refused: config fields that are not read, or not with every value, with the reason.
    - blanks: (names of the leaves, (in, out)) -> the shapes of tensors of zeros that PEFT keeps in place of leaves that
      a module's adapter lacks, by their names behind the module's.
    - tied: (config, {module: (in, out)} in the order of transformers' model) -> groups of names of tensors that are one
      in PEFT, and of which the file has copies. Modules that the config names in full are in no group.
    - constants: fields that are always written.
    - layered: whether the config can choose layers by number.
    - keeps_base: whether PEFT leaves the base as it is where our method takes its start out of it.
    - seeded: (method, shape) -> the frozen leaves that PEFT draws from the config's seed and keeps in no file.
    - derived: (leaves of a bank that are in the file) -> those that follow from them.
    - completed: (fields, {module: (in, out)} in the order of transformers' model, a function that reads a tensor) ->
      what a file of another form of the kind has instead of its tensors.
    """

    method: type[AbstractMethod]
    peft_type: str
    known_by: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    read: Callable[[Fields], Fit]
    write: Callable[[Adapter], dict[str, Any] | None] | None = None
    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pattern_form: str = r"(.*\.)?({})$"
    any_rank: bool = False
    by_module: Callable[[Fields, str], dict[str, Any]] | None = None
    by_shape: Callable[[Fields, tuple[int, int]], dict[str, Any]] | None = None
    in_config: Callable[[Mapping[str, Fields]], dict[str, Any]] | None = None
    reads: frozenset[str] = frozenset()
    inert: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    blanks: Callable[[Collection[str], tuple[int, int]], dict[str, tuple[int, ...]]] | None = None
    tied: Callable[[Fields, Mapping[str, tuple[int, int]]], list[list[str]]] | None = None
    constants: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"bias": "none"})
    layered: bool = True
    keeps_base: bool = False
    seeded: Callable[[AbstractMethod, tuple[int, int]], dict[str, np.ndarray]] | None = None
    derived: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    completed: Callable[[Fields, Mapping[str, tuple[int, int]], Callable[[str], np.ndarray]], Completed] | None = None

    def adapts(self, module: str) -> bool:
        """Whether PEFT adapts such a module in this way: not every kind adapts an embedding."""
        return module != EMBEDDING or all(tensor.embedding for tensor in self.tensors)


def whole_field(fields: Fields, name: str, least: int, most: int) -> int:
    """A field that holds a whole number. Raises SboraxError unless it lies in least..most."""
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise SboraxError(f"{name} must be a whole number in {least}..{most}, got {str(value)[:40]}")
    return value


def rank_field(fields: Fields, name: str = "r") -> int:
    """A field that holds a size. Raises SboraxError unless it is a whole number in 1..LARGEST_RANK."""
    return whole_field(fields, name, 1, LARGEST_RANK)


def number_field(fields: Fields, name: str) -> float:
    """A field that holds a number. Raises SboraxError unless it is finite."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise SboraxError(f"{name} must be a finite number, got {str(value)[:40]}")
    return float(value)


def check_types(fields: Fields, defaults: Mapping[str, Any]) -> None:
    """Raise SboraxError for a field of another type than its default's: a boolean, a text or a number.

    Where the default is None, a text or a number.
    """
    for name, default in defaults.items():
        value = fields[name]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise SboraxError(f"{name} must be true or false, got {str(value)[:40]!r}")
        elif isinstance(default, str):
            if not isinstance(value, str):
                raise SboraxError(f"{name} must be a text, got {str(value)[:40]!r}")
        elif default is None:
            if isinstance(value, bool) or not isinstance(value, str | int | float | None):
                raise SboraxError(f"{name} must be a text or a number, got {str(value)[:40]!r}")
        else:
            number_field(fields, name)


def alpha_of(node: Adapter, rank: int) -> int | float:
    """alpha = scale rank, an int if it is whole, for an adapter with a leaf `scale`."""
    # A float32 times an int is exact in float64, so dividing alpha by the rank gives the same scale back.
    alpha = float(node.frozen["scale"]) * rank
    return int(alpha) if alpha.is_integer() else alpha


def decimal_of(node: Adapter, leaf: str) -> float:
    """A frozen scalar of an adapter, rounded to the shortest decimal that gives the same float32; 0 without it."""
    return float(str(np.float32(node.frozen.get(leaf, 0.0))))


def dropout_of(node: Adapter) -> float:
    """An adapter's dropout rate, rounded to the shortest decimal that gives the same float32."""
    return decimal_of(node, "dropout")


def leaf_shapes(method: AbstractMethod, shape: tuple[int, int], bias: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf, trained or frozen, of a method on an (in, out) weight, with those of its bank.

    bias: whether there is a bias beside the weight.
    """

    def of_method(method: AbstractMethod, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        weight, hint = jax.ShapeDtypeStruct(size, jnp.float32), Hint(bias=bias)
        fitted = jax.eval_shape(lambda kernel: method.init(jax.random.key(0), kernel, hint)[:2], weight)
        return {name: leaf.shape for half in fitted for name, leaf in flatten(half).items()}

    shapes = of_method(method, shape)
    for part in banked_parts(method):
        bank = part.bank(shape, 1)
        # Of such a leaf a weight reads one entry.
        shapes |= {
            name: size[1:] if name in part.bank_entries else size for name, size in of_method(bank, bank.shape).items()
        }
    return shapes


def shared_shapes(row: Row, method: AbstractMethod, shapes: Iterable[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The shape of every shared tensor, by its name in the file.

    They are sized for a weight whose `in` is the largest among `shapes`, and whose `out` is.
    """
    shared = [tensor for tensor in row.tensors if tensor.shared]
    if not shared:
        return {}
    fan_in, fan_out = np.max(np.asarray(list(shapes)), axis=0)
    leaves = leaf_shapes(method, (int(fan_in), int(fan_out)))
    return {ROOT + tensor.suffix: tensor.shape(leaves) for tensor in shared if tensor.leaf in leaves}
