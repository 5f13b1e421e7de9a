"""Names of LLaMA's tensors here, in Hugging Face's files and in GGUF: one table for reading, writing and exporting.

Our kernels are `(in, out)`, Hugging Face's weights `(out, in)`. Paths of stacked params carry no layer number
(`layers/self_attn/q_proj/kernel`); those of an unrolled model do (`layers/3/self_attn/q_proj/kernel`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import flatten


class Row(NamedTuple):
    """The names of one tensor. `{layer}` stands for the number of the layer, `{expert}` for that of the expert."""

    ours: str
    hf: str
    gguf: str
    transposed: bool


def _projection(module: str, gguf: str) -> tuple[Row, Row]:
    ours, theirs, short = f"layers/{module}", "model.layers.{layer}." + module.replace("/", "."), "blk.{layer}." + gguf
    return (
        Row(f"{ours}/kernel", f"{theirs}.weight", f"{short}.weight", True),
        Row(f"{ours}/bias", f"{theirs}.bias", f"{short}.bias", False),
    )


def _expert(module: str, gguf: str) -> tuple[Row]:
    theirs = "model.layers.{layer}.mlp.experts.{expert}." + module
    return (Row(f"layers/mlp/experts/{module}/kernel", f"{theirs}.weight", f"blk.{{layer}}.{gguf}.weight", True),)


def _norm(ours: str, hf: str, gguf: str) -> Row:
    return Row(f"{ours}/scale", f"{hf}.weight", f"{gguf}.weight", False)


TABLE = (
    Row("embed_tokens/embedding", "model.embed_tokens.weight", "token_embd.weight", False),
    _norm("layers/input_layernorm", "model.layers.{layer}.input_layernorm", "blk.{layer}.attn_norm"),
    *_projection("self_attn/q_proj", "attn_q"),
    *_projection("self_attn/k_proj", "attn_k"),
    _norm("layers/self_attn/q_norm", "model.layers.{layer}.self_attn.q_norm", "blk.{layer}.attn_q_norm"),
    _norm("layers/self_attn/k_norm", "model.layers.{layer}.self_attn.k_norm", "blk.{layer}.attn_k_norm"),
    *_projection("self_attn/v_proj", "attn_v"),
    *_projection("self_attn/o_proj", "attn_output"),
    _norm("layers/post_attention_layernorm", "model.layers.{layer}.post_attention_layernorm", "blk.{layer}.ffn_norm"),
    _norm("layers/pre_feedforward_layernorm", "model.layers.{layer}.pre_feedforward_layernorm", "blk.{layer}.ffn_norm"),
    _norm(
        "layers/post_feedforward_layernorm",
        "model.layers.{layer}.post_feedforward_layernorm",
        "blk.{layer}.post_ffw_norm",
    ),
    *_projection("mlp/gate_proj", "ffn_gate"),
    *_projection("mlp/up_proj", "ffn_up"),
    *_projection("mlp/down_proj", "ffn_down"),
    Row("layers/mlp/router/weight", "model.layers.{layer}.mlp.gate.weight", "blk.{layer}.ffn_gate_inp.weight", True),
    *_expert("gate_proj", "ffn_gate_exps"),
    *_expert("up_proj", "ffn_up_exps"),
    *_expert("down_proj", "ffn_down_exps"),
    *_projection("mlp/shared_expert/gate_proj", "ffn_gate_shexp"),
    *_projection("mlp/shared_expert/up_proj", "ffn_up_shexp"),
    *_projection("mlp/shared_expert/down_proj", "ffn_down_shexp"),
    Row(
        "layers/mlp/shared_expert_gate/weight",
        "model.layers.{layer}.mlp.shared_expert_gate.weight",
        "blk.{layer}.ffn_gate_inp_shexp.weight",
        True,
    ),
    _norm("norm", "model.norm", "output_norm"),
    Row("lm_head/kernel", "lm_head.weight", "output.weight", True),
)

DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that follow from the config."""


def unlayered(path: str) -> tuple[str, int | None]:
    """A path without its layer number, and the number: `layers/3/norm` -> (`layers/norm`, 3)."""
    match = re.fullmatch(r"layers/(\d+)/(.*)", path)
    return (f"layers/{match[2]}", int(match[1])) if match else (path, None)


def row(path: str) -> Row:
    """The table's row for one of our leaf paths, stacked or not."""
    plain, _ = unlayered(path)
    for entry in TABLE:
        if entry.ours == plain:
            return entry
    raise SboraxError(f"{path}: not a parameter of this model")


def stack_shape(pattern: str, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes of the leaf at `path` along which its tensors are separate in a file: layers, experts or both.

    - pattern: the name of the tensors.
    - shape: that of the leaf.
    """
    layers = "{layer}" in pattern and unlayered(path)[1] is None
    return shape[: layers + ("{expert}" in pattern)]


def tensor_names(pattern: str, path: str, shape: tuple[int, ...]) -> Iterator[str]:
    """The names of the tensors of a leaf, in the order of its flattened leading axes. See `stack_shape`."""
    numbered = unlayered(path)[1]
    for place in np.ndindex(*stack_shape(pattern, path, shape)):
        layer, expert = (place[0] if numbered is None and place else numbered), place[-1] if place else None
        yield pattern.format(layer=layer, expert=expert)


def fused_module(name: str, fused: Mapping[str, tuple[str, ...]]) -> tuple[str, tuple[str, ...]] | None:
    """The module of a file that holds the projection `name`, and all projections of it; None for one by itself.

    `layers.3.self_attn.k_proj` -> (`layers.3.self_attn.qkv_proj`, (`layers.3.self_attn.q_proj`, ...)).

    - fused: `Family.fused`.
    """
    top, _, last = name.rpartition(".")
    for module, parts in fused.items():
        inner, _, joined = module.rpartition(".")
        if last in parts and f".{top}".endswith(f".{inner}"):
            return f"{top}.{joined}", tuple(f"{top}.{part}" for part in parts)
    return None


def fused_tensors(fused: Mapping[str, tuple[str, ...]], params: Any) -> dict[str, dict[str, int]]:
    """The tensors of a file that hold several projections: how many outputs each of these has, in order.

    - fused: `Family.fused`.
    - params: the param tree, or its shapes.
    """
    outputs = {}
    for path, leaf in flatten(params).items() if fused else ():
        if path.endswith("/kernel"):
            names = tensor_names(row(path).hf, path, leaf.shape)
            outputs |= dict.fromkeys((name.removesuffix(".weight") for name in names), leaf.shape[-1])
    tensors = {}
    for name in outputs:
        if (joint := fused_module(name, fused)) is not None:
            module, parts = joint
            tensors[f"{module}.weight"] = {f"{part}.weight": outputs[part] for part in parts}
    return tensors


def hf_module(path: str, layer: int | None = None, expert: int | None = None) -> str:
    """Hugging Face's name of a module: (`layers/self_attn/q_proj`, 3) -> `model.layers.3.self_attn.q_proj`."""
    plain, numbered = unlayered(path.removesuffix("/kernel"))
    pattern = row(f"{plain}/kernel").hf.removesuffix(".weight")
    number = numbered if numbered is not None else layer
    if "{layer}" in pattern and number is None:
        raise SboraxError(f"{path}: say which layer")
    if "{expert}" in pattern and expert is None:
        raise SboraxError(f"{path}: say which expert")
    return pattern.format(layer=number, expert=expert)
