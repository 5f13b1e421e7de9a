"""Adapters on disk in our own form: `adapter.safetensors` with every leaf, and `plan.json` with everything static."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from sborax.adapters.compose import with_parts
from sborax.adapters.constraints import replicate
from sborax.adapters.core import (
    AbstractComposite,
    AbstractKernelless,
    AbstractMethod,
    AbstractWeight,
    Adapter,
    SboraxError,
    leaf_axes,
)
from sborax.adapters.depth import axes_leaves, stack_of
from sborax.adapters.leaves import flatten, nest, replace_leaves
from sborax.adapters.paths import Rule, RuleLike, as_rules
from sborax.adapters.rebase import rewrite
from sborax.adapters.tables import tables
from sborax.adapters.tree import Adapters, Params, nodes, rebase
from sborax.adapters.vectors import TOKENS, VECTORS, vectors_fit, with_vectors
from sborax.adapters.weight import check_finite
from sborax.config.codec import decode, encode
from sborax.config.documents import check_plain, read_object, shown
from sborax.records.disk import replace, writing

LEAVES = "adapter.safetensors"
PLAN = "plan.json"
SAMPLED = 4096
"""How many values of a base leaf enter its fingerprint."""


def fingerprint(params: Params) -> dict[str, str]:
    """A digest of each base leaf by path, from its shape and evenly spaced values in bfloat16.

    It tells base models apart; it does not detect tampering. It is the same for float32 and bfloat16 copies of a model.
    Quantised leaves are left out.
    """
    prints = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, AbstractWeight):
            continue
        places = np.unravel_index(np.arange(0, leaf.size, max(1, leaf.size // SAMPLED)), leaf.shape)
        values = np.asarray(_bits(leaf, places)).view(leaf.dtype).astype(jnp.bfloat16)
        prints[path] = hashlib.sha256(f"{leaf.shape} ".encode() + values.tobytes()).hexdigest()[:16]
    return prints


@jax.jit
def _bits(leaf: Array, places: tuple[Array, ...]) -> Array:
    """The bits of the values at `places`.

    A gather from shards sums the parts; a sum of floats would lose the sign of zero, a sum of bits does not.
    """
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    return replicate(jax.lax.bitcast_convert_type(leaf, unsigned)[places])


def save_adapter(
    directory: str | epath.PathLike,
    adapters: Adapters,
    *,
    rules: Iterable[RuleLike] = (),
    base: Mapping[str, str] | None = None,
    trained_base: Mapping[str, Array] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter directory: `adapter.safetensors` and `plan.json`.

    Args:
    - directory: where to write; it is made if missing, and an adapter in it is replaced.
    - adapters: the tree, as `attach` makes it.
    - rules: the rules that made it, for the record.
    - base: `fingerprint` of the base parameters before `attach`; `load_adapter` refuses a base that differs from it.
    - trained_base: leaves of the base that were trained, by path; vectors of tokens with the tokens.
    - about: further entries of `plan.json`, such as the model's name.

    Raises SboraxError if a file cannot be written.
    """
    place = epath.Path(directory)
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    leaves: dict[str, np.ndarray] = {f"base/{path}": np.asarray(leaf) for path, leaf in (trained_base or {}).items()}
    sites = []
    for path, node in nodes(adapters).items():
        for half, tree in (("train", node.train), ("frozen", node.frozen)):
            leaves |= {f"{path}/{half}/{name}": np.asarray(leaf) for name, leaf in flatten(tree).items()}
        sites.append({"path": path, "method": encode(node.method), "in_axes": node.in_axes})
    plan = {
        "format": 1,
        **(about or {}),
        "rules": encode(as_rules(rules)),
        "sites": sites,
        "trained_base": sorted(trained_base or {}),
        "base": dict(base or {}),
    }
    # NumPy would give a scalar an axis.
    contiguous = {name: np.ascontiguousarray(leaf).reshape(leaf.shape) for name, leaf in leaves.items()}
    plan["digests"] = {name: _digest(leaf) for name, leaf in contiguous.items()}
    replace(place / LEAVES, save_safetensors(contiguous))
    # The plan comes last: an adapter with a plan is complete.
    replace(place / PLAN, json.dumps(plan, indent=2) + "\n")


