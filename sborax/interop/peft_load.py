"""Reads a PEFT adapter directory."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sborax.adapters.bank import AbstractBank, AbstractBanked, bank_path
from sborax.adapters.compose import ByLayer
from sborax.adapters.core import AbstractMethod, AbstractWeight, Adapter, SboraxError
from sborax.adapters.leaves import flatten, nest, replace_leaves
from sborax.adapters.paths import Plan, Site, bank_sites, bias_path, kernels
from sborax.adapters.tables import why_no_table
from sborax.adapters.tree import fit_plan, link, nodes, rebase
from sborax.interop.peft_base import Kind, kind_of
from sborax.interop.peft_biases import added_biases, check_saved, stored_biases
from sborax.interop.peft_embeddings import BARE, OF_ADAPTER, OF_ROWS, check_size, repeated, stored_layers
from sborax.interop.peft_experts import FIELD, Door, read_experts
from sborax.interop.peft_file import Tensors, in_todays_form, open_tensors, read_config
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
from sborax.interop.peft_row import Completed, Fit, Row, Tensor, check_types, leaf_shapes, shared_shapes
from sborax.interop.peft_table import INERT, PLAIN, SELECTING, check_options, row_for
from sborax.interop.peft_targets import saved_modules, targeted, value_for
from sborax.interop.peft_tokens import row_shapes, rows_in, tables_with_rows
from sborax.models.families import family_of
from sborax.models.language_model import LanguageModel
from sborax.models.names import unlayered

MERGED_THERE = "merge the adapter in PEFT and load the model that it saves"


def load_peft(directory: str | os.PathLike[str], model: LanguageModel) -> tuple[Any, Any]:
    """Read a PEFT adapter directory for `model`: `(params, adapters)`.

    Reads every kind in `peft_table.TABLE`, LORA with rsLoRA, DoRA and patterns, MISS in its three forms, and old BONE
    files, from safetensors only. Methods that rewrite the base, such as PiSSA, take their part of it from
    `model.params` again. `params` also holds the weights of `modules_to_save`, the rows of `trainable_token_indices`,
    the biases that PEFT trained, and the embedding and head of a file that was saved with `save_embedding_layers`.
    LN_TUNING, BEFT and TRAINABLE_TOKENS have no adapters and change only `params`.

    For a file with another vocabulary, give the model that `resize_vocabulary` returns; for one with
    `layer_replication`, the deeper model that `replicate_layers` returns.

    Raises SboraxError for anything missing, superfluous, of a wrong shape or unsupported.
    """
    place = Path(directory)
    try:
        return _load(place, model)
    except SboraxError as failure:
        raise SboraxError(f"{place}: {failure}") from None


def _load(place: Path, model: LanguageModel) -> tuple[Any, Any]:
    config, file = read_config(place / CONFIG), open_tensors(place / TENSORS)
    layout = layout_of(model.params)
    with file as opened:
        config, opened = taken_apart(config, opened, layout, family_of(model.config.model_type).fused)
        layout = dataclasses.replace(layout, shared=config.get(TYING) is True)
        config, tensors = in_todays_form(config, Tensors.of(opened), layout)
        check_size(tensors, layout)
        kind = kind_of(config)
        saved = [] if kind else saved_modules(config, layout.torch_modules)
        form = (BARE, OF_ADAPTER if kind else OF_ROWS)
        params, tensors = _with_layers(model.params, tensors, layout, saved, form)
        layout = dataclasses.replace(layout, leaves=flatten(params))
        if kind is not None:
            return _changed_base(kind, config, tensors, layout, params), {}
        of_experts, config = config.get(FIELD), {**config, FIELD: None}
        row = row_for(config)
        if config.get(REPLICATION):
            check_replication(row, config[REPLICATION], model)
        experts = _experts(row, {**config, FIELD: of_experts}, params) if of_experts else None
        modules = [] if experts and not config.get("target_modules") else _targets(config, layout)
        check_saved(config, layout, saved)
        if row.method.rewrites_base:
            _check_dense(row, modules, layout)
        fits = _fits(row, config, modules, layout)
        expected = _expected(row, fits, layout) if fits else {}
        expected |= experts.shapes if experts else {}
        extra = repeated(tensors.names, layout, saved)
        tensors = tensors.without(extra.unused)
        tied = _tied(config, layout, saved) | extra.copies
        copies = _copies_in(tensors, row, fits, tied, transposed_copies(layout, expected))
        originals = tensors.without(copies.names)
        added = added_biases(config, layout, fits)
        base = _base_tensors(layout, saved, modules, originals.names, stored_biases(config, layout, modules))
        rows = rows_in(config, layout, fits, saved)
        expected |= row_shapes(rows, layout)
        expected |= {name: shape for name, (_, _, shape) in added.items()}
        expected |= {PREFIX + key: shape for key, (_, shape) in base.items()}
        originals = originals.completed(_completed(row, config, fits, layout, originals))
        originals.compare(expected, _indices(row, fits, layout))
        copies.check(tensors, originals)

        new = _new_leaves(base, added, layout, originals) | tables_with_rows(rows, layout, originals.read)
        rewritten = row.method.rewrites_base and not row.keeps_base and HEAD in modules
        residual = new.pop(f"{HEAD}.weight", None) if rewritten else None
        # An allocator may have pruned all ranks of a module. Its tensors are empty, and it gets no adapter.
        adapted = {module: fit for module, fit in fits.items() if fit.method.rank != 0}
        params, fitted = fit_plan(jax.random.key(0), _replaced(params, layout, new), _plan(adapted, layout))
        banks = {
            path: _filled_bank(node, path, row, adapted, layout, originals.read)
            for path, node in fitted.items()
            if isinstance(node.method, AbstractBank)
        }
        # Leaves that follow from the base may need the banks, and are needed by others.
        adapters = rebase(params, nest({**fitted, **banks}))
        if residual is not None:
            _check_residual(residual, flatten(params)[layout.slots[f"{HEAD}.weight"].path])
        if _differ(nodes(adapters), row, adapted, layout, originals.read):
            adapters = link(adapters)
        filled = {
            path: node
            if isinstance(node.method, AbstractBank)
            else _filled(node, path, row, adapted, layout, originals.read)
            for path, node in nodes(adapters).items()
        }
        filled |= experts.fill(originals.read) if experts else {}
    return params, nest(filled)


def _experts(row: Row, config: Mapping[str, Any], params: Any) -> Door:
    """The adapters of experts in the file."""
    if row is not PLAIN:
        raise SboraxError(f"{FIELD} is read of plain LoRA alone, and this is {config.get('peft_type')}")
    return read_experts(config, params, lambda module: _fit(row, config, module, None))


def _tied(config: Mapping[str, Any], layout: HFLayout, saved: list[str]) -> dict[str, str]:
    """What the file may have twice, since the head is tied to the embedding: `{name of the copy: name}`."""
    changed = {EMBEDDING, HEAD} & set(saved) if layout.tied else set()
    # Of both, the file has what tells whether they are still equal.
    if len(changed) == 1 and config.get(TYING) is not True:
        subject = "the embedding, to which the head is tied" if EMBEDDING in changed else "the head, which is tied"
        raise SboraxError(f"modules_to_save has {subject} here; without {TYING}, PEFT unties them: {MERGED_THERE}")
    return {PREFIX + copy: PREFIX + name for copy, name in tied_copies(layout, saved).items()}


def _with_layers(
    params: Any, tensors: Tensors, layout: HFLayout, saved: list[str], form: Collection[str]
) -> tuple[Any, Tensors]:
    """`params` with the embedding and the head of the base that the file has, and the other tensors.

    The last two arguments are those of `stored_layers`.
    """
    layers = _shaped(stored_layers(tensors.names, layout, saved, form), layout)
    stored = tensors.only({PREFIX + key for key in layers})
    stored.compare({PREFIX + key: shape for key, (_, shape) in layers.items()})
    return _replaced(params, layout, _new_leaves(layers, {}, layout, stored)), tensors.without(stored.names.keys())


class _Copies(NamedTuple):
    """Tensors that repeat others.

    - names: all of them.
    - tied, transposed: those that are compared, `{name of the copy: name}`.
    """

    names: frozenset[str]
    tied: Mapping[str, str]
    transposed: Mapping[str, str]

    def check(self, tensors: Tensors, originals: Tensors) -> None:
        """Raise SboraxError for a copy that differs."""
        for copy, name in self.tied.items():
            if not np.array_equal(tensors.stored(copy).astype(np.float32), originals.read(name)):
                original = f"the embedding, to which the head is tied here; {MERGED_THERE}" if HEAD in copy else name
                raise SboraxError(f"{copy} differs from {original}")
        for copy, name in self.transposed.items():
            if not np.array_equal(tensors.stored(copy).astype(np.float32).T, originals.read(name)):
                raise SboraxError(f"{copy} is not the transpose of {name}, to which {TYING} ties it")


def _copies_in(
    tensors: Tensors, row: Row, fits: Mapping[str, Fit], tied: Mapping[str, str], transposed: Mapping[str, str]
) -> _Copies:
    tied, transposed = (
        {copy: name for copy, name in copies.items() if copy in tensors.names} for copies in (tied, transposed)
    )
    of_row = {copy for tensor in row.tensors for copy in tensor.copies(fits)}
    return _Copies(frozenset(of_row | tied.keys() | transposed.keys()), tied, transposed)


def _new_leaves(
    base: Mapping[str, tuple[str, tuple[int, ...]]],
    added: Mapping[str, tuple[str, float, tuple[int, ...]]],
    layout: HFLayout,
    tensors: Tensors,
) -> dict[str, np.ndarray]:
    """The leaves of the base that the file changes, by Hugging Face's names.

    - base: those that it has, as `_base_tensors` returns them.
    - added: what it adds to biases, as `added_biases` returns it.
    """
    new: dict[str, np.ndarray] = {}
    for key, (name, _) in base.items():
        value = tensors.read(PREFIX + key)
        if not np.array_equal(new.setdefault(name, value), value):
            raise SboraxError(f"{key} differs from the embedding, to which the head is tied here")
    for key, (name, scale, _) in added.items():
        original = new[name] if name in new else np.asarray(wide(tensor_in(layout, layout.leaves, name)))
        new[name] = original + np.float32(scale) * tensors.read(key)
    return new


def _changed_base(kind: Kind, config: Mapping[str, Any], tensors: Tensors, layout: HFLayout, params: Any) -> Any:
    """`params` with what the file of a kind without adapters changes."""
    read = (SELECTING - {"modules_to_save"}) | INERT.keys() | kind.reads | kind.inert.keys()
    check_options(config, read, {"modules_to_save": "this kind changes the base itself"})
    tensors.compare(kind.expected(config, layout))
    changed = kind.changed(config, layout, lambda name: tensors.stored(name).astype(np.float32))
    return _replaced(params, layout, changed)


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
            use = "lookup" if module == EMBEDDING else "kernel"
            why = why_no_table(fit.method, use) if row.adapts(module) else "PEFT has no such adapter of an embedding"
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
    shapes: dict[tuple[AbstractMethod, tuple[int, int], bool], dict[str, tuple[int, ...]]] = {}
    expected, numbers = {}, layout.numbers(fits)
    for module, fit in fits.items():
        path = layout.place(module)[0]
        shape, bias = layout.shape(path), bias_path(path) in layout.leaves
        if (fit.method, shape, bias) not in shapes:
            if not row.any_rank:
                try:
                    fit.method.check(shape)
                except SboraxError as failure:
                    raise SboraxError(f"{module} {shape}: {failure}") from None
            shapes[fit.method, shape, bias] = leaf_shapes(fit.method, shape, bias)
        leaves = shapes[fit.method, shape, bias]
        for tensor in row.tensors:
            if tensor.leaf in leaves and not tensor.shared:
                expected[tensor.key(module, numbers)] = tensor.shape(leaves)
        if row.blanks is not None:
            expected |= {f"{PREFIX}{module}.{name}": size for name, size in row.blanks(leaves, shape).items()}
    return expected | shared_shapes(row, next(iter(fits.values())).method, [shape for _, shape, _ in shapes])


def _indices(row: Row, fits: Mapping[str, Fit], layout: HFLayout) -> set[str]:
    """The names of the tensors that hold indices."""
    numbers, index_tensors = layout.numbers(fits), [tensor for tensor in row.tensors if tensor.places or tensor.into]
    return {tensor.key(module, numbers) for module in fits for tensor in index_tensors}


def _completed(
    row: Row, config: Mapping[str, Any], fits: Mapping[str, Fit], layout: HFLayout, tensors: Tensors
) -> Completed:
    """The tensors that another form of the kind has no room for, made of what it has instead."""
    if row.completed is None or not fits:
        return Completed({}, frozenset())
    numbers = layout.numbers(fits)
    shapes = {module: layout.shape(layout.place(module)[0]) for module in sorted(fits, key=numbers.get)}  # type: ignore[arg-type]
    fields = {name: config.get(name, default) for name, default in row.defaults.items()}
    return row.completed(fields, shapes, tensors.stored)


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
    return _shaped(keys, layout)


def _shaped(keys: Mapping[str, str], layout: HFLayout) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face's names with the shapes that they have there. keys: `{name in the file: Hugging Face's name}`."""
    tensors = {}
    for key, name in keys.items():
        slot = layout.slots[name]
        shape = layout.leaves[slot.path].shape[0 if slot.layer is None else 1 :]
        tensors[key] = (name, tuple(reversed(shape)) if slot.transposed else tuple(shape))
    return tensors


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
            f"{HEAD}.base_layer.weight is not what the factors' start leaves of this model's head; give the "
            "base that the adapter was trained on"
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
        stack, number = () if depth is None else (depth,), unlayered(path)[1] or 0
        sites.append(Site(path, method, stack, layout.shape(path), 1, number, bias=bias_path(path) in layout.leaves))
    untouched = tuple(path for path in kernels(layout.leaves) if path not in by_path)
    return Plan((*sites, *bank_sites(sites)), untouched)


