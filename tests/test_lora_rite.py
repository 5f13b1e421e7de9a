"""LoRA-RITE: the authors' trajectories, and steps that depend on the product of the factors alone."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sborax as sx
from sborax.adapters.core import SboraxError, structure
from sborax.adapters.tree import nodes
from sborax.optim import LoRARiteState, lora_rite, scale_by_lora_rite

GOLDEN = np.load(Path(__file__).parent / "golden" / "lora_rite.npz")
RUNS = json.loads(str(GOLDEN["meta"]))["runs"]


def rite_state(state) -> LoRARiteState:
    (result,) = [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, LoRARiteState))
        if isinstance(leaf, LoRARiteState)
    ]
    return result


@functools.cache
def golden_run(options: tuple):
    """All steps of a run as one program: start, hyper-parameters -> every a and b, and the last state."""

    @jax.jit
    def run(start, data, scale, weight, lr):
        tx = lora_rite(lr, **dict(options))

        def loss(params, inputs):
            total = 0.0
            for name in params:
                x, y = inputs[name]
                error = x @ (data[name]["w"] + scale * params[name]["a"] @ params[name]["b"]) - y
                total += 0.5 * jnp.sum(error**2) / x.shape[0]
            return weight * total

        def step(carry, inputs):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, inputs), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        batches = {name: (data[name]["x"], data[name]["y"]) for name in data}
        (_, state), trail = jax.lax.scan(step, (start, tx.init(start)), batches)
        return trail, state

    return run


@pytest.mark.parametrize("name", RUNS)
def test_the_authors_trajectory(name):
    settings = RUNS[name]
    options = {
        "escape": settings.get("apply_escape", False),
        "clip": None if settings.get("clip_unmagnified_grad") == 0.0 else 1.0,
        "skip": None if settings.get("update_skipping") == 0.0 else 1.0,
        "cap": settings.get("update_capping"),
        "balance": settings.get("balance_param", False),
        "weight_decay": settings.get("weight_decay", 0.0),
        "eps": settings.get("eps", 1e-6),
    }
    with jax.enable_x64(True):
        data = {i: {key: jnp.asarray(GOLDEN[key.upper() + i]) for key in "wxy"} for i in "12"}
        start = {i: {key: jnp.asarray(GOLDEN[f"{name}__{key.upper()}{i}"][0]) for key in "ab"} for i in "12"}
        run = golden_run(tuple(options.items()))
        trail, state = run(start, data, float(GOLDEN["s"]), settings["loss_weight"], settings.get("lr", 1e-3))
        assert trail["1"]["a"].dtype == jnp.float64
        for i in "12":
            for key in "ab":
                want = GOLDEN[f"{name}__{key.upper()}{i}"][1:]
                np.testing.assert_allclose(trail[i][key], want, rtol=0, atol=1e-10 * np.abs(want).max())
            # Bases are free up to an orthogonal matrix, which leaves these as they are.
            for side, key in zip(rite_state(state).sides[i], "AB", strict=True):
                v, m = GOLDEN[f"{name}__V_{key}{i}_last"], GOLDEN[f"{name}__M_{key}{i}_last"]
                values = np.linalg.eigvalsh(v)
                np.testing.assert_allclose(np.linalg.eigvalsh(side.v), values, rtol=0, atol=1e-9 * values.max())
                np.testing.assert_allclose(side.m @ side.m.T, m @ m.T, rtol=0, atol=1e-9 * np.abs(m @ m.T).max())


def products(dtype, gauge, steps=40, options=()):
    """a b after every step on a stack of two layers, started from (a R, R^-1 b)."""
    keys = jax.random.split(jax.random.key(0), 5)
    a = jax.random.normal(keys[0], (2, 12, 3), dtype)
    b = jax.random.normal(keys[1], (2, 3, 9), dtype)
    target = jax.random.normal(keys[2], (2, 12, 9), dtype)
    noise = 0.3 * jax.random.normal(keys[3], (steps, 2, 12, 9), dtype)
    rotation = jnp.linalg.inv(gauge) @ b if gauge is not None else b
    params = {"a": a @ gauge if gauge is not None else a, "b": rotation}
    tx = lora_rite(0.02, weight_decay=0.1, escape=True, cap=0.7, **dict(options))

    def step(carry, extra):
        params, state = carry

        def loss(params):
            return 0.1 * jnp.sum((params["a"] @ params["b"] - target + extra) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["a"] @ params["b"]

    return jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), noise)[1])(params)


def gauge_of(cond, dtype):
    """A random matrix of that condition number."""
    u, _, vt = np.linalg.svd(np.random.default_rng(0).normal(size=(3, 3)))
    return jnp.asarray(u @ np.diag(np.geomspace(1, 1 / cond, 3)) @ vt, dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_invariant_to_a_change_of_factors(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        plain = products(dtype, None)
        changed = products(dtype, gauge_of(50.0, dtype))
        assert plain.dtype == dtype
        assert np.abs(plain[-1] - plain[0]).max() > 0.1
        np.testing.assert_allclose(changed, plain, rtol=0, atol=tolerance * np.abs(plain).max())


def test_first_step_has_unit_root_mean_square():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 4)
        shapes = {"a": (20, 3), "b": (3, 11)}
        params = {name: jax.random.normal(key, shapes[name]) for name, key in zip("ab", keys, strict=False)}
        grads = {name: 1e-2 * jax.random.normal(key, shapes[name]) for name, key in zip("ab", keys[2:], strict=True)}
        _, state = scale_by_lora_rite(eps=0.0).update(grads, scale_by_lora_rite().init(params), params)
        side, _ = rite_state(state).sides[""]
        np.testing.assert_allclose(side.m.T @ side.m / 20, np.eye(3), rtol=0, atol=1e-12)


def train_steps(tx, adapters, target, steps=4):
    train, frozen = sx.split(adapters)
    base = {path: jnp.zeros_like(leaf) for path, leaf in target.items()}

    def loss(train):
        total = 0.0
        for path, node in nodes(sx.combine(train, frozen)).items():
            pair = [node.train["a"], node.train["b"]]
            scale = node.frozen["scale"].reshape(-1, *[1] * 2)
            total += 0.05 * jnp.sum((base[path] + scale * (pair[0] @ pair[1]) - target[path]) ** 2)
        return total

    @jax.jit
    def step(train, state):
        value, grads = jax.value_and_grad(loss)(train)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state, value

    state, values = jax.jit(tx.init)(train), []
    for _ in range(steps):
        train, state, value = step(train, state)
        values.append(float(value))
    return train, values


def target_of(layers=3, seed=5):
    return {"layers/proj/kernel": jax.random.normal(jax.random.key(seed), (layers, 16, 12))}


def test_padded_ranks_stay_zero_and_change_nothing():
    target = target_of()
    params = {"layers": {"proj": {"kernel": jnp.zeros_like(target["layers/proj/kernel"])}}}
    tx = lora_rite(0.05, escape=True, skip=None, clip=None)
    _, ragged = sx.attach(jax.random.key(0), params, [("proj", sx.LoRA(rank=(2, 4, 3)))])
    trained, values = train_steps(tx, ragged, target)
    assert values[-1] < values[0]
    chex.assert_tree_all_finite(trained)
    (node,) = nodes(trained).values()
    for layer, rank in enumerate((2, 4, 3)):
        a, b = node.train["a"][layer], node.train["b"][layer]
        np.testing.assert_array_equal(a[:, rank:], 0)
        np.testing.assert_array_equal(b[rank:], 0)
        # The same layer alone, without padding.
        (start,) = nodes(ragged).values()
        alone = {
            "a": start.train["a"][layer, :, :rank],
            "b": start.train["b"][layer, :rank],
            "scale": start.frozen["scale"][layer],
        }
        single = sx.Adapter(
            {"a": alone["a"][None], "b": alone["b"][None]}, {"scale": alone["scale"][None]}, start.method
        )
        tree = {"layers": {"proj": {"kernel": single}}}
        want, _ = train_steps(tx, tree, {path: leaf[layer][None] for path, leaf in target.items()})
        (node_alone,) = nodes(want).values()
        got = a[:, :rank] @ b[:rank]
        expected = node_alone.train["a"][0] @ node_alone.train["b"][0]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_ragged_stacks_of_sara():
    """Padded columns of a, b and of the diagonal between them stay zero, and every layer goes as it would alone."""
    target = jax.random.normal(jax.random.key(5), (3, 16, 12))
    ranks = (2, 4, 3)
    base = {"layers": {"proj": {"kernel": jax.random.normal(jax.random.key(6), (3, 16, 12))}}}
    _, adapters = sx.attach(jax.random.key(0), base, [("proj", sx.SARA(rank=ranks, alpha=4.0))])
    (ragged,) = nodes(adapters).values()
    tx = lora_rite(0.05, escape=True, skip=None, clip=None, weight_decay=0.1)

    def go(node, goal):
        train, frozen = sx.split({"proj": node})

        def loss(train):
            (stack,) = nodes(sx.combine(train, frozen)).values()
            change = jax.vmap(lambda single: single.method.add_to_weight(jnp.zeros((16, 12)), single))(stack)
            return 0.05 * jnp.sum((change - goal) ** 2)

        @jax.jit
        def run(train):
            def step(carry, _):
                value, grads = jax.value_and_grad(loss)(carry[0])
                updates, state = tx.update(grads, carry[1], carry[0])
                return (optax.apply_updates(carry[0], updates), state), value

            (train, _), values = jax.lax.scan(step, (train, tx.init(train)), length=5)
            return train, values

        train, values = run(train)
        return nodes(train)["proj"].train, values

    trained, values = go(ragged, target)
    assert values[-1] < values[0]
    chex.assert_tree_all_finite(trained)
    assert float(jnp.abs(trained["lam"] - ragged.train["lam"]).max()) > 1e-3
    for layer, rank in enumerate(ranks):
        for name, axis in (("a", 1), ("lam", 0), ("b", 0)):
            np.testing.assert_array_equal(jnp.take(trained[name][layer], jnp.arange(rank, 4), axis=axis), 0)

        def cut(name, leaf, layer=layer, rank=rank):
            piece = leaf[layer : layer + 1]
            return piece[:, :, :rank] if name == "a" else piece[:, :rank]

        alone = {name: cut(name, leaf) for name, leaf in ragged.train.items()}
        scale = {"scale": ragged.frozen["scale"][layer : layer + 1]}
        node = sx.Adapter(alone, scale, structure(sx.SARA(rank=rank)))
        expected, _ = go(node, target[layer : layer + 1])
        for name, leaf in expected.items():
            got = cut(name, trained[name])
            np.testing.assert_allclose(got, leaf, rtol=0, atol=1e-4 * float(jnp.abs(leaf).max()), err_msg=name)


def test_leaves_in_no_pair_get_adam():
    params = {"layers": {"proj": {"kernel": jax.random.normal(jax.random.key(0), (3, 16, 12))}}}
    _, adapters = sx.attach(jax.random.key(0), params, [("proj", sx.DoRA(rank=4))])
    train, _ = sx.split(adapters)
    tree = {"adapters": train, "base": {"norm/scale": jnp.ones((5,))}}
    grads = jax.tree.map(lambda leaf: 0.01 * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)), tree)
    tx, adam = scale_by_lora_rite(), optax.scale_by_adam()
    updates, _ = jax.jit(tx.update)(grads, tx.init(tree), tree)
    expected, _ = adam.update(grads, adam.init(tree))
    (got,), (want,) = nodes(updates).values(), nodes(expected).values()
    np.testing.assert_allclose(got.train["m"], want.train["m"], rtol=1e-6)
    np.testing.assert_allclose(updates["base"]["norm/scale"], expected["base"]["norm/scale"], rtol=1e-6)
    # b starts at zero: a stands still in the first step, where Adam would move it.
    np.testing.assert_array_equal(got.train["a"], 0)
    assert np.abs(got.train["b"]).min() > 0


def test_mistakes_are_told():
    with pytest.raises(SboraxError, match="rank 3 is above a side"):
        lora_rite(0.1).init({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 5))})
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 5))}
    with pytest.raises(SboraxError, match="needs params"):
        scale_by_lora_rite().update(params, scale_by_lora_rite().init(params))


def test_a_tree_without_a_pair_is_refused():
    _, adapters = sx.attach(jax.random.key(0), {"p": {"kernel": jnp.ones((8, 6))}}, [("p", sx.Bone(rank=4))])
    with pytest.raises(SboraxError, match="lora_rite: no adapter has a pair"):
        lora_rite(1e-3).init(sx.split(adapters)[0])
