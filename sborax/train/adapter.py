"""Adapters on disk in our own form: `adapter.safetensors` with every leaf, and `plan.json` with everything static."""

import dataclasses
import hashlib
import json
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

from sborax.config import decode, encode
from sborax.core import AbstractComposite, AbstractMethod, AbstractWeight, Adapter, SboraxError, whole
from sborax.paths import Rule, RuleLike, as_rules
from sborax.routing import AbstractRouter
from sborax.train.disk import replace, writing
from sborax.train.state import flatten, put_together
from sborax.tree import Adapters, Params, nest, nodes, rewrite

LEAVES = "adapter.safetensors"
PLAN = "plan.json"
SAMPLED = 4096
"""Values of each base leaf that enter its fingerprint."""


def fingerprint(params: Params) -> dict[str, str]:
    """By path, a digest of shape and of evenly spaced values in bfloat16: tells base models apart, not tampering.

    The same for float32 and bfloat16 copies of one model. Quantised leaves are left out.
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
    """The bits of some values. Gathered from shards they are summed, which as a number would lose the sign of zero."""
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    return whole(jax.lax.bitcast_convert_type(leaf, unsigned)[places])


def save_adapter(
    directory: str | epath.PathLike,
    adapters: Adapters,
    *,
    rules: Iterable[RuleLike] = (),
    base: Mapping[str, str] | None = None,
    trained_base: Mapping[str, Array] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter directory.

    rules: those it was made by, for the record. base: `fingerprint` of the parameters before `attach`.
    trained_base: trained leaves of the base by path. about: more for `plan.json`, such as the model's name.
    Raises SboraxError if the disk refuses.
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
    contiguous = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    replace(place / LEAVES, save_safetensors(contiguous))
    # Last: where there is a plan, the leaves are whole.
    replace(place / PLAN, json.dumps(plan, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Saved:
    """The content of an adapter directory."""

    adapters: Adapters
    rules: tuple[Rule, ...]
    base: dict[str, str]
    trained_base: dict[str, Array]
    about: dict[str, Any]


def read_adapter(directory: str | epath.PathLike) -> Saved:
    """What `save_adapter` wrote; needs no model.

    Raises SboraxError for a missing or damaged file.
    """
    place = epath.Path(directory)
    for name in (PLAN, LEAVES):
        if not (place / name).exists():
            raise SboraxError(f"{place / name}: missing; is this the adapter/ of a run?")
    try:
        plan = json.loads((place / PLAN).read_text())
        leaves = load_safetensors((place / LEAVES).read_bytes())
    except (ValueError, SafetensorError) as error:
        raise SboraxError(f"{place}: not a readable adapter ({error})") from error
    if not isinstance(plan, dict) or plan.get("format") != 1:
        raise SboraxError(f"{place / PLAN}: not format 1, which this version reads")
    used, adapters = set[str](), {}

    def part(prefix: str) -> dict[str, Array]:
        names = [name for name in leaves if name.startswith(prefix)]
        used.update(names)
        return {name.removeprefix(prefix): jnp.asarray(leaves[name]) for name in names}

    for site in plan["sites"]:
        path = site["path"]
        method = decode(AbstractMethod, site["method"], f"{place / PLAN}: {path}", structural=True)  # type: ignore[type-abstract]
        train, frozen = nest(part(f"{path}/train/")), nest(part(f"{path}/frozen/"))
        _check_leaves(path, method, train | frozen if not isinstance(method, AbstractComposite) else {})
        adapters[path] = Adapter(train, frozen, method, site["in_axes"])
    trained_base = part("base/")
    if sorted(trained_base) != plan["trained_base"] or used != set(leaves):
        raise SboraxError(f"{place}: {LEAVES} and {PLAN} do not belong together")
    rules = tuple(decode(Rule, rule, f"{place / PLAN}: rules.{i}") for i, rule in enumerate(plan["rules"]))
    known = ("format", "rules", "sites", "trained_base", "base")
    about = {name: value for name, value in plan.items() if name not in known}
    return Saved(nest(adapters), rules, plan["base"], trained_base, about)


def _check_leaves(path: str, method: AbstractMethod, leaves: Mapping[str, Any]) -> None:
    unknown = sorted(set(leaves) - set(method.axes))
    if unknown:
        raise SboraxError(f"{path}: {type(method).__name__} has no leaf {unknown[0]!r}")


def load_adapter(directory: str | epath.PathLike, params: Params) -> tuple[Params, Adapters]:
    """`(params, adapters)` as they were when the adapter was saved, from the base model `params`.

    A base that the method rewrote is rewritten again, W <- W - s a0 b0, as `attach` did.
    Raises SboraxError for another base model, and as `read_adapter` does.
    """
    saved = read_adapter(directory)
    flat, own = flatten(params), fingerprint(params)
    for path, print_ in saved.base.items():
        if path not in flat:
            raise SboraxError(f"{directory}: was trained on a base with {path}, which this model lacks")
        if path in own and own[path] != print_:
            raise SboraxError(f"{directory}: was trained on another base model ({path} differs); load that one")
    for path, node in nodes(saved.adapters).items():
        if isinstance(node.method, AbstractRouter):
            continue
        if path not in flat:
            raise SboraxError(f"{directory}: adapts {path}, which this model lacks")
        if node.method.rewrites_base:
            flat[path] = rewrite(flat[path], node)
    for path, leaf in saved.trained_base.items():
        if path not in flat or flat[path].shape != leaf.shape:
            raise SboraxError(f"{directory}: trained {path} {leaf.shape}, which does not fit this model")
    dtypes = {path: flat.pop(path).dtype for path in saved.trained_base}
    trained = {path: leaf.astype(dtypes[path]) for path, leaf in saved.trained_base.items()}
    return put_together(flat, trained), saved.adapters