def _stacked(methods: Mapping[int, AbstractMethod], depth: int) -> AbstractMethod:
    """One method for a stack of layers: ragged ranks where the method allows them, or else branches by layer."""
    groups: dict[AbstractMethod, dict[int, int]] = {}
    for layer, method in methods.items():
        uniform = dataclasses.replace(method, rank=1) if _takes_ranks(method) else method  # type: ignore[call-arg]
        groups.setdefault(uniform, {})[layer] = method.rank  # type: ignore[assignment]
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
        if row.blanks is not None:
            for name in row.blanks({**train, **frozen}, layout.shape(path)):
                if read(f"{PREFIX}{module}.{name}").any():
                    raise SboraxError(f"{PREFIX}{module}.{name} must hold zeros, as PEFT writes it, and does not")
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
            if tensor.over is not None:
                value = value - leaves[tensor.over][... if layer is None else layer]
            slot[...] = 0.0
            slot[tuple(slice(size) for size in value.shape)] = value
        for name, value in fits[module].frozen.items():
            frozen[name][... if layer is None else layer] = value
    train, frozen = (nest({name: jnp.asarray(leaf) for name, leaf in half.items()}) for half in (train, frozen))
    return Adapter(train, frozen, node.method, node.in_axes)


def _filled_bank(node: Adapter, path: str, row: Row, fits: Mapping[str, Fit], layout: HFLayout, read: Any) -> Adapter:
    """A bank with the values of the file.

    There is a tensor for each leaf, or each module has its entries of the leaf, or those of a kind have copies of it.
    """
    assert isinstance(node.method, AbstractBank)
    numbers, leaves = layout.numbers(fits), {}
    for name, leaf in {**node.train, **node.frozen}.items():
        leaves[name] = np.zeros(leaf.shape, leaf.dtype)
        filled = np.zeros(leaf.shape, bool)
        for tensor in (tensor for tensor in row.tensors if tensor.leaf == name and tensor.begins is None):
            if tensor.shared:
                leaves[name][...] = tensor.inward(read(tensor.key("", numbers)), leaf.shape)
                continue
            if tensor.at is None:
                for slot, key in dict.fromkeys(_copies(path, tensor, fits, layout)):
                    leaves[name][slot] = tensor.inward(read(key), leaves[name][slot].shape)
                    if tensor.places:
                        _check_places(key, leaves[name], node.method.shape)
                continue
            indices = next(candidate for candidate in row.tensors if candidate.leaf == tensor.at)
            for module in fits:
                key = indices.key(module, numbers)
                places, values = (
                    part.inward(read(part.key(module, numbers)), leaf.shape) for part in (indices, tensor)
                )
                if ((places < 0) | (places >= leaf.shape[0]) | (places % 1 != 0)).any():
                    raise SboraxError(f"{key}: an index lies outside the {leaf.shape[0]} entries of the shared vector")
                places = places.astype(np.int64)
                previous = np.where(filled[places], leaves[name][places], values)
                leaves[name][places], filled[places] = values, True
                if not (np.array_equal(previous, values) and np.array_equal(leaves[name][places], values)):
                    raise SboraxError(f"{tensor.key(module, numbers)}: entries at one index of the vector differ")
    leaves |= {} if row.derived is None else row.derived(leaves)
    train, frozen = ({name: jnp.asarray(leaves[name]) for name in half} for half in (node.train, node.frozen))
    return Adapter(train, frozen, node.method, node.in_axes)


