"""Writes adapters as a directory that PEFT loads."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import save

from sborax.adapters.core import AbstractWeight, Adapter, SboraxError
from sborax.adapters.leaves import flatten
from sborax.adapters.paths import bias_path, stacks_experts
from sborax.adapters.tables import HEAD, LOOKUP, TABLE
from sborax.adapters.tree import link, nodes
from sborax.adapters.weight import check_finite
from sborax.interop.card import adapter_card, check_card, write_card
from sborax.interop.factor import Factors, by_layer, exact, truncated
from sborax.interop.peft_base import kind_for
from sborax.interop.peft_biases import BIAS, Biases, stored_biases, trained_biases
from sborax.interop.peft_embeddings import written_layers
from sborax.interop.peft_experts import FIELD, Written, write_experts
from sborax.interop.peft_fused import put_together
from sborax.interop.peft_layout import (
    CONFIG,
    EMBEDDING,
    PREFIX,
    ROOT,
    TENSORS,
    TYING,
    HFLayout,
    layout_of,
    same,
    tensor_in,
    tied_copies,
    transposed_copies,
    wide,
)
from sborax.interop.peft_layout import HEAD as HEAD_MODULE
from sborax.interop.peft_replication import REPLICATION, written_replication
from sborax.interop.peft_row import Row, shared_shapes
from sborax.interop.peft_table import PLAIN
from sborax.interop.peft_table import TABLE as ROWS
from sborax.interop.peft_targets import naming, pattern_for, saved_modules, targeted
from sborax.interop.peft_tokens import TOKENS, TrainedRows, row_shapes, rows_in, trained_rows
from sborax.methods import LoRA
from sborax.models.families import family_of
from sborax.models.language_model import LanguageModel
from sborax.models.replication import Ranges


class Exported(NamedTuple):
    """What was written.

    - peft_type: PEFT's kind of adapter.
    - modules: number of adapted modules.
    - parameters: number of values in all tensors.
    - errors: relative Frobenius error of every module whose change was truncated.
    """

    peft_type: str
    modules: int
    parameters: int
    errors: dict[str, float]

    def __str__(self) -> str:
        text = f"{self.peft_type} adapter of {self.modules} modules, {self.parameters:,} numbers"
        if not self.errors:
            return f"{text}, exact"
        worst = max(self.errors, key=self.errors.__getitem__)
        mean = sum(self.errors.values()) / len(self.errors)
        return (
            f"{text}; {len(self.errors)} modules truncated, relative Frobenius error {mean:.3g} on average, "
            f"{self.errors[worst]:.3g} at most ({worst})"
        )


class _Entry(NamedTuple):
    """One module of the export."""

    row: Row
    method: str
    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
    error: float | None = None


def save_peft(
    directory: str | epath.PathLike,
    model: LanguageModel,
    params: Any,
    adapters: Any,
    *,
    as_: str = "native",
    rank: int | None = None,
    base: str | None = None,
    facts: Mapping[str, str] | None = None,
    layer_replication: Ranges | None = None,
    save_embedding_layers: bool = False,
) -> Exported:
    """Write `adapters` as a PEFT adapter directory for the base model `model.params`, with a model card.

    A method that PEFT has is written in PEFT's form. A method with thin factors is written as plain LoRA, exactly:
    SBoRA, contiguous Bone, sums and multiples, PiSSA and OLoRA (at rank 2r, since PEFT's base is the original one).
    Without adapters, norms, biases or rows of the embedding that were trained are written as LN_TUNING, BEFT or
    TRAINABLE_TOKENS.

    Args:
    - directory: created if missing.
    - model: the base model, with its original parameters.
    - params: the parameters as they are under the adapters. Those that differ from `model.params`, because they were
      trained with the adapters, are stored as `modules_to_save`, or for biases by `bias`, where PEFT's config has it.
      If at most half of the rows of an embedding or a head differ, only these rows are stored, by
      `trainable_token_indices`, where PEFT's config has it.
    - adapters: the adapters.
    - as_: "native" (default), or "lora" for plain LoRA whatever the method: exact where there are thin factors, else
      a truncated SVD of (merged - base), whose relative error is in the result and on the card.
    - rank: rank of that SVD; None (default) for the method's rank. Exact factors keep their rank.
    - base: name of the base model for the config and the card, a hub id or a path.
    - facts: further lines for the card, such as data and metrics.
    - layer_replication: where `replicate_layers` made `model`, its ranges, for PEFT to do the same to the base when it
      loads the adapter. Default None: the adapter is for the deeper model itself, as `save_hf` writes it.
    - save_embedding_layers: store the embedding and the head of `model`, too, trained or not, as PEFT does after
      `resize_token_embeddings`. Use it for a `model` that `resize_vocabulary` made: PEFT would draw its new rows again.
      It also stores a trained embedding or head if the kind has no other place for it. Default False.

    Raises SboraxError for adapters that no single PEFT adapter can hold, and for a directory with another README.md.
    """
    if as_ not in ("native", "lora"):
        raise SboraxError(f"as_ must be 'native' or 'lora', got {as_!r}")
    if rank is not None and (as_ == "native" or rank < 1):
        raise SboraxError(f"rank={rank}: must be 1 or more, and goes with as_='lora', which may truncate")
    check_card(epath.Path(directory))
    layout, leaves, linked = layout_of(model.params), flatten(params), nodes(link(adapters))
    if not linked:
        if as_ == "lora":
            raise SboraxError("there are no adapters; save fully trained kernels with as_='native'")
        if not (changed := _changed(layout, leaves, linked)):
            raise SboraxError("there is nothing to save: no adapters, and no kernel that differs from the model's")
        if layer_replication is not None:
            raise SboraxError(f"{REPLICATION} is for adapters, and there are none; leave it out")
        return _save_changed(directory, changed, layout, leaves, base, facts, save_embedding_layers)
    of_experts = {path: node for path, node in linked.items() if stacks_experts(path) and path in leaves}
    of_kernels = {path: node for path, node in linked.items() if path not in of_experts}
    _check_adapters(layout, leaves, linked)
    entries = _entries(of_kernels, layout, leaves, as_, rank)
    layout = dataclasses.replace(layout, shared=LOOKUP not in linked)
    row = _common_row(entries) if entries else PLAIN
    experts = write_experts(of_experts, layout.leaves) if of_experts else None
    if experts is not None and row is not PLAIN:
        raise SboraxError(f"PEFT adapts experts by LoRA alone, and other kernels have {row.peft_type}; use as_='lora'")
    changed = _changed(layout, leaves, linked)
    # A trained table of which this kind cannot say that it is tied is stored among the embedding layers.
    in_layers = {TABLE} & changed if save_embedding_layers and layout.tied and TYING not in row.reads else set()
    trained, biases, rows = _trained_leaves(row, entries, layout, leaves, changed - in_layers)
    config = _config(row, entries, layout, base, trained, experts) | rows.config
    if layer_replication is not None:
        config[REPLICATION] = written_replication(row, layer_replication, model, biases.names)
    if biases.names:
        config[BIAS] = biases.value
    tensors = _adapter_tensors(row, entries, layout) if entries else {}
    tensors |= _trained_tensors(layout, leaves, {name: name for name in trained} | biases.names) | rows.tensors
    config, tensors = _with_tied_copies(config, tensors, row, layout)
    if entries:
        config = _with_places(config, tensors, row, entries, layout)
    tensors |= {} if experts is None else experts.tensors
    modules = len(entries)
    if entries and (fused := family_of(model.config.model_type).fused):
        fields = {module: entry.fields for module, entry in entries.items()}
        config, tensors, modules = put_together(config, tensors, fields, row, layout, fused)
    if save_embedding_layers:
        source = leaves if in_layers or (row.method.rewrites_base and not row.keeps_base) else layout.leaves
        tensors |= written_layers(tensors, layout, source)
    errors = {module: entry.error for module, entry in entries.items() if entry.error is not None}
    exported = Exported(row.peft_type, modules + len(of_experts), _size(tensors), errors)
    methods = sorted({*(entry.method for entry in entries.values()), *map(_name, of_experts.values())})
    _write(directory, config, tensors, methods, exported, base, facts, layout)
    return exported


def _check_adapters(layout: HFLayout, leaves: Mapping[str, Any], linked: Mapping[str, Adapter]) -> None:
    """Raise SboraxError for adapters that no file can hold."""
    if layout.tied and len(linked.keys() & {TABLE, LOOKUP}) + (linked.keys() >= {TABLE, HEAD}) > 1:
        raise SboraxError(
            f"{TABLE}: its adapter is shared by look-ups and head, and one of them has another, too; no PEFT adapter "
            "is such a sum"
        )
    for path, node in linked.items():
        if node.method.rewrites_base and isinstance(leaves[path], AbstractWeight):
            raise SboraxError(
                f"{path}: {_name(node)} moved part of the base into its factors before the base was quantised, "
                "so no adapter of the original base equals it; merge instead"
            )


def _entries(
    linked: Mapping[str, Adapter], layout: HFLayout, leaves: Mapping[str, Any], form: str, rank: int | None
) -> dict[str, _Entry]:
    """The entries of adapters, by Hugging Face's name of the module. form: `as_` of `save_peft`."""
    entries = {}
    for path, node in linked.items():
        if path not in layout.depths:
            raise SboraxError(f"{path}: there is an adapter but the model has no kernel at this path")
        for layer, adapter in by_layer(node, layout.depths[path]):
            module = layout.module(path, layer)
            entries[module] = _entry(module, adapter, layout, leaves, path, layer, form, rank)
    return entries


def _trained_leaves(
    row: Row,
    entries: Mapping[str, _Entry],
    layout: HFLayout,
    leaves: Mapping[str, Any],
    changed: Collection[str],
) -> tuple[list[str], Biases, TrainedRows]:
    """What was trained beside the adapters: tensors of whole modules, biases that the config speaks of, and rows.

    - changed: paths of the trained leaves.
    """
    # Kinds whose config has no `bias` store a bias with its module alone.
    biases = Biases("none", {})
    if BIAS in row.constants:
        biases = trained_biases(row.peft_type, layout, leaves, changed, entries)
    in_names = {layout.slots[name].path for name in biases.names.values()}
    rows = trained_rows(layout, leaves, changed, entries) if TOKENS in row.reads else TrainedRows({}, {}, frozenset())
    return _trained_base(layout, set(changed) - in_names - rows.paths, entries), biases, rows


def _with_tied_copies(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], row: Row, layout: HFLayout
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors with the copies for a tied head, which PEFT stores beside the tensors of the embedding."""
    copies = {}
    for copy, name in tied_copies(layout, config.get("modules_to_save", ())).items():
        if TYING not in row.reads:
            raise SboraxError(
                f"{name}: the head is tied to it, which PEFT's {row.peft_type} cannot say; give "
                "save_embedding_layers=True, use as_='lora', or merge"
            )
        copies[PREFIX + copy] = tensors[PREFIX + name]
    for copy, name in transposed_copies(layout, {**tensors, **copies}).items():
        copies[copy] = np.ascontiguousarray(tensors[name].T)
    return {**config, **({TYING: True} if copies else {})}, {**tensors, **copies}


def _with_places(
    config: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    row: Row,
    entries: Mapping[str, _Entry],
    layout: HFLayout,
) -> dict[str, Any]:
    """The config, with every module named in full where PEFT would keep one tensor for several that differ.

    Raises SboraxError unless the config implies the names of the tensors.
    """
    if _tied_apart(config, row, layout, entries, tensors):
        # Modules that are named in full share nothing in PEFT.
        config = {**config, "target_modules": sorted(entries)}
        config.pop("layers_to_transform", None)
    _check_keys(config, row, layout, entries, set(tensors))
    return config


def _save_changed(
    directory: str | epath.PathLike,
    changed: Iterable[str],
    layout: HFLayout,
    leaves: Mapping[str, Any],
    base: str | None,
    facts: Mapping[str, str] | None,
    save_embedding_layers: bool,
) -> Exported:
    """`save_peft` of leaves of the base that were trained without adapters. changed: their paths."""
    changed = set(changed)
    if save_embedding_layers:
        # The file has the embedding and the head in any case. The kind needs something that was trained, though.
        if changed - {TABLE, HEAD}:
            changed -= {TABLE, HEAD}
        elif TABLE in changed:
            changed = {TABLE}
    kind = kind_for(changed)
    content = kind.written(changed, layout, leaves)
    config = {**_common(kind.peft_type, base), **content.config}
    layers = written_layers(content.tensors, layout, leaves) if save_embedding_layers else {}
    tensors = content.tensors | layers
    exported = Exported(kind.peft_type, len(content.tensors), _size(tensors), {})
    _write(directory, config, tensors, [kind.peft_type], exported, base, facts, layout)
    return exported


def _size(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(tensor.size for tensor in tensors.values())


def _write(
    directory: str | epath.PathLike,
    config: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    methods: list[str],
    exported: Exported,
    base: str | None,
    facts: Mapping[str, str] | None,
    layout: HFLayout,
) -> None:
    """Write the files of a directory."""
    out = epath.Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    (out / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tables = tuple(f"{PREFIX}{module}." for module in (EMBEDDING, HEAD_MODULE))
    vocabulary = layout.leaves[TABLE].shape[0] if any(name.startswith(tables) for name in tensors) else None
    write_card(out, adapter_card(methods, config, exported.errors, base, facts or {}, vocabulary))


def _common(peft_type: str, base: str | None) -> dict[str, Any]:
    """The config fields of all kinds."""
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }


def _trained_tensors(layout: HFLayout, leaves: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors of trained leaves of the base. names: `{name in the file: Hugging Face's name}`."""
    tensors = {}
    for key, name in names.items():
        leaf = wide(tensor_in(layout, leaves, name))
        tensors[PREFIX + key] = np.ascontiguousarray(leaf.T if layout.slots[name].transposed else leaf)
    return tensors


def _name(node: Adapter) -> str:
    return type(node.method).__name__


def _entry(
    module: str,
    node: Adapter,
    layout: HFLayout,
    leaves: Mapping[str, Any],
    path: str,
    layer: int | None,
    form: str,
    rank: int | None,
) -> _Entry:
    """The entry of one module: in PEFT's form of the method, or as plain LoRA, exact or truncated."""
    name = _name(node)
    for row in ROWS if form == "native" else [PLAIN]:
        if not row.adapts(module) or row.write is None:
            continue
        if type(node.method) is row.method and (fields := row.write(node)) is not None:
            _check_drawn(module, row, node, layout.shape(path))
            tensors = _tensors(row, node, layout.shape(path))
            return _Entry(row, name, fields if form == "native" else _undropped(fields), tensors)
    factors = exact(node, layout.shape(path))
    if factors is not None:
        return _plain(name, factors, None)
    if node.method.no_merge:
        options = " with these options" if any(type(node.method) is row.method for row in ROWS) else ""
        reason = (
            f"PEFT has no {name}{options}, nor a" if form == "native" else f"{name} is no plain LoRA, and there is no"
        )
        raise SboraxError(f"{module}: {reason} merged form of it to truncate: {node.method.no_merge}")
    if form == "native":
        raise SboraxError(f"{module}: PEFT has no {name} and it has no thin factors; use as_='lora' to truncate it")
    if node.method.adapts_bias and bias_path(path) in layout.leaves:
        raise SboraxError(
            f"{module}: {name} adapts the bias, too, which plain LoRA cannot; write it natively, or merge"
        )
    if node.method.rewrites_base and leaves[path] is layout.leaves[path]:
        raise SboraxError(f"{path}: {name} rewrote this kernel; model.params must be the base as it was before")
    rank = rank or node.method.rank  # type: ignore[assignment]
    if not isinstance(rank, int):
        raise SboraxError(f"{module}: say rank=... for the truncation of {name}")
    kernel = leaves[path] if layer is None else jax.tree.map(lambda leaf: leaf[layer], leaves[path])
    with jax.default_matmul_precision("highest"):
        merged = node.method.merge(kernel, node)
    check_finite(f"{module}: its merged weight", merged)
    a, b, error = truncated(np.asarray(merged - wide(layout.kernel(path, layer))), rank)
    return _plain(name, (a, b), error)


def _check_drawn(module: str, row: Row, node: Adapter, shape: tuple[int, int]) -> None:
    """Raise SboraxError unless PEFT would draw the frozen leaves that its file lacks as they are here."""
    for leaf, value in ({} if row.seeded is None else row.seeded(node.method, shape)).items():
        if not np.array_equal(np.asarray(node.frozen[leaf]), value):
            raise SboraxError(
                f"{module}: {leaf!r} is not what PEFT's {row.peft_type} draws from the seed, and its file cannot hold "
                "it; use as_='lora'"
            )


def _undropped(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "lora_dropout": 0.0}


def _plain(name: str, factors: Factors, error: float | None) -> _Entry:
    """The entry of a LoRA with these factors and scale 1."""
    a, b = (jnp.asarray(factor) for factor in factors)
    node = Adapter({"a": a, "b": b}, {"scale": jnp.float32(1.0)}, LoRA(rank=a.shape[1]))
    assert PLAIN.write is not None
    fields = PLAIN.write(node)
    assert fields is not None
    return _Entry(PLAIN, name, fields, _tensors(PLAIN, node, (a.shape[0], b.shape[1])), error)


def _tensors(row: Row, node: Adapter, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    leaves = {**flatten(node.train), **flatten(node.frozen)}
    blanks = {} if row.blanks is None else row.blanks(leaves, shape)
    tensors = {tensor.suffix: tensor.outward(leaves) for tensor in row.tensors if tensor.leaf in leaves}
    return tensors | {suffix: np.zeros(size, np.float32) for suffix, size in blanks.items()}


def _adapter_tensors(row: Row, entries: Mapping[str, _Entry], layout: HFLayout) -> dict[str, np.ndarray]:
    """The adapter's tensors by their names in the file."""
    numbers = layout.numbers(entries)
    tensors = {
        tensor.key(module, numbers): entry.tensors[tensor.suffix]
        for module, entry in entries.items()
        for tensor in row.tensors
        if tensor.suffix in entry.tensors and not tensor.shared
    }
    tensors |= {key: entries[module].tensors[suffix] for key, (module, suffix) in _blanks(row, entries).items()}
    if not any(tensor.shared for tensor in row.tensors):
        return tensors
    method = row.read({**row.defaults, **next(iter(entries.values())).fields}).method
    shapes = [layout.shape(layout.place(module)[0]) for module in entries]
    for key, shape in shared_shapes(row, method, shapes).items():
        tensors[key] = _shared_tensor(key, shape, entries)
    copies = {copy: tensors[key] for tensor in row.tensors for copy, key in tensor.copies(entries).items()}
    return tensors | copies


def _blanks(row: Row, entries: Mapping[str, _Entry]) -> dict[str, tuple[str, str]]:
    """The names of `Row.blanks` in the file, each with its module and its name behind the module's."""
    suffixes = {tensor.suffix for tensor in row.tensors}
    return {
        f"{PREFIX}{module}.{suffix}": (module, suffix)
        for module, entry in entries.items()
        for suffix in entry.tensors
        if suffix not in suffixes
    }


def _shared_tensor(key: str, shape: tuple[int, ...], entries: Mapping[str, _Entry]) -> np.ndarray:
    """A tensor that all modules share, of which each has the first part. Raises SboraxError where parts differ."""
    shared, filled = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for module, entry in entries.items():
        part = entry.tensors[key.removeprefix(ROOT)]
        place = tuple(slice(size) for size in part.shape)
        mask = filled[place]
        if not np.array_equal(shared[place][mask], part[mask]):
            raise SboraxError(
                f"{module}: PEFT keeps one {key} for all modules, and this one has its own; give all of them the same "
                "projection_seed, or use as_='lora'"
            )
        shared[place], filled[place] = part, True
    return shared


def _common_row(entries: Mapping[str, _Entry]) -> Row:
    """The row of all entries. Raises SboraxError if there are several."""
    rows = {id(entry.row): (module, entry) for module, entry in entries.items()}
    if len(rows) > 1:
        (module, first), (rival, second), *_ = rows.values()
        kinds = [entry.method for entry in (first, second)]
        if kinds[0] == kinds[1]:
            # PEFT has the method for some modules alone, such as projections and no embedding.
            kinds = [f"{entry.method} in the form of {entry.row.method.__name__}" for entry in (first, second)]
        raise SboraxError(
            f"{module} has {kinds[0]} and {rival} has {kinds[1]}: PEFT keeps one kind of adapter in a directory; use "
            "as_='lora' to write both as plain LoRA"
        )
    return next(iter(entries.values())).row


def _trained_base(layout: HFLayout, changed: Iterable[str], entries: Mapping[str, _Entry]) -> list[str]:
    """The tensors of every module with leaves at the paths `changed`, which were trained beside the adapters."""
    changed = set(changed)
    modules = {name.rpartition(".")[0] for name, slot in layout.slots.items() if slot.path in changed}
    for module in sorted(modules):
        if module in entries or (module == EMBEDDING and layout.tied and HEAD_MODULE in entries):
            raise SboraxError(f"{module}: both its base and an adapter were trained, which PEFT cannot store; merge")
    return [name for name in layout.slots if name.rpartition(".")[0] in modules]


def _changed(layout: HFLayout, leaves: Mapping[str, Any], linked: Mapping[str, Adapter]) -> set[str]:
    """Paths of the base leaves that were trained. Raises SboraxError for a parameter that is missing."""
    missing = sorted(layout.leaves.keys() - leaves.keys())
    if missing:
        raise SboraxError(f"{missing[0]}: the model has this parameter, the given params do not")
    return {
        path
        for path, leaf in layout.leaves.items()
        if not (path in linked and linked[path].method.rewrites_base) and not same(leaves[path], leaf)
    }


def _config(
    row: Row,
    entries: Mapping[str, _Entry],
    layout: HFLayout,
    base: str | None,
    trained: list[str],
    experts: Written | None,
) -> dict[str, Any]:
    """The fields of `adapter_config.json`. Raises SboraxError for fields that differ where PEFT has one for all."""
    # Patterns name modules, so the defaults are those of experts, which are parameters. PEFT drops nothing beside them.
    fixed = {} if experts is None else {"r": experts.rank, "lora_alpha": experts.rank, "lora_dropout": 0.0}
    config: dict[str, Any] = {
        **_common(row.peft_type, base),
        **row.constants,
        **{name: values[0] for name, values in row.known_by.items()},
        **row.defaults,
    }
    if row.in_config is not None:
        shapes = {module: layout.shape(layout.place(module)[0]) for module in entries}
        config |= row.in_config(
            {module: {**entry.fields, "shape": shapes[module]} for module, entry in entries.items()}
        )
    for name in next(iter(entries.values())).fields if entries else fixed:
        if name not in row.defaults:
            continue
        if name in fixed and (name not in row.patterns or not entries):
            config[name] = fixed[name]
            continue
        values = {module: entry.fields[name] for module, entry in entries.items()}
        common, exceptions = pattern_for(values)
        if name in fixed:
            common = fixed[name]
            exceptions = {module: value for module, value in values.items() if value != common}
        config[name] = common
        if name in row.patterns:
            config[row.patterns[name]] = exceptions
        elif exceptions:
            module = next(module for module in values if values[module] != common)
            raise SboraxError(
                f"{name} is {common} for most modules and {values[module]} for {module}: {row.peft_type} has one for "
                "all; use as_='lora'"
            )
    if trained:
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in trained})
    if experts is None:
        return config | naming(list(entries), layout.adaptable, row.layered)
    if config.get("use_rslora"):
        raise SboraxError("use_rslora: one scale is written for experts and other kernels; use as_='lora'")
    named = naming(list(entries), layout.adaptable, layered=False) if entries else {"target_modules": []}
    return config | named | {FIELD: experts.parameters}


