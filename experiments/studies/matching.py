"""The rank, or the size of blocks, at which a method trains about as many parameters as another.

`python -m experiments.studies.matching` writes the sizes of every method in the atlas to sizes.json. A method that is
not in this file is matched when the study is declared, which takes seconds.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax

import sborax as sx
from sborax.adapters.core import AbstractMethod, SboraxError
from sborax.models.config import LlamaConfig
from sborax.models.language_model import abstract
from sborax.train.base import adapt
from sborax.train.hints import promised, zeros

LARGEST = {"coefficients": 65_536, "rank": 128, "block": 128}
"""Fields that say how large an adapter is, with the largest value that is tried. Of several, the first counts."""
STORED = Path(__file__).parent / "sizes.json"


def size_of(method: AbstractMethod) -> str | None:
    """The field that says how large its adapters are; None for a method without one, such as IA3."""
    fields = {field.name for field in dataclasses.fields(method)}  # pyright: ignore
    return next((name for name in LARGEST if name in fields), None)


def sized(method: AbstractMethod, value: int) -> AbstractMethod:
    """The method at another size."""
    name = size_of(method)
    return method if name is None else dataclasses.replace(method, **{name: value})  # pyright: ignore


@functools.cache
def trained(shape: LlamaConfig, pattern: str, method: AbstractMethod) -> int:
    """The parameters that `method` trains on the kernels of a model that match `pattern`, from shapes alone.

    Raises SboraxError where the method does not fit.
    """
    params = abstract(shape, "float32")
    plan = sx.plan(params, [sx.Rule(pattern, method)], hints=promised(params))

    def adapters(key: Any, params: Any) -> Any:
        return adapt(key, params, plan, None, zeros)[1]

    return sx.count(jax.eval_shape(adapters, jax.random.key(0), params))


def matched(shape: LlamaConfig, pattern: str, method: AbstractMethod, target: int) -> AbstractMethod:
    """`method` at the size that trains as near to `target` parameters as it can; ties: the smaller size.

    A method without a size, such as IA3, is returned as it is. A rank policy is replaced by one rank for all layers.
    """
    size = size_of(method)
    if size is None:
        return method
    largest, params = LARGEST[size], abstract(shape, "float32")

    def distance(value: int) -> float:
        try:
            return abs(trained(shape, pattern, sized(method, value)) - target)
        except SboraxError:
            return float("inf")

    def fits(value: int) -> bool:
        try:
            sx.plan(params, [sx.Rule(pattern, sized(method, value))], hints=promised(params))
        except SboraxError:
            return False
        return True

    # Parameters grow about linearly but with a block, so few sizes need to be counted: those around the estimate.
    powers = [1 << power for power in range(largest.bit_length())]
    best = min(powers, key=distance)
    around = powers if size == "block" else list(range(max(1, best // 2), min(largest, 2 * best) + 1))
    around = [value for value in around if fits(value)]
    while len(around) > 9:
        step = max(1, len(around) // 8)
        number = around.index(min(around[::step], key=distance))
        around = around[max(0, number - step) : number + step + 1]
    return sized(method, min(around, key=distance))


def main() -> None:
    """Write the sizes of the atlas."""
    from experiments.studies import atlas

    sizes = {}
    for name, method in atlas.everything().items():
        field = size_of(method)
        if field is not None and name not in atlas.UNSIZED:
            sizes[name] = getattr(matched(atlas.SHAPE, atlas.LINEARS, method, atlas.BUDGET), field)
            print(name, sizes[name], flush=True)
    STORED.write_text(json.dumps(sizes, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
