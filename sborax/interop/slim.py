"""Cuts heads and channels that LoRAPrune has masked out of a model, arXiv:2305.18403."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.paths import STACKED_UNDER
from sborax.adapters.tree import Adapters, merge, nodes, stack_of
from sborax.methods.masked import Masked
from sborax.models.config import LlamaConfig
from sborax.models.families import UNEQUAL
from sborax.models.language_model import LanguageModel, Params
from sborax.procedures.importance import BLOCKS

LEADER = {"self_attn": "q_proj", "mlp": "gate_proj"}
"""By block: the projection whose mask also cuts the inputs of o_proj, or of down_proj."""


def slim(model: LanguageModel, params: Params, adapters: Adapters) -> LanguageModel:
    """The merged model without masked outputs and the inputs that read them. It computes the same function.

    If all layers keep the same size, as after LoRAPrune with protect=0, transformers loads what `save_hf` writes.
    Otherwise the layers are unrolled, `config.layer_sizes` has their sizes, and only sborax loads the model.

    Args:
    - model: the model, with its tokenizer.
    - params: the parameters under the adapters.
    - adapters: the adapters of a run with LoRAPrune.

    Raises SboraxError if nothing is masked.
    """
    masked = {path: node for path, node in nodes(adapters).items() if isinstance(node.method, Masked)}
    if not masked:
        raise SboraxError("slim: nothing is masked in these adapters; train them with procedure=LoRAPrune(...)")
    live = {path: np.asarray(node.frozen["mask"]) > 0 for path, node in masked.items()}
    flat = flatten(merge(params, adapters))
    if any(stack_of(node) for node in masked.values()):
        flat, live = _unstacked(flat), _unstacked(live)
    indices = {path: np.flatnonzero(mask) for path, mask in live.items()}
    flat = {path: _cut(path, leaf, indices) for path, leaf in flat.items()}
    if not isinstance(model.config, LlamaConfig):
        raise SboraxError(f"slim: cuts models with a LlamaConfig alone, not with a {type(model.config).__name__}")
    config = _config(model.config, indices)
    restacked = model.module.scan and not config.layer_sizes
    small = nest(_stacked(flat) if restacked else flat)
    return LanguageModel(model.module.clone(config=config), small, config, model.tokenizer)


def _unstacked(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path, with every layer of a stack under its number."""
    layers: dict[str, Any] = {}
    for path, leaf in flat.items():
        top, _, tail = path.partition("/")
        layers |= {f"{top}/{i}/{tail}": leaf[i] for i in range(len(leaf))} if top == STACKED_UNDER else {path: leaf}
    return layers


def _stacked(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_unstacked`, for layers in their order."""
    stacks: dict[str, list[Any]] = {}
    for path, leaf in flat.items():
        top, _, tail = path.partition("/")
        stack = f"{top}/{tail.partition('/')[2]}" if top == STACKED_UNDER else path
        stacks.setdefault(stack, []).append(leaf)
    return {
        path: jnp.stack(layers) if path.startswith(f"{STACKED_UNDER}/") else layers[0]
        for path, layers in stacks.items()
    }


def _cut(path: str, weight: Any, indices: Mapping[str, np.ndarray]) -> Any:
    """A kernel without masked outputs or the inputs that read them. Other leaves are returned unchanged."""
    if path in indices:
        return weight[:, indices[path]]
    *_, block, module, name = ("", "", *path.split("/"))
    if name != "kernel" or BLOCKS.get(block, {}).get(module) != "in":
        return weight
    return weight[indices[f"{path.removesuffix(f'{module}/kernel')}{LEADER[block]}/kernel"]]


def _config(config: LlamaConfig, indices: Mapping[str, np.ndarray]) -> LlamaConfig:
    """The config of the smaller model."""

    def size(layer: int, name: str) -> int:
        """The number of outputs that a projection keeps."""
        return indices[f"{STACKED_UNDER}/{layer}/{name}/kernel"].size

    sizes = tuple(
        (
            size(layer, "self_attn/q_proj") // config.head_dim,
            size(layer, "self_attn/k_proj") // config.head_dim,
            size(layer, "mlp/gate_proj"),
        )
        for layer in range(config.num_hidden_layers)
    )
    if len(set(sizes)) > 1:
        return dataclasses.replace(config, layer_sizes=sizes, model_type=UNEQUAL + config.model_type)
    heads, kv_heads, width = sizes[0]
    return dataclasses.replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=width)