def _copies(path: str, tensor: Tensor, fits: Mapping[str, Fit], layout: HFLayout) -> list[tuple[Any, str]]:
    """The copies in the file of a leaf of the bank at `path`: where in the leaf each belongs, and its name."""
    numbers = layout.numbers(fits)
    readers = {
        module: fit.method
        for module, fit in fits.items()
        if isinstance(fit.method, AbstractBanked) and bank_path(fit.method, layout.place(module)[0]) == path
    }
    copies = []
    for number, module in enumerate(sorted(readers, key=lambda module: numbers[module])):
        span = readers[module].bank_entries.get(tensor.leaf)
        copies.append((... if span is None else number // span, tensor.key(module, numbers)))
    return copies


def _differ(adapters: Mapping[str, Adapter], row: Row, fits: Mapping[str, Fit], layout: HFLayout, read: Any) -> bool:
    """Whether copies of one leaf of a bank differ: what is one tensor here is several in PEFT's model."""
    copied = [tensor for tensor in row.tensors if not tensor.shared and tensor.at is None]
    for path, node in adapters.items():
        for tensor in copied if isinstance(node.method, AbstractBank) else []:
            by_slot: dict[Any, np.ndarray] = {}
            for slot, key in _copies(path, tensor, fits, layout) if tensor.leaf in node.train else []:
                value = read(key)
                if not np.array_equal(by_slot.setdefault(slot, value), value):
                    return True
    return False


def _check_places(name: str, value: np.ndarray, shape: tuple[int, int]) -> None:
    """Raise SboraxError unless `value` holds distinct places of an (in, out) weight.

    A column of (column, row) is a place, or else a number into the transposed weight, row by row.
    """
    bounds = np.asarray(shape[::-1])[:, None] if value.ndim == 2 else np.prod(shape)
    inside = (value >= 0).all() and (value < bounds).all() and (value % 1 == 0).all()
    if not inside or np.unique(value, axis=-1).shape[-1] != value.shape[-1]:
        raise SboraxError(f"{name}: an index lies outside the {shape} weight or comes twice")