def _tied_apart(
    config: Mapping[str, Any],
    row: Row,
    layout: HFLayout,
    entries: Mapping[str, _Entry],
    tensors: Mapping[str, np.ndarray],
) -> bool:
    """Whether PEFT would keep one tensor for several that differ."""
    numbers = layout.numbers(entries)
    shapes = {
        module: layout.shape(layout.place(module)[0]) for module in sorted(entries, key=lambda name: numbers[name])
    }
    groups = [] if row.tied is None else row.tied(config, shapes)
    return any(not np.array_equal(tensors[first], tensors[name]) for first, *copies in groups for name in copies)


def _check_keys(
    config: Mapping[str, Any], row: Row, layout: HFLayout, entries: Mapping[str, _Entry], keys: set[str]
) -> None:
    """Raise SboraxError unless the names of the tensors are those that the config implies."""
    modules = targeted(config, layout.adaptable)
    numbers = layout.numbers(modules)
    implied = {
        tensor.key(module, numbers)
        for module in modules
        for tensor in row.tensors
        if module not in entries or tensor.suffix in entries[module].tensors
    }
    implied |= {copy for tensor in row.tensors for copy in tensor.copies(entries)} | _blanks(row, entries).keys()
    saved = set(saved_modules(config, layout.modules))
    implied |= {PREFIX + name for name in layout.slots if name.rpartition(".")[0] in saved}
    implied |= {PREFIX + copy for copy in tied_copies(layout, saved)} | transposed_copies(layout, implied).keys()
    implied |= {PREFIX + name for name in stored_biases(config, layout, modules)}
    implied |= row_shapes(rows_in(config, layout, modules, saved), layout).keys()
    if implied != keys:
        raise SboraxError(f"the config and the tensors disagree about {sorted(implied ^ keys)[0]!r}; nothing written")
