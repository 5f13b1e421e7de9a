"""The config and the tensors of a PEFT adapter directory, in the form that PEFT gives them today."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sborax.adapters.core import SboraxError
from sborax.interop.peft_layout import CONFIG, PREFIX, TENSORS, HFLayout
from sborax.interop.peft_row import Completed

LARGEST_CONFIG = 1 << 22
"""In bytes."""
FLOATS = ("F32", "F16", "BF16", "F64")
INTEGERS = ("I32", "I64")
OLD_NAMES = {"BONE": ("MISS", ".bone_", ".miss_")}
"""Kinds that PEFT has renamed: the new name, and what the names of tensors contain, before and after."""

POOLED = "use_qalora"
"""The config field of QA-LoRA. On a base that is not GPTQ's, PEFT ignores it and trains a plain LoRA."""
ONE_RANK = ("HIRA",)
"""Kinds whose rank PEFT takes from `r`, ignoring `rank_pattern`. Earlier exports of sborax followed `rank_pattern`."""


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of an open file, by their names today.

    - file: as `safetensors` opens it.
    - names: of every tensor that has not been read, its name in the file.
    - derived: tensors that the file has in another form.
    """

    file: Any
    names: Mapping[str, str]
    derived: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, file: Any) -> "Tensors":
        """All tensors of a file."""
        return cls(file, {name: name for name in file.keys()}, {})  # noqa: SIM118

    def without(self, names: Collection[str]) -> "Tensors":
        """The tensors that do not have these names."""
        return dataclasses.replace(self, names={name: key for name, key in self.names.items() if name not in names})

    def only(self, names: Collection[str]) -> "Tensors":
        """The tensors that have these names."""
        return self.without(self.names.keys() - names)

    def completed(self, completed: Completed) -> "Tensors":
        """The tensors with what some of them are made of."""
        return dataclasses.replace(self.without(completed.spent), derived=completed.tensors)

    def stored(self, name: str) -> np.ndarray:
        """A tensor in its dtype. Raises SboraxError if the file lacks it."""
        if name not in self.names:
            raise SboraxError(f"tensor {name!r} is missing from {TENSORS}")
        return np.asarray(self.file.get_tensor(self.names[name]))

    def read(self, name: str) -> np.ndarray:
        """A tensor, float32 unless it holds integers."""
        if name in self.derived:
            return self.derived[name]
        tensor = self.stored(name)
        # A flat index may be larger than float32 can tell from the next one.
        return tensor if tensor.dtype.kind in "iu" else tensor.astype(np.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that the file has."""
        return tuple(self.file.get_slice(self.names[name]).get_shape())

    def headers(self) -> dict[str, Any]:
        """Shapes and dtypes by name."""
        return {name: self.file.get_slice(key) for name, key in self.names.items()}

    def compare(self, expected: Mapping[str, tuple[int, ...]], indices: Collection[str] = ()) -> None:
        """Raise SboraxError unless these are the expected tensors, with their shapes and a legal dtype.

        Tensors that are made of others are not compared.

        - expected: shapes by name.
        - indices: names of tensors that hold indices.
        """
        required, present = expected.keys() - self.derived.keys(), self.names.keys()
        missing, surplus = sorted(required - present), sorted(present - required)
        if missing:
            raise SboraxError(f"{len(missing)} tensors are missing from {TENSORS}, such as {missing[0]!r}")
        if surplus:
            raise SboraxError(
                f"{len(surplus)} tensors in {TENSORS} have no place in this model, such as {surplus[0][:120]!r}"
            )
        for name, header in self.headers().items():
            if tuple(header.get_shape()) != expected[name]:
                raise SboraxError(
                    f"{name} has shape {tuple(header.get_shape())}, config and model say {expected[name]}"
                )
            if header.get_dtype() not in ((*FLOATS, *INTEGERS) if name in indices else FLOATS):
                raise SboraxError(f"{name} is of dtype {header.get_dtype()}, not a floating one")


def read_config(path: Path) -> Mapping[str, Any]:
    """The config at `path`. Raises SboraxError for anything but a JSON object of a sane size."""
    if not path.is_file():
        raise SboraxError(f"{CONFIG} is missing; is this a PEFT adapter directory?")
    if path.stat().st_size > LARGEST_CONFIG:
        raise SboraxError(f"{CONFIG} is larger than {LARGEST_CONFIG} bytes")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as failure:
        raise SboraxError(f"{CONFIG} is not JSON ({str(failure)[:80]})") from None
    if not isinstance(config, dict):
        raise SboraxError(f"{CONFIG} is not a JSON object")
    return config


def open_tensors(path: Path) -> Any:
    """The open safetensors file at `path`. Raises SboraxError if there is none, or it is broken."""
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        advice = "; pickled weights are not read, save it again with safe_serialization=True" if pickled else ""
        raise SboraxError(f"{TENSORS} is missing{advice}")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as failure:
        raise SboraxError(f"{TENSORS} is not a readable safetensors file ({str(failure)[:80]})") from None


def in_todays_form(config: Mapping[str, Any], tensors: Tensors, layout: HFLayout) -> tuple[Mapping[str, Any], Tensors]:
    """A config and tensors of earlier versions of PEFT and sborax as they would be written today."""
    headers = tensors.headers()
    if str(config.get("peft_type")) in OLD_NAMES:
        kind, old, new = OLD_NAMES[config["peft_type"]]
        config = {**config, "peft_type": kind}
        # Before PEFT's release of BONE the block-affine form was the default. Only the shape of the tensors shows it.
        if any(len(header.get_shape()) == 3 for header in headers.values()):
            config["init_weights"] = "bat"
        names = {name.replace(old, new): key for name, key in tensors.names.items()}
        tensors = dataclasses.replace(tensors, names=names)
    if config.get("peft_type") in ONE_RANK and not _ragged(headers):
        config = {**config, "rank_pattern": {}}
    if config.get(POOLED) and config.get("qalora_group_size") != 1 and _unpooled(headers, layout):
        config = {**config, POOLED: False}
    return config, tensors


def _ragged(headers: Mapping[str, Any]) -> bool:
    """Whether modules differ in rank: the smaller side of tensors with the same last name."""
    ranks: dict[str, set[int]] = {}
    for name, header in headers.items():
        ranks.setdefault(name.rpartition(".")[2], set()).add(min(header.get_shape(), default=0))
    return any(len(sizes) > 1 for sizes in ranks.values())


def _unpooled(headers: Mapping[str, Any], layout: HFLayout) -> bool:
    """Whether a LoRA reads every input, and not groups of them, which PEFT pools on GPTQ bases alone."""
    for name, header in headers.items():
        slot = layout.slots.get(name.removeprefix(PREFIX).removesuffix(".lora_A.weight") + ".weight")
        if name.endswith(".lora_A.weight") and slot is not None and len(shape := header.get_shape()) == 2:
            return shape[1] == layout.shape(slot.path)[0]
    return False
