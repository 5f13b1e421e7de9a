"""What training changed in weights, on changes whose spectrum and regions are known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import sborax as sx
from sborax.adapters.core import SboraxError
from sborax.adapters.tree import nodes
from sborax.evaluate.compare.spectra import (
    Spectra,
    intruders,
    ranks,
    regions,
    right_vectors,
    singular_values,
    summary,
)
from sborax.records.adapter import save_adapter

LAYERS, FAN_IN, FAN_OUT = 3, 24, 40


def kernels(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    shapes = {"q_proj": (LAYERS, FAN_IN, FAN_OUT), "down_proj": (LAYERS, FAN_OUT, FAN_IN)}
    leaves = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {"layers": {name: {"kernel": kernel} for name, kernel in leaves.items()}}


def trained(method, params):
    """Adapters whose trained leaves have moved away from their start."""
    params, adapters = sx.attach(jax.random.key(1), params, [sx.Rule("layers", method)])

    def move(leaf, flag):
        return leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape) if flag else leaf

    tuned = jax.tree.map(move, adapters, sx.trainable(adapters))
    return params, tuned


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_decompositions_are_numpys(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    _, singular, vectors = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(singular_values(matrix), singular, rtol=1e-6)
    for count in (None, 5):
        computed = right_vectors(matrix, count)
        np.testing.assert_allclose(np.abs(np.sum(computed * vectors[: count or 24], axis=1)), 1.0, atol=1e-6)


def test_vectors_of_a_thin_matrix_are_as_many_as_its_rank():
    random = np.random.default_rng(1)
    thin = (random.normal(size=(24, 3)) @ random.normal(size=(3, 40))).astype(np.float32)
    assert len(right_vectors(thin.astype(np.float64))) == 3


def test_intruders_are_new_directions():
    random = np.random.default_rng(2)
    weight = random.normal(size=(40, 24))
    directions = right_vectors(weight)
    # The same vectors with other singular values, in another order.
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    assert intruders(directions, u @ np.diag(s[::-1]) @ v) == 0
    # A large change in directions between all of the old ones.
    between = np.ones(24) @ v / np.sqrt(24)
    across = (np.resize([1.0, -1.0], 24) @ v) / np.sqrt(24)
    for count, new in ((1, [between]), (2, [between, across])):
        large = sum(1000.0 * (k + 1) * np.outer(u[:, k], direction) for k, direction in enumerate(new))
        assert intruders(directions, weight + large, leading=count) == count


def test_a_change_is_that_of_the_merged_weights():
    params = kernels()
    base, adapters = trained(sx.LoRA(rank=4), params)
    changes = list(Spectra(params).changes(base, adapters))
    assert [(change.kernel, change.layer) for change in changes] == [
        (f"layers/{name}", layer) for name in ("down_proj", "q_proj") for layer in range(LAYERS)
    ]
    merged = sx.merge(base, adapters)["layers"]["q_proj"]["kernel"]
    weight = np.asarray(params["layers"]["q_proj"]["kernel"])
    for layer, change in enumerate(changes[LAYERS:]):
        delta = np.asarray(merged[layer]) - weight[layer]
        norm = np.linalg.norm(weight[layer])
        assert change.size == pytest.approx(np.linalg.norm(delta) / norm, rel=1e-4)
        np.testing.assert_allclose(change.singular[:4], np.linalg.svd(delta, compute_uv=False)[:4] / norm, rtol=1e-3)
        assert change.rank <= 4 and change.rows.all() and change.columns.all()
    means = summary(changes)
    assert means.matrices == 2 * LAYERS and means.spectrum.shape == (FAN_IN,) and means.moved_rows == 1.0
    assert regions(changes) == {}


def test_a_base_that_was_rewritten_is_compared_with_what_it_was():
    params = kernels()
    base, adapters = sx.attach(jax.random.key(1), params, [sx.Rule("layers", sx.PiSSA(rank=4))])
    changes = list(Spectra(params).changes(base, adapters))
    # Untrained, it is the base up to rounding.
    assert max((change.size for change in changes), default=0.0) < 1e-5


@pytest.mark.parametrize(("variant", "side"), [("FA", "rows"), ("FB", "columns")])
def test_regions_are_those_that_the_adapter_names(variant, side):
    params = kernels()
    base, adapters = trained(sx.SBoRA(rank=5, variant=variant), params)
    maps = regions(list(Spectra(params).changes(base, adapters)))
    assert sorted(maps) == [f"layers/{name}, {side}" for name in ("down_proj", "q_proj")]
    for path, node in nodes(adapters).items():
        region = maps[f"{path.removesuffix('/kernel')}, {side}"]
        expected = np.zeros_like(region)
        for layer, idx in enumerate(np.asarray(node.frozen["idx"])):
            expected[layer, idx] = True
        np.testing.assert_array_equal(region, expected)


def test_full_fine_tuning_has_changes_without_adapters():
    params = kernels()
    new = jax.tree.map(lambda leaf: leaf.at[1].add(0.5), params)
    changes = list(Spectra(params).changes(new, None))
    assert [(change.layer, change.rank) for change in changes] == [(1, 1), (1, 1)]
    with pytest.raises(SboraxError, match="changed no kernel"):
        summary(list(Spectra(params).changes(params, None)))


def test_changes_in_bfloat16_are_not_rounded_off():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), kernels())
    base, adapters = trained(sx.LoRA(rank=2), params)
    tiny = jax.tree.map(lambda leaf, flag: 0.1 * leaf if flag else leaf, adapters, sx.trainable(adapters))
    assert {change.rank for change in Spectra(params).changes(base, tiny)} <= {1, 2}


def test_what_has_no_merged_form_is_refused():
    params = kernels()
    base, adapters = sx.attach(jax.random.key(1), params, [sx.Rule("layers", sx.MoSARA())])
    with pytest.raises(SboraxError, match="MoSARA has no merged form"):
        list(Spectra(params).changes(base, adapters))
    with pytest.raises(SboraxError, match="trained on another model"):
        list(Spectra(params).changes({"layers": {"q_proj": {"kernel": jnp.zeros((2, 2))}}}, None))


def test_ranks_by_layer_are_those_of_the_plan(tmp_path):
    params = kernels()
    _, adapters = sx.attach(jax.random.key(1), params, [sx.Rule("q_proj", sx.PRILoRA(rank=sx.LinearRanks(2, 6)))])
    save_adapter(tmp_path / "adapter", adapters)
    assert ranks(epath.Path(tmp_path)) == {"layers/q_proj": (2, 4, 6)}
    _, even = sx.attach(jax.random.key(1), params, [sx.Rule("q_proj", sx.LoRA(rank=4))])
    save_adapter(tmp_path / "even" / "adapter", even)
    assert ranks(epath.Path(tmp_path / "even")) == {} == ranks(epath.Path(tmp_path / "missing"))
    (tmp_path / "adapter" / "plan.json").write_text(json.dumps({"sites": [1]}))
    with pytest.raises(SboraxError, match="expected a path and a method"):
        ranks(epath.Path(tmp_path))
