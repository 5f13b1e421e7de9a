"""LoRA-RITE: LoRA Done RITE, Robust Invariant Transformation Equilibration, arXiv:2410.20625.

Steps depend on a and b through their product alone: replacing (a, b) by (a R, R^-1 b) changes no update of a b. Each
factor's gradient is expressed in an orthonormal basis of the other factor, so that the size of that factor cancels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from sborax.adapters.core import SboraxError
from sborax.adapters.linalg import eigenvalues, eigh, pinv, qr
from sborax.optim.pairs import Factors, over_pairs, pairs, replace_pairs, sides


class Side(NamedTuple):
    """Statistics of one factor, in the basis of the other one.

    - v: second moment, (rank, rank).
    - m: first moment, (rows, rank).
    - u: this factor's basis in the step before, (rows, rank).
    - rho: second moment lost with former bases, per entry of v's diagonal.
    """

    v: Float[Array, "*stack rank rank"]
    m: Float[Array, "*stack rows rank"]
    u: Float[Array, "*stack rows rank"]
    rho: Float[Array, "*stack"]


class LoRARiteState(NamedTuple):
    """The number of steps made, and both sides of every pair by its path."""

    count: Int[Array, ""]
    sides: dict[str, tuple[Side, Side]]


class _Unmagnified(NamedTuple):
    """One factor in this step.

    - grad: in the other factor's basis.
    - basis: orthonormal basis of this factor's columns.
    - inverse: pseudo-inverse of the triangle R in factor = basis R.
    """

    grad: Float[Array, "rows rank"]
    basis: Float[Array, "rows rank"]
    inverse: Float[Array, "rank rank"]


def scale_by_lora_rite(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    clip: float | None = 1.0,
    skip: float | None = 1.0,
    escape: bool = False,
    cap: float | None = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Directions of LoRA-RITE for every pair of leaves a, b, and of `rest` for other leaves. arXiv:2410.20625

    With a = U_a R_a and b^T = U_b R_b (QR; the polar factors give the same trajectory), for a, and likewise for b:
    g = grad_a R_b^+, zero if RMS(g) > skip, all pairs scaled to global norm <= clip;  P = U_b^T U_b,former;
    V <- b2_t P V P^T + (1 - b2_t) g^T g / in;  S = g (V + rho I)^(-1/2);  M <- b1_t M P^T + (1 - b1_t) S;
    direction M R_b^+T.  b_t = b (1 - b^(t-1)) / (1 - b^t) corrects for bias.

    Args:
    - b1, b2, eps: decay rates of the moments, and what is added to roots of eigenvalues. Defaults: the authors'.
    - clip: largest global norm of all g; None for no clipping. Default: the authors'. Put no other clipping in front:
        it would depend on the sizes of a and b.
    - skip: largest RMS of a g that is not skipped; None for no skipping. Default: the authors'.
    - escape: add rho, the second moment that is lost when a basis changes (paper: on; authors' code: off).
    - cap: largest RMS of the applied M; None (default) for no cap.
    - rest: for leaves that are in no pair; None (default) for Adam with b1 and b2.

    `update` needs `params`. Stacks are mapped over; padded ranks stay zero. Leaves must have 32 bits or more.
    Raises SboraxError for a rank above either side, for a tree without a pair, and without `params`.
    """
    pair = _pairs_alone(b1, b2, eps, clip, skip, escape, cap)
    unpaired = optax.scale_by_adam(b1, b2) if rest is None else rest

    def labels(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda side: "rest" if side == "rest" else "pair", sides(tree))

    return optax.partition({"pair": pair, "rest": unpaired}, param_labels=labels)


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    skip: float | None = 1.0,
    escape: bool = False,
    cap: float | None = None,
    balance: bool = False,
    rest: optax.GradientTransformation | None = None,
    mask: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE as an optimiser: `scale_by_lora_rite`, decoupled weight decay, the learning rate. arXiv:2410.20625

    Args:
    - learning_rate: a number, or a schedule by step; the authors' is 1e-3. A step moves a b by about lr sqrt(in rank),
        however large a and b are, so that rates do not compare with Adam's. Leaves in no pair can have another rate:
        `rest=chain(scale_by_adam(), scale(factor))`.
    - weight_decay: decoupled weight decay.
    - balance: after each step give a and b the same norm without changing a b (`balance_pairs`).
    - mask: the leaves that decay, as in `optax.adamw`.
    - b1, b2, eps, clip, skip, escape, cap, rest: as in `scale_by_lora_rite`.
    """
    links = [
        scale_by_lora_rite(b1, b2, eps, clip, skip, escape, cap, rest),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    ]
    return optax.chain(*links, balance_pairs()) if balance else optax.chain(*links)


def balance_pairs() -> optax.GradientTransformation:
    """As the last link of a chain: after the step, a <- a sqrt(|b| / |a|) and b <- b sqrt(|a| / |b|).

    |x| is the Frobenius norm plus 1e-6.
    """

    def balanced_steps(step_a: Array, step_b: Array, a: Array, b: Array) -> Factors:
        new_a, new_b = a + step_a, b + step_b
        norm_a, norm_b = jnp.linalg.norm(new_a) + 1e-6, jnp.linalg.norm(new_b) + 1e-6
        target = jnp.sqrt(norm_a * norm_b)
        return new_a * (target / norm_a) - a, new_b * (target / norm_b) - b

    def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
        factors, balanced = pairs(params), {}
        for path, steps in pairs(updates).items():
            a, b = factors[path]
            balanced[path] = over_pairs(balanced_steps, a.ndim - 2)(*steps, a, b)
        return replace_pairs(updates, balanced)

    return optax.stateless(update)


def _pairs_alone(
    b1: float, b2: float, eps: float, clip: float | None, skip: float | None, escape: bool, cap: float | None
) -> optax.GradientTransformation:
    def init(params: PyTree) -> LoRARiteState:
        factors = pairs(params)
        if not factors:
            raise SboraxError("lora_rite: no adapter has a pair of trained factors a, b; use another optimizer")
        for path, (a, b) in factors.items():
            if a.shape[-1] > min(a.shape[-2], b.shape[-1]):
                raise SboraxError(
                    f"lora_rite: {path}: rank {a.shape[-1]} is above a side of ({a.shape[-2]}, {b.shape[-1]})"
                )
        return LoRARiteState(
            jnp.zeros((), jnp.int32), {path: (_zero(a), _zero(b.mT)) for path, (a, b) in factors.items()}
        )

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, LoRARiteState]:
        if params is None:
            raise SboraxError("lora_rite: update needs params")
        grads, factors = pairs(updates), pairs(params)
        count = state.count + 1
        with jax.default_matmul_precision("highest"):
            unmagnified = {}
            for path, pair in factors.items():
                unmagnify = over_pairs(functools.partial(_unmagnify, skip=skip), pair[0].ndim - 2)
                unmagnified[path] = unmagnify(grads[path], pair)
            shrink = _clip_factor([side.grad for group in unmagnified.values() for side in group], clip)
            directions, new_sides = {}, {}
            for path, (side_a, side_b) in unmagnified.items():
                a, _ = factors[path]

                def direct(side: _Unmagnified, partner: _Unmagnified, old: Side, former: Array) -> tuple[Array, Side]:
                    t = count.astype(side.grad.dtype)
                    first, second = _decay(b1, t), _decay(b2, t)
                    return _direct(side, partner, old, former, shrink.astype(t.dtype), first, second, eps, escape, cap)

                mapped = over_pairs(direct, a.ndim - 2)
                old_a, old_b = state.sides[path]
                step_a, new_a = mapped(side_a, side_b, old_a, old_b.u)
                step_b, new_b = mapped(side_b, side_a, old_b, old_a.u)
                directions[path], new_sides[path] = (step_a, step_b.mT), (new_a, new_b)
        return replace_pairs(updates, directions), LoRARiteState(count, new_sides)

    return optax.GradientTransformation(init, update)


def _zero(factor: Float[Array, "*stack rows rank"]) -> Side:
    *stack, _, rank = factor.shape
    moment, mass = jnp.zeros((*stack, rank, rank), factor.dtype), jnp.zeros(tuple(stack), factor.dtype)
    return Side(moment, jnp.zeros_like(factor), jnp.zeros_like(factor), mass)


def _unmagnify(grads: Factors, factors: Factors, skip: float | None) -> tuple[_Unmagnified, _Unmagnified]:
    """Both factors, decomposed, with their gradients in each other's basis."""
    (grad_a, grad_b), (a, b) = grads, factors
    # Padding is a tail of columns that are zero in both factors, but QR would give them a direction.
    nonzero = jnp.any(a != 0, axis=0) | jnp.any(b != 0, axis=1)
    live = jnp.flip(jnp.cumsum(jnp.flip(nonzero)) > 0)
    basis_a, inverse_a = _decompose(a, live)
    basis_b, inverse_b = _decompose(b.T, live)

    def in_basis(grad: Array, inverse: Array) -> Array:
        unmagnified = grad @ inverse
        if skip is None:
            return unmagnified
        rms = jnp.sqrt(jnp.mean(jnp.square(unmagnified)))
        return jnp.where(rms > skip, jnp.zeros_like(unmagnified), unmagnified)

    return (
        _Unmagnified(in_basis(grad_a, inverse_b), basis_a, inverse_a),
        _Unmagnified(in_basis(grad_b.T, inverse_a), basis_b, inverse_b),
    )


