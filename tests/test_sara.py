"""SARA and Mo-SARA: ranks from singular values, ragged stacks, the mixture, its approximate merge."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import IN, OUT

import sborax as sx
from sborax.adapters.core import Adapter, structure
from sborax.adapters.tree import over_stack, stack_of
from sborax.methods.mo_sara import mean_gate_weight, mean_gates

pytestmark = pytest.mark.usefixtures("strict")

LAYERS = 3
THRESHOLD = 0.3


def spectrum(values, key=0):
    """A weight with these singular values."""
    u, _ = np.linalg.qr(np.random.default_rng(key).normal(size=(IN, len(values))))
    v, _ = np.linalg.qr(np.random.default_rng(key + 1).normal(size=(OUT, len(values))))
    return (u * np.asarray(values, np.float64)) @ v.T


def weights():
    """Three layers, the first with the steepest spectrum."""
    decay = [0.9, 0.95, 0.98]
    return jnp.asarray(np.stack([spectrum(d ** np.arange(48), i) for i, d in enumerate(decay)]), jnp.float32)


def stacked(method):
    params = {"layers": {"proj": {"kernel": weights()}}}
    _, adapters = sx.attach(jax.random.key(0), params, [("proj", method)])
    return adapters["layers"]["proj"]["kernel"]


def tuned(node):
    """Trained leaves moved at random where a layer uses them."""
    live = (np.arange(max(node.method.rank)) < np.asarray(node.method.rank)[:, None]).astype(np.float32)

    def shift(name, leaf):
        mask = np.ones(leaf.shape, np.float32)
        for axis, kind in enumerate(node.method.axes[name]):
            if kind == "rank":
                shape = [LAYERS, *(1 for _ in leaf.shape[1:])]
                shape[axis + 1] = live.shape[1]
                mask = mask * live.reshape(shape)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), len(name)), leaf.shape)
        return leaf + 0.2 * noise * mask

    return dataclasses.replace(node, train={name: shift(name, leaf) for name, leaf in node.train.items()})


def trimmed(node, method, layer):
    """One layer's adapter at its own rank; `method` is the one it was made by."""
    rank = node.method.rank[layer]

    def cut(leaves):
        return {
            name: leaf[layer][tuple(slice(rank) if axis == "rank" else slice(None) for axis in node.method.axes[name])]
            for name, leaf in leaves.items()
        }

    return Adapter(cut(node.train), cut(node.frozen), structure(dataclasses.replace(method, rank=rank)))


def ranks_of(policy, *matrices):
    return policy.ranks([lambda m=m: m for m in matrices], range(len(matrices)), len(matrices))


@pytest.mark.parametrize(
    ("threshold", "rank"), [(1e-6, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.91, 4), (1.0, 4)]
)
def test_rank_is_the_first_whose_mass_reaches_the_threshold(threshold, rank):
    assert ranks_of(sx.SingularMass(threshold), np.diag([4.0, 3.0, 2.0, 1.0])) == (rank,)
    assert ranks_of(sx.SingularMass(threshold, max_rank=2), np.diag([1.0, 2.0, 3.0, 4.0])) == (min(rank, 2),)


def test_rank_of_no_mass_is_one_and_bounds_are_checked():
    assert ranks_of(sx.SingularMass(0.5), np.zeros((3, 4))) == (1,)
    for wrong in ({"threshold": 0.0}, {"threshold": 1.1}, {"threshold": 0.5, "max_rank": 0}):
        with pytest.raises(sx.SboraxError, match="must"):
            sx.SingularMass(**wrong)


def test_shuffled_ranks_are_the_same_ranks_elsewhere():
    matrices = [spectrum(d ** np.arange(48), i) for i, d in enumerate((0.6, 0.7, 0.8, 0.9, 0.95))]
    policy = sx.SingularMass(0.5)
    plain = ranks_of(policy, *matrices)
    shuffled = [ranks_of(sx.ShuffledRanks(policy, seed), *matrices) for seed in range(4)]
    assert all(sorted(ranks) == sorted(plain) for ranks in shuffled)
    assert len(set(shuffled)) > 1 and shuffled[1] == ranks_of(sx.ShuffledRanks(policy, 1), *matrices)
    with pytest.raises(sx.SboraxError, match="stacked over layers"):
        ranks_of(sx.ShuffledRanks(policy), matrices[0])


