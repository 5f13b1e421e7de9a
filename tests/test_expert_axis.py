"""A mesh with an axis for experts: results are those of one device, and each row is multiplied on one device."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import assert_close, largest, linear, normal, standalone, trained
from cases import IN, METHODS, OUT, Case, context_for, hint_for
from jax.sharding import NamedSharding, PartitionSpec
from tiny_model import WIDE

import sborax as sx
from sborax.adapters import grouped_matmul
from sborax.adapters.constraints import ROWS
from sborax.adapters.core import is_weight
from sborax.adapters.leaves import nest
from sborax.adapters.tree import nodes
from sborax.layout.mesh import make_mesh
from sborax.layout.sharding import Layout
from sborax.layout.state import take_apart
from sborax.models import LanguageModel, Llama
from sborax.models.config import Experts
from sborax.models.mixture import Mixture, Projection, mixed
from sborax.models.nf4 import quantise
from sborax.models.sharding import base_specs, quantised_specs
from sborax.plans.hlo import collective_bytes, matmul_flops

COUNT, CHOSEN, TOKENS = 8, 2, 16
SPARSE = dataclasses.replace(
    WIDE,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    vocab_size=64,
    model_type="mixtral",
    experts=Experts(count=COUNT, chosen=CHOSEN, intermediate_size=64, shared_size=64),
)
ON_EXPERTS = [case for case in METHODS if not (case.method.linked or case.method.token_mean)]
RULES = [
    ("experts/gate_proj", sx.LoRA(rank=4)),
    ("experts/up_proj", sx.SBoRA(rank=4)),
    ("experts/down_proj", sx.LoRA(rank=2)),
    ("q_proj", sx.LoRA(rank=4)),
]


# A model


def gradients(sizes):
    """The losses of a batch and the gradients of adapters, router and norms. gate_proj is in 4 bits."""
    model, rng = LanguageModel(Llama(SPARSE, jnp.dtype("float32")), {}, SPARSE, None), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), model.abstract())
    gate = params["layers"]["mlp"]["experts"]["gate_proj"]
    gate["kernel"] = quantise(gate["kernel"])
    params, adapters = sx.attach(jax.random.key(0), params, RULES)
    train, frozen = sx.split(adapters)
    train = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), train)
    layout = Layout.of(sizes, 8)
    parts = layout.place(take_apart(params, sx.combine(train, frozen), train_also=["norm", "router"]), SPARSE)
    tokens = rng.integers(0, SPARSE.vocab_size, (1, 8, 8)).astype(np.int32)
    counts = rng.random(tokens.shape) < 0.7
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 2), "counts": counts, "segments": np.ones_like(tokens)}
    with layout.context():
        call = jax.jit(functools.partial(sx.forward_backward, model))
        sums, grads = call(parts.train, parts.frozen, parts.base, layout.batch(batch), jax.random.key(1))
    return jax.device_get((sums.losses, grads)), parts


alone = functools.cache(lambda: gradients(None)[0])


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"expert": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_model_on_an_axis_of_experts_is_one_on_one_device(sizes):
    (losses, grads), parts = gradients(sizes)
    expected, slopes = alone()
    chex.assert_trees_all_close(losses, expected, rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(slopes), strict=True):
        assert largest(theirs) > 0
        assert_close(mine, theirs, 1e-5)
    # Experts are cut along their axis, and what is not an expert is cut over all devices that have its features.
    for leaf in jax.tree.leaves((parts.base["layers/mlp/experts/gate_proj/kernel"], nodes(parts.adapters))):
        parted = leaf.shape[0] * leaf.shape[1] // np.prod(leaf.sharding.shard_shape(leaf.shape)[:2])
        assert leaf.shape[1] != COUNT or parted == sizes["expert"]
    query = parts.base["layers/self_attn/q_proj/kernel"]
    assert query.size == 8 * np.prod(query.sharding.shard_shape(query.shape))


@pytest.mark.parametrize(
    ("sizes", "config", "message"),
    [
        ({"expert": 2}, WIDE, "^mesh: expert = 2, but llama has no experts; use fsdp or data$"),
        (
            {"expert": 8},
            dataclasses.replace(SPARSE, experts=Experts(count=12, chosen=2, intermediate_size=64)),
            "^mesh: num_experts = 12 is not divisible by expert = 8$",
        ),
    ],
)
def test_a_mesh_whose_experts_cannot_be_divided(sizes, config, message):
    shapes = LanguageModel(Llama(config), {}, config, None).abstract()
    with pytest.raises(sx.SboraxError, match=message):
        Layout.of(sizes, 8).of_params(config, shapes)


def test_rows_of_a_batch_are_cut_over_experts_too():
    with pytest.raises(sx.SboraxError, match="6 rows are not divisible by data x fsdp x expert = 4 of the mesh"):
        Layout.of({"data": 2, "expert": 2}, 6)


# A mixture


def a_mixture(method=None, quantised=False, layers=()):
    """gate and up (IN, OUT) with adapters of `method`, and down (OUT, IN), of COUNT experts."""
    projections = {}
    for seed, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        sides = (OUT, IN) if name == "down_proj" else (IN, OUT)
        kernel, node = jnp.asarray(np.float32(0.3) * normal(seed, *layers, COUNT, *sides)), None
        if name != "down_proj":
            kernel = quantise(kernel) if quantised else kernel
        if method is not None and name != "down_proj":
            path = f"layers/experts/{name}" if layers else f"experts/{name}"
            hints = (
                {path: hint_for(method, jnp.asarray(normal(seed + 3, *kernel.shape)), len(kernel.shape) - 2)}
                if method.needs
                else None
            )
            params = nest({f"{path}/kernel": kernel})
            params, adapters = sx.attach(jax.random.key(seed), params, [("experts", method)], hints)
            (kernel,) = jax.tree.leaves(params, is_leaf=is_weight)
            node = trained(standalone(adapters), seed)
        projections[name] = Projection(kernel, node, None, f"experts/{name}")
    return projections


@functools.cache
def routed():
    """Tokens, their weights and their experts: the last expert has none, and the first one every third token."""
    rng = np.random.default_rng(7)
    probabilities = rng.random((TOKENS, COUNT)).astype(np.float32)
    probabilities[::3, 0] += 1
    probabilities[:, -1] = 0
    weights, numbers = jax.lax.top_k(jnp.asarray(probabilities), CHOSEN)
    return jnp.asarray(normal(8, TOKENS, IN)), weights, numbers


def by_expert(x, weights, numbers, projections):
    """What a loop over experts computes, each of all tokens."""
    y = jnp.zeros_like(x)
    for expert in range(COUNT):
        matrices, adapters = jax.tree.map(
            lambda leaf, expert=expert: leaf[expert],
            ({name: p.kernel for name, p in projections.items()}, {name: p.adapter for name, p in projections.items()}),
        )

        def call(name, x, matrices=matrices, adapters=adapters):
            node = adapters[name]
            return sx.linear(x, matrices[name]) if node is None else linear(x, matrices[name], node)

        share = jnp.sum(jnp.where(numbers == expert, weights, 0), axis=1, keepdims=True)
        out = call("down_proj", jax.nn.silu(call("gate_proj", x)) * call("up_proj", x))
        y = y + jnp.broadcast_to(share, x.shape) * out
    return y


def together(x, weights, numbers, projections):
    return mixed(x, weights, numbers, context(x, projections), projections, Mixture(jax.nn.silu, False))[0]


def context(x, projections):
    """What the adapters of projections read beside `x`."""
    return context_for((leaf.adapter.method for leaf in projections.values() if leaf.adapter), x)


def with_gradients(form, projections, tokens=TOKENS):
    x, weights, numbers = (leaf[:tokens] for leaf in routed())
    trees = {name: leaf.adapter.train for name, leaf in projections.items() if leaf.adapter}

    def loss(x, weights, trees):
        tuned = {
            name: dataclasses.replace(leaf, adapter=dataclasses.replace(leaf.adapter, train=trees[name]))
            if leaf.adapter
            else leaf
            for name, leaf in projections.items()
        }
        y = form(x, weights, numbers, tuned)
        return jnp.sum(y * normal(9, TOKENS, IN)[:tokens]), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, weights, trees)
    return jax.device_get((y, grads))


@pytest.mark.parametrize("tokens", [3, 4])
def test_tokens_that_devices_do_not_divide(tokens):
    """As when text is generated: devices along an axis that does not divide them have the same tokens."""
    projections = a_mixture(sx.LoRA(rank=4))
    expected = with_gradients(by_expert, projections, tokens)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        got = with_gradients(together, projections, tokens)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(mine, theirs, 1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("quantised", [False, True], ids=["f32", "nf4"])
@pytest.mark.parametrize("case", ON_EXPERTS, ids=lambda case: case.name)
def test_a_method_on_an_axis_of_experts_is_a_loop_over_experts(case: Case, quantised, strict):
    projections = a_mixture(case.method, quantised)
    expected = with_gradients(by_expert, projections)
    with jax.set_mesh(make_mesh({"expert": 8})):
        got = with_gradients(together, projections)
    if case.method.batch_gradient:
        # The loop hands every expert all tokens.
        got, expected = ((y, grads[:2]) for y, grads in (got, expected))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # Without a key, leaves of draws alone have no gradient.
        assert largest(theirs) > 0 or case.method.draws
        assert_close(mine, theirs, 1e-5)


# What is sent, and what is computed

LAYERS, SIZES = 3, {"data": 2, "expert": 2, "fsdp": 2}


def compiled_layers(sizes, quantised, method=sx.LoRA(rank=4), tokens=256, form=together):
    """The program of the gradients of LAYERS mixtures in turn, and the shapes of their projections."""
    mesh = make_mesh(sizes)
    projections = a_mixture(method, quantised, (LAYERS,))
    rows = NamedSharding(mesh, PartitionSpec(ROWS))

    def shaped(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def placed(name, projection):
        kernel, path = projection.kernel, f"layers/mlp/experts/{name}/kernel"
        (spec,) = jax.tree.leaves(base_specs(nest({path: kernel}), mesh.shape))
        kernel = jax.tree.map(shaped, kernel, quantised_specs(kernel, spec) if is_weight(kernel) else spec)
        adapter = jax.tree.map(lambda leaf: shaped(leaf, PartitionSpec(None, "expert")), projection.adapter)
        return dataclasses.replace(projection, kernel=kernel, adapter=adapter)

    projections = {name: placed(name, leaf) for name, leaf in projections.items()}
    trees = {name: leaf.adapter.train for name, leaf in projections.items() if leaf.adapter}

    def loss(x, trees, weights, numbers, projections):
        tuned = {
            name: dataclasses.replace(leaf, adapter=dataclasses.replace(leaf.adapter, train=trees[name]))
            if leaf.adapter
            else leaf
            for name, leaf in projections.items()
        }
        y, _ = jax.lax.scan(lambda x, layer: (x + form(x, weights, numbers, layer), None), x, tuned)
        return jnp.sum(jax.lax.with_sharding_constraint(y, rows))

    arguments = [
        jax.ShapeDtypeStruct((tokens, *shape), dtype, sharding=rows)
        for shape, dtype in (((IN,), jnp.float32), ((CHOSEN,), jnp.float32), ((CHOSEN,), jnp.int32))
    ]
    where = (rows, jax.tree.map(lambda leaf: leaf.sharding, trees))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, (0, 1)), out_shardings=where)
        return program.lower(arguments[0], trees, *arguments[1:], projections).compile(), projections


def leaf_bytes(tree, parts):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) // parts


@pytest.mark.parametrize("quantised", [False, True], ids=["f32", "nf4"])
def test_a_mixture_sends_its_tokens_its_kernels_as_stored_and_its_gradients(quantised):
    program, projections = compiled_layers(SIZES, quantised)
    sent = collective_bytes(program.as_text())
    features, choices = 4 * IN * 256 // 8, 4 * CHOSEN * 256 // 8
    matrices = [leaf for leaf in jax.tree.leaves([p.kernel for p in projections.values()]) if leaf.ndim == 4]
    # Of each layer the tokens, the slopes of its outputs, and kernels twice; once weights and numbers, which all layers
    # have in common here.
    gathered = LAYERS * 2 * 2 * features + 2 * 2 * choices + 2 * leaf_bytes(matrices, 2)
    # Outputs, and the slopes of tokens.
    scattered = LAYERS * 2 * features
    trained_leaves = leaf_bytes([p.adapter.train for p in projections.values() if p.adapter], 2)
    assert sent == {"all-gather": gathered, "reduce-scatter": scattered, "all-reduce": trained_leaves}


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"expert": 2, "fsdp": 4}, {"data": 8}], ids=str)
def test_at_balanced_load_each_row_is_multiplied_once(sizes, monkeypatch):
    """FLOPs of the compiled program, with as many turns of the loops over tiles as were counted in a call."""
    tokens, turns = 512, []

    def counted(sizes, tile, tiles=grouped_matmul.tiles):
        total, place = tiles(sizes, tile)
        jax.debug.callback(lambda number: turns.append(int(number)), total)
        return total, place

    monkeypatch.setattr(grouped_matmul, "tiles", counted)
    projections = a_mixture()
    x = jnp.asarray(normal(8, tokens, IN))
    numbers = jnp.arange(tokens * CHOSEN, dtype=jnp.int32).reshape(tokens, CHOSEN) % COUNT
    mesh = make_mesh(sizes)
    x, weights, numbers = (
        jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(ROWS)))
        for leaf in (x, jnp.full(numbers.shape, 0.5, jnp.float32), numbers)
    )

    def loss(x, projections):
        return jnp.sum(together(x, weights, numbers, projections))

    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss)).lower(x, projections).compile()
        jax.block_until_ready(program(x, projections))
    jax.effects_barrier()
    # Three products, and those with their transposes, whose number of tiles is the same everywhere.
    assert len(set(turns)) == 1 and len(turns) >= 6 * 8
    least = 6 * 2 * IN * OUT * tokens * CHOSEN // 8
    counted_flops = matmul_flops(program.as_text(), turns[0])
    assert least <= counted_flops <= 1.1 * least, counted_flops / least
