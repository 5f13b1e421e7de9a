"""Reads a PEFT adapter directory."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sborax.adapters.bank import AbstractBank
from sborax.adapters.compose import ByLayer
from sborax.adapters.core import AbstractMethod, AbstractWeight, Adapter, SboraxError
from sborax.adapters.leaves import flatten, nest, replace_leaves
from sborax.adapters.paths import Plan, Site, bank_sites, kernels
from sborax.adapters.tables import why_no_table
from sborax.adapters.tree import attach, nodes
from sborax.interop.peft_base import Kind, kind_of
from sborax.interop.peft_biases import added_biases, check_saved, stored_biases
from sborax.interop.peft_experts import FIELD, read_experts
from sborax.interop.peft_fused import taken_apart
from sborax.interop.peft_layout import (
    CONFIG,
    EMBEDDING,
    HEAD,
    PREFIX,
    TENSORS,
    TYING,
    HFLayout,
    layout_of,
    tensor_in,
    tied_copies,
    transposed_copies,
    wide,
)
from sborax.interop.peft_replication import REPLICATION, check_replication
from sborax.interop.peft_row import Completed, Fit, Row, check_types, leaf_shapes, shared_shapes
from sborax.interop.peft_table import INERT, PLAIN, SELECTING, check_options, row_for
from sborax.interop.peft_targets import saved_modules, targeted, value_for
from sborax.models.families import family_of
from sborax.models.language_model import LanguageModel
from sborax.models.names import unlayered

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


def load_peft(directory: str | os.PathLike[str], model: LanguageModel) -> tuple[Any, Any]:
    """Read a PEFT adapter directory for `model`: `(params, adapters)`.

    Reads every kind in `peft_table.TABLE`, LORA with rsLoRA, DoRA and patterns, MISS in its three forms, and old BONE
    files, from safetensors only. PiSSA and OLoRA take their part of the base from `model.params` again. The weights of
    `modules_to_save` and the biases that PEFT trained are in `params`. LN_TUNING, BEFT and TRAINABLE_TOKENS have no
    adapters and change `params` alone.

    A file with `layer_replication` is for a deeper model: give the one that `replicate_layers` makes of its base.

    Raises SboraxError for anything missing, superfluous, of a wrong shape or unsupported.
    """
    place = Path(directory)
    try:
        return _load(place, model)
    except SboraxError as failure:
        raise SboraxError(f"{place}: {failure}") from None


def _load(place: Path, model: LanguageModel) -> tuple[Any, Any]:
    config, file = _read_config(place / CONFIG), _open(place / TENSORS)
    layout = layout_of(model.params)
    with file as stored:
        config, file = taken_apart(config, stored, layout, family_of(model.config.model_type).fused)
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        names = dict(zip(headers, headers, strict=True))
        layout = dataclasses.replace(layout, shared=config.get(TYING) is True)
        if str(config.get("peft_type")) in OLD_NAMES:
            config, names = _modern(config, headers)
        kind = kind_of(config)
        if kind is not None:
            return _changed_base(kind, config, headers, file, layout, model.params), {}
        if config.get("peft_type") in ONE_RANK and not _ragged(headers):
            config = {**config, "rank_pattern": {}}
        if config.get(POOLED) and config.get("qalora_group_size") != 1 and _unpooled(headers, layout):
            config = {**config, POOLED: False}
        listed, config = config, {**config, FIELD: None}
        row = row_for(config)
        if config.get(REPLICATION):
            check_replication(row, config[REPLICATION], model)
        experts = None
        if listed.get(FIELD):
            if row is not PLAIN:
                raise SboraxError(f"{FIELD} is read of plain LoRA alone, and this is {config.get('peft_type')}")
            experts = read_experts(listed, model.params, lambda module: _fit(row, config, module, None))
        modules = [] if experts and not config.get("target_modules") else _targets(config, layout)
        saved = saved_modules(config, layout.modules)
        check_saved(config, layout, saved)
        tied = {PREFIX + copy: PREFIX + name for copy, name in tied_copies(layout, saved).items()}
        if tied and config.get(TYING) is not True:
            raise SboraxError(
                f"modules_to_save has the embedding, to which the head is tied here and, without {TYING}, is not in "
                "PEFT; merge the adapter there and load the model that it saves"
            )
        if row.method.rewrites_base:
            _check_dense(row, modules, layout)
        fits = _fits(row, config, modules, layout)
        expected = _expected(row, fits, layout) if fits else {}
        expected |= experts.shapes if experts else {}
        # An allocator may have pruned all ranks of a module. Its tensors are empty, and it gets no adapter.
        adapted = {module: fit for module, fit in fits.items() if fit.method.rank != 0}
        turned = {copy: name for copy, name in transposed_copies(layout, expected).items() if copy in names}
        copies = {copy for tensor in row.tensors for copy in tensor.copies(fits)} | tied.keys() | turned.keys()
        turned = {names[copy]: name for copy, name in turned.items()}
        heads = {copy: names[copy] for copy in tied if copy in names}
        names = {name: stored for name, stored in names.items() if name not in copies}
        added = added_biases(config, layout, fits)
        expected |= {name: shape for name, (_, _, shape) in added.items()}
        base = _base_tensors(layout, saved, modules, names, stored_biases(config, layout, modules))
        completed = _completed(row, config, fits, layout, names, file)
        names = {name: stored for name, stored in names.items() if name not in completed.spent}
        expected = {name: shape for name, shape in expected.items() if name not in completed.tensors}
        places = tuple(f".{tensor.suffix}" for tensor in row.tensors if tensor.places or tensor.into)
        _compare({**expected, **{PREFIX + key: shape for key, (_, shape) in base.items()}}, names, headers, places)

        def read(name: str) -> np.ndarray:
            if name in completed.tensors:
                return completed.tensors[name]
            tensor = np.asarray(file.get_tensor(names[name]))
            # A flat index may be larger than float32 can tell from the next one.
            return tensor if tensor.dtype.kind in "iu" else tensor.astype(np.float32)

        for copy, stored in heads.items():
            if not np.array_equal(np.asarray(file.get_tensor(stored), np.float32), read(tied[copy])):
                raise SboraxError(f"{copy} differs from the embedding that it should be tied to")
        for stored, name in turned.items():
            if not np.array_equal(np.asarray(file.get_tensor(stored), np.float32).T, read(name)):
                raise SboraxError(f"{stored} is not the transpose of {name}, to which {TYING} ties it")
        new = {}
        for key, (name, _) in base.items():
            value = read(PREFIX + key)
            if not np.array_equal(new.setdefault(name, value), value):
                raise SboraxError(f"{key} differs from the embedding, to which the head is tied here")
        for tensor, (name, scale, _) in added.items():
            before = new[name] if name in new else np.asarray(wide(tensor_in(layout, layout.leaves, name)))
            new[name] = before + np.float32(scale) * read(tensor)
        rewritten = row.method.rewrites_base and not row.keeps_base and HEAD in modules
        residual = new.pop(f"{HEAD}.weight", None) if rewritten else None
        params, adapters = attach(jax.random.key(0), _replaced(model.params, layout, new), _plan(adapted, layout))
        if residual is not None:
            _check_residual(residual, flatten(params)[layout.slots[f"{HEAD}.weight"].path])
        filled = {
            path: _filled_bank(node, row, adapted, layout, read)
            if isinstance(node.method, AbstractBank)
            else _filled(node, path, row, adapted, layout, read)
            for path, node in nodes(adapters).items()
        }
        filled |= experts.fill(read) if experts else {}
    return params, nest(filled)


def _changed_base(
    kind: Kind, config: Mapping[str, Any], headers: Mapping[str, Any], file: Any, layout: HFLayout, params: Any
) -> Any:
    """`params` with what the file of a kind without adapters changes."""
    read = (SELECTING - {"modules_to_save"}) | INERT.keys() | kind.reads | kind.inert.keys()
    check_options(config, read, {"modules_to_save": "this kind changes the base itself"})
    _compare(kind.expected(config, layout), dict(zip(headers, headers, strict=True)), headers)
    changed = kind.changed(config, layout, lambda name: np.asarray(file.get_tensor(name), np.float32))
    return _replaced(params, layout, changed)


def _read_config(path: Path) -> Mapping[str, Any]:
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


def _open(path: Path) -> Any:
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        advice = "; pickled weights are not read, save it again with safe_serialization=True" if pickled else ""
        raise SboraxError(f"{TENSORS} is missing{advice}")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as failure:
        raise SboraxError(f"{TENSORS} is not a readable safetensors file ({str(failure)[:80]})") from None


def _modern(config: Mapping[str, Any], headers: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """`(config, {new name: stored name})` of a kind that PEFT has renamed."""
    kind, old, new = OLD_NAMES[config["peft_type"]]
    config = {**config, "peft_type": kind}
    # Before PEFT's release of BONE the block-affine form was the default. Only the shape of the tensors shows it.
    if any(len(header.get_shape()) == 3 for header in headers.values()):
        config["init_weights"] = "bat"
    return config, {name.replace(old, new): name for name in headers}


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


def _targets(config: Mapping[str, Any], layout: HFLayout) -> list[str]:
    modules = targeted(config, layout.adaptable)
    if layout.tied and layout.shared and HEAD in modules:
        # PEFT then adapts the embedding, and ties the head's adapter to that.
        modules = list(dict.fromkeys(EMBEDDING if module == HEAD else module for module in modules))
    if not modules:
        raise SboraxError(f"target_modules matches no module of this model: {str(config['target_modules'])[:80]}")
    return modules


def _fits(row: Row, config: Mapping[str, Any], modules: list[str], layout: HFLayout) -> dict[str, Fit]:
    fits = {module: _fit(row, config, module, layout.shape(layout.place(module)[0])) for module in modules}
    for module, fit in fits.items():
        if layout.place(module)[0] not in layout.leaves or module == EMBEDDING:
            why = why_no_table(fit.method) if row.adapts(module) else "PEFT has no such adapter of an embedding"
            if why:
                raise SboraxError(
                    f"{module}: {type(fit.method).__name__} cannot adapt the table of the embedding: {why}"
                )
    return fits


def _fit(row: Row, config: Mapping[str, Any], module: str, shape: tuple[int, int] | None) -> Fit:
    """What the config says of a module. shape: its weight's, (in, out); None for one that stands for several."""
    fields = {name: config.get(name, default) for name, default in row.defaults.items()}
    for name, pattern in row.patterns.items():
        fields[name] = value_for(config, pattern, module, fields[name], row.pattern_form)
    check_types(fields, row.defaults)
    if row.by_module is not None:
        fields |= row.by_module(config, module)
    if row.by_shape is not None and shape is not None:
        fields |= row.by_shape(fields, shape)
    return row.read(fields)