def test_plan_without_weights_says_what_is_missing():
    shapes = {"proj": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    with pytest.raises(sx.SboraxError, match="reads the weights"):
        sx.plan(shapes, [("proj", sx.SARA())])


METHODS = [
    sx.SARA(rank=sx.SingularMass(THRESHOLD), gamma=0.5, alpha=8.0),
    sx.SARA(rank=sx.SingularMass(THRESHOLD), factor_init="svd"),
    sx.SARA(rank=sx.SingularMass(THRESHOLD), lam_init="normal", alpha=8.0, rslora=True),
    sx.MoSARA(rank=sx.SingularMass(THRESHOLD), sets=4),
    sx.MoSARA(rank=sx.SingularMass(THRESHOLD), sets=4, router="full"),
    sx.PRILoRA(rank=sx.LinearRanks(2, 6), alpha=8.0, persistent_mask=True),
    sx.LoRA(rank=sx.LinearRanks(6, 2), alpha=8.0, init_a="gaussian"),
]
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


def count_of(method, k):
    if isinstance(method, sx.MoSARA):
        return 4 * k + OUT + (k + 4 if method.router == "rank1" else 4 * k)
    return k * (IN + OUT) + (k if isinstance(method, sx.SARA) else 0)


@by_method
def test_ragged_stack_equals_its_layers(method):
    node = stacked(method)
    ranks = node.method.rank
    assert len(set(ranks)) == LAYERS
    assert sx.count({"k": node}) == sum(count_of(method, k) for k in ranks)
    x = jax.random.normal(jax.random.key(2), (5, IN))
    trained = tuned(node)
    together = jax.jit(over_stack(lambda w, n: sx.linear(x, w, n), stack_of(node)))(weights(), trained)
    for i, rank in enumerate(ranks):
        flat = {"layers": {str(i): {"proj": {"kernel": weights()[i]}}}}
        rule = sx.Rule("proj", dataclasses.replace(method, rank=rank))
        _, alone = sx.attach(jax.random.key(0), flat, [rule])
        single = alone["layers"][str(i)]["proj"]["kernel"]
        chex.assert_trees_all_close(single, trimmed(node, method, i), rtol=1e-4, atol=1e-4)
        y = sx.linear(x, weights()[i], trimmed(trained, method, i))
        chex.assert_trees_all_close(together[i], y, atol=2e-5 * float(jnp.abs(y).max()))
        if not method.no_merge:
            merged = method.merge(weights()[i], jax.tree.map(lambda leaf, i=i: leaf[i], trained))
            chex.assert_trees_all_close(x @ merged, y, atol=2e-5 * float(jnp.abs(y).max()))


@by_method
def test_padding_trains_to_zero(method):
    node = tuned(stacked(method))
    train, frozen = sx.split(node)
    x = jax.random.normal(jax.random.key(2), (5, IN))

    def loss(train):
        full = sx.combine(train, frozen)
        return jnp.mean(jnp.square(over_stack(lambda w, n: sx.linear(x, w, n), (LAYERS,))(weights(), full) - 1.0))

    tx = optax.adamw(1e-2, weight_decay=0.1)
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(train)
        for _ in range(2):
            updates, state = tx.update(jax.jit(jax.grad(loss))(train), state, train)
            train = optax.apply_updates(train, updates)
    padded = 0
    for name, leaf in train.train.items():
        for layer, rank in enumerate(node.method.rank):
            index = tuple(slice(rank, None) if axis == "rank" else slice(None) for axis in node.method.axes[name])
            padding = np.asarray(leaf[layer][index]) if "rank" in node.method.axes[name] else np.zeros(0)
            assert not padding.any()
            padded += padding.size
        assert not np.array_equal(leaf, node.train[name])
    assert padded > 0


def test_starting_values_of_sara():
    weight = weights()[0]
    params = {"proj": {"kernel": weight}}

    def started(**options):
        _, adapters = sx.attach(jax.random.key(0), params, [("proj", sx.SARA(rank=4, **options))])
        return adapters["proj"]["kernel"]

    u, s, vt = np.linalg.svd(np.asarray(weight, np.float64), full_matrices=False)
    node = started()
    np.testing.assert_allclose(node.train["lam"], s[:4] / s[:4].mean(), rtol=1e-5)
    assert not node.train["b"].any() and float(jnp.abs(node.train["a"]).max()) <= IN**-0.5
    assert np.array_equal(started(lam_init="ones").train["lam"], np.ones(4))
    assert len(set(np.asarray(started(lam_init="normal").train["lam"]).tolist())) == 4
    node = started(factor_init="svd")
    assert not node.train["lam"].any()
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(node.train["a"]) * u[:, :4], axis=0)), 1.0, atol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(node.train["b"]) * vt[:4], axis=1)), 1.0, atol=1e-4)
    scales = [
        float(started(**o).frozen["scale"]) for o in ({"gamma": 3.0}, {"alpha": 8.0}, {"alpha": 8.0, "rslora": True})
    ]
    np.testing.assert_allclose(scales, [3.0, 2.0, 4.0])
    with pytest.raises(sx.SboraxError, match="factor_init, lam_init"):
        started(factor_init="svd", lam_init="sigma")
    zero = {"proj": {"kernel": jnp.zeros((8, 8))}}
    _, adapters = sx.attach(jax.random.key(0), zero, [("proj", sx.SARA(rank=2))])
    assert np.array_equal(adapters["proj"]["kernel"].train["lam"], np.ones(2))


