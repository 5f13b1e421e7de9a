"""The contract that every method keeps, on bare kernels: one row of `cases.METHODS` is one method."""

import bisect
import dataclasses
import json
import math
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bare_kernels import (
    SETTINGS,
    assert_close,
    base,
    by_few,
    fitted,
    forward,
    hints,
    host,
    inputs,
    lapack_batches,
    largest,
    linear,
    merged,
    normal,
    padding,
    projected,
    standalone,
    tolerance,
    trained,
)
from cases import FEW, FIRST, IN, LAYERS, METHODS, OUT, TOKENS, Case, hint_for, hint_of_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import Jaxpr, Var, jaxprs_in_params
from nightly import nightly_unless

import sborax as sx
from sborax.adapters.bank import link
from sborax.adapters.core import AbstractMethod, Adapter, dense, pair_of, structure
from sborax.adapters.paths import kernels
from sborax.adapters.tree import nodes, over_stack, stack_of
from sborax.config import codec as config
from sborax.records.adapter import check_leaves, read_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("strict")

by_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.quick] if case in FEW else [pytest.mark.nightly] * (case not in FIRST),
        )
        for case in METHODS
    ],
)
# Every dtype, stack and base is in one of these. All rows take the first; the nightly run takes all six.
SOME = (1, 2, 5)
by_setting = pytest.mark.parametrize(
    ("case", "dtype", "stacked", "quantised"),
    [
        pytest.param(
            case,
            *setting.values,
            id=f"{case.name}-{setting.id}",
            marks=(
                [pytest.mark.quick]
                if case in FEW and number in SOME
                else [pytest.mark.nightly]
                * (number not in SOME or case not in FEW and number != SOME[0] or case not in FIRST)
            ),
        )
        for case in METHODS
        for number, setting in enumerate(SETTINGS)
    ],
)


@by_case
def test_a_pair_is_declared_where_the_change_is_that_of_its_factors(case: Case):
    weight, node = fitted(case.method)
    declared = getattr(case.method, "pair", False)
    if case.method.no_merge or case.method.linked or set(node.train) != {"a", "b"} or "scale" not in node.frozen:
        assert not declared
        return
    tuned = trained(node)
    scale, a, b = pair_of(tuned)
    if a.shape[-2] != weight.shape[-2]:
        assert not declared
        return
    expected = weight + jnp.matmul(scale[:, None, None] * a, b, precision="highest")
    assert declared == bool(jnp.allclose(merged(weight, tuned), expected, rtol=0, atol=1e-5 * largest(expected)))


@by_setting
def test_identity_at_init(case: Case, dtype, stacked, quantised):
    original = dense(base(dtype, stacked, quantised))
    weight, node = fitted(case.method, dtype, stacked, quantised)
    if case.method.rewrites_base and quantised:
        # The residual is quantised again: what it loses is its own rounding error, bounded by the base's.
        assert largest(host(merged(weight, node)) - host(original)) < 0.35 * largest(original)
        return
    if case.method.no_merge:
        x = inputs(dtype)
        plain = np.einsum("ti,...io->...to", host(x), host(dense(weight)))
        assert_close(forward(x, weight, node), plain, tolerance(dtype))
        return
    change = largest(host(merged(weight, node)) - host(original))
    if case.method.identity_at_init:
        assert change <= tolerance(dtype) * largest(original)
    else:
        assert change > 0


@by_setting
def test_factored_equals_merged_with_random_leaves(case: Case, dtype, stacked, quantised):
    weight, node = fitted(case.method, dtype, stacked, quantised)
    node, x = trained(node), inputs(dtype)
    factored = forward(x, weight, node)
    assert factored.dtype == x.dtype
    if case.method.no_merge:
        with pytest.raises(sx.SboraxError, match="cannot be merged"):
            sx.merge({"layers": {"proj": {"kernel": weight}}}, {"layers": {"proj": {"kernel": node}}})
        return
    dense_weight = merged(weight, node)
    assert dense_weight.dtype == jnp.float32
    assert_close(factored, host(x) @ host(dense_weight), tolerance(dtype))
    assert largest(host(dense_weight) - host(dense(weight))) > 1e-3, (
        "the random leaves changed nothing: the comparison proves nothing"
    )


SMALL = 3e-3
"""A change of the outputs, relative to them: less than half a step of bfloat16 above 1, more than half of one below."""


