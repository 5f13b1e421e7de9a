"""Decompositions of batches on a CPU: equal to JAX's own, and never handed to LAPACK as a batch."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import lapack_batches

import sborax as sx
from sborax.adapters import linalg
from sborax.optim import scale_by_lora_rite

pytestmark = pytest.mark.usefixtures("strict")

TALL, SQUARE = (2, 3, 7, 4), (2, 3, 5, 5)
OPERATIONS = {
    "qr": (linalg.qr, jnp.linalg.qr, TALL),
    "qr of a wide matrix": (linalg.qr, jnp.linalg.qr, TALL[:2] + TALL[:1:-1]),
    "svd": (linalg.svd, lambda x: jnp.linalg.svd(x, full_matrices=False), TALL),
    "singular_values": (linalg.singular_values, lambda x: jnp.linalg.svd(x, compute_uv=False), TALL),
    "eigh": (linalg.eigh, jnp.linalg.eigh, SQUARE),
    "eigenvalues": (linalg.eigenvalues, jnp.linalg.eigvalsh, SQUARE),
    "inverse": (linalg.inverse, jnp.linalg.inv, SQUARE),
    "pinv": (lambda x: linalg.pinv(x, 0.2), lambda x: jnp.linalg.pinv(x, 0.2), TALL),
}
FEW_DECOMPOSITIONS = ("qr", "inverse")
"""Those whose derivatives do not decompose again."""


def matrices(shape):
    """Well-conditioned ones, symmetric if they are square."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return x + np.swapaxes(x, -1, -2) + 9 * np.eye(shape[-1], dtype=np.float32) if shape[-1] == shape[-2] else x


def batched(operation):
    return jax.jit(jax.vmap(jax.vmap(operation)))


def summed(operation):
    """A number that depends on every entry of the result."""

    def number(leaf):
        return jnp.sum(jnp.cos(leaf) * jnp.arange(1.0, leaf.size + 1).reshape(leaf.shape))

    return lambda x: sum(number(leaf) for leaf in jax.tree.leaves(operation(x)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_batch_equals_that_of_jax(name):
    ours, reference, shape = OPERATIONS[name]
    x = matrices(shape)
    for result, expected in zip(jax.tree.leaves(batched(ours)(x)), jax.tree.leaves(batched(reference)(x)), strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "wide" not in name])
def test_gradients_of_a_batch_equal_those_of_jax(name):
    """JAX has none of the QR decomposition of a wide matrix."""
    ours, reference, shape = OPERATIONS[name]
    x = matrices(shape)
    result, expected = (batched(jax.grad(summed(operation)))(x) for operation in (ours, reference))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", FEW_DECOMPOSITIONS)
def test_second_derivatives_equal_those_of_jax(name):
    ours, reference, shape = OPERATIONS[name]
    x = matrices(shape)[0, 0]
    result, expected = (jax.jit(jax.hessian(summed(operation)))(x) for operation in (ours, reference))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", OPERATIONS)
def test_lapack_gets_one_matrix_at_a_time(name):
    ours, _, shape = OPERATIONS[name]
    found, calls = lapack_batches(batched(ours).lower(matrices(shape)))
    assert calls and not found
    if name in FEW_DECOMPOSITIONS:
        found, calls = lapack_batches(batched(jax.grad(summed(ours))).lower(matrices(shape)))
        assert calls and not found


def test_jax_itself_gives_lapack_a_batch():
    """Else the tests here prove nothing."""
    found, calls = lapack_batches(batched(lambda x: jnp.linalg.qr(x)).lower(matrices(TALL)))
    assert calls and found


def test_lora_rite_gives_lapack_no_batch():
    base = {"layers": {"proj": {"kernel": jnp.ones((3, 16, 12))}}}
    _, adapters = sx.attach(jax.random.key(0), base, [("proj", sx.LoRA(rank=4))])
    train, _ = sx.split(adapters)
    tx = scale_by_lora_rite()
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), train)

    def step(train):
        return tx.update(train, tx.init(train), train)[0]

    # optax promotes where it corrects the bias of Adam.
    with jax.numpy_dtype_promotion("standard"):
        found, calls = lapack_batches(jax.jit(jax.vmap(step)).lower(members))
    assert calls and not found


@pytest.mark.nightly
def test_many_decompositions_side_by_side_end():
    """As many as the step of LoRA-RITE has, of the size of SmolLM2-135M's factors."""
    program = """
import jax, sborax
from sborax.adapters import linalg
xs = [jax.random.normal(jax.random.key(i), (30, 576, 16)) for i in range(14)]
jax.block_until_ready(jax.jit(lambda xs: [jax.vmap(linalg.qr)(x) for x in xs])(xs))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
