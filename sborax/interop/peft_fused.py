"""PEFT's files for models whose files hold several projections in one module, such as Phi-3's `qkv_proj`.

Here these projections are kernels of their own, each with its adapter. PEFT adapts the module as a whole. LoRA and DoRA
are taken apart and put together exactly: parts of such a module share `a`, and each has its columns of `b` and of the
magnitude. Parts with different `a` are put side by side, at the sum of their ranks.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sborax.adapters.core import SboraxError
from sborax.interop.peft_base import kind_of
from sborax.interop.peft_layout import PREFIX, TENSORS, HFLayout
from sborax.interop.peft_row import Row
from sborax.interop.peft_table import row_for
from sborax.interop.peft_targets import naming, pattern_for, targeted, value_for
from sborax.models.names import fused_module

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields of a config that choose modules."""

Fused = Mapping[str, tuple[str, ...]]
"""`Family.fused`."""


class Header(NamedTuple):
    """What the header of a file says of a tensor, with the methods of a safetensors slice."""

    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype


class Tensors(NamedTuple):
    """Some tensors of a file, whole or in part, with the methods of an open safetensors file.

    places: by name, the tensor in the file and its first and last row; None for all rows.
    """

    file: Any
    places: Mapping[str, tuple[str, slice | None]]

    def keys(self) -> list[str]:
        return list(self.places)

    def get_slice(self, name: str) -> Header:
        stored, rows = self.places[name]
        header = self.file.get_slice(stored)
        shape = tuple(header.get_shape())
        return Header(shape if rows is None else (rows.stop - rows.start, *shape[1:]), header.get_dtype())

    def get_tensor(self, name: str) -> np.ndarray:
        stored, rows = self.places[name]
        tensor = self.file.get_tensor(stored)
        return tensor if rows is None else tensor[rows]


def file_modules(modules: Iterable[str], fused: Fused) -> dict[str, tuple[str, ...]]:
    """The modules of transformers' model, and the projections that each holds."""
    by_module = {}
    for module in modules:
        name, parts = fused_module(module, fused) or (module, (module,))
        by_module[name] = parts
    return by_module


def _outputs(module: str, layout: HFLayout) -> int:
    return layout.shape(layout.place(module)[0])[1]


def _refuse_saved(config: Mapping[str, Any], joint: Iterable[str]) -> None:
    """Raise SboraxError if `modules_to_save` names a module among `joint`."""
    for name in config.get("modules_to_save") or []:
        for module in joint:
            if isinstance(name, str) and module.endswith(name):
                raise SboraxError(
                    f"modules_to_save: {name[:60]} holds several projections in PEFT's model; merge and save the model"
                )


def taken_apart(config: Mapping[str, Any], file: Any, layout: HFLayout, fused: Fused) -> tuple[Mapping[str, Any], Any]:
    """`(config, file)` of an adapter with a module for each projection, from those of an adapter of fused modules.

    Args:
    - config: the fields of `adapter_config.json`.
    - file: the open file of tensors.
    - layout: the model's parameters under the names of projections.
    - fused: the modules that hold several projections; empty for most families, and then nothing changes.

    Raises SboraxError for a kind of adapter that acts on such a module as a whole.
    """
    if not fused or kind_of(config) is not None or not config.get("target_modules"):
        return config, file
    by_module = file_modules(layout.adaptable, fused)
    joint = {module: parts for module, parts in by_module.items() if len(parts) > 1}
    _refuse_saved(config, joint)
    targets = targeted(config, list(by_module))
    row = row_for(config)
    places: dict[str, tuple[str, slice | None]] = {name: (name, None) for name in file.keys()}  # noqa: SIM118
    for module in targets:
        if module in joint:
            _check_kind(module, joint[module], row, "merge it in PEFT and load the model that it saves")
            _take_apart(module, joint[module], places, file, layout, MAGNITUDE in [t.suffix for t in row.tensors])
    config = {name: value for name, value in config.items() if name not in CHOOSING} | {
        "target_modules": [part for module in targets for part in by_module.get(module, (module,))]
    }
    if any(module in joint for module in targets):
        for name, pattern in row.patterns.items():
            default = config.get(name, row.defaults[name])
            values = {module: value_for(config, pattern, module, default, row.pattern_form) for module in targets}
            config[pattern] = {
                part: value for module, value in values.items() for part in by_module.get(module, (module,))
            }
    return config, Tensors(file, places)


def _check_kind(module: str, parts: tuple[str, ...], row: Row, advice: str) -> None:
    plain = all(tensor.suffix in (A, B, MAGNITUDE) and tensor.leaf in ("a", "b", "m") for tensor in row.tensors)
    if row.peft_type != "LORA" or row.method.rewrites_base or not plain:
        short = ", ".join(part.rpartition(".")[2] for part in parts)
        raise SboraxError(
            f"{module} holds {short}, and only LoRA and DoRA of such a module can be split by projection, "
            f"not {row.method.__name__}; {advice}"
        )