@by_case
def test_a_small_change_is_the_same_applied_in_half_precision_and_merged(case: Case):
    """A factor near 1 that is rounded before it is used stays 1, and the model as it is, until it has moved far."""
    if case.method.no_merge or case.method.linked:
        return
    weight, start = fitted(case.method, "bfloat16", stacked=False)
    x = jnp.asarray(normal(4, 64, IN), "bfloat16")
    base_weight, before = host(merged(weight, start)), host(forward(x, weight, start))
    leaves, treedef = jax.tree.flatten(start.train)
    live = jax.tree.leaves(padding(start))
    for number, leaf in enumerate(leaves):
        # All entries move the same way, and not quite alike: equal ones may change nothing.
        direction = (np.float32(1.0) + np.float32(0.1) * normal(number, *leaf.shape)) * live[number]

        def moved(step: float, number=number, direction=direction) -> Adapter:
            values = [*leaves[:number], leaves[number] + np.float32(step) * direction, *leaves[number + 1 :]]
            return dataclasses.replace(start, train=jax.tree.unflatten(treedef, values))

        def change(step: float, moved=moved) -> np.ndarray:
            return host(x) @ (host(merged(weight, moved(step))) - base_weight)

        steps = [2.0 ** (k / 16) for k in range(-320, 1)]
        size = SMALL * np.linalg.norm(before)
        number_of_step = bisect.bisect(steps, size, key=lambda step: np.linalg.norm(change(step)))
        if number_of_step == len(steps):
            continue  # Beside starts of the other leaves, this one changes little or nothing.
        step = steps[number_of_step - 1]
        expected, got = change(step), host(forward(x, weight, moved(step))) - before
        share = np.sum(got * expected) / np.sum(expected**2)
        assert 0.7 < share < 1.3, f"{share:.2f} of the change is applied"


@by_case
def test_no_tokens_give_no_outputs(case: Case):
    (weight, node), x = fitted(case.method), inputs()[:0]
    over = over_stack(lambda w, n: linear(x, w, n), stack_of(node))
    assert jax.eval_shape(over, weight, node).shape == (LAYERS, 0, OUT)


@by_case
def test_leaves_have_32_bits_where_jax_computes_with_64(case: Case):
    params, hint = {"layers": {"proj": {"kernel": base("float32", True, False)}}}, hints(case.method, True)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        key = jax.random.key(0)
        _, adapters = jax.eval_shape(lambda key: sx.attach(key, params, [("proj", case.method)], hint), key)
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(adapters)} == {4}


@by_case
def test_lapack_gets_one_matrix_at_a_time(case: Case):
    """Batches can keep a program on a CPU from ending, see `adapters.linalg`. Here: layers, keys and members."""
    (weight, node), x, hint = fitted(case.method), inputs(), hints(case.method, True)
    params = {"layers": {"proj": {"kernel": weight}}}
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), trained(node).train)

    def start(key):
        return sx.attach(key, params, [("proj", case.method)], hint)

    def loss(train):
        tuned = dataclasses.replace(node, train=train)
        return jnp.sum(over_stack(lambda w, n: linear(x, w, n), stack_of(node))(weight, tuned) ** 2)

    for function, argument in ((start, jax.random.split(jax.random.key(0))), (jax.grad(loss), members)):
        assert not lapack_batches(jax.jit(jax.vmap(function)).lower(argument))[0]


def depends_on(jaxpr: Jaxpr, tainted: set[Var]) -> bool:
    """Whether a value of the size of a weight depends on the tainted inputs, sub-programs included."""
    for eqn in jaxpr.eqns:
        touched = [isinstance(v, Var) and v in tainted for v in eqn.invars]
        if not any(touched):
            continue
        # A barrier hands each operand on as it is.
        handed = touched if eqn.primitive is jax.lax.optimization_barrier_p else [True] * len(eqn.outvars)
        tainted.update(out for out, hit in zip(eqn.outvars, handed, strict=True) if hit)
        # A value with a token axis is an activation, whatever its size.
        sizes = [math.prod(out.aval.shape) for out in eqn.outvars if out in tainted]
        if any(size >= IN * OUT and size % TOKENS for size in sizes):
            return True
        for sub in jaxprs_in_params(eqn.params):
            inner = {v for v, hit in zip(sub.invars[::-1], touched[::-1], strict=False) if hit}
            if depends_on(sub, inner):
                return True
    return False


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@by_case
def test_never_materialises_a_weight(case: Case, quantised):
    weight, node = fitted(case.method, "float32", False, quantised)
    x = inputs()

    def loss(train):
        return linear(x, weight, Adapter(train, node.frozen, node.method)).sum()

    closed = jax.make_jaxpr(jax.grad(loss))(node.train)
    dependence = depends_on(closed.jaxpr, set(closed.jaxpr.invars))
    assert dependence == bool(case.method.materialises)


