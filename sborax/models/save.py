"""Models written as Hugging Face directories that transformers loads."""

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sborax.adapters import core
from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import flatten
from sborax.models.checkpoint import INDEX
from sborax.models.families import family_of
from sborax.models.language_model import LanguageModel, Params
from sborax.models.names import fused_tensors, row, stack_shape, tensor_names

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The safetensors format's names of numpy's dtypes."""


class Tensor(NamedTuple):
    """One tensor to be written. `read` fetches it when it is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def save_hf(
    directory: str | os.PathLike[str], model: LanguageModel, params: Params, *, shard_bytes: int = 5_000_000_000
) -> None:
    """Write `params` as a Hugging Face directory: `config.json`, tokenizer files, `model*.safetensors`.

    Tensors are fetched and written one by one. Quantised weights are written dense. The directory may be remote.

    - shard_bytes: largest size of one file, in bytes (transformers' 5 GB).

    Raises SboraxError if the directory already holds a model.
    """
    place = epath.Path(directory)
    if place.exists() and any(place.glob("*.safetensors")):
        raise SboraxError(f"{directory}: already holds a model; choose another directory or remove it")
    place.mkdir(parents=True, exist_ok=True)
    fused = fused_tensors(family_of(model.config.model_type).fused, params)
    shards = _shards(_joined(list(_tensors(model, params)), fused), shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(place / name, shard)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    if len(shards) > 1:
        total = sum(tensor.size for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (place / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    raw = model.config.to_hf() | {"torch_dtype": model.module.dtype.name}
    (place / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if model.tokenizer is not None:
        _write_tokenizer(place, model.tokenizer)


def write_safetensors(file: epath.Path, tensors: list[Tensor]) -> None:
    """Write one `.safetensors` file, under another name until it is complete.

    safetensors' own writer needs all tensors of a file in memory at once, and writes local files only.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            stream.write(np.ascontiguousarray(tensor.read()).tobytes())
    partial.replace(file)


def _tensors(model: LanguageModel, params: Params) -> Iterator[Tensor]:
    """Every tensor of `params` under Hugging Face's name, leaf by leaf."""
    leaves = flatten(params)
    if list(flatten(model.abstract())) != list(leaves):
        raise SboraxError("params: not the param tree of this model")
    renamed = family_of(model.config.model_type).files
    for path, leaf in leaves.items():
        entry = row(path)
        pattern = renamed.get(entry.ours, entry.hf)
        stack = stack_shape(pattern, path, leaf.shape)
        shape = tuple(leaf.shape[len(stack) :])
        for place, name in zip(np.ndindex(*stack), tensor_names(pattern, path, leaf.shape), strict=True):

            def read(leaf: Any = leaf, place: tuple[int, ...] = place, flip: bool = entry.transposed) -> np.ndarray:
                part = jax.tree.map(lambda leaf: leaf[place], leaf)
                array = np.asarray(core.dense(part) if core.is_weight(part) else part)
                return array.T if flip else array

            yield Tensor(name, np.dtype(leaf.dtype).name, shape[::-1] if entry.transposed else shape, read)


def _joined(tensors: list[Tensor], fused: Mapping[str, Mapping[str, int]]) -> list[Tensor]:
    """`tensors`, with projections that share a module of the file in one tensor, output after output.

    fused: the names of the parts of each such tensor, in order.
    """
    named = {tensor.name: tensor for tensor in tensors}
    joined: dict[str, Tensor] = {}
    for name, parts in fused.items():
        group = [named[part] for part in parts]

        def read(group: list[Tensor] = group) -> np.ndarray:
            return np.concatenate([tensor.read() for tensor in group])

        shape = (sum(tensor.shape[0] for tensor in group), *group[0].shape[1:])
        joined |= dict.fromkeys(parts, Tensor(name, group[0].dtype, shape, read))
    entries = (joined.get(tensor.name, tensor) for tensor in tensors)
    return list({tensor.name: tensor for tensor in entries}.values())


def _shards(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards


def _write_tokenizer(place: epath.Path, tokenizer: Any) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for file in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            text, target = file.read_text(), place / file.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.name == "tokenizer_config.json":
                # transformers before version 5 does not know the class by its new name.
                text = json.dumps(json.loads(text) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"
            target.write_text(text)
