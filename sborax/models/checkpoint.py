"""Files of named tensors, read one tensor at a time."""

import abc
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sborax.core import SboraxError
from sborax.models.config import LlamaConfig
from sborax.models.names import DERIVED, Row, row, unlayered

INDEX = "model.safetensors.index.json"


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
    def read(self, name: str) -> np.ndarray:
        """One tensor."""


@dataclasses.dataclass(frozen=True)
class Safetensors(AbstractTensors):
    """One or many `.safetensors` shards. `files` says which shard holds which tensor."""

    where: str
    files: Mapping[str, Path]

    def names(self) -> frozenset[str]:
        """Every tensor but the rotary frequencies of old checkpoints."""
        return frozenset(name for name in self.files if not DERIVED.fullmatch(name))

    def name(self, entry: Row) -> str:
        """Hugging Face's name."""
        return entry.hf

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file."""
        with _opened(self.files[name]) as shard:
            return shard.get_tensor(name)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as failure:
        raise SboraxError(f"{file}: not a readable safetensors file ({failure}); fetch it again") from failure


def open_safetensors(directory: Path) -> Safetensors:
    """The shards that the directory's index lists, or its `model.safetensors`.

    Raises SboraxError for a missing, truncated or unlisted shard.
    """
    index = directory / INDEX
    if index.exists():
        try:
            listed = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as failure:
            raise SboraxError(f"{index}: not an index with a weight_map ({failure!r})") from failure
        shards = sorted(set(listed.values()))
    else:
        listed, shards = None, ["model.safetensors"]
    files: dict[str, Path] = {}
    for shard in shards:
        if not (directory / shard).exists():
            raise SboraxError(f"{directory / shard}: missing; weights must be in safetensors format")
        with _opened(directory / shard) as opened:
            files |= dict.fromkeys(opened.keys(), directory / shard)
    if listed is not None and (lost := sorted(listed.keys() - files.keys())):
        raise SboraxError(f"{directory}: tensor {lost[0]!r} is in {INDEX} but in no shard")
    return Safetensors(str(directory), files)


def load_params(config: LlamaConfig, shapes: dict[str, Any], tensors: AbstractTensors) -> dict[str, Any]:
    """The params shaped like `shapes`, read tensor by tensor: the host holds one stacked tensor beside them.

    Raises SboraxError for a missing, unused or ill-shaped tensor.
    """
    available, used = tensors.names(), set[str]()

    def fill(keys: Any, want: jax.ShapeDtypeStruct) -> jax.Array:
        path = "/".join(key.key for key in keys)
        entry, own = row(path), unlayered(path)[1]
        pattern = tensors.name(entry)
        stacked = "{layer}" in pattern and own is None
        target = np.empty(want.shape, want.dtype)
        for layer in range(config.num_hidden_layers) if stacked else [own]:
            name = pattern.format(layer=layer)
            if name not in available:
                raise SboraxError(f"{tensors.where}: tensor {name!r} is missing")
            used.add(name)
            found = tensors.read(name)
            slot = target[layer] if stacked else target
            found = found.T if entry.transposed else found
            if found.shape != slot.shape:
                raise SboraxError(f"{tensors.where}: {name} gives {path} shape {found.shape}, config says {slot.shape}")
            slot[...] = found
        return jnp.asarray(target)

    params = jax.tree_util.tree_map_with_path(fill, shapes)
    unused = sorted(available - used - _tied_copy(config, params, tensors, available))
    if unused:
        raise SboraxError(f"{tensors.where}: {len(unused)} tensors the model does not use, such as {unused[0]!r}")
    return params


def _tied_copy(
    config: LlamaConfig, params: dict[str, Any], tensors: AbstractTensors, available: frozenset[str]
) -> set[str]:
    """The head that some tied checkpoints store a second time, if it equals the embedding."""
    name = tensors.name(row("lm_head/kernel"))
    if not config.tie_word_embeddings or name not in available:
        return set()
    table = np.asarray(params["embed_tokens"]["embedding"])
    if not np.array_equal(tensors.read(name).astype(table.dtype), table):
        raise SboraxError(f"{tensors.where}: tie_word_embeddings is true but {name} differs from the embedding")
    return {name}
