"""DoRA against arrays that the authors' code made."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sborax as sx
from sborax.adapters.core import dense, linear, structure

pytestmark = pytest.mark.quick
GOLDEN = np.load(Path(__file__).parent / "golden" / "dora.npz")
DETACHED = ["detached", "detached_bias", "detached_init", "detached_init_bias"]
FULL = ["full", "full_bias", "full_init", "full_init_bias"]


def node_of(b, m):
    """An adapter with the golden factors, in float64."""
    weight = jnp.asarray(GOLDEN["W"].T)
    train = {"a": jnp.asarray(GOLDEN["A"].T), "b": jnp.asarray(b), "m": jnp.asarray(m)}
    frozen = {"scale": jnp.asarray(GOLDEN["scaling"]), "w2": jnp.sum(jnp.square(weight), axis=0)}
    return weight, sx.Adapter(train, frozen, structure(sx.DoRA(rank=3)))


def results(case):
    """Output and gradients of sum(y * ct), in the golden file's orientation."""
    start = "init" in case
    weight, node = node_of(
        np.zeros_like(GOLDEN["B"].T) if start else GOLDEN["B"].T, GOLDEN["m_init"] if start else GOLDEN["m"]
    )
    bias = jnp.asarray(GOLDEN["bias"])[None, None] if "bias" in case else 0.0

    def loss(train, x):
        y = linear(x, weight, sx.Adapter(train, node.frozen, node.method)) + bias
        return jnp.sum(y * GOLDEN["ct"]), y

    (_, y), (train, x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(node.train, jnp.asarray(GOLDEN["x"]))
    return {"y": y, "gm": train["m"], "gA": train["a"].T, "gB": train["b"].T, "gx": x}


def close(got, want, tolerance=1e-10):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("case", DETACHED)
def test_outputs_and_gradients(case):
    with jax.enable_x64(True):
        for name, got in results(case).items():
            close(got, GOLDEN[f"{case}__{name}"])


@pytest.mark.parametrize("case", FULL)
def test_the_norm_is_held_constant(case):
    """Without that the outputs are the same and the gradients of the factors are not."""
    with jax.enable_x64(True):
        got = results(case)
        for name in ("y", "gm"):
            close(got[name], GOLDEN[f"{case}__{name}"])
        assert np.abs(got["gB"] - GOLDEN[f"{case}__gB"]).max() > 1e-2


def test_only_the_magnitude():
    with jax.enable_x64(True):
        weight, node = node_of(np.zeros_like(GOLDEN["B"].T), GOLDEN["m"])
        bias = jnp.asarray(GOLDEN["bias"])[None, None]

        def loss(m, x):
            y = linear(x, weight, sx.Adapter({**node.train, "m": m}, node.frozen, node.method)) + bias
            return jnp.sum(y * GOLDEN["ct"]), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            node.train["m"], jnp.asarray(GOLDEN["x"])
        )
        for name, got in {"y": y, "gm": grads[0], "gx": grads[1]}.items():
            close(got, GOLDEN[f"magonly_bias__{name}"])
        close(node.method.merge(weight, node).T, GOLDEN["magonly_bias__W_merged"], 1e-6)


@pytest.mark.parametrize("case", ["detached", "detached_bias"])
def test_merged(case):
    """Merging is in float32, whatever the leaves are."""
    with jax.enable_x64(True):
        weight, node = node_of(GOLDEN["B"].T, GOLDEN["m"])
        merged = node.method.merge(weight, node)
        close(merged.T, GOLDEN[f"{case}__W_merged"], 1e-6)
        bias = GOLDEN["bias"] if "bias" in case else 0.0
        close(np.asarray(GOLDEN["x"]) @ np.asarray(merged) + bias, GOLDEN[f"{case}__y_merged"], 1e-6)


def test_start_and_decomposition():
    """m starts as the norms of the columns, and w2 agrees with the weight that it stands for."""
    weight = jnp.asarray(GOLDEN["W"].T, jnp.float32)
    fitted = sx.DoRA(rank=3, alpha=6.0).init(jax.random.key(0), weight, sx.Hint())
    close(fitted.train["m"], GOLDEN["m_init"], 1e-6)
    close(fitted.frozen["w2"], np.square(GOLDEN["W"]).sum(axis=1), 1e-6)
    assert float(fitted.frozen["scale"]) == float(GOLDEN["scaling"])
    assert dense(weight).shape == GOLDEN["W"].T.shape
