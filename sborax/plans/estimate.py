"""What a step's temporaries come to where no program can be compiled: a formula, and no more than that."""

import math

from sborax.adapters.constraints import ROWS
from sborax.adapters.core import is_weight, width
from sborax.methods.lowrank import HIDDEN
from sborax.models.llama import kept_names
from sborax.plans.ahead import Outline, device_bytes
from sborax.train.head_loss import CHUNK


def temporary_bytes(one: Outline) -> int:
    """About how many bytes of temporaries the step takes on each device.

    gradients + what layers keep for the backward pass + one layer's workspace + the head: the sizes of the arrays that
    exist at one time, without what a compiler adds or saves.
    """
    return round(device_bytes(one.state.train) + _kept(one) + _layer(one) + _head(one))


def _cut(one: Outline) -> tuple[int, int, int]:
    """Rows of a device, tokens of a row, and devices that share heads and channels."""
    _, rows, length = one.batch["tokens"].shape
    sizes = {} if one.mesh is None else one.mesh.shape
    return rows // math.prod(sizes.get(axis, 1) for axis in ROWS), length, sizes.get("tensor", 1)


def _kept(one: Outline) -> float:
    """The stream of states, and the values that `remat` keeps, of every layer."""
    config, (rows, length, tensor) = one.model.config, _cut(one)
    heads = config.head_dim * config.num_attention_heads
    pairs = config.head_dim * config.num_key_value_heads
    widths = {
        "qkv": (heads + 2 * pairs) / tensor,
        "attended": heads / tensor,
        "mixed": config.hidden_size,
        "gate_up": 2 * config.intermediate_size / tensor,
        HIDDEN: sum(width(site.method.rank) for site in one.plan.sites),
    }
    names = kept_names(one.model.module.remat)
    item = one.model.module.dtype.itemsize
    one_token = config.hidden_size + sum(widths[name] for name in (widths if names is None else names))
    total = rows * length * one_token * item
    if names is None:
        # Norms in float32, rotated heads, the gated unit's activations, scores and their softmax.
        total += rows * length * (2 * 4 * config.hidden_size + item * (widths["qkv"] + 1.5 * widths["gate_up"]))
        total += rows * config.num_attention_heads / tensor * length**2 * (4 + item)
    return config.num_hidden_layers * total


def _layer(one: Outline) -> float:
    """Attention's scores with their gradients, the gated unit with its own, and kernels put together from shards."""
    config, (rows, length, tensor) = one.model.config, _cut(one)
    item = one.model.module.dtype.itemsize
    scores = 2 * rows * config.num_attention_heads / tensor * length**2 * (4 + item)
    gated = 4 * rows * length * config.intermediate_size / tensor * item
    kernels = [leaf for path, leaf in one.parts.base.items() if path.startswith("layers/") and path.endswith("/kernel")]
    quantised, sharded = any(is_weight(leaf) for leaf in kernels), one.mesh is not None and one.mesh.shape["fsdp"] > 1
    whole = max((math.prod(leaf.shape[1:]) for leaf in kernels), default=0) / tensor
    return max(scores, gated) + (whole * (item + 4 * quantised) if quantised or sharded else 0)


def _head(one: Outline) -> float:
    """Some chunks of logits in float32, and copies of the hidden states that are sorted for them."""
    config, (rows, length, tensor) = one.model.config, _cut(one)
    chunk = min(CHUNK, rows * length)
    return 3 * 4 * chunk * config.vocab_size / tensor + 3 * rows * length * config.hidden_size * 4