def _expected(row: Row, fits: Mapping[str, Fit], layout: HFLayout) -> dict[str, tuple[int, ...]]:
    """The shape of every adapter tensor by its name in the file, as the config implies it."""
    shapes: dict[tuple[AbstractMethod, tuple[int, int]], dict[str, tuple[int, ...]]] = {}
    expected, numbers = {}, layout.numbers(fits)
    for module, fit in fits.items():
        shape = layout.shape(layout.place(module)[0])
        if (fit.method, shape) not in shapes:
            if not row.any_rank:
                try:
                    fit.method.check(shape)
                except SboraxError as failure:
                    raise SboraxError(f"{module} {shape}: {failure}") from None
            shapes[fit.method, shape] = leaf_shapes(fit.method, shape)
        leaves = shapes[fit.method, shape]
        for tensor in row.tensors:
            if tensor.leaf in leaves and not tensor.shared:
                expected[tensor.key(module, numbers)] = tensor.shape(leaves)
    return expected | shared_shapes(row, next(iter(fits.values())).method, [shape for _, shape in shapes])


def _completed(
    row: Row,
    config: Mapping[str, Any],
    fits: Mapping[str, Fit],
    layout: HFLayout,
    names: Mapping[str, str],
    file: Any,
) -> Completed:
    """The tensors that another form of the kind has no room for, made of what it has instead."""
    if row.completed is None or not fits:
        return Completed({}, frozenset())
    numbers = layout.numbers(fits)
    shapes = {module: layout.shape(layout.place(module)[0]) for module in sorted(fits, key=numbers.get)}  # type: ignore[arg-type]

    def read(name: str) -> np.ndarray:
        if name not in names:
            raise SboraxError(f"tensor {name!r} is missing from {TENSORS}")
        return np.asarray(file.get_tensor(names[name]))

    fields = {name: config.get(name, default) for name, default in row.defaults.items()}
    return row.completed(fields, shapes, read)


