"""What composed methods promise beyond the contract: chains that lose nothing, sums and multiples that are such."""

from inspect import unwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nightly import nightly_unless

import sborax as sx
from sborax.adapters.core import is_weight
from sborax.adapters.tree import nodes, stack_of
from sborax.layout.state import take_apart
from sborax.methods.masked import Masked
from sborax.models.nf4 import quantise

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
LAYERS, IN, OUT = 3, 64, 32


def base(dtype="float32"):
    return {"layers": {"proj": {"kernel": jax.random.normal(jax.random.key(1), (LAYERS, IN, OUT)).astype(dtype)}}}


def tuned(rules, seed=0, params=None):
    """What a training might leave: the base it stands on, and moved adapters."""
    params, adapters = sx.attach(jax.random.key(seed), base() if params is None else params, rules)
    train, frozen = sx.split(adapters)
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(seed + 9), len(leaves))
    trained = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return params, sx.combine(jax.tree.unflatten(treedef, trained), frozen)


def kernel(params):
    return np.asarray(params["layers"]["proj"]["kernel"])


def change(params, adapters):
    return kernel(sx.merge(params, adapters)) - kernel(base())


def applied(params, adapters):
    """The weights whose plain projection is the adapted one, from what `linear` makes of unit vectors."""
    (weight,), (node,) = jax.tree.leaves(params), nodes(adapters).values()
    return np.asarray(jax.jit(jax.vmap(lambda w, n: sx.linear(jnp.eye(IN), w, n)))(weight, node))


def close(got, want, tolerance=2e-6):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (sx.AdaLoRA(rank=4), "would ignore 'e'"),
        (sx.SARA(rank=4), "would ignore 'lam'"),
        (sx.SARA(rank=4, factor_init="svd"), "would ignore 'lam'"),
        (sx.PRILoRA(rank=4, persistent_mask=True), "would ignore 'mask'"),
        (sx.OrthogonalAdaptation(rank=4), "trains 'a', which OrthogonalAdaptation keeps frozen"),
        (sx.OrthogonalAdaptation(rank=4, side="out"), "trains 'b', which OrthogonalAdaptation keeps frozen"),
        (sx.VeRA(rank=4), "trains 'a', which VeRA keeps frozen"),
        (sx.DoRA(rank=4), "would ignore 'm'"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_chain_refuses_a_first_link_of_which_it_would_lose_a_leaf(first, says):
    with pytest.raises(sx.SboraxError) as caught:
        sx.plan(base(), [("proj", sx.chain(first, sx.DoRA()))])
    assert says in str(caught.value) and "layers/proj/kernel" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "first", [sx.LoRA(rank=3, alpha=6.0), sx.LoRA(rank=3, dropout=0.5), sx.PiSSA(rank=3), sx.OLoRA(rank=3, alpha=2.0)]
)
def test_a_chain_that_is_taken_starts_at_the_base_and_merges_to_what_it_is(first):
    params, adapters = sx.attach(KEY, base(), [("proj", sx.chain(first, sx.DoRA()))])
    close(kernel(sx.merge(params, adapters)), kernel(base()))
    params, adapters = tuned([("proj", sx.chain(first, sx.DoRA()))])
    close(applied(params, adapters), kernel(sx.merge(params, adapters)), 1e-5)


@pytest.mark.parametrize("field", [{"rank": 9}, {"alpha": 18.0}, {"dropout": 0.5}], ids=str)
def test_a_field_of_the_second_link_that_would_be_dropped_is_refused(field):
    ((name, value),) = field.items()
    with pytest.raises(sx.SboraxError, match=f"DoRA's {name}={value} would not be used, since PiSSA"):
        sx.plan(base(), [("proj", sx.chain(sx.PiSSA(rank=4), sx.DoRA(**field)))])
    # Said of both it is no contradiction.
    sx.plan(base(), [("proj", sx.chain(sx.PiSSA(**{"rank": 4, **field}), sx.DoRA(**field)))])


REWRITING = [sx.PiSSA(rank=3, alpha=6.0), sx.OLoRA(rank=3), sx.add(sx.PiSSA(rank=2), sx.LoRA(rank=2), sx.OLoRA(rank=2))]


