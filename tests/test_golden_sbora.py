"""SBoRA against arrays that the authors' code made, in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sborax as sx
from sborax.adapters.core import linear, structure

pytestmark = pytest.mark.quick
GOLDEN = np.load(Path(__file__).parent / "golden" / "sbora.npz")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def case_of(name):
    return {key.removeprefix(f"{name}__"): GOLDEN[key] for key in GOLDEN.files if key.startswith(f"{name}__")}


def node_of(case, variant, factor):
    """The golden layer as an adapter. Ours keeps idx sorted, which permutes the trained factor with it."""
    order = np.argsort(case["idx"])
    train = {"b": jnp.asarray(factor.T[order])} if variant == "FA" else {"a": jnp.asarray(factor.T[:, order])}
    frozen = {"idx": jnp.asarray(case["idx"][order], jnp.int32), "scale": jnp.asarray(GOLDEN["scaling"])}
    return sx.Adapter(train, frozen, structure(sx.SBoRA(rank=3, variant=variant))), np.argsort(order)


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("start", ["", "_init"], ids=["trained", "initial"])
@pytest.mark.parametrize("name", ["fa", "fa_bias", "fb", "fb_bias"])
def test_outputs_and_gradients(name, start):
    case, variant = case_of(name), name[:2].upper()
    factor = np.zeros_like(case["factor"]) if start else case["factor"]
    node, back = node_of(case, variant, factor)
    weight, bias = jnp.asarray(case["W"].T), case.get("bias", np.zeros(11))

    def output(train, x):
        return linear(x, weight, sx.Adapter(train, node.frozen, node.method)) + bias[None, None]

    y, pull = jax.vjp(output, node.train, jnp.asarray(case["x"]))
    grads, gx = pull(jnp.asarray(case["ct"]))
    gfactor = grads["b"][back].T if variant == "FA" else grads["a"][:, back].T
    assert y.dtype == jnp.float64
    close(y, case[f"y{start}"])
    close(gfactor, case[f"gfactor{start}"])
    close(gx, case[f"gx{start}"])


@pytest.mark.parametrize("name", ["fa", "fa_bias", "fb", "fb_bias"])
def test_merged_weight(name):
    case, variant = case_of(name), name[:2].upper()
    node, _ = node_of(case, variant, case["factor"])
    merged = node.method.add_to_weight(jnp.asarray(case["W"].T), node)
    close(merged.T, case["W_merged"])
    close(jnp.asarray(case["x"]) @ merged + case.get("bias", np.zeros(11))[None, None], case["y_merged"])
    assert np.abs(case["W_merged"] - case["W"]).max() > 0.1
