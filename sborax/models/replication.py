"""Depth up-scaling (arXiv:2312.15166): a deeper model of copies of a model's layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.paths import STACKED_UNDER
from sborax.config.documents import shown
from sborax.models.config import MOST_LAYERS, LlamaConfig
from sborax.models.language_model import LanguageModel
from sborax.models.names import unlayered

Ranges = Sequence[Sequence[int]]
"""Pairs (start, end) of layers, the end excluded. The layers of all ranges, one after the other, are a model's."""


def replicate_layers(model: LanguageModel, ranges: Ranges) -> LanguageModel:
    """A deeper model, whose layers are those of the ranges in order: PEFT's `layer_replication`, before any adapter.

        deeper = sx.replicate_layers(model, [(0, 4), (2, 5)])  # layers 0, 1, 2, 3, 2, 3, 4
        params, adapters = sx.attach(key, deeper.params, [("q_proj|v_proj", sx.LoRA(rank=8))])

    Each copy has adapters of its own, as every layer has. In PEFT copies share the weights of the base. Here they do so
    in models that were loaded with `scan=False`; stacked layers are one array, and copies in it take memory as further
    layers do. `save_hf` writes the deeper model as any other.

    Args:
    - model: the base. It stays as it is.
    - ranges: pairs (start, end) of layers of the base, counted from 0, the end excluded. They may overlap, and leave
      layers out.

    Raises SboraxError for a range outside the model, and for a config that is not a `LlamaConfig`.
    """
    config = model.config
    if not isinstance(config, LlamaConfig):
        raise SboraxError(f"replicate_layers: takes models with a LlamaConfig, not with a {type(config).__name__}")
    order = layer_order(ranges)
    if max(order) >= config.num_hidden_layers:
        raise SboraxError(f"ranges {shown(list(ranges))}: the model has layers 0 to {config.num_hidden_layers - 1}")
    deeper = dataclasses.replace(
        config,
        num_hidden_layers=len(order),
        layer_types=tuple(config.layer_types[layer] for layer in order) if config.layer_types else (),
        layer_sizes=tuple(config.layer_sizes[layer] for layer in order) if config.layer_sizes else (),
    )
    copies: dict[str, Any] = {}
    leaves = flatten(model.params)
    for path, leaf in leaves.items():
        number = unlayered(path)[1]
        if number is not None:
            continue
        stacked = path.startswith(f"{STACKED_UNDER}/")
        copies[path] = jax.tree.map(lambda part: part[np.asarray(order)], leaf) if stacked else leaf
    for place, layer in enumerate(order):
        prefix = f"{STACKED_UNDER}/{layer}/"
        copies |= {
            f"{STACKED_UNDER}/{place}/{path.removeprefix(prefix)}": leaf
            for path, leaf in leaves.items()
            if path.startswith(prefix)
        }
    return LanguageModel(model.module.clone(config=deeper), nest(copies), deeper, model.tokenizer)


def layer_order(ranges: Any, name: str = "ranges") -> list[int]:
    """The layers of a base that a replicated model has, in order. Raises SboraxError for anything but ranges.

    - name: what the ranges are called in errors.
    """
    pairs = ranges if isinstance(ranges, list | tuple) else ()
    for pair in pairs:
        valid = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(end) is int for end in pair)
        if not valid or not 0 <= pair[0] < pair[1] <= MOST_LAYERS:
            raise SboraxError(f"{name}: expected pairs [start, end] of layers, 0 <= start < end, got {shown(pair)}")
    if not pairs:
        raise SboraxError(f"{name}: expected a list of pairs of layers, such as [[0, 4], [2, 5]], got {shown(ranges)}")
    if sum(end - start for start, end in pairs) > MOST_LAYERS:
        raise SboraxError(f"{name}: more than {MOST_LAYERS:,} layers")
    return [layer for start, end in pairs for layer in range(start, end)]


def check_replicated(model: LanguageModel, ranges: Any, name: str) -> None:
    """Raise SboraxError unless `model` may be what `replicate_layers` makes of these ranges.

    It must have as many layers, and layers that are copies of one must be equal.

    - name: what the ranges are called in errors.
    """
    order = layer_order(ranges, name)
    call = f"give sx.replicate_layers(model, {str([tuple(pair) for pair in ranges])[:80]})"
    depth = model.config.num_hidden_layers
    if len(order) != depth:
        raise SboraxError(f"{name}: of a model of {len(order)} layers, and this one has {depth}; {call}")
    leaves = flatten(model.params)
    for place, layer in enumerate(order):
        first = order.index(layer)
        if first != place and not _equal(leaves, first, place):
            raise SboraxError(f"{name}: layers {first} and {place} are not copies of one in this model; {call}")


def _equal(leaves: dict[str, Any], first: int, second: int) -> bool:
    """Whether two layers have the same weights."""
    for path, leaf in leaves.items():
        if path.startswith(f"{STACKED_UNDER}/{first}/"):
            pair = leaf, leaves[f"{STACKED_UNDER}/{second}/{path.removeprefix(f'{STACKED_UNDER}/{first}/')}"]
        elif path.startswith(f"{STACKED_UNDER}/") and unlayered(path)[1] is None:
            pair = tuple(jax.tree.map(lambda part, layer=layer: part[layer], leaf) for layer in (first, second))
        else:
            continue
        parts = zip(*map(jax.tree.leaves, pair), strict=True)
        if not all(a is b or (a.shape == b.shape and bool(jnp.all(a == b))) for a, b in parts):
            return False
    return True