@pytest.mark.parametrize("factor", nightly_unless([0.0, 0.5], [0.0, 0.5, 1.0, -1.0]))
@pytest.mark.parametrize("method", REWRITING, ids=lambda method: type(method).__name__)
def test_a_multiple_is_one_of_the_change_since_the_original_base(method, factor):
    params, adapters = tuned([("proj", method)])
    scaled = sx.scale(adapters, factor)
    want = kernel(base()) + factor * change(params, adapters)
    close(kernel(sx.merge(params, scaled)), want)
    close(applied(params, scaled), want)
    close(
        kernel(sx.merge(params, sx.scale(sx.scale(adapters, 0.5), factor))),
        kernel(base()) + 0.5 * (want - kernel(base())),
    )
    # As a method it is the same function of the same leaves.
    second, attached = sx.attach(KEY, base(), [("proj", sx.scale(method, factor))])
    close(kernel(sx.merge(second, attached)), kernel(base()))
    chex.assert_trees_all_equal_structs(attached, scaled)


def test_a_node_without_what_is_put_back_computes_as_it_was_trained():
    """Files of before have no `rest`."""
    params, adapters = tuned([("proj", sx.PiSSA(rank=3))])
    (node,) = nodes(sx.scale(adapters, 0.5)).values()
    del node.frozen["rest"]
    old = {"layers": {"proj": {"kernel": node}}}
    (plain,) = nodes(adapters).values()
    want = kernel(params) + 0.5 * np.asarray(plain.frozen["scale"][:, None, None] * plain.train["a"] @ plain.train["b"])
    close(kernel(sx.merge(params, old)), want)
    close(applied(params, old), want)


def test_a_sum_with_one_tree_that_rewrote_its_base_stands_on_that():
    params, adapters = tuned([("proj", sx.PiSSA(rank=3))])
    _, lora = tuned([("proj", sx.LoRA(rank=2))], seed=1)
    total = sx.add(adapters, lora)
    close(change(params, total), change(params, adapters) + change(base(), lora))
    close(applied(params, total), kernel(sx.merge(params, total)))


def test_a_sum_of_trees_that_each_rewrote_their_base_is_refused():
    (first_base, first), (second_base, second) = (
        tuned([("proj", sx.PiSSA(rank=3))]),
        tuned([("proj", sx.OLoRA(rank=3))], seed=1),
    )
    with pytest.raises(sx.SboraxError, match="layers/proj/kernel: add: PiSSA and OLoRA each took .* merge_weighted"):
        sx.add(first, second)
    merged = sx.merge_weighted(base(), [sx.Weighted(1.0, first, first_base), sx.Weighted(1.0, second, second_base)])
    close(kernel(merged) - kernel(base()), change(first_base, first) + change(second_base, second))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "nf4"])
@pytest.mark.parametrize(
    "rules",
    [
        [("proj", sx.PiSSA(rank=3))],
        [("proj", sx.chain(sx.OLoRA(rank=3), sx.DoRA()))],
        [("proj", sx.add(sx.LoRA(rank=2), sx.OLoRA(rank=2)))],
        [sx.Rule("proj", sx.PiSSA(rank=3), layers=(1,)), sx.Rule("proj", sx.LoRA(rank=2))],
        [("proj", sx.LoRAGA(rank=2))],
    ],
    ids=["PiSSA", "chain", "sum", "by layer", "LoRA-GA"],
)
def test_the_base_of_before_is_noticed(rules, dtype):
    def cast(params):
        return jax.tree.map(quantise if dtype == "nf4" else lambda leaf: leaf.astype(dtype), params)

    hints = {"layers/proj": sx.Hint(grad=jax.random.normal(jax.random.key(5), (LAYERS, IN, OUT)))}
    params, adapters = sx.attach(KEY, base(), rules, hints)
    right = sx.merge(cast(params), adapters)
    for wrong in (
        lambda: sx.merge(cast(base()), adapters),
        lambda: sx.merge_weighted(cast(base()), [sx.Weighted(1.0, adapters)]),
        lambda: sx.unmerge(right, adapters, cast(base())),
    ):
        with pytest.raises(sx.SboraxError, match="layers/proj/kernel: .* took its start out of the base"):
            wrong()
    # A trace has no values to look at.
    jax.eval_shape(sx.merge, cast(base()), adapters)