def _digest(leaf: np.ndarray) -> str:
    """A digest of a leaf's dtype, shape and bytes."""
    return hashlib.sha256(f"{leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Saved:
    """The content of an adapter directory."""

    adapters: Adapters
    rules: tuple[Rule, ...]
    base: dict[str, str]
    trained_base: dict[str, Array]
    about: dict[str, Any]


def read_adapter(directory: str | epath.PathLike) -> Saved:
    """Read what `save_adapter` wrote, without a model.

    Raises SboraxError for a missing or damaged file, and for a leaf that is not finite.
    """
    place = epath.Path(directory)
    for name in (PLAN, LEAVES):
        if not (place / name).exists():
            raise SboraxError(f"{place / name}: missing; is this the adapter/ of a run?")
        check_plain(place / name)
    try:
        leaves = load_safetensors((place / LEAVES).read_bytes())
    # KeyError: a dtype that NumPy lacks.
    except (ValueError, KeyError, SafetensorError) as error:
        raise SboraxError(f"{place}: not a readable adapter ({error})") from error
    plan = read_object(place / PLAN)
    if plan.get("format") != 1:
        raise SboraxError(f"{place / PLAN}: not format 1, which this version reads")
    for name, kind in (("sites", list), ("trained_base", list), ("rules", list), ("base", dict)):
        if not isinstance(plan.get(name), kind):
            raise SboraxError(f"{place / PLAN}: {name} is missing or has the wrong type")
    _check_values(place, leaves, plan.get("digests"))
    leaf_names, adapters = set[str](), {}

    def leaves_under(prefix: str) -> dict[str, Array]:
        names = [name for name in leaves if name.startswith(prefix)]
        leaf_names.update(names)
        return {name.removeprefix(prefix): jnp.asarray(leaves[name]) for name in names}

    for site in plan["sites"]:
        path, in_axes = _site(site, f"{place / PLAN}: sites")
        method = decode(AbstractMethod, site["method"], f"{place / PLAN}: {path}", structural=True)  # type: ignore[type-abstract]
        where = f"{place / PLAN}: {path}"
        train, frozen = _nested(where, leaves_under(f"{path}/train/")), _nested(where, leaves_under(f"{path}/frozen/"))
        for half in (train, frozen):
            check_leaves(where, method, method.axes, half, None)
        adapters[path] = _with_parts(_with_scalars(Adapter(train, frozen, method, in_axes)))
    trained_base = leaves_under("base/")
    if set(trained_base) != set(map(str, plan["trained_base"])) or leaf_names != set(leaves):
        raise SboraxError(f"{place}: {LEAVES} and {PLAN} do not belong together")
    rules = tuple(decode(Rule, rule, f"{place / PLAN}: rules.{i}") for i, rule in enumerate(plan["rules"]))
    fields = ("format", "rules", "sites", "trained_base", "base", "digests")
    about = {name: value for name, value in plan.items() if name not in fields}
    return Saved(_nested(str(place / PLAN), adapters), rules, plan["base"], trained_base, about)


def _check_values(place: epath.Path, leaves: Mapping[str, np.ndarray], digests: Any) -> None:
    """Raise SboraxError for a leaf that has changed since it was written, and for one that is not finite.

    - digests: of every leaf, by name; None in files from before there were digests.
    """
    if digests is not None and (not isinstance(digests, dict) or digests.keys() != leaves.keys()):
        raise SboraxError(f"{place / PLAN}: digests do not fit the leaves in {LEAVES}; restore both from a copy")
    for name, leaf in leaves.items():
        if digests is not None and digests[name] != _digest(leaf):
            raise SboraxError(f"{place / LEAVES}: {name} is damaged, its digest does not match; restore a copy")
        if not np.issubdtype(leaf.dtype, np.integer) and not np.isfinite(leaf).all():
            raise SboraxError(f"{place / LEAVES}: {name} is not finite; training diverged, or the file is damaged")


def _site(site: Any, where: str) -> tuple[str, int]:
    """Path and number of input axes of an entry of `sites`."""
    if not isinstance(site, dict) or not {"path", "method", "in_axes"} <= site.keys():
        raise SboraxError(f"{where}: expected a path, a method and in_axes, got {shown(site)}")
    path, in_axes = site["path"], site["in_axes"]
    if not isinstance(path, str) or type(in_axes) is not int or not 1 <= in_axes < 10:
        raise SboraxError(f"{where}: {shown(path)} with in_axes {shown(in_axes)} cannot hold an adapter")
    return path, in_axes


def _nested(where: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """`nest`, but SboraxError where one path is the parent of another."""
    parents = {path[:at] for path in flat for at, letter in enumerate(path) if letter == "/"}
    if clash := parents & flat.keys():
        raise SboraxError(f"{where}: {shown(min(clash))} is both a leaf and the parent of another path")
    return nest(flat)


def _with_scalars(node: Adapter) -> Adapter:
    """The adapter with scalars of shape () unless it is stacked. Earlier versions wrote them with an axis."""
    leaves, structure = jax.tree.flatten((node.train, node.frozen))
    axes = [names for half in (node.train, node.frozen) for names in axes_leaves(leaf_axes(node.method.axes, half))]
    stacks = [leaf.ndim - len(names) for leaf, names in zip(leaves, axes, strict=True)]
    if len(set(stacks)) > 1 and min(stacks) == 0:
        leaves = [leaf.reshape(leaf.shape[stack:]) for leaf, stack in zip(leaves, stacks, strict=True)]
    train, frozen = jax.tree.unflatten(structure, leaves)
    return Adapter(train, frozen, node.method, node.in_axes)


def _with_parts(node: Adapter) -> Adapter:
    """The adapter with an entry for every part of a composed method. Files have none for a part without leaves."""
    method = node.method
    if not isinstance(method, AbstractComposite):
        return node
    return with_parts(node, [_with_parts(child) for child, _ in method.children(node)])


def check_leaves(where: str, method: AbstractMethod, axes: Any, leaves: Any, sizes: Mapping[str, int] | None) -> None:
    """Raise SboraxError for a leaf that the method lacks, or whose shape does not fit the weight.

    - axes: names of each leaf's axes, as the method declares them.
    - sizes: the weight's "in" and "out"; an axis of that name has this size, divides it (one entry a block) or is a
      multiple of it (several entries a feature). None if not known.
    """
    for name, leaf in leaves.items():
        names = axes.get(name)
        if names is None or isinstance(names, dict) != isinstance(leaf, dict):
            raise SboraxError(f"{where}: {type(method).__name__} has no leaf {shown(name)}")
        if isinstance(leaf, dict):
            check_leaves(where, method, names, leaf, sizes)
            continue
        if leaf.ndim < len(names):
            raise SboraxError(f"{where}: {name} has shape {leaf.shape}, which lacks an axis")
        for axis, size in zip(names, leaf.shape[leaf.ndim - len(names) :], strict=True):
            if sizes is not None and axis in sizes and (size < 1 or (sizes[axis] % size and size % sizes[axis])):
                raise SboraxError(f"{where}: {name} has shape {leaf.shape}, the weight {sizes['in']} x {sizes['out']}")


def load_adapter(directory: str | epath.PathLike, params: Params) -> tuple[Params, Adapters]:
    """`(params, adapters)` as they were when the adapter was saved.

    A base that the method rewrote is rewritten again, W <- W - s a0 b0, as by `attach`. Leaves that depend on the base,
    such as DoRA's norms, are computed from `params`, which may have another precision than in training, such as NF4.

    Args:
    - directory: an adapter directory, such as `adapter/` or `best/` of a run.
    - params: the base model's parameters, before any adapter rewrote them.

    Returns the parameters to run with, and the adapters.
    Raises SboraxError for a base model other than the adapter's, and as `read_adapter` does.
    """
    saved = read_adapter(directory)
    flat, prints, changed = flatten(params), fingerprint(params), {}
    weights = {**flat, **tables(params)}
    for path, print_ in saved.base.items():
        if path not in flat:
            raise SboraxError(f"{directory}: was trained on a base with {path}, which this model lacks")
        if path in prints and prints[path] != print_:
            raise SboraxError(f"{directory}: was trained on another base model ({path} differs); load that one")
    for path, node in nodes(saved.adapters).items():
        if isinstance(node.method, AbstractKernelless):
            continue
        if path not in weights:
            raise SboraxError(f"{directory}: adapts {path}, which this model lacks")
        sizes = weights[path].shape[len(stack_of(node)) :]
        weight = {"in": math.prod(sizes[: node.in_axes]), "out": math.prod(sizes[node.in_axes :])}
        for half in (node.train, node.frozen):
            check_leaves(f"{directory}: {path}", node.method, node.method.axes, half, weight)
        if node.method.rewrites_base:
            changed[path] = rewrite(flat[path], node)
            check_finite(f"{directory}: {path}, rewritten", changed[path])
    vectors = {path: leaf for path, leaf in saved.trained_base.items() if path in VECTORS or path in TOKENS}
    if not vectors_fit(vectors, flat):
        raise SboraxError(
            f"{directory}: trained vectors of tokens, which do not fit this model's embedding and head; load the model "
            "of the run"
        )
    if vectors:
        base_tables = {table: flat[table] for path, table in VECTORS.items() if path in vectors}
        changed |= with_vectors({**base_tables, **vectors})
    for path, leaf in saved.trained_base.items():
        if path in vectors:
            continue
        if path not in flat or flat[path].shape != leaf.shape:
            raise SboraxError(f"{directory}: trained {path} {leaf.shape}, which does not fit this model")
        changed[path] = leaf.astype(flat[path].dtype)
    # The tree keeps its keys: those of lists in NNX are numbers, which paths write as text.
    params = replace_leaves(params, changed)
    return params, rebase(params, saved.adapters)
