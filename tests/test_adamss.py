"""AdaMSS: the subspaces that K-means finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import normal

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.methods.adamss import clustered

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_with_the_nearest_mean(seed):
    """Of four groups far from each other, three of which may be found as one: a fixed point of Lloyd's steps."""
    centres = 20 * normal(seed, 4, 3)
    rows = np.repeat(centres, [5, 9, 2, 7], axis=0) + 0.1 * normal(seed + 1, 23, 3)
    idx = np.asarray(clustered(jax.random.key(seed), jnp.asarray(rows), 4))
    means = np.stack([rows[idx == k].mean(axis=0) for k in range(4)])
    distances = np.square(rows[:, None] - means[None]).sum(axis=2)
    np.testing.assert_array_equal(idx, distances.argmin(axis=1))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_no_subspace_is_empty(count):
    """Not even of equal rows, or with as many subspaces as rows."""
    for rows in (jnp.ones((6, 2)), jnp.asarray(normal(0, 6, 2))):
        idx = clustered(jax.random.key(0), rows, count)
        assert sorted(set(np.asarray(idx).tolist())) == list(range(count))


def test_the_start_spans_what_is_largest_in_each_subspace():
    """a[:, k] is orthonormal and holds as much of the rows of subspace k as their leading singular vectors."""
    weight = jnp.asarray(normal(3, 12, 20))
    method = sx.AdaMSS(rank=8, subspaces=3, subspace_rank=2)
    _, adapters = sx.attach(jax.random.key(0), {"up": {"kernel": weight}}, [("up", method)])
    node = nodes(adapters)["up/kernel"]
    u, _, vt = np.linalg.svd(np.asarray(weight), full_matrices=False)
    np.testing.assert_allclose(np.abs(node.frozen["p"]), np.abs(u[:, :8]), atol=1e-4)
    rows = np.asarray(weight.T @ node.frozen["p"])
    rows = rows / np.linalg.norm(rows, axis=0)
    for k in range(3):
        subspace, a = rows[np.asarray(node.frozen["idx"]) == k], np.asarray(node.train["a"][:, k])
        np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-5)
        expected = np.sqrt(np.square(np.linalg.svd(subspace, compute_uv=False)[:2]).sum())
        np.testing.assert_allclose(np.linalg.norm(subspace @ a), expected, rtol=1e-4)
