"""Experts trained apart: disjoint blocks, sums without interference, removal to the bit."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sborax as sx
from sborax.adapters.tree import nodes

pytestmark = pytest.mark.usefixtures("strict")

IN, OUT, LAYERS, EXPERTS = 40, 36, 2, 3
WEIGHT = jax.random.normal(jax.random.key(1), (LAYERS, IN, OUT))
PARAMS = {"layers": {"q": {"kernel": WEIGHT}, "k": {"kernel": 2 * WEIGHT}}}
METHODS = {
    "FA": sx.SBoRA(rank=4, experts=EXPERTS, expert=0),
    "FB": sx.SBoRA(rank=4, experts=EXPERTS, expert=0, variant="FB", alpha=12.0),
    "in": sx.OrthogonalAdaptation(rank=4, experts=EXPERTS, alpha=12.0),
    "out": sx.OrthogonalAdaptation(rank=4, experts=EXPERTS, side="out"),
}
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def expert_of(method, number, pattern="q|k", seed=None):
    """An expert attached under a key of its own, its factor moved away from zero."""
    of_number = dataclasses.replace(method, expert=number)
    _, adapters = sx.attach(jax.random.key(number if seed is None else seed), PARAMS, [(pattern, of_number)])
    train, frozen = sx.split(adapters)
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(100 + number), len(leaves))
    tuned = [leaf + jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return sx.combine(jax.tree.unflatten(treedef, tuned), frozen)


def merged(adapters):
    return sx.merge(PARAMS, adapters)["layers"]["q"]["kernel"]


def block_of(adapters, path="layers/q/kernel"):
    """The frozen directions, (layers, size, rank)."""
    node = nodes(adapters)[path]
    if "idx" in node.frozen:
        size = IN if node.method.variant == "FA" else OUT
        return jax.nn.one_hot(node.frozen["idx"], size, axis=-2)
    return node.frozen["a"] if node.method.side == "in" else jnp.swapaxes(node.frozen["b"], -1, -2)


@by_method
def test_blocks_are_orthonormal_disjoint_and_shared(method):
    blocks = [block_of(expert_of(method, e)) for e in range(EXPERTS)]
    together = jnp.concatenate(blocks, axis=-1)
    gram = jnp.einsum("lir,lis->lrs", together, together)
    chex.assert_trees_all_close(gram, jnp.broadcast_to(jnp.eye(4 * EXPERTS)[None], gram.shape), atol=1e-5)
    # The attach key, the module and the layer change nothing; the basis seed does.
    second = expert_of(method, 1, seed=99)
    chex.assert_trees_all_close(block_of(second), blocks[1], atol=0)
    chex.assert_trees_all_close(block_of(second, "layers/k/kernel"), blocks[1], atol=0)
    chex.assert_trees_all_close(blocks[1][0], blocks[1][1], atol=0)
    of_seed = block_of(expert_of(dataclasses.replace(method, basis_seed=1), 1))
    assert float(jnp.abs(of_seed - blocks[1]).max()) > 0.1


@by_method
def test_an_expert_does_not_depend_on_how_many_there_are(method):
    """So that a fourth can be trained later."""
    small, large = (block_of(expert_of(dataclasses.replace(method, experts=n), 1)) for n in (2, 8))
    chex.assert_trees_all_close(small, large, atol=1e-6)


@by_method
def test_removal_is_exact_to_the_bit(method):
    experts = [expert_of(method, e) for e in range(EXPERTS)]
    everyone = sx.combine_experts(experts)
    for number in range(EXPERTS):
        subset = [expert for e, expert in enumerate(experts) if e != number]
        remainder = sx.remove_expert(everyone, experts[number])
        never = sx.combine_experts(subset)
        chex.assert_trees_all_equal(remainder, never)
        chex.assert_trees_all_equal(merged(remainder), merged(never))
        alone = sx.remove_expert(remainder, subset[0])
        chex.assert_trees_all_equal(alone, subset[1])
        assert sx.remove_expert(alone, subset[1]) == {}
    assert sx.count(everyone) == sum(sx.count(expert) for expert in experts)
    grown = sx.combine_experts([sx.combine_experts(experts[:2]), experts[2]])
    chex.assert_trees_all_equal(grown, everyone)


@by_method
def test_combined_forward_equals_merged(method):
    everyone = sx.combine_experts([expert_of(method, e) for e in range(EXPERTS)])
    x = jax.random.normal(jax.random.key(5), (7, IN))
    node = jax.tree.map(lambda leaf: leaf[1], nodes(everyone)["layers/q/kernel"])
    y = sx.linear(x, WEIGHT[1], node)
    chex.assert_trees_all_close(y, x @ merged(everyone)[1], atol=2e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("variant", ["FA", "FB"])
def test_every_entry_is_one_experts_or_the_bases_to_the_bit(variant):
    experts = [expert_of(METHODS[variant], e) for e in range(EXPERTS)]
    together, alone = np.asarray(merged(sx.combine_experts(experts))), [np.asarray(merged(e)) for e in experts]
    untouched = np.ones(WEIGHT.shape, bool)
    for expert, weight in zip(experts, alone, strict=True):
        for layer, idx in enumerate(np.asarray(nodes(expert)["layers/q/kernel"].frozen["idx"])):
            index = (layer, idx) if variant == "FA" else (layer, slice(None), idx)
            np.testing.assert_array_equal(together[index], weight[index])
            assert (together[index] != np.asarray(WEIGHT)[index]).all()
            untouched[index] = False
    np.testing.assert_array_equal(together[untouched], np.asarray(WEIGHT)[untouched])
    assert untouched.any()


@by_method
def test_each_expert_is_recovered_from_the_sum(method):
    """What Orthogonal Adaptation promises, and what a sum of plain LoRAs does not."""
    experts = [expert_of(method, e) for e in range(EXPERTS)]
    delta = np.asarray(merged(sx.combine_experts(experts)) - WEIGHT, np.float64)
    for expert in experts:
        node, q = nodes(expert)["layers/q/kernel"], np.asarray(block_of(expert), np.float64)
        scale = np.asarray(node.frozen["scale"])[:, None, None]
        if "b" in node.train:
            np.testing.assert_allclose(np.swapaxes(q, 1, 2) @ delta, scale * node.train["b"], atol=3e-5)
        else:
            np.testing.assert_allclose(delta @ q, scale * node.train["a"], atol=3e-5)


@pytest.mark.parametrize("side", ["in", "out"])
def test_gaussian_experts_interfere_as_much_as_the_docstring_says(side):
    """On inputs (outputs) in the span of an expert's block: what the other experts add, beside what it adds itself."""
    size, rank = 400, 4
    params = {"q": {"kernel": jnp.zeros((size, size))}}

    def block(basis, number, **options):
        method = sx.OrthogonalAdaptation(rank=rank, side=side, expert=number, experts=12, basis=basis, **options)
        (node,) = nodes(sx.attach(jax.random.key(number), params, [("q", method)])[1]).values()
        assert sx.count({"q": {"kernel": node}}) == rank * size
        return np.asarray(node.frozen["a"] if side == "in" else node.frozen["b"].T, np.float64)

    trained = np.random.default_rng(0).normal(size=(12, rank, size))

    def crosstalk(basis):
        blocks = [block(basis, number) for number in range(12)]
        signal = np.linalg.norm(blocks[0].T @ blocks[0] @ trained[0])
        interference = [np.linalg.norm(blocks[0].T @ q @ b) for q, b in zip(blocks[1:], trained[1:], strict=True)]
        return np.mean(interference) / signal

    assert crosstalk("orthogonal") < 1e-5
    assert 0.9 < crosstalk("gaussian") / np.sqrt(rank / size) < 1.1
    # E[q_i^T q_j] = 0 and E[q^T q] = 1; deviations by chance have size 1 / sqrt(size).
    blocks = [block("gaussian", number) for number in range(12)]
    cross = np.stack([blocks[0].T @ q for q in blocks[1:]])
    assert abs(cross.mean()) < 4 / np.sqrt(size * cross.size)
    assert 0.9 < cross.std() * np.sqrt(size) < 1.1
    assert abs(np.mean([np.sum(q**2, axis=0) for q in blocks]) - 1) < 0.02
    np.testing.assert_allclose(block("gaussian", 3, sigma=0.5), 0.5 * np.sqrt(size) * blocks[3], rtol=1e-6)
    # Of the seed and the expert, not of the key or the number of experts.
    assert np.abs(block("gaussian", 3, basis_seed=1) - blocks[3]).max() > 0.1
    small = sx.OrthogonalAdaptation(rank=rank, side=side, expert=3, experts=4, basis="gaussian")
    (node,) = nodes(sx.attach(jax.random.key(77), params, [("q", small)])[1]).values()
    np.testing.assert_array_equal(node.frozen["a"] if side == "in" else node.frozen["b"].T, blocks[3])


