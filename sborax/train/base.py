"""The base of a run: adapted by the rules, then or before that quantised."""

import dataclasses

from jaxtyping import Array, Key

from sborax.core import SboraxError
from sborax.paths import STACKED_UNDER, Plan
from sborax.quant.nf4 import quantise
from sborax.train.state import flatten
from sborax.tree import Adapters, Params, attach, nest, nodes


def quantise_base(params: Params, quant: str | None) -> Params:
    """The kernels of the layers in 4 bits if `quant` is "nf4"; embeddings, norms and head stay as they are.

    Raises SboraxError naming the kernel whose shape does not allow it.
    """
    if quant is None:
        return params
    flat = flatten(params)
    for path, leaf in flat.items():
        if path.split("/")[0] == STACKED_UNDER and path.endswith("/kernel") and isinstance(leaf, Array):
            try:
                flat[path] = quantise(leaf)
            except SboraxError as error:
                raise SboraxError(f"quant: {path}: {error}") from None
    return nest(flat)


def adapt(key: Key[Array, ""], params: Params, plan: Plan, quant: str | None) -> tuple[Params, Adapters]:
    """`attach`, on a base that may be quantised.

    A method that rewrites the base starts from the dense weight, and what it leaves is quantised (QPiSSA,
    arXiv:2404.02948); every other one starts from the quantised weight that it will stand on.
    """
    if quant is None:
        return attach(key, params, plan)
    first = tuple(site for site in plan.sites if site.method.rewrites_base)
    rest = tuple(site for site in plan.sites if not site.method.rewrites_base)
    params, rewriting = attach(key, params, dataclasses.replace(plan, sites=first))
    params = quantise_base(params, quant)
    _, others = attach(key, params, dataclasses.replace(plan, sites=rest))
    return params, nest(nodes(rewriting) | nodes(others))
