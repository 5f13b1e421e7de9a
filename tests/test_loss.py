"""Chunked cross-entropy against optax on whole arrays, gradients included."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sborax.train.head_loss import frozen_head_loss, head_losses, trained_head_loss, trained_head_losses

TOKENS, D, VOCAB, CHUNK = 37, 11, 53, 8

pytestmark = pytest.mark.usefixtures("strict", "compiled_fully")


def make(dtype, counted=0.5):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (TOKENS, D), jnp.float32).astype(dtype)
    kernel = jax.random.normal(keys[1], (D, VOCAB), jnp.float32).astype(dtype)
    targets = jax.random.randint(keys[2], (TOKENS,), 0, VOCAB, jnp.int32)
    return hidden, kernel, targets, jax.random.uniform(keys[3], (TOKENS,)) < counted


def reference(hidden, kernel, targets, counts):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(jnp.where(counts, losses, 0.0))


@pytest.mark.parametrize("vocab_first", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("counted", [0.0, 0.5, 1.0])
def test_frozen_head_equals_optax(dtype, tolerance, vocab_first, counted):
    hidden, kernel, targets, counts = make(dtype, counted)
    table = kernel.T if vocab_first else kernel
    ours = jax.jit(jax.value_and_grad(lambda h: frozen_head_loss(h, table, targets, counts, vocab_first, CHUNK)))
    with jax.default_matmul_precision("highest"):
        value, slope = ours(hidden)
        expected, expected_slope = jax.value_and_grad(reference)(hidden, kernel, targets, counts)
        only_value = frozen_head_loss(hidden, table, targets, counts, vocab_first, CHUNK)
    assert slope.dtype == dtype
    chex.assert_trees_all_close(value, expected, rtol=1e-6)
    chex.assert_trees_all_close(only_value, value, rtol=1e-6)
    largest = max(float(jnp.max(jnp.abs(expected_slope.astype(jnp.float32)))), 1e-6)
    error = np.abs(np.asarray(slope, np.float32) - np.asarray(expected_slope, np.float32))
    assert error.max() <= tolerance * largest


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_trained_head_equals_optax(dtype, tolerance):
    hidden, kernel, targets, counts = make(dtype)

    def ours(hidden, kernel):
        def head(states, _):
            return jnp.matmul(states, kernel, preferred_element_type=jnp.float32)

        return trained_head_loss(head, hidden, targets, counts, CHUNK)

    with jax.default_matmul_precision("highest"):
        value, slopes = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, kernel)
        expected, expected_slopes = jax.value_and_grad(reference, argnums=(0, 1))(hidden, kernel, targets, counts)
    chex.assert_trees_all_close(value, expected, rtol=1e-6)
    for slope, target in zip(slopes, expected_slopes, strict=True):
        error = np.abs(np.asarray(slope, np.float32) - np.asarray(target, np.float32))
        assert error.max() <= tolerance * np.abs(np.asarray(target, np.float32)).max()


@pytest.mark.parametrize("trained", [False, True])
def test_terms_by_token_equal_optax_and_leave_the_bits_of_the_sum(trained):
    hidden, kernel, targets, counts = make(jnp.float32)

    def head(states, _=None):
        return jnp.matmul(states, kernel, preferred_element_type=jnp.float32)

    if trained:
        total, terms = jax.jit(lambda h: trained_head_losses(head, h, targets, counts, CHUNK))(hidden)
        alone = jax.jit(lambda h: trained_head_loss(head, h, targets, counts, CHUNK))(hidden)
    else:
        total, terms = jax.jit(lambda h: head_losses(h, kernel, targets, counts, False))(hidden)
        alone = jax.jit(lambda h: frozen_head_loss(h, kernel, targets, counts, False))(hidden)
    expected = optax.softmax_cross_entropy_with_integer_labels(head(hidden), targets)
    chex.assert_trees_all_close(terms, jnp.where(counts, expected, 0.0), rtol=1e-5)
    chex.assert_trees_all_equal(total, alone)


def test_the_upstream_gradient_scales_the_slope():
    hidden, kernel, targets, counts = make(jnp.float32)
    slope = jax.grad(lambda h: frozen_head_loss(h, kernel, targets, counts, False, CHUNK))(hidden)
    tripled = jax.grad(lambda h: jnp.float32(3) * frozen_head_loss(h, kernel, targets, counts, False, CHUNK))(hidden)
    chex.assert_trees_all_close(tripled, 3 * slope, rtol=1e-6)


def test_no_array_of_tokens_by_vocabulary():
    hidden, kernel, targets, counts = make(jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda h: frozen_head_loss(h, kernel, targets, counts, False, CHUNK)))
    assert f"{TOKENS},{VOCAB}" not in step.lower(hidden).compile().as_text()
    assert f"{CHUNK},{VOCAB}" in step.lower(hidden).compile().as_text()


def test_chunks_without_tokens_that_count_are_not_computed():
    """A chunk that were computed would bring the infinity in its hidden states into the sum as NaN."""
    hidden, kernel, targets, _ = make(jnp.float32)
    counts = jnp.arange(TOKENS) < CHUNK
    hidden = jnp.where(counts[:, None], hidden, jnp.inf)
    value, slope = jax.value_and_grad(frozen_head_loss)(hidden, kernel, targets, counts, False, CHUNK)
    expected = reference(hidden[:CHUNK], kernel, targets[:CHUNK], counts[:CHUNK])
    chex.assert_trees_all_close(value, expected, rtol=1e-6)
    assert bool(jnp.all(jnp.isfinite(slope)))