def test_gaussian_experts_are_summed_but_not_combined():
    method = dataclasses.replace(METHODS["in"], basis="gaussian")
    experts = [expert_of(method, number) for number in (0, 1)]
    for mistake in (lambda: sx.combine_experts(experts), lambda: sx.remove_expert(sx.add(*experts), experts[0])):
        with pytest.raises(
            sx.SboraxError, match="orthogonal in expectation alone, so that experts interfere.*add"
        ) as e:
            mistake()
        assert "\n" not in str(e.value)
    change = merged(sx.add(*experts)) - WEIGHT
    chex.assert_trees_all_close(change, sum(merged(expert) - WEIGHT for expert in experts), atol=2e-5)
    # More experts than fit side by side; but not one beyond their number.
    large = dataclasses.replace(method, experts=100, expert=99)
    assert sx.plan(PARAMS, [("q", large)])
    for wrong, message in (
        (dataclasses.replace(large, expert=100), "expert must lie in 0..99"),
        (dataclasses.replace(method, sigma=0.0), "sigma"),
        (dataclasses.replace(METHODS["in"], sigma=0.1), "sigma=0.1 is of basis='gaussian'"),
    ):
        with pytest.raises(sx.SboraxError, match=message):
            sx.plan(PARAMS, [("q", wrong)])