def _base_tensors(
    layout: HFLayout, saved: list[str], modules: list[str], names: Mapping[str, str], biases: dict[str, str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Base weights in the file: those of `modules_to_save`, of an adapted embedding or head, and `biases`.

    Returns `{name in the file: (Hugging Face's name, shape)}`.
    """
    keys = {name: name for name in layout.slots if name.rpartition(".")[0] in saved} | biases
    for module in (EMBEDDING, HEAD):
        key, shares = f"{module}.base_layer.weight", layout.tied and module == HEAD
        if PREFIX + key in names and (module in modules or (shares and layout.shared and EMBEDDING in modules)):
            keys[key] = f"{EMBEDDING if shares else module}.weight"
    tensors = {}
    for key, name in keys.items():
        slot = layout.slots[name]
        shape = layout.leaves[slot.path].shape[0 if slot.layer is None else 1 :]
        tensors[key] = (name, tuple(reversed(shape)) if slot.transposed else tuple(shape))
    return tensors


def _compare(
    expected: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    headers: Mapping[str, Any],
    places: tuple[str, ...] = (),
) -> None:
    """Raise SboraxError unless the file has exactly the expected tensors, with their shapes and a legal dtype.

    places: endings of the names of tensors that hold indices.
    """
    missing, surplus = sorted(expected.keys() - names.keys()), sorted(names.keys() - expected.keys())
    if missing:
        raise SboraxError(f"{len(missing)} tensors are missing from {TENSORS}, such as {missing[0]!r}")
    if surplus:
        raise SboraxError(
            f"{len(surplus)} tensors in {TENSORS} have no place in this model, such as {surplus[0][:120]!r}"
        )
    for name, shape in expected.items():
        header = headers[names[name]]
        if tuple(header.get_shape()) != shape:
            raise SboraxError(f"{name} has shape {tuple(header.get_shape())}, config and model say {shape}")
        if header.get_dtype() not in ((*FLOATS, *INTEGERS) if name.endswith(places) else FLOATS):
            raise SboraxError(f"{name} is of dtype {header.get_dtype()}, not a floating one")


def _check_dense(row: Row, modules: list[str], layout: HFLayout) -> None:
    """Raise SboraxError if the kernel of a module is quantised, for a method that rewrites the base."""
    for module in modules:
        if isinstance(layout.leaves.get(layout.place(module)[0]), AbstractWeight):
            raise SboraxError(
                f"{module}: {row.method.__name__} takes its start out of the base, which is quantised here and could "
                "not hold what is left; load the model unquantised"
            )


def _check_residual(stored: np.ndarray, left: Any) -> None:
    """Raise SboraxError unless the head in the file is the model's head less its factors, to half precision.

    Args:
    - stored: the head's weight in the file, (out, in).
    - left: the model's kernel after the factors were taken out, (in, out).
    """
    if np.abs(stored.T - np.asarray(left)).max() > 1e-2 * np.abs(stored).max():
        raise SboraxError(
            f"{HEAD}.base_layer.weight is not what the factors' start leaves of this model's head; it was another model"
        )


def _replaced(params: Any, layout: HFLayout, new: Mapping[str, np.ndarray]) -> Any:
    """`params` with the tensors in `new` (by Hugging Face's names) in their places."""
    changed: dict[str, np.ndarray] = {}
    for name, tensor in new.items():
        path, layer, transposed = layout.slots[name]
        leaf = layout.leaves[path]
        if isinstance(leaf, AbstractWeight):
            raise SboraxError(f"{name} is stored whole, but it is quantised in this model; load the model unquantised")
        target = changed.setdefault(path, np.array(leaf))
        (target if layer is None else target[layer])[...] = tensor.T if transposed else tensor
    return replace_leaves(params, {path: jnp.asarray(leaf) for path, leaf in changed.items()})


def _plan(fits: Mapping[str, Fit], layout: HFLayout) -> Plan:
    """A plan that attaches every module's method."""
    by_path: dict[str, dict[int | None, AbstractMethod]] = {}
    for module, fit in fits.items():
        path, layer = layout.place(module)
        by_path.setdefault(path, {})[layer] = fit.method
    sites = []
    for path, methods in by_path.items():
        depth = layout.depths[path]
        method = methods[None] if depth is None else _stacked(methods, depth)  # type: ignore[arg-type]
        stack = () if depth is None else (depth,)
        sites.append(Site(path, method, stack, layout.shape(path), 1, unlayered(path)[1] or 0))
    untouched = tuple(path for path in kernels(layout.leaves) if path not in by_path)
    return Plan((*sites, *bank_sites(sites)), untouched)


def _stacked(methods: Mapping[int, AbstractMethod], depth: int) -> AbstractMethod:
    """One method for a stack of layers: ragged ranks where the method allows them, or else branches by layer."""
    groups: dict[AbstractMethod, dict[int, int]] = {}
    for layer, method in methods.items():
        alike = dataclasses.replace(method, rank=1) if _takes_ranks(method) else method  # type: ignore[call-arg]
        groups.setdefault(alike, {})[layer] = method.rank  # type: ignore[assignment]
    parts, layers = [], []
    for method, ranks in groups.items():
        if _takes_ranks(method):
            widest = max(ranks.values())
            planned = tuple(ranks.get(layer, widest) for layer in range(depth))
            rank = widest if len(set(planned)) == 1 else planned
            method = dataclasses.replace(method, rank=rank)  # type: ignore[call-arg]
        parts.append(method)
        layers.append(tuple(sorted(ranks)))
    if len(parts) == 1 and len(layers[0]) == depth:
        return parts[0]
    return ByLayer(tuple(parts), tuple(layers))


def _takes_ranks(method: AbstractMethod) -> bool:
    """Whether the ranks of a stack's layers are those of one method, and not of a part of it."""
    return method.ragged and "rank" in vars(method)


def _filled(node: Adapter, path: str, row: Row, fits: Mapping[str, Fit], layout: HFLayout, read: Any) -> Adapter:
    """`node` with the values of the file in its leaves."""
    if isinstance(node.method, ByLayer):
        children = node.method.children(node)
        parts = [_filled_layers(child, layers, path, row, fits, layout, read) for child, layers in children]
        train = {str(i): part.train for i, part in enumerate(parts)}
        frozen = {**node.frozen, **{str(i): part.frozen for i, part in enumerate(parts)}}
        return Adapter(train, frozen, node.method, node.in_axes)
    depth = layout.depths[path]
    return _filled_layers(node, None if depth is None else tuple(range(depth)), path, row, fits, layout, read)


def _filled_layers(
    node: Adapter,
    layers: tuple[int, ...] | None,
    path: str,
    row: Row,
    fits: Mapping[str, Fit],
    layout: HFLayout,
    read: Any,
) -> Adapter:
    train = {name: np.array(leaf) for name, leaf in flatten(node.train).items()}
    frozen = {name: np.array(leaf) for name, leaf in flatten(node.frozen).items()}
    numbers = layout.numbers(fits)
    for layer in [None] if layers is None else layers:
        module = layout.module(path, layer)
        for tensor in row.tensors:
            if tensor.leaf not in (leaves := {**train, **frozen}) or tensor.begins is not None:
                continue
            name = tensor.key(module, numbers)
            slot = leaves[tensor.leaf][... if layer is None else np.s_[layer, ...]]
            value = tensor.inward(read(name), slot.shape)
            if tensor.places:
                _check_places(name, value, layout.shape(path))
            if tensor.shared:
                value = value[tuple(slice(size) for size in slot.shape)]
            slot[...] = 0.0
            slot[tuple(slice(size) for size in value.shape)] = value
        for name, value in fits[module].frozen.items():
            frozen[name][... if layer is None else layer] = value
    train, frozen = (nest({name: jnp.asarray(leaf) for name, leaf in half.items()}) for half in (train, frozen))
    return Adapter(train, frozen, node.method, node.in_axes)


def _filled_bank(node: Adapter, row: Row, fits: Mapping[str, Fit], layout: HFLayout, read: Any) -> Adapter:
    """A bank with the values of the file: a tensor of its own for each leaf, or the entries that modules have of it."""
    numbers, leaves = layout.numbers(fits), {}
    for name, leaf in {**node.train, **node.frozen}.items():
        leaves[name] = np.zeros(leaf.shape, np.float32)
        known = np.zeros(leaf.shape, bool)
        for tensor in (tensor for tensor in row.tensors if tensor.leaf == name):
            if tensor.shared:
                leaves[name][...] = tensor.inward(read(tensor.key("", numbers)), leaf.shape)
                continue
            indices = next(other for other in row.tensors if other.leaf == tensor.at)
            for module in fits:
                key = indices.key(module, numbers)
                places, values = (
                    part.inward(read(part.key(module, numbers)), leaf.shape) for part in (indices, tensor)
                )
                if ((places < 0) | (places >= leaf.shape[0]) | (places % 1 != 0)).any():
                    raise SboraxError(f"{key}: an index lies outside the {leaf.shape[0]} entries of the shared vector")
                places = places.astype(np.int64)
                before = np.where(known[places], leaves[name][places], values)
                leaves[name][places], known[places] = values, True
                if not (np.array_equal(before, values) and np.array_equal(leaves[name][places], values)):
                    raise SboraxError(f"{tensor.key(module, numbers)}: entries at one index of the vector differ")
    train, frozen = ({name: jnp.asarray(leaves[name]) for name in half} for half in (node.train, node.frozen))
    return Adapter(train, frozen, node.method, node.in_axes)


def _check_places(name: str, value: np.ndarray, shape: tuple[int, int]) -> None:
    """Raise SboraxError unless `value` holds distinct places of an (in, out) weight.

    A column of (column, row) is a place, or else a number into the transposed weight, row by row.
    """
    bounds = np.asarray(shape[::-1])[:, None] if value.ndim == 2 else np.prod(shape)
    inside = (value >= 0).all() and (value < bounds).all() and (value % 1 == 0).all()
    if not inside or np.unique(value, axis=-1).shape[-1] != value.shape[-1]:
        raise SboraxError(f"{name}: an index lies outside the {shape} weight or comes twice")
