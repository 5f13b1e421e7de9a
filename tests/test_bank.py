"""Banks: what all kernels of a model share is there once, and each adapter has a copy while it is used."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import normal
from flax import nnx
from nightly import nightly_unless

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.models.nf4 import quantise

pytestmark = pytest.mark.usefixtures("strict")

KERNELS = {"layers": {"up": normal(0, 3, 16, 24), "down": normal(1, 3, 24, 16)}, "head": normal(2, 16, 32)}
PARAMS = jax.tree.map(lambda leaf: {"kernel": jnp.asarray(leaf)}, KERNELS)
VECTORS, THETA = sx.VBLoRA(rank=2, vectors=6, length=8, bound=0.5), sx.UniLoRA(rank=2, coefficients=70)
METHODS = [VECTORS, THETA]
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
by_one = pytest.mark.parametrize("method", nightly_unless([VECTORS], METHODS), ids=lambda method: type(method).__name__)


def attached(*rules):
    return sx.attach(jax.random.key(0), PARAMS, rules)[1]


def bank_of(adapters):
    (bank,) = [node for path, node in nodes(adapters).items() if path.startswith("bank/")]
    return bank


def change(adapters):
    return jax.tree.map(lambda end, start: end - start, sx.merge(PARAMS, adapters), PARAMS)


@by_one
def test_gradients_of_all_copies_add_up(method):
    """Rules of other ranks share the bank, and so do layers that a rule leaves out, which have no part in it."""
    second = type(method)(**{**vars(method), "rank": 3})
    adapters = attached(sx.Rule("up", method, layers=(0, 2)), ("down", second), ("head", method))
    train, frozen = sx.split(adapters)

    def loss(adapters):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(sx.merge(PARAMS, adapters)))

    grads = jax.grad(lambda train: loss(sx.combine(train, frozen)))(train)
    linked = sx.link(adapters)
    assert list(nodes(linked)) == ["head/kernel", "layers/down/kernel", "layers/up/kernel"]
    copies, constants = sx.split(linked)
    of_copies = jax.grad(lambda copies: loss(sx.combine(copies, constants)))(copies)
    for name, leaf in bank_of(grads).train.items():
        of_up = np.asarray(of_copies["layers"]["up"]["kernel"].train["0"][name])
        assert not of_up[1].any() and of_up[0].any()
        parts = (of_copies[path]["kernel"] if path == "head" else of_copies["layers"][path]["kernel"]
                 for path in ("head", "down"))  # fmt: skip
        total = of_up.sum(axis=0) + sum(np.asarray(node.train[name]).reshape(-1, *leaf.shape).sum(0) for node in parts)
        np.testing.assert_allclose(leaf, total, rtol=1e-5, atol=1e-6)


@by_method
def test_linking_twice_changes_nothing(method):
    linked = sx.link(attached((".*", method)))
    chex.assert_trees_all_equal(sx.link(linked), linked)


@by_method
def test_adapters_are_used_with_their_bank_or_not_at_all(method):
    adapters = attached((".*", method))
    alone = {path: node for path, node in adapters.items() if path != "bank"}
    path = f"bank/{method.bank_name}"
    with pytest.raises(sx.SboraxError, match=rf"head/kernel: {type(method).__name__} reads {path}, which these adap"):
        sx.merge(PARAMS, alone)
    with pytest.raises(sx.SboraxError, match=r"reads a bank of the whole model; give sx.link\(adapters\)"):
        sx.linear(jnp.ones((1, 16)), PARAMS["head"]["kernel"], adapters["head"]["kernel"])


def test_rules_agree_about_a_bank():
    variant = sx.VBLoRA(rank=2, vectors=7, length=8, bound=0.5)
    with pytest.raises(sx.SboraxError, match="up/kernel: VBLoRA has one bank/vectors for the whole model; give all"):
        attached(("head|down", VECTORS), ("up", variant))
    by_path = nodes(attached(("head", VECTORS), ("up", THETA)))
    assert {path for path in by_path if path.startswith("bank/")} == {"bank/vectors", "bank/theta"}


@pytest.mark.nightly
@by_method
def test_sums_and_multiples(method):
    lora = sx.LoRA(rank=2, init_a="gaussian")
    total, plain = attached((".*", sx.add(method, lora))), attached((".*", method))
    assert sx.count(total) == sx.count(plain) + sx.count(attached((".*", lora)))
    chex.assert_trees_all_close(
        change(sx.scale(plain, 0.5)), jax.tree.map(lambda leaf: 0.5 * leaf, change(plain)), atol=1e-6
    )
    chex.assert_trees_all_close(change(sx.add(plain, attached((".*", lora)))), change(plain), atol=1e-6)
    with pytest.raises(sx.SboraxError, match=f"bank/{method.bank_name}: each tree has its own"):
        sx.add(plain, plain)


def test_theta_is_mapped_to_all_factors_by_an_isometry():
    """Also where layers are left out: each of all entries of the factors counts."""
    linked = sx.link(attached(sx.Rule("up", THETA, layers=(1,)), ("head", THETA)))
    up, head = linked["layers"]["up"]["kernel"], linked["head"]["kernel"]
    ((child, _),) = up.method.children(up)
    factors = [
        *THETA.factors(jax.tree.map(lambda leaf: leaf[1], child), (16, 24)),
        *THETA.factors(head, (16, 32)),
    ]
    assert sum(factor.size for factor in factors) == 2 * (16 + 24) + 2 * (16 + 32)
    total = sum(jnp.sum(jnp.square(factor)) for factor in factors)
    np.testing.assert_allclose(total, jnp.sum(jnp.square(head.train["theta"])), rtol=1e-5)


def test_indices_of_a_weight_are_dealt_out_evenly():
    for path, node in nodes(attached((".*", THETA))).items():
        if path.startswith("bank/"):
            continue
        a, b = (np.asarray(node.frozen[name]) for name in ("idx_a", "idx_b"))
        for layer in range(3) if a.ndim == 3 else [...]:
            counts = np.bincount(np.concatenate([a[layer].reshape(-1), b[layer].reshape(-1)]), minlength=70)
            assert set(counts) <= {counts.sum() // 70, counts.sum() // 70 + 1}


@by_one
def test_models_of_others(method):
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16)])
    x = jnp.asarray(normal(3, 5, 16))
    with jax.numpy_dtype_promotion("standard"):
        params = model.init(jax.random.key(0), x)["params"]
        params, adapters = sx.attach(jax.random.key(1), params, [("layers", method)])
        got = sx.apply_linen(model, {"params": params}, adapters, x)
        expected = model.apply({"params": sx.merge(params, adapters)}, x)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        module = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
        _, adapters = sx.attach(jax.random.key(1), {"kernel": module.kernel[...]}, [("", method)])
        with pytest.raises(sx.SboraxError, match="needs a model that knows it"):
            sx.adapt_nnx(module, adapters)


def test_a_bank_is_settled_with_the_weights_that_read_it_by_layer(monkeypatch):
    """Dense ones, of layers on which the method acts alone, and of a rounded base as it is."""
    calls = []

    def settle(self, bank, readers, weights):
        calls.append([np.asarray(load()) for load in weights])
        return bank

    monkeypatch.setattr(type(VECTORS.bank((1, 1), 0)), "settle", settle)
    attached(sx.Rule("up", VECTORS, layers=(2, 0)), ("head", VECTORS))
    up, head = KERNELS["layers"]["up"], KERNELS["head"]
    chex.assert_trees_all_equal(calls.pop(), [head, up[0], up[2]])
    numbered = {
        "layers": {str(layer): {"up": {"kernel": PARAMS["layers"]["up"]["kernel"][layer]}} for layer in range(3)}
    }
    sx.attach(jax.random.key(0), numbered, [("up", VECTORS)])
    chex.assert_trees_all_equal(calls.pop(), list(up))
    kernel = quantise(jnp.asarray(normal(3, 2, 64, 64)))
    sx.attach(jax.random.key(0), {"layers": {"up": {"kernel": kernel}}}, [("up", VECTORS)])
    np.testing.assert_allclose(np.stack(calls.pop()), np.asarray(kernel.dense()), rtol=1e-6)


def test_a_vector_longer_than_what_reads_it_is_refused():
    """Entries that nothing reads would count as trained, and learn nothing."""
    places = 2 * (3 * (16 + 24) + 3 * (24 + 16) + 16 + 32)
    rules = [("up|down|head", sx.UniLoRA(rank=2, coefficients=places))]
    assert sx.plan(PARAMS, rules).sites
    with pytest.raises(sx.SboraxError, match=f"bank/theta: {places + 1} entries are more than the {places} that"):
        sx.plan(PARAMS, [("up|down|head", sx.UniLoRA(rank=2, coefficients=places + 1))])
