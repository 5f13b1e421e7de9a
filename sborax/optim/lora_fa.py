"""LoRA-FA, arXiv:2308.03303: a is frozen, b follows the projected gradient. The projection is that of PEFT."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from sborax.adapters.core import AbstractComposite, AbstractFactored, Adapter, Leaves, SboraxError, is_adapter
from sborax.adapters.grouped import AbstractBranched
from sborax.adapters.leaves import flatten, replace_leaves, union
from sborax.adapters.linalg import pinv
from sborax.adapters.tables import LOOKUP, TABLE
from sborax.adapters.tree import nodes, split
from sborax.optim.pairs import agree, over_pairs, sides

RIDGE = 1e-8


def split_lora_fa(adapters: PyTree) -> tuple[PyTree, PyTree]:
    """`split` for LoRA-FA: a of every pair a, b goes into the frozen half, so that it has no gradient.

    `combine` joins the halves again, and `lora_fa` reads a from `frozen=`:

        train, frozen = split_lora_fa(adapters)
        tx = optax.chain(optax.clip_by_global_norm(1.0), lora_fa(1e-3))  # clips by the gradient of b alone

    Raises SboraxError if no adapter has such a pair, for a pair that is not s a b or has trained numbers between a
    and b, for a method that differs from LoRA in the gradient of a alone, and for an embedding, where a is zero.
    arXiv:2308.03303
    """
    for path in (TABLE, LOOKUP):
        if path in nodes(adapters):
            raise SboraxError(f"lora_fa: {path}: a starts at zero there, and would stay zero; use another optimizer")
    for path, node in nodes(adapters).items():
        _check_product(path, node)
    train, frozen = split(adapters)
    flags = jax.tree.map(lambda side: side == "a", sides(train))
    if not any(jax.tree.leaves(flags)):
        raise SboraxError("lora_fa: no adapter has a pair of trained factors a, b; use another optimizer")

    def half(node: Any, flag: Any, value: bool) -> Any:
        return dataclasses.replace(node, train=_subset(node.train, flag.train, value))

    fixed = jax.tree.map(lambda node, flag: half(node, flag, True), train, flags, is_leaf=is_adapter)
    moving = jax.tree.map(lambda node, flag: half(node, flag, False), train, flags, is_leaf=is_adapter)
    frozen = jax.tree.map(lambda a, b: dataclasses.replace(b, train=a.train), fixed, frozen, is_leaf=is_adapter)
    return moving, frozen


def _check_product(path: str, node: Adapter) -> None:
    """Raise SboraxError for a pair that is not s a b, or has trained gains between a and b, which it leaves out."""
    method, train = node.method, node.train
    if isinstance(method, AbstractComposite):
        for child, _ in method.children(node):
            _check_product(path, child)
    elif {"a", "b"} <= train.keys():
        gains = [name for name in train if method.axes[name] == ("rank",)]
        if gains:
            raise SboraxError(
                f"lora_fa: {path}: {type(method).__name__} trains {gains[0]} between a and b, which the "
                "projection of b leaves out; use another optimizer"
            )
        if isinstance(method, AbstractFactored) and set(method.masks.values()) & node.frozen.keys():
            raise SboraxError(
                f"lora_fa: {path}: {type(method).__name__} masks a, which the projection of b leaves out; use another "
                "optimizer"
            )
        product = (method.axes["a"], method.axes["b"]) == (("in", "rank"), ("rank", "out")) and "scale" in node.frozen
        if agree(train["a"], train["b"]) and not product:
            raise SboraxError(
                f"lora_fa: {path}: the change by {type(method).__name__} is not s a b, which the projection of b is "
                "for; use another optimizer"
            )
        if isinstance(method, AbstractBranched):
            raise SboraxError(
                f"lora_fa: {path}: {type(method).__name__} approximates the gradient of a, which is fixed here, and "
                "is LoRA otherwise; use LoRA, or another optimizer"
            )


def _subset(leaves: Leaves, flags: Leaves, value: bool) -> Leaves:
    """The leaves whose flag is `value`, nested as they were."""
    return {
        name: _subset(leaf, flags[name], value) if isinstance(leaf, dict) else leaf
        for name, leaf in leaves.items()
        if isinstance(leaf, dict) or flags[name] == value
    }


def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on b alone, along (a^T a + 1e-8 I)^-1 g_b / s^2; a never moves and has no moments. arXiv:2308.03303

    Moments are corrected for bias, eps is not, and decay acts after the step: b <- (b + u)(1 - lr weight_decay).
    Leaves that are in no pair get the same AdamW without the projection.

    Split adapters with `split_lora_fa`, so that a costs no gradient and does not count in clipping. With `split`, a is
    in the trained half and its updates are zero.

    Args:
    - learning_rate: a number, or a schedule by step.
    - b1, b2: decay rates of the moments. Defaults: PEFT's.
    - eps: added to the root of the second moment. Default: PEFT's.
    - weight_decay: decoupled. Default: PEFT's.

    `update` needs `params` and `frozen=`, the frozen halves of the adapters, which hold a and the scales s.
    Raises SboraxError without them, and if there is no pair a, b.
    """
    trained = optax.chain(_scale_by_adam(b1, b2, eps), _descend_then_decay(learning_rate, weight_decay))

    def labels(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda side: "fixed" if side == "a" else "trained", sides(tree))

    return optax.chain(
        project_lora_fa(), optax.partition({"fixed": optax.set_to_zero(), "trained": trained}, param_labels=labels)
    )