def _take_apart(
    module: str,
    parts: tuple[str, ...],
    places: dict[str, tuple[str, slice | None]],
    file: Any,
    layout: HFLayout,
    magnitude: bool,
) -> None:
    """Put the tensors of each part into `places`, instead of those of the module."""
    outputs = [_outputs(part, layout) for part in parts]
    for suffix in (A, B, *([MAGNITUDE] if magnitude else [])):
        name = f"{PREFIX}{module}.{suffix}"
        if places.pop(name, None) is None:
            raise SboraxError(f"tensor {name!r} is missing from {TENSORS}")
        shape = tuple(file.get_slice(name).get_shape())
        if suffix != A and shape[:1] != (sum(outputs),):
            raise SboraxError(f"{name} has shape {shape}, the model has {sum(outputs)} outputs there")
        stop = 0
        for part, size in zip(parts, outputs, strict=True):
            start, stop = stop, stop + size
            places[f"{PREFIX}{part}.{suffix}"] = (name, None if suffix == A else slice(start, stop))


def put_together(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    fields: Mapping[str, Mapping[str, Any]],
    row: Row,
    layout: HFLayout,
    fused: Fused,
) -> tuple[dict[str, Any], dict[str, np.ndarray], int]:
    """`(config, tensors, number of modules)` of an adapter of fused modules: the inverse of `taken_apart`.

    Args:
    - config, tensors: those of an adapter with a module for each projection.
    - fields: the config fields of each adapted module.
    - row: the kind of the adapter.
    - layout, fused: as in `taken_apart`.

    Raises SboraxError for a kind of adapter that acts on such a module as a whole, and for DoRA on some of its parts.
    """
    by_module = file_modules(layout.adaptable, fused)
    joint = {module: parts for module, parts in by_module.items() if len(parts) > 1}
    _refuse_saved(config, [part for parts in joint.values() for part in parts])
    adapted = {module: parts for module, parts in by_module.items() if any(part in fields for part in parts)}
    named = naming(list(adapted), list(by_module), row.layered)
    config = {name: value for name, value in config.items() if name not in CHOOSING} | named
    if not adapted.keys() & joint:
        return config, dict(tensors), len(adapted)
    tensors, sizes = dict(tensors), {}
    for module, parts in adapted.items():
        if module not in joint:
            sizes[module] = {name: fields[module][name] for name in row.patterns}
            continue
        _check_kind(module, parts, row, "use as_='lora', or merge")
        by_part = {part: fields[part] for part in parts if part in fields}
        alphas = {float(field["lora_alpha"]) / field["r"] for field in by_part.values()}
        stored = {
            part: {
                suffix: tensors.pop(name)
                for suffix in (A, B, MAGNITUDE)
                if (name := f"{PREFIX}{part}.{suffix}") in tensors
            }
            for part in by_part
        }
        if len(alphas) > 1:
            for part, field in by_part.items():
                stored[part][B] = stored[part][B] * np.float32(field["lora_alpha"] / field["r"])
        joined = _put_together(module, {part: _outputs(part, layout) for part in parts}, stored)
        tensors |= {f"{PREFIX}{module}.{suffix}": tensor for suffix, tensor in joined.items()}
        rank = len(joined[A])
        alpha = alphas.pop() * rank if len(alphas) == 1 else rank
        sizes[module] = {"r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}
    for name, pattern in row.patterns.items():
        config[name], config[pattern] = pattern_for({module: values[name] for module, values in sizes.items()})
    return config, tensors, len(adapted)


def _put_together(
    module: str, outputs: Mapping[str, int], stored: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The tensors of a module from those of its adapted parts. Outputs of the other parts do not change."""
    joined = {}
    if any(MAGNITUDE in tensors for tensors in stored.values()):
        if stored.keys() != outputs.keys():
            missing = next(part for part in outputs if part not in stored)
            raise SboraxError(f"{missing} has no DoRA, and PEFT adapts {module} as a whole; adapt all of its parts")
        joined[MAGNITUDE] = np.concatenate([stored[part][MAGNITUDE] for part in outputs])
    first = next(iter(stored.values()))[A]
    if stored.keys() == outputs.keys() and all(np.array_equal(tensors[A], first) for tensors in stored.values()):
        return {A: first, B: np.concatenate([stored[part][B] for part in outputs]), **joined}
    ranks = [len(tensors[A]) for tensors in stored.values()]
    b, column = np.zeros((sum(outputs.values()), sum(ranks)), np.float32), 0
    starts = dict(zip(outputs, np.cumsum([0, *outputs.values()]).tolist(), strict=False))
    for (part, tensors), rank in zip(stored.items(), ranks, strict=True):
        b[starts[part] : starts[part] + outputs[part], column : column + rank] = tensors[B]
        column += rank
    return {A: np.concatenate([tensors[A] for tensors in stored.values()]), B: b, **joined}
