"""The optax transformation that an `Optimizer` describes."""

import jax
import optax
from jaxtyping import PyTree

from sborax.optim import lora_fa, lora_plus, lora_rite, split_lora_fa
from sborax.train.experiment import Optimizer
from sborax.train.state import Halves
from sborax.tree import split


def schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to `lr`, then constant, linear or cosine decay over `steps`."""
    warmup = int(optimizer.warmup) if optimizer.warmup >= 1 else round(optimizer.warmup * steps)
    rest = max(1, steps - warmup)
    last = optimizer.final * optimizer.lr
    if optimizer.schedule == "constant":
        after = optax.constant_schedule(optimizer.lr)
    elif optimizer.schedule == "linear":
        after = optax.linear_schedule(optimizer.lr, last, rest)
    else:
        after = optax.cosine_decay_schedule(optimizer.lr, rest, alpha=optimizer.final)
    if not warmup:
        return after
    # The first step moves: the ramp starts at lr / warmup, where transformers' starts at 0.
    ramp = optax.linear_schedule(optimizer.lr / warmup, optimizer.lr, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def decayed(train: PyTree) -> PyTree:
    """Which leaves weight decay acts on: all but the norm scales and biases of the base."""

    def one(path: tuple, leaf: jax.Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return not (name.startswith("base/") and name.endswith(("/scale", "/bias")))

    return jax.tree_util.tree_map_with_path(one, train)


def halves(optimizer: Optimizer) -> Halves:
    """How adapters are split for this optimiser: `lora_fa` holds a fixed."""
    return split_lora_fa if optimizer.name == "lora_fa" else split


def make_optimizer(
    optimizer: Optimizer,
    steps: int,
    watch: optax.GradientTransformation | None = None,
    lr: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """Clip by global norm, show the gradients to `watch`, then the named optimiser on its schedule, or on `lr`."""
    lr = schedule(optimizer, steps) if lr is None else lr
    first, second = optimizer.betas
    links = [] if optimizer.clip is None else [optax.clip_by_global_norm(optimizer.clip)]
    if optimizer.name == "adamw":
        rule = optax.adamw(lr, first, second, optimizer.eps or 1e-8, weight_decay=optimizer.decay, mask=decayed)
    elif optimizer.name == "adam":
        rule = optax.adam(lr, first, second, optimizer.eps or 1e-8)
    elif optimizer.name == "lion":
        rule = optax.lion(lr, first, second, weight_decay=optimizer.decay, mask=decayed)
    elif optimizer.name == "adafactor":
        rule = optax.adafactor(lr)
    elif optimizer.name == "lora_rite":
        # It clips gradients that do not depend on the sizes of a and b; a clip in front would.
        links = []
        eps = optimizer.eps or 1e-6
        rule = lora_rite(lr, first, second, eps, optimizer.decay, optimizer.clip, mask=decayed)
    elif optimizer.name == "lora_fa":
        rule = lora_fa(lr, first, second, optimizer.eps or 1e-6, optimizer.decay)
    else:
        rule = optax.sgd(lr, momentum=first or None)
    links += [watch] if watch is not None else []
    return optax.chain(*links, rule, *([lora_plus(optimizer.b_ratio)] if optimizer.b_ratio != 1.0 else []))