def test_experts_may_adapt_different_kernels():
    method = METHODS["FA"]
    first, second = expert_of(method, 0, "q"), expert_of(method, 1)
    union = sx.combine_experts([first, second])
    assert set(nodes(union)) == {"layers/q/kernel", "layers/k/kernel"}
    chex.assert_trees_all_equal(sx.remove_expert(union, first), second)
    chex.assert_trees_all_equal(sx.remove_expert(union, second), first)


def test_overlap_and_strangers_are_refused():
    fa = METHODS["FA"]
    mistakes = [
        [expert_of(fa, 1), expert_of(fa, 1, seed=7)],
        [expert_of(fa, 0), expert_of(METHODS["FB"], 1)],
        [expert_of(fa, 0), expert_of(METHODS["in"], 1)],
        [expert_of(METHODS["in"], 0), expert_of(METHODS["out"], 1)],
        [expert_of(METHODS["in"], 0), expert_of(dataclasses.replace(METHODS["in"], basis_seed=5), 1)],
        [expert_of(fa, 1), expert_of(dataclasses.replace(fa, rank=8), 0)],
    ]
    for pair in mistakes:
        with pytest.raises(sx.SboraxError, match="expert number 1 of the list overlaps") as error:
            sx.combine_experts(pair)
        assert "\n" not in str(error.value)
    _, lora = sx.attach(jax.random.key(0), PARAMS, [("q", sx.LoRA(rank=2))])
    with pytest.raises(sx.SboraxError, match="LoRA owns no block"):
        sx.combine_experts([lora])
    rule = sx.Rule("q", dataclasses.replace(fa, expert=0), layers=(0,))
    _, partial = sx.attach(jax.random.key(0), PARAMS, [rule])
    with pytest.raises(sx.SboraxError, match="a rule with layers= puts its expert on a part of the stack.*sborax.add"):
        sx.combine_experts([partial])
    assert sx.add(partial, sx.attach(jax.random.key(0), PARAMS, [rule])[1])
    with pytest.raises(sx.SboraxError, match="at least one"):
        sx.combine_experts([])
    with pytest.raises(sx.SboraxError, match="no such expert among the 1"):
        sx.remove_expert(expert_of(fa, 0), expert_of(fa, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": 3}, "expert must lie in 0..2"),
        ({"expert": -1}, "expert must be 0 or more, got -1"),
        ({"experts": 11, "expert": 0}, "11 experts of rank 4 need 44 directions, there are (40|36)"),
    ],
)
@by_method
def test_blocks_that_do_not_exist_are_refused_at_planning(method, options, message):
    with pytest.raises(sx.SboraxError, match=message):
        sx.plan(PARAMS, [("q", dataclasses.replace(method, **options))])


def test_sbora_with_experts_must_say_which():
    with pytest.raises(sx.SboraxError, match="with experts=3, expert must lie in 0..2, got None"):
        sx.plan(PARAMS, [("q", sx.SBoRA(rank=4, experts=3))])