def project_lora_fa() -> optax.GradientTransformationExtraArgs:
    """g_b <- (a^T a + 1e-8 I)^-1 g_b / s^2: for fixed a, the step of b that is nearest to that of full fine-tuning.

    Stateless. `update` needs `params` and `frozen=`, as in `lora_fa`. Padded ranks keep a zero gradient.
    """

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, *, frozen: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        if params is None or frozen is None:
            raise SboraxError("lora_fa: update needs params and frozen=, the frozen halves of the adapters")
        for path, node in _joined(params, frozen).items():
            _check_product(path, node)
        grads, constant, trained = flatten(updates), flatten(frozen), flatten(params)
        new: dict[str, Array] = {}
        for path, grad in grads.items():
            if not path.endswith("/b"):
                continue
            beside = path.removesuffix("b") + "a"
            a = trained[beside] if beside in trained else _at(constant, beside)
            if a is None or not agree(a, grad):
                continue
            scale = _at(constant, path.removesuffix("/b").replace("/train", "/frozen") + "/scale")
            if scale is None:
                raise SboraxError(f"lora_fa: {path.removesuffix('/b')}: frozen= has no scale for this pair")
            new[path] = over_pairs(_project, a.ndim - 2)(grad, a, scale)
            if beside in grads:
                new[beside] = jnp.zeros_like(a)
        if not new:
            raise SboraxError("lora_fa: no adapter has a pair of factors a, b; use another optimizer")

        return replace_leaves(updates, new), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _joined(params: PyTree, frozen: PyTree) -> dict[str, Adapter]:
    """The adapters by path, of both halves. Those without a frozen half are left out."""
    halves, joined = nodes(frozen), {}
    for path, node in nodes(params).items():
        half = _at(halves, path)
        if half is not None:
            joined[path] = dataclasses.replace(half, train=union(half.train, node.train))
    return joined


def _at(leaves: Mapping[str, Any], path: str) -> Any:
    """The leaf whose path `path` ends with: `path` starts at the training state, `leaves` at the adapters in it."""
    return next((leaf for name, leaf in leaves.items() if f"/{path}".endswith(f"/{name}")), None)


def _project(
    grad: Float[Array, "rank out"], a: Float[Array, "in rank"], scale: Float[Array, ""]
) -> Float[Array, "rank out"]:
    with jax.default_matmul_precision("highest"):
        live = jnp.any(a != 0, axis=0)
        gram = a.T @ a + RIDGE * jnp.eye(a.shape[1], dtype=a.dtype)
        inverse = pinv(gram, 10 * len(gram) * float(jnp.finfo(gram.dtype).eps))
        # Rounding in the inverse would move padded rows, and Adam would make the movement large.
        inverse = jnp.where(live[:, None] & live[None, :], inverse, 0)
        return inverse @ grad / jnp.square(scale).astype(a.dtype)


class _AdamState(NamedTuple):
    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam whose eps is not corrected for bias: sqrt(1 - b2^t) / (1 - b1^t) * mu / (sqrt(nu) + eps)."""

    def init(params: PyTree) -> _AdamState:
        return _AdamState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, _AdamState]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)

        def direction(m: Array, v: Array) -> Array:
            t = count.astype(m.dtype)
            return jnp.sqrt(1 - b2**t) / (1 - b1**t) * m / (jnp.sqrt(v) + eps)

        return jax.tree.map(direction, mu, nu), _AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _descend_then_decay(rate: optax.ScalarOrSchedule, decay: float) -> optax.GradientTransformation:
    """u = -lr d, then decay of the new value: u - lr decay (p + u)."""

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, optax.ScaleByScheduleState]:
        lr = rate(state.count) if callable(rate) else rate

        def decayed_step(direction: Array, leaf: Array) -> Array:
            leaf_lr = jnp.asarray(lr, leaf.dtype)
            step = -leaf_lr * direction
            return step - leaf_lr * decay * (leaf + step)

        return jax.tree.map(decayed_step, updates, params), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)
