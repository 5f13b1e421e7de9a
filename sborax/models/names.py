"""How Hugging Face names the tensors of this model, and how we do: one table for loading, saving and exporting.

Our kernels are `(in, out)`, Hugging Face's weights `(out, in)`. Paths of stacked params carry no layer number
(`layers/self_attn/q_proj/kernel`); those of an unrolled model do (`layers/3/self_attn/q_proj/kernel`).
"""

import re
from typing import NamedTuple

from sborax.core import SboraxError


class Row(NamedTuple):
    """One tensor. `{layer}` stands for the number of the layer."""

    ours: str
    hf: str
    gguf: str
    transposed: bool


TABLE = (
    Row("embed_tokens/embedding", "model.embed_tokens.weight", "token_embd.weight", False),
    Row("layers/input_layernorm/scale", "model.layers.{layer}.input_layernorm.weight", "blk.{layer}.attn_norm.weight", False),
    Row("layers/self_attn/q_proj/kernel", "model.layers.{layer}.self_attn.q_proj.weight", "blk.{layer}.attn_q.weight", True),
    Row("layers/self_attn/k_proj/kernel", "model.layers.{layer}.self_attn.k_proj.weight", "blk.{layer}.attn_k.weight", True),
    Row("layers/self_attn/v_proj/kernel", "model.layers.{layer}.self_attn.v_proj.weight", "blk.{layer}.attn_v.weight", True),
    Row("layers/self_attn/o_proj/kernel", "model.layers.{layer}.self_attn.o_proj.weight", "blk.{layer}.attn_output.weight", True),
    Row("layers/self_attn/q_proj/bias", "model.layers.{layer}.self_attn.q_proj.bias", "blk.{layer}.attn_q.bias", False),
    Row("layers/self_attn/k_proj/bias", "model.layers.{layer}.self_attn.k_proj.bias", "blk.{layer}.attn_k.bias", False),
    Row("layers/self_attn/v_proj/bias", "model.layers.{layer}.self_attn.v_proj.bias", "blk.{layer}.attn_v.bias", False),
    Row("layers/self_attn/o_proj/bias", "model.layers.{layer}.self_attn.o_proj.bias", "blk.{layer}.attn_output.bias", False),
    Row("layers/post_attention_layernorm/scale", "model.layers.{layer}.post_attention_layernorm.weight", "blk.{layer}.ffn_norm.weight", False),
    Row("layers/mlp/gate_proj/kernel", "model.layers.{layer}.mlp.gate_proj.weight", "blk.{layer}.ffn_gate.weight", True),
    Row("layers/mlp/up_proj/kernel", "model.layers.{layer}.mlp.up_proj.weight", "blk.{layer}.ffn_up.weight", True),
    Row("layers/mlp/down_proj/kernel", "model.layers.{layer}.mlp.down_proj.weight", "blk.{layer}.ffn_down.weight", True),
    Row("layers/mlp/gate_proj/bias", "model.layers.{layer}.mlp.gate_proj.bias", "blk.{layer}.ffn_gate.bias", False),
    Row("layers/mlp/up_proj/bias", "model.layers.{layer}.mlp.up_proj.bias", "blk.{layer}.ffn_up.bias", False),
    Row("layers/mlp/down_proj/bias", "model.layers.{layer}.mlp.down_proj.bias", "blk.{layer}.ffn_down.bias", False),
    Row("norm/scale", "model.norm.weight", "output_norm.weight", False),
    Row("lm_head/kernel", "lm_head.weight", "output.weight", True),
)  # fmt: skip

DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors in old checkpoints that follow from the config."""


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


def hf_module(path: str, layer: int | None = None) -> str:
    """Hugging Face's module for ours: (`layers/self_attn/q_proj`, 3) -> `model.layers.3.self_attn.q_proj`."""
    plain, own = unlayered(path.removesuffix("/kernel"))
    pattern = row(f"{plain}/kernel").hf.removesuffix(".weight")
    number = own if own is not None else layer
    if "{layer}" in pattern and number is None:
        raise SboraxError(f"{path}: say which layer")
    return pattern.format(layer=number)


def our_module(module: str) -> tuple[str, int | None]:
    """The inverse of `hf_module`: `model.layers.3.self_attn.q_proj` -> (`layers/self_attn/q_proj`, 3)."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module)
    pattern = f"model.layers.{{layer}}.{match[2]}" if match else module
    for entry in TABLE:
        if entry.hf == f"{pattern}.weight":
            return entry.ours.rpartition("/")[0], int(match[1]) if match else None
    raise SboraxError(f"{module}: not a module of this model")