def loss_of(train, frozen, weight, x):
    """With a key, as in training: leaves that only shape what is drawn are trained, too."""
    node, key = sx.combine(train, frozen), jax.random.key(8)
    y = over_stack(lambda w, n: linear(x, w, n, key), stack_of(node))(weight, node)
    return jnp.mean(jnp.square(y - 1.0))


@by_case
def test_one_step_moves_the_trained_leaves_alone(case: Case):
    weight, node = fitted(case.method)
    node = trained(node)
    train, frozen = sx.split(node)
    tx = optax.adam(1e-2)
    grads = jax.jit(jax.grad(loss_of))(train, frozen, weight, inputs())
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert largest(grad) > 0, f"dead leaf {jax.tree_util.keystr(path)}"
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(train)
        updates, _ = tx.update(grads, state, train)
        final = optax.apply_updates(train, updates)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sum(leaf.size for leaf in floats) == 2 * sum(leaf.size for leaf in jax.tree.leaves(train))
    chex.assert_trees_all_equal_shapes_and_dtypes(train, final)
    for start, end, live in zip(
        jax.tree.leaves(train), jax.tree.leaves(final), jax.tree.leaves(padding(node)), strict=True
    ):
        assert not np.array_equal(start, end)
        assert not np.any(np.asarray(end)[np.asarray(live) == 0]), "padding left zero"


