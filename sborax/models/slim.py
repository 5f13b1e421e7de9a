"""A pruned model as a smaller one: heads and channels that LoRAPrune has masked are cut out, arXiv:2305.18403."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sborax.core import Adapter, SboraxError
from sborax.methods.masked import Masked
from sborax.models.language_model import LanguageModel, Params
from sborax.procedures.importance import BLOCKS, block_of
from sborax.tree import Adapters, merge, nodes

LEADER = {"self_attn": "q_proj", "mlp": "gate_proj"}
"""Whose outputs are the inputs of the projection that is cut on its input side."""


def slim(model: LanguageModel, params: Params, adapters: Adapters) -> LanguageModel:
    """The merged model without the outputs that are masked and the inputs that read them: the same function.

    The result has fewer heads and a narrower MLP in every layer; `save_hf` writes it and transformers loads it.
    Raises SboraxError where nothing is masked, and where layers keep different numbers of heads or channels: such a
    model has no config.json. LoRAPrune prunes all layers alike with protect=0.
    """
    flat = nodes(adapters)
    kept = {path: _kept(node) for path, node in flat.items() if isinstance(node.method, Masked)}
    if not kept:
        raise SboraxError("slim: nothing is masked in these adapters; train them with procedure=LoRAPrune(...)")
    counts = {module: _count(module, kept) for module in ("q_proj", "k_proj", "gate_proj")}

    def cut(keys: tuple, weight: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path not in flat or block_of(path)[1] not in BLOCKS:
            return weight
        parent, block, module = block_of(path)
        if BLOCKS[block][module] == "out":
            index, axis = kept[path][..., None, :], -1
        else:
            index, axis = kept[f"{parent}/{LEADER[block]}/kernel"][..., :, None], -2
        return jnp.take_along_axis(weight, jnp.asarray(index), axis=axis)

    merged = jax.tree_util.tree_map_with_path(cut, merge(params, adapters))
    width = model.config.head_dim
    config = dataclasses.replace(
        model.config,
        num_attention_heads=counts["q_proj"] // width,
        num_key_value_heads=counts["k_proj"] // width,
        intermediate_size=counts["gate_proj"],
    )
    return LanguageModel(model.module.clone(config=config), merged, config, model.tokenizer)


def _kept(node: Adapter) -> np.ndarray:
    """Numbers of the live outputs, `(*stack, kept)`."""
    mask = np.asarray(node.frozen["mask"]) > 0
    counts = mask.sum(axis=-1)
    _same(counts.reshape(-1).tolist())
    return np.argsort(~mask, axis=-1, kind="stable")[..., : int(counts.min())]


def _count(module: str, kept: dict[str, np.ndarray]) -> int:
    """How many outputs a projection keeps in every layer."""
    return _same([own.shape[-1] for path, own in kept.items() if block_of(path)[2] == module])


def _same(counts: list[int]) -> int:
    if len(set(counts)) > 1:
        raise SboraxError(
            f"slim: layers keep {min(counts)} to {max(counts)} outputs, which no config.json can say; "
            "prune with protect=0, or merge for a masked model of full size"
        )
    return counts[0]