@pytest.mark.parametrize("router", ["rank1", "full"])
def test_mixture_is_the_formula_and_merges_on_average(router):
    weight = weights()[0]
    method = sx.MoSARA(rank=5, sets=3, router=router, gamma=0.5)
    _, adapters = sx.attach(jax.random.key(0), {"proj": {"kernel": weight}}, [("proj", method)])
    node = adapters["proj"]["kernel"]
    u, _, vt = np.linalg.svd(np.asarray(weight, np.float64), full_matrices=False)
    train = {name: leaf + 0.3 * jax.random.normal(jax.random.key(7), leaf.shape) for name, leaf in node.train.items()}
    node = dataclasses.replace(node, train=train)
    x = jax.random.normal(jax.random.key(2), (5, IN))
    # The frozen pair is W's own leading part.
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(node.frozen["a"]) * u[:, :5], axis=0)), 1.0, atol=1e-4)
    a, b, wide = (np.asarray(leaf, np.float64) for leaf in (node.frozen["a"], node.frozen["b"], weight))
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in train.items()}
    z = np.asarray(x, np.float64) @ a
    logits = z @ leaves["w1"] if router == "full" else z @ leaves["w1"] @ leaves["w2"]
    gates = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    want = np.asarray(x, np.float64) @ wide + 0.5 * leaves["v"] * (((gates @ leaves["lam"]) * z) @ b)
    np.testing.assert_allclose(sx.linear(x, weight, node), want, atol=2e-5 * np.abs(want).max())
    np.testing.assert_allclose(mean_gates(x, node), gates.mean(axis=0), rtol=1e-4)
    # One token: its own gates are the mean, and the approximation is exact.
    merged = mean_gate_weight(weight, node, mean_gates(x[:1], node))
    np.testing.assert_allclose(x[:1] @ merged, want[:1], atol=2e-5 * np.abs(want).max())
    assert np.abs(x[1:] @ merged - want[1:]).max() > 1e-3
    with pytest.raises(sx.SboraxError, match="cannot be merged: its gates depend on the token"):
        sx.merge({"proj": {"kernel": weight}}, {"proj": {"kernel": node}})
