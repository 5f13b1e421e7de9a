"""A formula for the temporary memory of a step, for devices that nothing can be compiled for."""

import math

import jax

from sborax.adapters.constraints import EXPERT, ROWS
from sborax.adapters.core import HIDDEN, is_weight, width
from sborax.adapters.tables import HEAD, TABLE
from sborax.adapters.vectors import VECTORS
from sborax.models.decoder import active_width, expert_rows
from sborax.models.llama import kept_names
from sborax.models.sharding import is_expert
from sborax.plans.ahead import Outline, device_bytes
from sborax.train.head_loss import CHUNK


def temporary_bytes(planned: Outline) -> int:
    """An estimate of the bytes of temporaries on each device.

    gradients, those that a procedure watches included, + a table with trained vectors + values kept for the backward
    pass + one layer's workspace + the head: the sizes of the arrays that exist at one time, without what a compiler
    adds or saves.
    """
    watched = device_bytes([planned.parts.base[path] for path in planned.prepared.differentiated])
    gradients = device_bytes(planned.state.train) + watched
    return round(gradients + _table(planned) + _residuals(planned) + _layer(planned) + _head(planned))


def _table(planned: Outline) -> int:
    """Bytes of copies of tables in which vectors of tokens are trained, and of their gradients, which are as large.

    Where the embedding is not the head, its copy is gone before the gradient is there.
    """
    base = planned.parts.base
    trained = {table for path, table in VECTORS.items() if path in planned.parts.trained_base}
    return sum(device_bytes(base[table]) * (1 if table == TABLE and HEAD in base else 2) for table in trained)


def _cut(planned: Outline) -> tuple[int, int, int]:
    """Rows on a device, tokens of a row, and the number of devices that share heads and channels."""
    _, rows, length = planned.batch["tokens"].shape
    sizes = {} if planned.mesh is None else planned.mesh.shape
    return rows // math.prod(sizes.get(axis, 1) for axis in ROWS), length, sizes.get("tensor", 1)


def _size(planned: Outline, *names: str) -> int:
    """The number of devices along these axes of the mesh together; 1 without a mesh."""
    sizes = {} if planned.mesh is None else planned.mesh.shape
    return math.prod(sizes.get(name, 1) for name in names)


def _residuals(planned: Outline) -> float:
    """Bytes of the hidden states and of the values that `remat` keeps, of all layers."""
    config, (rows, length, tensor) = planned.model.config, _cut(planned)
    capacity = planned.model.module.expert_capacity
    heads = config.head_dim * config.num_attention_heads
    pairs = config.head_dim * config.num_key_value_heads
    widths = {
        "qkv": (heads + 2 * pairs) / tensor,
        "attended": heads / tensor,
        "mixed": config.hidden_size,
        "gate_up": 2 * active_width(config, _size(planned, EXPERT), capacity) / tensor,
        HIDDEN: sum(width(site.method.rank) for site in planned.plan.sites),
    }
    names = kept_names(planned.model.module.remat)
    item = planned.model.module.dtype.itemsize
    per_token = config.hidden_size + sum(widths[name] for name in (widths if names is None else names))
    total = rows * length * per_token * item
    if names is None:
        # Also norms in float32, rotated heads, the gated unit's activations, scores and their softmax.
        total += rows * length * (2 * 4 * config.hidden_size + item * (widths["qkv"] + 1.5 * widths["gate_up"]))
        if planned.model.module.attention == "xla":
            total += rows * config.num_attention_heads / tensor * length**2 * (4 + item)
    return float(config.num_hidden_layers * total)


def _layer(planned: Outline) -> float:
    """Bytes of one layer: attention's scores or the gated unit, with gradients; the kernels of two layers, if gathered,
    since those of the next layer are under way; and the largest kernel made dense, if quantised.

    Experts are gathered whole, since their tokens are cut along tensor; inputs, outputs and gradients of their rows are
    hidden states.
    """
    config, (rows, length, tensor) = planned.model.config, _cut(planned)
    item = planned.model.module.dtype.itemsize
    # Other programs for attention hold no scores.
    quadratic = planned.model.module.attention == "xla"
    scores = 2 * rows * config.num_attention_heads / tensor * length**2 * (4 + item) if quadratic else 0
    shares, capacity = _size(planned, EXPERT), planned.model.module.expert_capacity
    gated = 4 * rows * length * active_width(config, shares, capacity) / tensor * item
    gated += 3 * rows * length * expert_rows(config, shares, capacity) / tensor * config.hidden_size * item
    if capacity is not None and shares > 1:
        # Rows before they are sent, and outputs once they are back.
        gated += 2 * rows * length * expert_rows(config, shares, capacity) / tensor * config.hidden_size * item
    kernels = {
        path: leaf
        for path, leaf in planned.parts.base.items()
        if path.startswith("layers/") and path.endswith("/kernel")
    }
    cuts = {path: shares if is_expert(path) else tensor for path in kernels}
    largest = max((math.prod(leaf.shape[1:]) / cuts[path] for path, leaf in kernels.items()), default=0)
    dense = largest * (item + 4) if any(map(is_weight, kernels.values())) else 0
    gathered = 0.0
    for path, leaf in kernels.items():
        if _size(planned, "fsdp", "tensor" if is_expert(path) else EXPERT) > 1:
            stored = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(leaf))
            gathered += 2 * stored / config.num_hidden_layers / cuts[path]
    return max(scores, gated) + gathered + dense


def _head(planned: Outline) -> float:
    """Bytes of the head: chunks of logits in float32, and sorted copies of the hidden states."""
    config, (rows, length, tensor) = planned.model.config, _cut(planned)
    chunk = min(CHUNK, rows * length)
    return 3 * 4 * chunk * config.vocab_size / tensor + 3 * rows * length * config.hidden_size * 4