def _decompose(
    factor: Float[Array, "rows rank"], live: Bool[Array, " rank"]
) -> tuple[Float[Array, "rows rank"], Float[Array, "rank rank"]]:
    """The basis of a QR decomposition and the pseudo-inverse of its triangle, both zero at padded ranks."""
    basis, triangle = qr(factor)
    block = live[:, None] & live[None, :]
    inverse = pinv(jnp.where(block, triangle, 0), rtol=factor.shape[1] * float(jnp.finfo(factor.dtype).eps))
    return jnp.where(live[None, :], basis, 0), jnp.where(block, inverse, 0)


def _clip_factor(grads: list[Array], clip: float | None) -> Float[Array, ""]:
    """The factor, at most 1, that brings the global norm of the unmagnified gradients down to `clip`."""
    if clip is None or not grads:
        return jnp.ones(())
    norm = optax.tree.norm(grads)
    return jnp.where(norm > clip, clip / norm, jnp.ones_like(norm))


def _decay(beta: float, t: Float[Array, ""]) -> Float[Array, ""]:
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def _direct(
    side: _Unmagnified,
    partner: _Unmagnified,
    old: Side,
    former: Float[Array, "cols rank"],
    shrink: Float[Array, ""],
    first: Float[Array, ""],
    second: Float[Array, ""],
    eps: float,
    escape: bool,
    cap: float | None,
) -> tuple[Float[Array, "rows rank"], Side]:
    """Direction and new statistics of one factor; `former` is the other factor's basis in the step before."""
    grad = shrink * side.grad
    move = partner.basis.T @ former
    carried = _symmetric(move @ old.v @ move.T)
    rho = old.rho
    if escape:
        rho = second * (rho + _escaped(old.v, carried))
    v = _symmetric(second * carried + (1 - second) * (grad.T @ grad) / grad.shape[0])
    m = first * (old.m @ move.T) + (1 - first) * (grad @ _inverse_root(v, rho, eps))
    applied = m
    if cap is not None:
        applied = m / jnp.maximum(1, jnp.sqrt(jnp.mean(jnp.square(m))) / cap)
    return applied @ partner.inverse.T, Side(v, m, side.basis, rho)


def _escaped(start: Float[Array, "rank rank"], end: Float[Array, "rank rank"]) -> Float[Array, ""]:
    """The largest decrease of an eigenvalue, but at most that of the trace, and at least 0."""
    fall = jnp.max(eigenvalues(start) - eigenvalues(end))
    return jnp.maximum(jnp.minimum(fall, jnp.trace(start) - jnp.trace(end)), 0)


def _inverse_root(v: Float[Array, "rank rank"], rho: Float[Array, ""], eps: float) -> Float[Array, "rank rank"]:
    """(v + rho I)^(-1/2), with 1 / (sqrt(eigenvalue) + eps)."""
    values, vectors = eigh(v)
    # Eigenvalues below the rounding of the largest are noise, of either sign.
    floor = jnp.finfo(v.dtype).eps * jnp.max(jnp.abs(values))
    weights = 1 / (jnp.sqrt(jnp.maximum(values, floor) + rho) + eps)
    return _symmetric((vectors * weights[None, :]) @ vectors.T)


def _symmetric(matrix: Float[Array, "rank rank"]) -> Float[Array, "rank rank"]:
    return (matrix + matrix.T) / 2
