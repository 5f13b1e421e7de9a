"""Weights and gradients that are not finite are refused by name, before a decomposition spins or a scale spoils all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import by_case, normal
from cases import IN, LAYERS, OUT, Case, hint_for

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.adapters.weight import check_finite
from sborax.models.nf4 import NF4Array, quantise, quantise_numpy
from sborax.records.adapter import load_adapter, save_adapter
from sborax.train.base import adapt, quantise_base

pytestmark = pytest.mark.usefixtures("strict")

KERNEL = normal(1, LAYERS, IN, OUT)
SPOILT = [np.nan, np.inf, -np.inf]
WHERE = "layers/proj/kernel"


def spoilt(value: float, dtype="float32"):
    weight = KERNEL.copy()
    weight[1, 5, 7] = value
    return jnp.asarray(weight, dtype)


def tree(weight):
    return {"layers": {"proj": {"kernel": weight}}}


def hints(case: Case, grad=KERNEL):
    return {"layers/proj": hint_for(case.method, grad, 1)} if case.method.needs else None


@pytest.mark.parametrize("value", SPOILT[:2])
@by_case
def test_attach_names_the_kernel(case: Case, value):
    """A decomposition of an infinite value would never end."""
    with pytest.raises(sx.SboraxError, match=rf"^{WHERE}: holds values that are not finite"):
        sx.attach(jax.random.key(0), tree(spoilt(value)), [("proj", case.method)], hints(case))


@pytest.mark.parametrize("grad", [np.asarray, jnp.asarray], ids=["host", "device"])
@by_case
def test_attach_names_the_gradient(case: Case, grad):
    if "grad" in case.method.needs:
        site_hints = hints(case, grad(np.asarray(spoilt(np.nan))))
        with pytest.raises(sx.SboraxError, match=rf"^{WHERE}: its gradient: holds values that are not finite"):
            sx.attach(jax.random.key(0), tree(jnp.asarray(KERNEL)), [("proj", case.method)], site_hints)


@by_case
def test_attach_names_the_statistics_of_inputs(case: Case):
    if "inputs" in case.method.needs:
        (hint,) = hints(case).values()
        wrong = {name: np.full_like(leaf, np.nan) for name, leaf in hint.inputs.items()}
        site_hints = {"layers/proj": sx.Hint(grad=KERNEL, inputs=wrong)}
        with pytest.raises(sx.SboraxError, match=rf"^{WHERE}: the statistics of its inputs: holds values that are not"):
            sx.attach(jax.random.key(0), tree(jnp.asarray(KERNEL)), [("proj", case.method)], site_hints)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", SPOILT)
def test_nf4_refuses_what_would_spoil_the_whole_weight(value, dtype):
    for route in (quantise, lambda weight: quantise_numpy(np.asarray(weight))):
        with pytest.raises(sx.SboraxError, match=r"a weight of shape .* holds values that are not finite"):
            route(spoilt(value, dtype))
    params = {"layers": {"mlp": {"kernel": spoilt(value, dtype)}, **tree(jnp.asarray(KERNEL))["layers"]}}
    with pytest.raises(sx.SboraxError, match=r"^quant: layers/mlp/kernel: .* not finite"):
        quantise_base(params, "nf4")
    for method in (sx.LoRA(2), sx.PiSSA(2)):
        plan = sx.plan(tree(spoilt(value, dtype)), [("proj", method)])
        with pytest.raises(sx.SboraxError, match=rf"{WHERE}: .*not finite"):
            adapt(jax.random.key(0), tree(spoilt(value, dtype)), plan, "nf4")


def test_a_4_bit_weight_with_a_spoilt_scale_is_named():
    weight = quantise(jnp.asarray(KERNEL))
    weight = NF4Array(weight.codes, weight.absmax, weight.nested, weight.offset.at[1].set(jnp.nan), dtype=weight.dtype)
    with pytest.raises(sx.SboraxError, match=rf"^{WHERE}: holds values that are not finite"):
        sx.attach(jax.random.key(0), tree(weight), [("proj", sx.LoRA(2))])


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_a_base_is_not_rewritten_by_leaves_that_are_not_finite(quantised, tmp_path):
    params = tree(quantise(jnp.asarray(KERNEL)) if quantised else jnp.asarray(KERNEL))
    _, adapters = sx.attach(jax.random.key(0), params, [("proj", sx.PiSSA(2, niter=1))])
    node = nodes(adapters)[WHERE]
    node.frozen["a0"] = node.frozen["a0"].at[0, 0, 0].set(jnp.inf)
    save_adapter(tmp_path, adapters)
    with pytest.raises(sx.SboraxError, match=rf"{WHERE}/frozen/a0 is not finite"):
        load_adapter(tmp_path, params)


def test_a_rank_policy_reads_finite_weights_alone():
    rules = [("proj", sx.LoRA(rank=sx.SingularMass(0.5)))]
    with pytest.raises(sx.SboraxError, match="^layers/proj: holds values that are not finite"):
        sx.plan(tree(spoilt(np.inf)), rules)


def test_shapes_alone_are_planned_without_values():
    rules = [("proj", sx.PiSSA(2))]
    shapes = jax.eval_shape(lambda weight: sx.attach(jax.random.key(0), tree(weight), rules), jnp.asarray(KERNEL))
    assert jax.tree.leaves(shapes)
    assert jax.eval_shape(quantise, jnp.asarray(KERNEL)).shape == KERNEL.shape
    # What a trace closes over is no shape alone.
    for value, problem in [(1.0, None), (np.nan, "not finite")]:
        kernel = spoilt(value)
        if problem is None:
            jax.eval_shape(lambda kernel=kernel: sx.attach(jax.random.key(0), tree(kernel), rules))
            continue
        with pytest.raises(sx.SboraxError, match=problem):
            jax.eval_shape(lambda kernel=kernel: sx.attach(jax.random.key(0), tree(kernel), rules))


def test_arrays_cut_over_devices_are_reduced_where_they_lie():
    mesh = jax.make_mesh((8,), ("fsdp",))
    where = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    check_finite("kernel", jax.device_put(KERNEL, where))
    with pytest.raises(sx.SboraxError, match="^kernel: "):
        check_finite("kernel", jax.device_put(spoilt(np.nan), where))
