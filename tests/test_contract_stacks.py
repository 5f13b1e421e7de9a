"""The contract where a layer's number and the position in a stack are two things: the experts of a mixture."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import assert_close, by_case, by_few, forward, host, inputs, normal, standalone, trained
from cases import IN, METHODS, OUT, Case, hint_for

import sborax as sx
from sborax.adapters.bank import link
from sborax.adapters.core import structure
from sborax.adapters.paths import Site, weight_keys
from sborax.adapters.tree import nodes

pytestmark = pytest.mark.usefixtures("strict")

LAYERS, EXPERTS = 3, 4
WEIGHT, GRAD = np.float32(0.3) * normal(1, IN, OUT), normal(9, IN, OUT)


def unrolled(weight) -> dict:
    """A layer a module, and the experts of each in one kernel."""
    return {"layers": {str(i): {"experts": {"kernel": weight[i]}} for i in range(LAYERS)}}


def attached(case: Case, params, seed: int = 0, **places):
    shape = jax.tree.leaves(params)[0].shape
    hint = (
        {"layers/experts": hint_for(case.method, np.broadcast_to(GRAD, shape), len(shape) - 2)}
        if case.method.needs
        else None
    )
    rule = sx.Rule("experts", case.method, **places)
    return sx.attach(jax.random.key(seed), params, [rule], hint)


SAME = jnp.asarray(np.broadcast_to(WEIGHT, (LAYERS, EXPERTS, IN, OUT)))


@by_few
def test_a_rule_for_a_layer_adapts_all_of_its_experts_and_no_others(case: Case):
    if case.method.linked or case.method.token_mean:
        with pytest.raises(sx.SboraxError, match="layers/0/experts/kernel: .* (links layers|takes means)"):
            attached(case, unrolled(SAME), stack_axes=1, layers=(0,))
        return
    params, adapters = attached(case, unrolled(SAME), stack_axes=1, layers=(0,))
    ((path, node),) = link(nodes(adapters)).items()
    assert path == "layers/0/experts/kernel"
    assert node.method == structure(case.method)
    assert sx.count(adapters) == EXPERTS * case.count(IN, OUT) + case.shared(IN, OUT)
    y = forward(inputs(), params["layers"]["0"]["experts"]["kernel"], trained(node))
    plain = host(inputs()) @ WEIGHT
    assert all(np.abs(host(expert) - plain).max() > 1e-3 for expert in y)


@by_case
def test_random_starts_differ_from_weight_to_weight(case: Case):
    """Leaves that depend on the key, found by drawing twice, are those of no other expert and of no other layer."""
    if case.method.linked or case.method.token_mean:
        return
    first, second = (attached(case, unrolled(SAME), seed, stack_axes=1)[1] for seed in (0, 1))
    trees = [[node for path, node in nodes(tree).items() if path.endswith("/kernel")] for tree in (first, second)]
    leaves = [jax.tree.leaves((node.train, node.frozen)) for tree in trees for node in tree]
    for together in zip(*leaves, strict=True):
        draws = np.stack([np.asarray(leaf) for leaf in together]).reshape(2, LAYERS * EXPERTS, -1)
        if draws.shape[2] < 4 or not apart(draws[0, 0], draws[1, 0]):
            continue
        for a, b in itertools.combinations(draws[0], 2):
            assert apart(a, b)


def apart(a: np.ndarray, b: np.ndarray) -> bool:
    """By more than rounding."""
    return float(np.abs(a - b).max()) > 1e-3 * float(np.abs(a).max())


@by_few
def test_layers_of_a_stack_of_two_axes_are_chosen_with_all_of_their_experts(case: Case):
    weight = np.float32(0.3) * normal(5, LAYERS, EXPERTS, IN, OUT)
    params = {"layers": {"experts": {"kernel": jnp.asarray(weight)}}}
    if case.method.linked or case.method.token_mean:
        with pytest.raises(sx.SboraxError, match="links layers|takes means"):
            attached(case, params, stack_axes=2, layers=(0, -1))
        return
    params, adapters = attached(case, params, stack_axes=2, layers=(0, -1))
    kernel, node = params["layers"]["experts"]["kernel"], standalone(adapters)
    assert sx.count(adapters) == 2 * EXPERTS * case.count(IN, OUT) + case.shared(IN, OUT)
    node = trained(node)
    y, plain = forward(inputs(), kernel, node), np.einsum("ti,leio->leto", host(inputs()), weight)
    mask = np.abs(host(y) - plain).max(axis=(2, 3)) > 1e-3
    assert mask.tolist() == [[True] * EXPERTS, [False] * EXPERTS, [True] * EXPERTS]
    if not case.method.no_merge:
        merged = sx.merge(params, {"layers": {"experts": {"kernel": node}}})["layers"]["experts"]["kernel"]
        np.testing.assert_array_equal(merged[1], weight[1])
        assert_close(y, np.einsum("ti,leio->leto", host(inputs()), host(merged)), 2e-5)


def spectra(ranks) -> jax.Array:
    """Weights with so many equal singular values each, and no others."""
    weights = np.zeros((*np.shape(ranks), IN, OUT), np.float32)
    for place in np.ndindex(np.shape(ranks)):
        weights[place][range(ranks[place]), range(ranks[place])] = 1
    return jnp.asarray(weights)


RANKS = np.array([[4, 1, 4, 1], [1, 1, 3, 2], [2, 2, 2, 2]])
RAGGED = [
    case for case in METHODS if case.method.ragged and "rank" in {f.name for f in dataclasses.fields(case.method)}
]


def takes_odd_ranks(method) -> bool:
    try:
        dataclasses.replace(method, rank=(1, 3)).check((IN, OUT))
    except sx.SboraxError:
        return False
    return True


@pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])
@pytest.mark.parametrize("case", RAGGED, ids=lambda case: case.name)
def test_planned_ranks_land_on_the_weights_they_were_planned_for(case: Case, stacked):
    # The rank of a weight is its number of singular values.
    method = dataclasses.replace(case.method, rank=sx.SingularMass(0.99))
    planned = RANKS if takes_odd_ranks(case.method) else 2 * RANKS
    params = {"layers": {"experts": {"kernel": spectra(planned)}}} if stacked else unrolled(spectra(planned))
    _, adapters = attached(dataclasses.replace(case, method=method), params, stack_axes=1 + stacked)
    total = 0
    for node, ranks in zip(nodes(adapters).values(), [planned.reshape(-1)] if stacked else planned, strict=True):
        assert node.method.rank == (tuple(ranks) if len(set(ranks)) > 1 else ranks[0])
        live = np.arange(max(ranks)) < ranks[:, None]
        for name, leaf in {**node.frozen, **node.train}.items():
            names = node.method.axes[name]
            columns = np.asarray(leaf).reshape(len(ranks), *leaf.shape[leaf.ndim - len(names) :])
            if "rank" in names:
                columns = np.moveaxis(columns, 1 + names.index("rank"), 1).reshape(*live.shape, -1)
                support = (columns != 0).any(axis=2)
                assert (support == live).all() or not support.any(), name
            if name in node.train:
                total += int(live.sum()) * columns.shape[2] if "rank" in names else leaf.size
    assert sx.count(adapters) == total


def test_ranks_by_depth_are_those_of_the_layer():
    method, weights = sx.LoRA(rank=sx.LinearRanks(2, 6)), {"kernel": SAME}
    sites = sx.plan(unrolled(SAME), [sx.Rule("experts", method, stack_axes=1)]).sites
    assert [site.method.rank for site in sites] == [2, 4, 6]
    (site,) = sx.plan({"layers": {"experts": weights}}, [sx.Rule("experts", method, stack_axes=2)]).sites
    assert site.method.rank == (2,) * EXPERTS + (4,) * EXPERTS + (6,) * EXPERTS
    shuffled = sx.LoRA(rank=sx.ShuffledRanks(sx.LinearRanks(2, 6)))
    with pytest.raises(sx.SboraxError, match="one layer's rank"):
        sx.plan(unrolled(SAME), [sx.Rule("experts", shuffled, stack_axes=1)])


def test_ranks_are_read_off_matrices_whatever_the_axes_of_a_kernel():
    weight = spectra(np.array([3, 2])).reshape(2, IN, 8, OUT // 8)
    rule = sx.Rule("query", sx.LoRA(rank=sx.SingularMass(0.99)), stack_axes=1, in_axes=1)
    (site,) = sx.plan({"layers": {"query": {"kernel": weight}}}, [rule]).sites
    assert site.method.rank == (3, 2)


@pytest.mark.parametrize(
    ("path", "stack", "layers"),
    [
        ("layers/proj/kernel", (3,), (0, 1, 2)),
        ("layers/experts/kernel", (2, 3), (0, 0, 0, 1, 1, 1)),
        ("layers/3/proj/kernel", (), (3,)),
        ("layers/3/experts/kernel", (2,), (3, 3)),
        ("layers/3/experts/5/kernel", (), (3,)),
        ("layers/experts/5/kernel", (2,), (0, 1)),
        ("h/3/experts/kernel", (2,), (3, 3)),
        ("head/kernel", (), (0,)),
    ],
)
def test_layers_are_counted_by_the_path_before_the_stack(path, stack, layers):
    number = next((int(part) for part in path.split("/") if part.isdecimal()), 0)
    assert Site(path, sx.LoRA(2), stack, (8, 8), 1, number).layers == layers


def test_no_two_weights_have_one_key():
    """Not those of neighbours in a stack, in layers, or among experts that are modules of their own."""
    places = [("layers/experts/kernel", (3, 4))]
    places += [(f"layers/{i}/up/kernel", (4,)) for i in range(4)]
    places += [(f"layers/{i}/gate/{j}/kernel", ()) for i in range(4) for j in range(4)]
    keys = [weight_keys(jax.random.key(0), path, stack).reshape(-1) for path, stack in places]
    words = np.concatenate([np.asarray(jax.random.key_data(key)) for key in keys])
    assert len(np.unique(words, axis=0)) == 12 + 16 + 16


def test_keys_of_a_stack_and_of_numbered_layers_are_folded_once():
    (alone,) = weight_keys(jax.random.key(0), "layers/proj/kernel", (1,))
    for i, key in enumerate(weight_keys(jax.random.key(0), "layers/proj/kernel", (4,))):
        assert key == weight_keys(jax.random.key(0), f"layers/{i}/proj/kernel", ())
    assert alone == weight_keys(jax.random.key(0), "layers/proj/kernel", ())