@pytest.mark.parametrize(
    "case",
    nightly_unless([METHODS[0], *(case for case in METHODS if case.method.draws)], METHODS),
    ids=lambda case: case.name,
)
def test_only_what_draws_depends_on_the_key(case: Case):
    weight, node = fitted(case.method, stacked=False)
    node, x = trained(node), inputs()
    run = jax.jit(lambda key: linear(x, weight, node, key))
    first, repeat, second = (host(run(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, repeat)
    assert (largest(first - second) > 1e-3) == bool(case.method.draws)
    if not case.method.draws:
        assert_close(first, forward(x, weight, node), 1e-5)


@by_few
def test_masked_combined_tree_trains_like_the_train_tree(case: Case):
    weight, node = fitted(case.method)
    node = trained(node)
    x = inputs()
    train, frozen = sx.split(node)
    variables = {"base": weight, "adapters": node}

    def combined_loss(tree):
        return loss_of(*sx.split(tree["adapters"]), tree["base"], x)

    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    tx = optax.partition({"train": inner, "freeze": optax.set_to_zero()}, sx.labels(variables))
    alone, masked = train, variables
    with jax.numpy_dtype_promotion("standard"):
        state_alone, state_masked = inner.init(alone), tx.init(masked)

        @jax.jit
        def step(alone, state_alone, masked, state_masked):
            updates, state_alone = inner.update(jax.grad(loss_of)(alone, frozen, weight, x), state_alone, alone)
            value, grads = sx.value_and_grad(combined_loss)(masked)
            chex.assert_trees_all_equal_shapes_and_dtypes(grads, masked)
            deltas, state_masked = tx.update(grads, state_masked, masked)
            return optax.apply_updates(alone, updates), state_alone, optax.apply_updates(masked, deltas), state_masked

        for _ in range(2):
            alone, state_alone, masked, state_masked = step(alone, state_alone, masked, state_masked)
    got, frozen_leaves = sx.split(masked["adapters"])
    chex.assert_trees_all_close(got, alone, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(frozen_leaves, frozen)
    chex.assert_trees_all_equal(masked["base"], weight)
    assert jax.tree.leaves(sx.trainable(variables)).count(True) == len(jax.tree.leaves(train))


@by_case
def test_stack_equals_its_layers(case: Case):
    weight, node = fitted(case.method)
    if isinstance(node.method.rank, tuple):
        pytest.fail("ragged methods are compared in their own test")
    flat = {"layers": {str(i): {"proj": {"kernel": base()[i]}} for i in range(LAYERS)}}
    source = hints(case.method, True)
    hint = {f"layers/{i}/proj": hint_of_layer(source["layers/proj"], i) for i in range(LAYERS)} if source else None
    params, adapters = sx.attach(jax.random.key(0), flat, [("proj", case.method)], hint)
    singles = link(nodes(adapters))
    assert list(singles) == [f"layers/{i}/proj/kernel" for i in range(LAYERS)]
    for i, single in enumerate(singles.values()):
        sliced = jax.tree.map(lambda leaf, i=i: leaf[i], node)
        chex.assert_trees_all_close(sx.split(single), sx.split(sliced), rtol=1e-5, atol=1e-5)
        kernel = params["layers"][str(i)]["proj"]["kernel"]
        y = projected(inputs(), kernel, single)
        assert_close(y, forward(inputs(), weight, node)[i], 2e-5)


@by_case
def test_adding_a_rule_leaves_other_adapters_alone(case: Case):
    kernel = base()
    params = {"layers": {"proj": {"kernel": kernel}, "other": {"kernel": kernel}}}
    hint = hints(case.method, True)
    all_hints = {**hint, "layers/other": hint["layers/proj"]} if hint else None
    _, first = sx.attach(jax.random.key(0), params, [("proj", case.method)], all_hints)
    _, second = sx.attach(jax.random.key(0), params, [("other", case.method), ("proj", case.method)], all_hints)
    chex.assert_trees_all_equal(first["layers"]["proj"], second["layers"]["proj"])


@by_few
def test_second_step_compiles_nothing(case: Case):
    weight, node = fitted(case.method)
    train, frozen = sx.split(node)
    x = inputs()

    @jax.jit
    def step(train, frozen):
        return jax.tree.map(lambda p, g: p - 0.1 * g, train, jax.grad(loss_of)(train, frozen, weight, x))

    result = step(train, frozen)
    chex.assert_trees_all_equal_structs(train, result)
    step(result, frozen)
    assert step._cache_size() == 1


@by_case
def test_count_is_the_closed_form(case: Case):
    stacked, flat = {"proj": {"kernel": base()}}, {"0": {"proj": {"kernel": base()[0]}}}
    for layers, weights in (stacked, LAYERS), (flat, 1):
        params = {"layers": layers}
        hints = {
            path.removesuffix("/kernel"): hint_for(case.method, leaf, leaf.ndim - 2)
            for path, leaf in kernels(params).items()
        }
        _, adapters = sx.attach(
            jax.random.key(0), params, [("proj", case.method)], hints if case.method.needs else None
        )
        assert sx.count(adapters) == weights * case.count(IN, OUT) + case.shared(IN, OUT)


@by_case
def test_config_round_trip(case: Case):
    encoding = json.loads(json.dumps(config.encode(case.method)))
    assert config.decode(AbstractMethod, encoding) == case.method
    assert hash(structure(case.method)) == hash(fitted(case.method)[1].method)


@by_case
def test_every_counted_parameter_has_a_gradient(case: Case):
    """On sides that divide little: rows without inputs, or gates without a choice, would be counted and never train."""
    kernel = jnp.asarray(normal(5, 10, 12))
    params = {"proj": {"kernel": kernel}}
    grad = {"proj": hint_for(case.method, kernel, 0)} if case.method.needs else None
    try:
        sx.plan(params, [("proj", case.method)], hints=grad)
    except sx.SboraxError as error:
        assert "\n" not in str(error)
        return
    params, adapters = sx.attach(jax.random.key(0), params, [("proj", case.method)], grad)
    node = standalone(adapters)
    # Not the frozen half that `trained` returns: what it masks has no gradient.
    train, frozen = sx.split(trained(node))[0], sx.split(node)[1]
    gradient = jax.grad(loss_of)(train, frozen, params["proj"]["kernel"], jnp.asarray(normal(6, 33, 10)))
    live = sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(gradient))
    assert live == sx.count(adapters) == case.count(10, 12) + case.shared(10, 12)


@by_case
def test_hyper_parameters_have_bounds_that_planning_keeps(case: Case):
    """A scale of zero would train nothing, and the first step would blame the model for it."""
    params = {"layers": {"proj": {"kernel": base()}}}
    for field in dataclasses.fields(case.method):
        bound = field.metadata.get("above")
        if bound is not None:
            wrong = dataclasses.replace(case.method, **{field.name: bound})
            with pytest.raises(sx.SboraxError, match=f"{field.name} must be above 0, got 0"):
                sx.plan(params, [("proj", wrong)], hints=hints(case.method, True))
            with pytest.raises(sx.SboraxError, match=f"{field.name} must be above 0, got 0"):
                sx.plan(params, [sx.Rule("proj", wrong, layers=(0,))], hints=hints(case.method, True))
        kinds = typing.get_args(field.type | None)
        wrongs = [(math.nan, "finite"), (math.inf, "finite")] if float in kinds else []
        # A field in which a sign means something says so.
        wrongs += (
            [(-1.0 if float in kinds else -1, "")]
            if {int, float} & {*kinds} and not field.metadata.get("signed")
            else []
        )
        for value, says in wrongs:
            wrong = dataclasses.replace(case.method, **{field.name: value})
            with pytest.raises(sx.SboraxError, match=f"{field.name} must be .*{says}"):
                sx.plan(params, [("proj", wrong)], hints=hints(case.method, True))


@pytest.mark.parametrize(
    ("stacked", "quantised"),
    [
        pytest.param(False, False, id="flat-dense"),
        pytest.param(False, True, id="flat-nf4", marks=pytest.mark.nightly),
        pytest.param(True, False, id="stacked-dense", marks=pytest.mark.nightly),
        pytest.param(True, True, id="stacked-nf4"),
    ],
)
@by_few
def test_many_adapters_over_one_base(case: Case, stacked, quantised):
    """vmap over trained and frozen leaves: each member equals itself alone."""
    weight, first = fitted(case.method, "float32", stacked, quantised)
    params = {"layers": {"proj": {"kernel": base("float32", stacked, quantised)}}}
    if not stacked:
        params = {"layers": {"0": params["layers"]}}
    _, adapters = sx.attach(jax.random.key(1), params, [("proj", case.method)], hints(case.method, stacked))
    second = standalone(adapters)
    members = [trained(first, 3), trained(second, 4)]
    together = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *members)
    x = inputs()
    y = jax.jit(jax.vmap(lambda node: forward(x, weight, node)))(together)
    for i, member in enumerate(members):
        assert_close(y[i], forward(x, weight, member), 1e-5)
    assert not np.array_equal(y[0], y[1])


@by_case
def test_file_round_trip(case: Case, tmp_path):
    weight, node = fitted(case.method)
    adapters = {"layers": {"proj": {"kernel": trained(node)}}}
    save_adapter(tmp_path / "adapter", adapters)
    copy = read_adapter(tmp_path / "adapter").adapters
    chex.assert_trees_all_equal_structs(copy, adapters)
    chex.assert_trees_all_equal(copy, adapters)
    shape = dict(zip(("in", "out"), weight.shape[-2:], strict=True))
    for half in (node.train, node.frozen):
        check_leaves("proj", node.method, node.method.axes, half, shape)


@by_few
def test_unselected_layers_keep_the_base_bit_for_bit(case: Case):
    params = {"layers": {"proj": {"kernel": base()}}}
    rule = sx.Rule("proj", case.method, layers=(0, -1))
    params, adapters = sx.attach(jax.random.key(0), params, [rule], hints(case.method, True))
    node = trained(standalone(adapters))
    weight = params["layers"]["proj"]["kernel"]
    assert sx.count(adapters) == 2 * case.count(IN, OUT) + case.shared(IN, OUT)
    y = forward(inputs(), weight, node)
    x = inputs()
    plain = jax.jit(lambda stack: jax.lax.map(lambda w: sx.linear(x, w), stack))(base())
    chex.assert_trees_all_equal(y[1], plain[1])
    assert not np.array_equal(y[0], plain[0]) and not np.array_equal(y[2], plain[2])
    if not case.method.no_merge:
        dense_weight = sx.merge(params, {"layers": {"proj": {"kernel": node}}})["layers"]["proj"]["kernel"]
        chex.assert_trees_all_equal(dense_weight[1], base()[1])
        assert_close(y, host(inputs()) @ host(dense_weight), 2e-5)


@by_few
@settings(max_examples=5, deadline=None, derandomize=True)
@given(fan_in=st.integers(1, 40), fan_out=st.integers(1, 40))
def test_any_shape_works_or_is_refused_at_planning(case: Case, fan_in, fan_out):
    kernel = jnp.asarray(normal(5, fan_in, fan_out))
    params = {"proj": {"kernel": kernel}}
    hint = {"proj": hint_for(case.method, kernel, 0)} if case.method.needs else None
    try:
        sx.plan(params, [("proj", case.method)], hints=hint)
    except sx.SboraxError as error:
        assert "proj" in str(error) and "\n" not in str(error)
        return
    params, adapters = sx.attach(jax.random.key(0), params, [("proj", case.method)], hint)
    node = trained(standalone(adapters))
    x = jnp.asarray(normal(6, 3, fan_in))
    y = projected(x, params["proj"]["kernel"], node)
    assert sx.count(adapters) == case.count(fan_in, fan_out) + case.shared(fan_in, fan_out)
    if not case.method.no_merge:
        assert_close(y, host(x) @ host(merged(params["proj"]["kernel"], node)), 5e-5)
