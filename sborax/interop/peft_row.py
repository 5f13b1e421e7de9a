"""What it takes to read and write one kind of PEFT adapter."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sborax.adapters.core import AbstractMethod, Adapter, Hint, SboraxError

Fields = Mapping[str, Any]
"""Config fields of one module, patterns resolved."""

PREFIX, ROOT = "base_model.model.", "base_model."
"""What PEFT puts in its files before every module's name, and before what all modules share."""
LARGEST_RANK = 65_536
"""Beyond any model's width: larger numbers in a file are refused before anything is sized by them."""


class Tensor(NamedTuple):
    """A tensor of one module in PEFT's file, which is there if our method has the leaf, trained or frozen.

    axes: of our leaf, in PEFT's order; None stands for an axis of size 1 that ours lacks.
    times: a frozen scalar that PEFT has multiplied in.
    shared: the file has one for all modules, as large as the largest asks for, and each reads its first part.
    repeated: shared, and PEFT writes a copy of it for every module beside.
    places: these are indices, of columns and rows of W.
    """

    suffix: str
    leaf: str
    axes: tuple[int | None, ...]
    times: str | None = None
    shared: bool = False
    repeated: bool = False
    places: bool = False

    def key(self, module: str) -> str:
        """The tensor's name in the file."""
        return ROOT + self.suffix if self.shared else f"{PREFIX}{module}.{self.suffix}"

    def copies(self, modules: Iterable[str]) -> dict[str, str]:
        """The names of PEFT's copies in the file, each with that of the tensor it copies."""
        return {f"{PREFIX}{module}.{self.suffix}": self.key(module) for module in modules if self.repeated}

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """PEFT's shape from ours."""
        return tuple(1 if axis is None else ours[axis] for axis in self.axes)

    def outward(self, leaves: Mapping[str, Any]) -> np.ndarray:
        """Our leaf as PEFT keeps it, float32 or int32."""
        leaf = np.asarray(leaves[self.leaf], np.int32 if self.places else np.float32)
        if self.times is not None:
            leaf = leaf * np.asarray(leaves[self.times], np.float32)
        turned = np.transpose(leaf, [axis for axis in self.axes if axis is not None])
        return np.ascontiguousarray(turned.reshape(self.shape(leaf.shape)))

    def inward(self, value: np.ndarray) -> np.ndarray:
        """PEFT's tensor as our leaf."""
        kept = [axis for axis in self.axes if axis is not None]
        sizes = [size for size, axis in zip(value.shape, self.axes, strict=True) if axis is not None]
        return np.transpose(value.reshape(sizes), np.argsort(kept))


class Fit(NamedTuple):
    """A method, and the values of the frozen leaves that the config states outright."""

    method: AbstractMethod
    frozen: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of PEFT adapter and the method it is here.

    known_by: config fields, and the values by which a file of this row is known; the first one is written.
    defaults: the other fields that the row reads, with the values PEFT gives them when they are absent.
    patterns: fields that may differ by module, and where the config keeps the exceptions; only those that PEFT heeds.
    pattern_form: how a key of a pattern stands for a module, as a regular expression around the key.
    write: the fields of one module from its adapter, or None for a setting that PEFT lacks; None: read only.
    any_rank: PEFT accepts ranks beyond the size of the matrix, which our planning refuses.
    by_module: further fields of one module that the config (first) says in its own way (module second), or None.
    in_config: how the config says them, from the fields of all modules.
    reads: config fields that only `by_module` reads. inert: ones that change no saved adapter's function.
    constants: fields that are always written.
    layered: the config can choose layers by number.
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
    in_config: Callable[[Mapping[str, Fields]], dict[str, Any]] | None = None
    reads: frozenset[str] = frozenset()
    inert: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"bias": "none"})
    layered: bool = True


def rank_field(fields: Fields, name: str = "r") -> int:
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_RANK:
        raise SboraxError(f"{name} must be a whole number in 1..{LARGEST_RANK}, got {str(value)[:40]}")
    return value


def number_field(fields: Fields, name: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise SboraxError(f"{name} must be a finite number, got {str(value)[:40]}")
    return float(value)


def check_types(fields: Fields, defaults: Mapping[str, Any]) -> None:
    """Raise SboraxError for a field that is not of the type of its default: a switch, a number or, for None, a text."""
    for name, default in defaults.items():
        value = fields[name]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise SboraxError(f"{name} must be true or false, got {str(value)[:40]!r}")
        elif default is None:
            if not isinstance(value, str | None):
                raise SboraxError(f"{name} must be a text, got {str(value)[:40]!r}")
        else:
            number_field(fields, name)


def dropout_of(node: Adapter) -> float:
    """The dropout rate as its shortest decimal."""
    return float(str(np.float32(node.frozen.get("dropout", 0.0))))


def leaf_shapes(method: AbstractMethod, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf, trained or frozen, that the method makes for an (in, out) weight."""
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    fitted = jax.eval_shape(lambda kernel: method.init(jax.random.key(0), kernel, Hint()), weight)
    return {name: leaf.shape for name, leaf in {**fitted.train, **fitted.frozen}.items()}


def shared_shapes(row: Row, method: AbstractMethod, shapes: Iterable[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The shape of every shared tensor by its key: that of a weight as large as the largest on either side."""
    shared = [tensor for tensor in row.tensors if tensor.shared]
    if not shared:
        return {}
    fan_in, fan_out = np.max(np.asarray(list(shapes)), axis=0)
    leaves = leaf_shapes(method, (int(fan_in), int(fan_out)))
    return {tensor.key(""): tensor.shape(leaves[tensor.leaf]) for tensor in shared if tensor.leaf in leaves}
