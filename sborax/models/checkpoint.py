"""Files of named tensors, read one tensor at a time."""

import abc
import dataclasses
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
from sborax.config.documents import check_plain, parse, read_object, shown
from sborax.config.terminal import say
from sborax.models.decoder import DecoderConfig
from sborax.models.names import DERIVED, Row, row, unlayered
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
        """Every tensor there is, but those that follow from the config."""

    @abc.abstractmethod
    def name(self, entry: Row) -> str:
        """The pattern by which this kind of file names a tensor."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; reads none of it."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor."""


class Entry(NamedTuple):
    """One tensor of a shard: the format's name of its dtype, and where its data begin, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclasses.dataclass(frozen=True)
class Safetensors(AbstractTensors):
    """One or many `.safetensors` shards, and which tensor lies where."""

    where: str
    entries: Mapping[str, Entry]

    def names(self) -> frozenset[str]:
        """Every tensor but the rotary frequencies of old checkpoints."""
        return frozenset(name for name in self.entries if not DERIVED.fullmatch(name))

    def name(self, entry: Row) -> str:
        """Hugging Face's name."""
        return entry.hf

    def shape(self, name: str) -> tuple[int, ...]:
        """As the header says, within the bounds of the file."""
        return self.entries[name].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file, whose pages it is: the reader of safetensors would make a copy."""
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise SboraxError(f"{entry.file}: {name} has dtype {entry.dtype}; known: {', '.join(FLOATS)}")
        return np.memmap(entry.file, jnp.dtype(FLOATS[entry.dtype]), "r", entry.start, entry.shape)


def _entries(file: Path) -> dict[str, Entry]:
    check_plain(file)
    try:
        with safe_open(file, framework="numpy") as shard:
            names = shard.keys()
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            # Of a size that `safe_open` has found to be sound.
            header = parse(stream.read(length), f"{file}: header")
    except (SafetensorError, OSError) as failure:
        raise SboraxError(f"{file}: not a readable safetensors file ({failure}); fetch it again") from failure
    listed = {name: header[name] for name in names}
    return {
        name: Entry(file, one["dtype"], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
        for name, one in listed.items()
    }


def open_safetensors(directory: Path) -> Safetensors:
    """The directory's `model.safetensors`, else the shards that its index lists: the order of transformers.

    An index that is not read, and lists other files, is reported in a line on stderr.
    Raises SboraxError for a missing, truncated or unlisted shard.
    """
    index, single = directory / INDEX, (directory / SINGLE).exists()
    listed = _weight_map(index) if index.exists() and not single else None
    if single and index.exists() and not _lists_only(index, SINGLE):
        say(f"{directory}: {SINGLE} is read, as by transformers; {INDEX} lists other files", file=sys.stderr)
    shards = [SINGLE] if listed is None else sorted(set(listed.values()))
    entries: dict[str, Entry] = {}
    for shard in shards:
        if not (directory / shard).exists():
            raise SboraxError(f"{directory / shard}: missing; weights must be in safetensors format")
        entries |= _entries(directory / shard)
    if listed is not None and (lost := sorted(listed.keys() - entries.keys())):
        raise SboraxError(f"{directory}: tensor {lost[0]!r} is in {INDEX} but in no shard")
    return Safetensors(str(directory), entries)


def _weight_map(index: Path) -> dict[str, str]:
    """Which shard holds which tensor, as an index says."""
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict):
        raise SboraxError(f"{index}: not an index with a weight_map")
    for shard in listed.values():
        # A name with a folder in it could lead anywhere.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise SboraxError(f"{index}: {shown(shard)} is not the name of a safetensors file beside it")
    return listed


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
    """The params shaped like `shapes`, read tensor by tensor: the host holds one stacked tensor beside them.

    quantised: which paths are held in NF4, each tensor quantised as soon as it is read. place: the shardings of the
        params from their shapes; then this host reads, quantises and holds what its devices hold, and nothing else.
    Raises SboraxError for a missing, unused or ill-shaped tensor, and for one that cannot be quantised.
    """
    available, used = tensors.names(), set[str]()
    where = jax.tree.map(lambda _: None, shapes) if place is None else place(_held(shapes, quantised))

    def is_stacked(path: str) -> bool:
        return "{layer}" in tensors.name(row(path)) and unlayered(path)[1] is None

    def named(path: str) -> Iterator[str]:
        pattern = tensors.name(row(path))
        for layer in range(config.num_hidden_layers) if is_stacked(path) else [unlayered(path)[1]]:
            yield pattern.format(layer=layer)

    def fit(keys: Any, want: jax.ShapeDtypeStruct) -> None:
        path = "/".join(key.key for key in keys)
        one = want.shape[1:] if is_stacked(path) else want.shape
        for name in named(path):
            if name not in available:
                raise SboraxError(f"{tensors.where}: tensor {name!r} is missing")
            used.add(name)
            found = tensors.shape(name)[:: -1 if row(path).transposed else 1]
            if found != one:
                raise SboraxError(f"{tensors.where}: {name} gives {path} shape {found}, config says {one}")

    # All of it before anything is allocated by what a config says.
    jax.tree_util.tree_map_with_path(fit, shapes)

    def fill(keys: Any, want: jax.ShapeDtypeStruct, lies: Any) -> Any:
        path = "/".join(key.key for key in keys)
        entry, stacked = row(path), is_stacked(path)

        def read() -> Iterator[tuple[str, np.ndarray]]:
            for name in named(path):
                found = tensors.read(name)
                yield name, found.T if entry.transposed else found

        if lies is not None:
            own_layers = enumerate(read()) if stacked else ((None, one) for one in read())
            return read_sharded(own_layers, want, lies)
        if quantised(path):
            return _quantised(path, want, read(), stacked)
        target = aligned(want.shape, want.dtype)
        for slot, (_, found) in zip(target if stacked else [target], read(), strict=True):
            slot[...] = found
        return jax.device_put(target)

    params = jax.tree_util.tree_map_with_path(fill, shapes, where)
    unused = sorted(available - used - _tied_copy(config, params, tensors, available))
    if unused:
        raise SboraxError(f"{tensors.where}: {len(unused)} tensors the model does not use, such as {unused[0]!r}")
    return params


def _held(shapes: dict[str, Any], quantised: Callable[[str], bool]) -> dict[str, Any]:
    """The shapes of what is held: those in 4 bits as `NF4Array`."""

    def one(keys: Any, want: jax.ShapeDtypeStruct) -> Any:
        path = "/".join(key.key for key in keys)
        if not quantised(path):
            return want
        _check(path, want)
        return jax.eval_shape(quantise, want)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _check(path: str, want: jax.ShapeDtypeStruct) -> None:
    try:
        check(want.shape, want.dtype)
    except SboraxError as error:
        raise SboraxError(f"quant: {path}: {error}") from None


def _quantised(
    path: str, want: jax.ShapeDtypeStruct, layers: Iterator[tuple[str, np.ndarray]], stacked: bool
) -> NF4Array:
    """What `quantise` makes of the dense tensor, which never exists: one layer at a time."""
    _check(path, want)
    target: Any = None
    depth = want.shape[:1] if stacked else (1,)
    for number, (name, found) in enumerate(layers):
        try:
            one = quantise_numpy(found.astype(want.dtype, copy=False))
        except SboraxError as error:
            raise SboraxError(f"quant: {name}: {error}") from None
        if target is None:
            target = jax.tree.map(lambda leaf: aligned((*depth, *np.shape(leaf)), leaf.dtype), one)
        for slots, leaf in zip(jax.tree.leaves(target), jax.tree.leaves(one), strict=True):
            slots[number] = leaf
    return jax.device_put(target if stacked else jax.tree.map(lambda leaf: leaf[0], target))


def _tied_copy(
    config: DecoderConfig, params: dict[str, Any], tensors: AbstractTensors, available: frozenset[str]
) -> set[str]:
    """The head that some tied checkpoints store a second time, if it equals the embedding."""
    name = tensors.name(row("lm_head/kernel"))
    if not config.tie_word_embeddings or name not in available:
        return set()
    dtype = params["embed_tokens"]["embedding"].dtype
    table = tensors.read(tensors.name(row("embed_tokens/embedding"))).astype(dtype, copy=False)
    if not np.array_equal(tensors.read(name).astype(dtype, copy=False), table):
        raise SboraxError(f"{tensors.where}: tie_word_embeddings is true but {name} differs from the embedding")
    return {name}