def test_layers_are_scaled_and_summed_each_with_its_own():
    """Trees whose rules pick layers, with each other and with one that adapts all."""
    trees = [
        tuned([sx.Rule("proj", sx.LoRA(rank=2), layers=(0,)), sx.Rule("proj", sx.SBoRA(rank=3), layers=(2,))]),
        tuned([sx.Rule("proj", sx.Bone(rank=4), layers=(0, 1))], seed=1),
        tuned([("proj", sx.LoRA(rank=3))], seed=2),
    ]
    for numbers in ([0, 1], [1, 0], [0, 2], [2, 1], [0, 1, 2]):
        adapters = [trees[number][1] for number in numbers]
        total = sx.add(*adapters)
        close(change(base(), total), sum(change(base(), tree) for tree in adapters))
        close(applied(base(), total), kernel(sx.merge(base(), total)), 1e-5)
        assert sx.count(total) == sum(sx.count(tree) for tree in adapters)
    for params, adapters in trees:
        half = sx.scale(adapters, 0.5)
        close(change(params, half), 0.5 * change(params, adapters))
        close(applied(params, half), kernel(sx.merge(params, half)), 1e-5)
    # A layer that no rule picks keeps its bits.
    merged = kernel(sx.merge(base(), sx.scale(trees[0][1], 0.5)))
    chex.assert_trees_all_equal(merged[1], kernel(base())[1])


def test_the_stack_of_parts_without_frozen_leaves_is_known():
    _, adapters = sx.attach(KEY, base(), [("proj", sx.add(sx.C3A(block=8), sx.C3A(block=16)))])
    (node,) = nodes(adapters).values()
    assert not jax.tree.leaves(node.frozen) and stack_of(node) == (LAYERS,)


def test_a_part_that_is_not_additive_is_the_one_that_is_named():
    _, adapters = tuned([sx.Rule("proj", sx.LoRA(rank=2), layers=(0,)), sx.Rule("proj", sx.DoRA(rank=2))])
    _, plain = tuned([("proj", sx.LoRA(rank=2))])
    for wrong in (lambda: sx.scale(adapters, 0.5), lambda: sx.add(adapters, plain)):
        with pytest.raises(sx.SboraxError, match="DoRA rewrites the weight as a whole"):
            wrong()
    _, linked = tuned([("proj", sx.ResLoRA(rank=2))])
    _, first = tuned([sx.Rule("proj", sx.LoRA(rank=2), layers=(0,))])
    with pytest.raises(sx.SboraxError, match="ResLoRA links layers"):
        sx.add(linked, first)


@pytest.mark.parametrize("method", [sx.DoRA(rank=2), sx.chain(sx.PiSSA(rank=2), sx.DoRA())], ids=["DoRA", "chain"])
def test_a_column_of_zeros_stays_finite(method):
    params = {"layers": {"proj": {"kernel": base()["layers"]["proj"]["kernel"].at[:, :, 3].set(0.0)}}}
    params, adapters = sx.attach(KEY, params, [("proj", method)])
    merged = kernel(sx.merge(params, adapters))
    assert np.isfinite(merged).all()
    close(applied(params, adapters), merged, 1e-5)
    params, adapters = tuned([("proj", method)], params=params)
    merged = kernel(sx.merge(params, adapters))
    assert np.isfinite(merged).all()
    close(applied(params, adapters), merged, 1e-5)


@pytest.mark.parametrize("share", [0.5, 0.1, 3e-2, 1e-2, 1e-3, 1e-4, 0.0])
def test_a_column_that_nearly_cancels_is_applied_as_it_merges(share):
    """W + s a b shrinks one column to `share` of its length."""
    params, adapters = sx.attach(KEY, base(), [("proj", sx.DoRA(rank=2))])
    (node,) = nodes(adapters).values()
    weight = params["layers"]["proj"]["kernel"]
    a = node.train["a"].at[:, :, 0].set(weight[:, :, 3])
    train = {**node.train, "a": a, "b": jnp.zeros_like(node.train["b"]).at[:, 0, 3].set(share - 1.0)}
    adapters = {"layers": {"proj": {"kernel": sx.Adapter(train, node.frozen, node.method)}}}
    merged = kernel(sx.merge(params, adapters))
    assert np.isfinite(merged).all()
    # Beside the direction of the column, what is left of it is known to the rounding of W.
    np.testing.assert_allclose(applied(params, adapters), merged, rtol=0, atol=2e-3 * np.abs(merged).max())
    if share >= 1e-2:
        lengths = np.linalg.norm(merged[:, :, 3], axis=1)
        np.testing.assert_allclose(lengths, node.train["m"][:, 3], rtol=2e-3)


