"""Files of named tensors, read one tensor at a time."""

import abc
import dataclasses
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import map_with_path
from sborax.config.documents import check_plain, parse, read_object, shown
from sborax.config.terminal import say
from sborax.models.decoder import DecoderConfig
from sborax.models.names import DERIVED, Row, fused_tensors, row, stack_shape, tensor_names
from sborax.models.nf4 import NF4Array, check, quantise, quantise_numpy
from sborax.models.shards import aligned, read_sharded

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The format's names of dtypes -> numpy's."""


class AbstractTensors(abc.ABC):
    """Named tensors in Hugging Face's orientation, (out, in)."""

    where: str
    """The file or directory, for errors."""

    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """All tensors but those that follow from the config."""

    @abc.abstractmethod
    def name(self, entry: Row) -> str:
        """The name of a tensor in this kind of file, with `{layer}` and `{expert}` for the numbers of these."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor."""


class Entry(NamedTuple):
    """One tensor of a shard. dtype: the format's name. start: offset of the data in the file, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclasses.dataclass(frozen=True)
class Safetensors(AbstractTensors):
    """The tensors of one or more `.safetensors` shards."""

    where: str
    entries: Mapping[str, Entry]
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of the family's own, by path of our leaf."""

    def names(self) -> frozenset[str]:
        """All tensors but the rotary frequencies of old checkpoints."""
        return frozenset(name for name in self.entries if not DERIVED.fullmatch(name))

    def name(self, entry: Row) -> str:
        """Hugging Face's name."""
        return self.renamed.get(entry.ours, entry.hf)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the header, which is within the bounds of the file."""
        return self.entries[name].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor in the dtype of the file, as a memory map: the reader of safetensors would make a copy."""
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise SboraxError(f"{entry.file}: {name} has dtype {entry.dtype}; known: {', '.join(FLOATS)}")
        return np.memmap(entry.file, jnp.dtype(FLOATS[entry.dtype]), "r", entry.start, entry.shape)

    def parted(self, fused: Mapping[str, tuple[str, ...]], shapes: Mapping[str, Any]) -> "Safetensors":
        """These tensors, with those of modules that hold several projections taken apart without reading them.

        - fused: the names of the projections by module, in the order of their outputs.
        - shapes: the shapes of the params, which say how many outputs each projection has.

        Raises SboraxError for a tensor that is missing, that has other outputs, or of which a part is there twice.
        """
        entries = dict(self.entries)
        for module, parts in fused_tensors(fused, shapes).items():
            if (entry := entries.pop(module, None)) is None:
                raise SboraxError(f"{self.where}: tensor {module!r} is missing")
            outputs = sum(parts.values())
            if entry.shape[:1] != (outputs,):
                raise SboraxError(f"{self.where}: {module} has shape {entry.shape}, config says {outputs} outputs")
            row = math.prod(entry.shape[1:]) * np.dtype(jnp.dtype(FLOATS.get(entry.dtype, "float32"))).itemsize
            start = entry.start
            for part, size in parts.items():
                if part in self.entries:
                    raise SboraxError(f"{self.where}: tensor {part!r} is stored twice, also in {module!r}; remove one")
                entries[part] = entry._replace(shape=(size, *entry.shape[1:]), start=start)
                start += size * row
        return dataclasses.replace(self, entries=entries)


def _entries(file: Path) -> dict[str, Entry]:
    check_plain(file)
    try:
        with safe_open(file, framework="numpy") as shard:
            names = shard.keys()
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            # `safe_open` has checked the length.
            header = parse(stream.read(length), f"{file}: header")
    except (SafetensorError, OSError) as failure:
        raise SboraxError(f"{file}: not a readable safetensors file ({failure}); fetch it again") from failure
    tensors = {name: header[name] for name in names}
    return {
        name: Entry(file, tensor["dtype"], tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0])
        for name, tensor in tensors.items()
    }


def open_safetensors(directory: Path, renamed: Mapping[str, str] | None = None) -> Safetensors:
    """The directory's `model.safetensors`, else the shards that its index lists, as transformers does.

    - renamed: names of the family's own, by path of our leaf; none by default.

    An index that lists other files than the one that is read is reported on stderr.
    Raises SboraxError for a missing, truncated or unlisted shard.
    """
    index, single = directory / INDEX, (directory / SINGLE).exists()
    weight_map = _weight_map(index) if index.exists() and not single else None
    if single and index.exists() and not _lists_only(index, SINGLE):
        say(f"{directory}: {SINGLE} is read, as by transformers; {INDEX} lists other files", file=sys.stderr)
    shards = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    entries: dict[str, Entry] = {}
    for shard in shards:
        if not (directory / shard).exists():
            raise SboraxError(f"{directory / shard}: missing; weights must be in safetensors format")
        entries |= _entries(directory / shard)
    if weight_map is not None and (lost := sorted(weight_map.keys() - entries.keys())):
        raise SboraxError(f"{directory}: tensor {lost[0]!r} is in {INDEX} but in no shard")
    return Safetensors(str(directory), entries, renamed or {})


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor, from an index."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise SboraxError(f"{index}: not an index with a weight_map")
    for shard in weight_map.values():
        # A name with a folder could lead out of the directory.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise SboraxError(f"{index}: {shown(shard)} is not the name of a safetensors file beside it")
    return weight_map


