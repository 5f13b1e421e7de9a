"""The base of a run: adapted by the rules, in 4 bits where it is quantised."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtyping import Array, Key

from sborax.adapters.core import Adapter, Hint, SboraxError
from sborax.adapters.leaves import nest
from sborax.adapters.paths import Plan, Rule, Site, module_path
from sborax.adapters.patterns import search
from sborax.adapters.rebase import rewrite
from sborax.adapters.tables import weight_at
from sborax.adapters.tree import Adapters, Params, fit, settle
from sborax.adapters.weight import check_finite
from sborax.layout.state import flatten
from sborax.models.load import is_layer_kernel
from sborax.models.nf4 import Unquantised, check, quantise


def quantise_base(params: Params, quant: str | None) -> Params:
    """`params` with the layers' kernels in 4 bits if `quant` is "nf4"; embeddings, norms and head stay as they are.

    Raises SboraxError naming a kernel whose shape does not allow it, or whose values are not finite.
    """
    if quant is None:
        return params
    return nest({path: _quantised(path, leaf) for path, leaf in flatten(params).items()})


def _quantised(path: str, leaf: Any) -> Any:
    if not _to_quantise(path, leaf):
        return leaf
    try:
        return quantise(leaf)
    except SboraxError as error:
        raise SboraxError(f"quant: {path}: {error}") from None


def _unquantised(path: str, leaf: Any) -> Any:
    if not _to_quantise(path, leaf):
        return leaf
    _check(path, leaf)
    return Unquantised(leaf)


def _to_quantise(path: str, leaf: Any) -> bool:
    return is_layer_kernel(path) and isinstance(leaf, Array)


def _check(path: str, leaf: Array) -> None:
    try:
        check(leaf.shape, leaf.dtype)
    except SboraxError as error:
        raise SboraxError(f"quant: {path}: {error}") from None


def rewritten(rules: Iterable[Rule]) -> Callable[[str], bool]:
    """A function that tells whether a rule gives the kernel at a path a method that rewrites the base.

    Such a kernel is loaded dense.
    """
    all_rules = tuple(rules)

    def is_rewritten(path: str) -> bool:
        for rule in all_rules:
            if search(rule.pattern, module_path(path)[0]):
                if rule.method is not None and rule.method.rewrites_base:
                    return True
                if rule.layers is None:
                    return False
        return False

    return is_rewritten


def adapt(
    key: Key[Array, ""],
    params: Params,
    plan: Plan,
    quant: str | None,
    hint: Callable[[Params, Site], Hint] | None = None,
    begun: Mapping[str, Adapter] | None = None,
) -> tuple[Params, Adapters]:
    """`attach`, on a base that may be quantised, one kernel after the other.

    A method that rewrites the base starts from the dense weight, and the residual is quantised (QPiSSA,
    arXiv:2404.02948); every other method starts from the quantised weight that it adapts.

    Args:
    - quant: "nf4" to quantise the kernels of the layers; None leaves them dense.
    - hint: gives `init` the hint of a site whose method needs one.
    - begun: adapters that were made before, by path.
    """
    flat = flatten(params)
    if quant is not None:
        changing = {site.path for site in plan.sites if site.method.rewrites_base}
        flat = {path: leaf if path in changing else _quantised(path, leaf) for path, leaf in flat.items()}
    unadapted, adapters = nest(flat), {}
    for site in plan.sites:
        if begun is not None and site.path in begun:
            adapters[site.path] = begun[site.path]
            continue
        weight = weight_at(site.path, flat)
        weight = weight if quant is None else _unquantised(site.path, weight)
        site_hint = hint(unadapted, site) if hint is not None and site.method.needs else Hint()
        adapters[site.path] = fit(key, weight, site, site_hint)
    del unadapted
    for site in plan.sites:
        if site.method.rewrites_base:
            flat[site.path] = rewrite(flat[site.path], adapters[site.path])
            check_finite(site.path, flat[site.path])
            flat[site.path] = _quantised(site.path, flat[site.path]) if quant is not None else flat[site.path]
    params = nest(flat)
    return params, settle(params, adapters)
