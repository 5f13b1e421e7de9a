"""Products whose backward pass has numbers of sub-tokens, parts of the inputs, in place of the inputs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sborax.adapters.core import cast
from sborax.adapters.grouped import Sizes, expert_of_row, grouped_matmul


def unit(v: Float[Array, " size"]) -> Float[Array, " size"]:
    """v scaled to length 1. If v is zero, all entries become equal, as in PEFT."""
    v = jnp.where(jnp.any(v != 0), v, jnp.ones_like(v))
    return v / jnp.linalg.norm(v)


def sub_tokens(x: Float[Array, "tokens in"], size: int) -> Float[Array, "tokens groups size"]:
    """Parts of each token, the last one filled up with zeros."""
    groups = -(-x.shape[1] // size)
    return jnp.pad(x, ((0, 0), (0, groups * size - x.shape[1]))).reshape(x.shape[0], groups, size)


def _restored(
    sums: Float[Array, "groups rank"], v: Float[Array, " size"], gain: Array, fan_in: int
) -> Float[Array, "in rank"]:
    """x~^T dh from the sums over tokens of (x_g . v) dh, without x~."""
    v = cast(gain * v, sums)
    return (sums[:, None, :] * v[None, :, None]).reshape(-1, sums.shape[1])[:fan_in]


@jax.custom_vjp
def product(x: Float[Array, "tokens in"], a: Float[Array, "in rank"], v: Array, gain: Array) -> Array:
    """x a. The backward pass has x . v in place of x."""
    return x @ a


def _product_forward(x: Array, a: Array, v: Array, gain: Array) -> tuple[Array, Any]:
    coefficients = jnp.einsum("tgd,d->tg", sub_tokens(x, v.size), cast(v, x))
    return x @ a, (coefficients, a, v, gain)


def _product_backward(saved: Any, slope: Float[Array, "tokens rank"]) -> tuple[Array | None, ...]:
    coefficients, a, v, gain = saved
    return slope @ a.T, _restored(coefficients.T @ slope, v, gain, a.shape[0]), None, None


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "rows in"], a: Float[Array, "experts fan_in rank"], v: Array, gain: Array, sizes: Sizes
) -> Array:
    """Each row times the a of its expert, as in `product`."""
    return grouped_matmul(x, a, sizes)


def _grouped_forward(x: Array, a: Array, v: Array, gain: Array, sizes: Sizes) -> tuple[Array, Any]:
    of_row = cast(v, x)[expert_of_row(sizes, x.shape[0])]
    coefficients = jnp.einsum("tgd,td->tg", sub_tokens(x, v.shape[-1]), of_row)
    return grouped_matmul(x, a, sizes), (coefficients, a, v, gain, sizes)


def _grouped_backward(saved: Any, slope: Float[Array, "rows rank"]) -> tuple[Array | None, ...]:
    coefficients, a, v, gain, sizes = saved
    sums = sums_by_expert(coefficients, slope, sizes)
    of_a = jax.vmap(_restored, in_axes=(0, 0, 0, None))(sums, v, gain, a.shape[1])
    return grouped_matmul(slope, jnp.swapaxes(a, 1, 2), sizes), of_a, None, None, None


grouped_product.defvjp(_grouped_forward, _grouped_backward)


def sums_by_expert(
    left: Float[Array, "rows m"], right: Float[Array, "rows n"], sizes: Sizes
) -> Float[Array, "experts m n"]:
    """left^T right over the rows of each expert."""
    zeros = jnp.zeros((sizes.experts, left.shape[1], right.shape[1]), left.dtype)
    _, pull = jax.vjp(lambda weight: grouped_matmul(left, weight, sizes), zeros)
    (sums,) = pull(right)
    return sums