@pytest.mark.parametrize(
    "method",
    [Masked(sx.DoRA(rank=2)), Masked(sx.chain(sx.PiSSA(rank=2), sx.DoRA())), sx.chain(sx.OLoRA(rank=2), sx.DoRA())],
    ids=["masked", "masked chain", "chain"],
)
def test_rebase_reaches_the_parts_of_a_composed_method(method):
    params, adapters = tuned([sx.Rule("proj", method, layers=(0, 2)), sx.Rule("proj", sx.DoRA(rank=2))])
    quantised = jax.tree.map(quantise, params)
    rebased = sx.rebase(quantised, adapters)
    chex.assert_trees_all_equal_structs(rebased, adapters)
    chex.assert_trees_all_equal(sx.split(rebased)[0], sx.split(adapters)[0])
    (weight,) = jax.tree.leaves(quantised, is_leaf=is_weight)

    def gap(tree):
        (node,) = nodes(tree).values()
        got = jax.jit(jax.vmap(lambda w, n: sx.linear(jnp.eye(IN), w, n)))(weight, node)
        return np.abs(got - kernel(sx.merge(quantised, tree))).max()

    assert gap(rebased) < 2e-5 < 1e-3 < gap(adapters)
    chex.assert_trees_all_equal(sx.rebase(params, rebased), sx.rebase(params, adapters))
    chex.assert_trees_all_equal(sx.rebase(params, adapters), adapters)


def test_a_weight_that_is_trained_itself_cannot_have_what_follows_from_it():
    rules = [sx.Rule("proj", sx.LoRA(rank=2), layers=(0,)), sx.Rule("proj", sx.DoRA(rank=2))]
    params, adapters = sx.attach(KEY, base(), rules)
    with pytest.raises(sx.SboraxError, match="layers/proj/kernel: ByLayer keeps what follows from this weight"):
        take_apart(params, adapters, train_base=True)
    take_apart(*sx.attach(KEY, base(), [("proj", sx.PiSSA(rank=2))]), train_base=True)


def test_what_is_no_tree_of_adapters_is_refused():
    """Adapters in it would be lost without a word: a tree in place of a list of trees, a method, parameters.

    Types are checked in tests alone, so the functions are unwrapped.
    """
    params, adapters = tuned([("proj", sx.SBoRA(rank=2))])
    tree = "expected a tree of adapters, as `attach` and `load_adapter` return, got a"
    mistakes = {
        "top_k=1.5 must be a whole number": lambda: unwrap(sx.arrow)(params, [adapters, adapters], top_k=1.5),
        "arrow: " + tree + " str": lambda: unwrap(sx.arrow)(params, adapters, top_k=1),
        "combine_experts: " + tree + " str": lambda: unwrap(sx.combine_experts)(adapters),
        "add: " + tree + " LoRA": lambda: unwrap(sx.add)(adapters, sx.LoRA()),
        "merge: " + tree: lambda: unwrap(sx.merge)(adapters, params),
        r"merge_weighted: " + tree: lambda: unwrap(sx.merge_weighted)(params, [sx.Weighted(1.0, params)]),
        r"such as \[sx.Weighted\(1.0, adapters\)\]": lambda: unwrap(sx.merge_weighted)(params, [adapters]),
        r"adapters with weights": lambda: unwrap(sx.merge_weighted)(params, sx.Weighted(1.0, adapters)),
    }
    for says, call in mistakes.items():
        with pytest.raises(sx.SboraxError, match=says):
            call()


def test_a_part_without_frozen_leaves_is_read_as_it_was_written(tmp_path):
    """The tree has the same form, so that it can be mapped over together with the one that was saved."""
    part = sx.C3A(block=16)
    rules = [sx.Rule("proj", sx.scale(sx.add(part, part), 0.5), layers=(0, 2)), ("proj", part)]
    _, adapters = tuned(rules)
    sx.save_adapter(tmp_path, adapters)
    _, copy = sx.load_adapter(tmp_path, base())
    chex.assert_trees_all_equal(copy, adapters)
    assert jax.tree.structure(copy) == jax.tree.structure(adapters)