def _lists_only(index: Path, shard: str) -> bool:
    try:
        return set(_weight_map(index).values()) == {shard}
    except SboraxError:
        return False


def load_params(
    config: DecoderConfig,
    shapes: dict[str, Any],
    tensors: AbstractTensors,
    quantised: Callable[[str], bool] = lambda path: False,
    place: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Params of the shapes `shapes`, read tensor by tensor: the host holds one stacked tensor beside them.

    - quantised: whether the kernel at a path is held in NF4. Each tensor is quantised as soon as it is read.
    - place: the shardings of the params from their shapes. With them this host reads, quantises and holds what its
      devices hold, and nothing else.

    Raises SboraxError for a missing, unused or ill-shaped tensor, and for one that cannot be quantised.
    """
    available, names = tensors.names(), set[str]()
    where = jax.tree.map(lambda _: None, shapes) if place is None else place(_memory_shapes(shapes, quantised))

    def stack_of(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return stack_shape(tensors.name(row(path)), path, shape)

    def check_leaf(path: str, want: jax.ShapeDtypeStruct) -> None:
        shape = want.shape[len(stack_of(path, want.shape)) :]
        for name in tensor_names(tensors.name(row(path)), path, want.shape):
            if name not in available:
                raise SboraxError(f"{tensors.where}: tensor {name!r} is missing")
            names.add(name)
            stored = tensors.shape(name)[:: -1 if row(path).transposed else 1]
            if stored != shape:
                raise SboraxError(f"{tensors.where}: {name} gives {path} shape {stored}, config says {shape}")

    # Check all leaves before memory is allocated for the shapes of a config.
    map_with_path(check_leaf, shapes)

    def read_leaf(path: str, want: jax.ShapeDtypeStruct, sharding: Any) -> Any:
        entry, stack = row(path), stack_of(path, want.shape)

        def read() -> Iterator[tuple[str, np.ndarray]]:
            for name in tensor_names(tensors.name(entry), path, want.shape):
                tensor = tensors.read(name)
                yield name, tensor.T if entry.transposed else tensor

        if sharding is not None:
            return read_sharded(zip(np.ndindex(*stack), read(), strict=True), want, sharding)
        if quantised(path):
            return _quantised(path, want, read(), stack)
        target = aligned(want.shape, want.dtype)
        for place, (_, tensor) in zip(np.ndindex(*stack), read(), strict=True):
            target[place] = tensor
        return jax.device_put(target)

    params = map_with_path(read_leaf, shapes, where)
    unused = sorted(available - names - _tied_copy(config, params, tensors, available))
    if unused:
        raise SboraxError(f"{tensors.where}: {len(unused)} tensors the model does not use, such as {unused[0]!r}")
    return params


def _memory_shapes(shapes: dict[str, Any], quantised: Callable[[str], bool]) -> dict[str, Any]:
    """The shapes in memory: weights in 4 bits are an `NF4Array`."""

    def held_leaf(path: str, want: jax.ShapeDtypeStruct) -> Any:
        if not quantised(path):
            return want
        _check(path, want)
        return jax.eval_shape(quantise, want)

    return map_with_path(held_leaf, shapes)


def _check(path: str, want: jax.ShapeDtypeStruct) -> None:
    try:
        check(want.shape, want.dtype)
    except SboraxError as error:
        raise SboraxError(f"quant: {path}: {error}") from None


def _quantised(
    path: str, want: jax.ShapeDtypeStruct, matrices: Iterator[tuple[str, np.ndarray]], stack: tuple[int, ...]
) -> NF4Array:
    """`quantise` of a stack that is never dense in memory: one matrix at a time."""
    _check(path, want)
    target: Any = None
    for place, (name, tensor) in zip(np.ndindex(*stack), matrices, strict=True):
        try:
            matrix = quantise_numpy(tensor.astype(want.dtype, copy=False))
        except SboraxError as error:
            raise SboraxError(f"quant: {name}: {error}") from None
        if target is None:
            target = jax.tree.map(lambda leaf: aligned((*stack, *np.shape(leaf)), leaf.dtype), matrix)
        for slots, leaf in zip(jax.tree.leaves(target), jax.tree.leaves(matrix), strict=True):
            slots[place] = leaf
    return jax.device_put(target)


def _tied_copy(
    config: DecoderConfig, params: dict[str, Any], tensors: AbstractTensors, available: frozenset[str]
) -> set[str]:
    """The head that some tied checkpoints store beside the embedding, if the two are equal."""
    name = tensors.name(row("lm_head/kernel"))
    if not config.tie_word_embeddings or name not in available:
        return set()
    dtype = params["embed_tokens"]["embedding"].dtype
    table = tensors.read(tensors.name(row("embed_tokens/embedding"))).astype(dtype, copy=False)
    if not np.array_equal(tensors.read(name).astype(dtype, copy=False), table):
        raise SboraxError(f"{tensors.where}: tie_word_embeddings is true but {name} differs from the embedding")
    return {name}
