"""What a step sends between devices, read from compiled programs: what the base sends, and what a method declares."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from cases import METHODS, context_for, hint_for
from jax.sharding import NamedSharding, PartitionSpec
from tiny_model import WIDE

import sborax as sx
from sborax.adapters.bank import link
from sborax.adapters.constraints import ROWS, mesh_axes
from sborax.adapters.core import linear
from sborax.adapters.leaves import nest
from sborax.adapters.routing import AbstractRouted
from sborax.adapters.tree import nodes, specs
from sborax.layout.mesh import make_mesh
from sborax.models.nf4 import quantise
from sborax.models.sharding import base_specs, quantised_specs, sent_packed, used_whole
from sborax.plans.ahead import compiled, on_mesh, outline
from sborax.plans.hlo import collective_bytes
from sborax.train.step import sums

SIZES = {"fsdp": 2, "tensor": 4}
IN, OUT, ROWS_OF, LENGTH = 256, 384, 16, 12
TOKENS = ROWS_OF * LENGTH // SIZES["fsdp"]
"""Those of one device."""


def shaped(tree, mesh, where):
    def shape(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(shape, tree, where)


def projection(method, module, quant=False):
    """Bytes by kind of y, its gradient in x and those of trained leaves, and the adapter's leaves as they lie."""
    mesh = make_mesh(SIZES)
    spec = PartitionSpec("tensor", "fsdp") if module == "o_proj" else PartitionSpec("fsdp", "tensor")

    hints = {} if method is None else {module: hint_for(method, jnp.ones((IN, OUT)), 0)}

    def build():
        weight = jnp.zeros((IN, OUT))
        params = {module: {"kernel": quantise(weight) if quant else weight}}
        return (params, {}) if method is None else sx.attach(jax.random.key(0), params, [(module, method)], hints)

    params, adapters = jax.eval_shape(build)
    kernel = params[module]["kernel"]
    kernel = shaped(kernel, mesh, quantised_specs(kernel, spec) if quant else spec)
    train, frozen = (shaped(half, mesh, specs(half, {module: {"kernel": spec}})) for half in sx.split(adapters))
    inner, outer = ("tensor", None) if module == "o_proj" else (None, "tensor")
    x, y = (NamedSharding(mesh, PartitionSpec(ROWS, None, axis)) for axis in (inner, outer))

    def program(x_, kernel, train, frozen, slope):
        def forward(x_, train):
            candidates = link(nodes(sx.combine(train, frozen))).values()
            node = next((used_whole(node, module) for node in candidates), None)
            ctx = context_for([] if node is None else [node.method], x_)
            return jax.lax.with_sharding_constraint(linear(x_, sent_packed(kernel, module), node, ctx), y)

        out, pull = jax.vjp(forward, x_, train)
        return out, *pull(slope)

    arguments = (
        jax.ShapeDtypeStruct((ROWS_OF, LENGTH, IN), jnp.float32, sharding=x),
        kernel,
        train,
        frozen,
        jax.ShapeDtypeStruct((ROWS_OF, LENGTH, OUT), jnp.float32, sharding=y),
    )
    results = (y, x, jax.tree.map(lambda leaf: leaf.sharding, train))
    with jax.set_mesh(mesh):
        text = jax.jit(program, out_shardings=results).lower(*arguments).compile().as_text()
    return collective_bytes(text), train, frozen


BASE = {}


def base(module, quant):
    if (module, quant) not in BASE:
        BASE[module, quant] = projection(None, module, quant)[0]
    return BASE[module, quant]


def leaf_bytes(tree, natural=None):
    """Bytes of leaves as a device uses them, and of those among them that lie in smaller parts.

    - natural: specs of the leaves as their kernels are cut; by default as they lie.
    """
    total = gathered = 0
    specs_of = [leaf.sharding.spec for leaf in jax.tree.leaves(tree)]
    for leaf, spec in zip(
        jax.tree.leaves(tree), specs_of if natural is None else jax.tree.leaves(natural), strict=True
    ):
        shared = any("tensor" in mesh_axes(entry) for entry in spec)
        size = leaf.size * leaf.dtype.itemsize // (SIZES["tensor"] if shared else 1)
        total += size
        if math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize < size:
            gathered += size
    return total, gathered


def declared(method, train, frozen):
    """Gradients summed over rows, thin values summed over devices that share a projection, leaves put together."""
    gradients, gathered = leaf_bytes(train)
    # What the base was rewritten by is kept, and not used.
    read = [{k: v for k, v in node.frozen.items() if k not in ("a0", "b0")} for node in nodes(frozen).values()]
    return gradients + 4 * TOKENS * method.summed, gathered + leaf_bytes(read)[1]


THIN = [case for case in METHODS if not (case.method.sends or case.method.materialises)]
SKIPPED = (
    *("rsLoRA", "LoRA-orthogonal", "SBoRA-expert", "PiSSA-fast", "OLoRA", "LoRA-GA", "LoRA-GA-peft", "EVA"),
    *("EVA-whitened", "CorDA", "CorDA-kpm", "LoftQ", "LoftQ-twice", "SARA-svd", "MoSARA-full"),
)


def on_its_own(case):
    """Those that send what another one in the list does are left out, and those that no bare projection has."""
    bare = not isinstance(case.method, AbstractRouted) and not case.method.linked
    return bare and case.name not in (*SKIPPED, "PRILoRA", "PRILoRA-mask")


@pytest.mark.parametrize("module", ["q_proj", "o_proj"])
@pytest.mark.parametrize("case", [case for case in THIN if on_its_own(case)], ids=lambda case: case.name)
def test_a_projection_sends_what_its_method_declares(case, module):
    sent, train, frozen = projection(case.method, module)
    summed, gathered = declared(case.method, train, frozen)
    baseline = base(module, False)
    assert sent.get("all-reduce", 0) == baseline.get("all-reduce", 0) + summed
    assert sent.get("all-gather", 0) == baseline.get("all-gather", 0) + gathered
    assert set(sent) <= {"all-reduce", "all-gather"}


@pytest.mark.parametrize(("module", "side"), [("q_proj", "out"), ("o_proj", "in")])
def test_block_diagonal_factors_sum_no_activations(module, side):
    """Thin values are gathered. Beside the base's sums there are those of gradients alone."""
    method = sx.BDLoRA(rank=8, side=side, blocks=SIZES["tensor"])
    sent, train, frozen = projection(method, module)
    gradients, gathered = declared(method, train, frozen)
    baseline = base(module, False)
    assert sent["all-reduce"] == baseline["all-reduce"] + gradients
    assert sent["all-gather"] == baseline["all-gather"] + gathered + 4 * TOKENS * method.rank
    assert set(sent) <= {"all-reduce", "all-gather"}


@pytest.mark.parametrize("module", ["q_proj", "o_proj"])
def test_a_quantised_projection_sends_what_its_method_declares(module):
    method = sx.LoRA(rank=4)
    sent, train, frozen = projection(method, module, True)
    summed, gathered = declared(method, train, frozen)
    baseline = base(module, True)
    assert sent.get("all-reduce", 0) == baseline.get("all-reduce", 0) + summed
    assert sent.get("all-gather", 0) == baseline.get("all-gather", 0) + gathered
    assert {kind: size for kind, size in sent.items() if kind not in ("all-reduce", "all-gather")} == {
        kind: size for kind, size in baseline.items() if kind not in ("all-reduce", "all-gather")
    }


@pytest.mark.parametrize("module", ["q_proj", "o_proj"])
def test_a_quantised_projection_sends_its_codes_and_never_its_weights(module):
    """Half a byte for each weight and one for the scale of 64, twice. A dense weight is sent once by this program."""
    packed = (IN * OUT // 2 + IN * OUT // 64) // SIZES["tensor"]
    dense = base(module, False)
    assert dense["all-gather"] == 4 * IN * OUT // SIZES["tensor"]
    assert base(module, True) == dense | {"all-gather": 2 * packed}


RULES = (
    ("q_proj", sx.LoRA(rank=8)),
    ("k_proj", sx.SBoRA(rank=8, variant="FB")),
    ("v_proj", sx.VeRA(rank=8)),
    ("o_proj", sx.Bone(rank=8)),
    ("gate_proj", sx.SARA(rank=4)),
    ("up_proj", sx.SBoRA(rank=8)),
    ("down_proj", sx.LoRA(rank=8)),
)


def dx_alone(outlined):
    """Bytes by kind of the same model without adapters, from its loss and the gradient in the embedded tokens."""
    rows = NamedSharding(outlined.mesh, PartitionSpec(ROWS))
    _, count, length = outlined.batch["tokens"].shape
    shift = jax.ShapeDtypeStruct((count, length, WIDE.hidden_size), jnp.float32, sharding=rows)

    def loss(shift, base, batch):
        def shifted(call, args, kwargs, context):
            out = call(*args, **kwargs)
            embeds = (context.module.name, context.method_name) == ("embed_tokens", "__call__")
            return out + shift if embeds else out

        part = jax.tree.map(lambda leaf: leaf[0], batch)
        with nn.intercept_methods(shifted):
            return sums(outlined.model, {"adapters": {}, "base": {}}, {}, base, part, None).losses["loss"]

    program = jax.jit(jax.value_and_grad(loss), out_shardings=(None, rows))
    with jax.set_mesh(outlined.mesh):
        return collective_bytes(program.lower(shift, outlined.parts.base, outlined.batch).compile().as_text())


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_step_sends_what_its_methods_declare(quant):
    experiment = sx.Experiment("x", sx.Data("x", max_length=32), RULES, steps=10, batch_size=8, quant=quant)
    outlined = on_mesh(outline(experiment, WIDE), make_mesh(SIZES))
    sent, baseline = collective_bytes(compiled(outlined).as_text()), dx_alone(outlined)
    tokens, layers = 8 * 32 // SIZES["fsdp"], WIDE.num_hidden_layers
    base = base_specs(nest(outlined.parts.base), SIZES)
    train, frozen = (specs(half, base) for half in (outlined.parts.adapters, outlined.parts.frozen))
    gradients, gathered = leaf_bytes(outlined.parts.adapters, train)
    thin = 4 * tokens * layers * sum(method.summed for _, method in RULES)
    # Put together in the forward pass and again in the backward one.
    gathers = 2 * (gathered + leaf_bytes(outlined.parts.frozen, frozen)[1])
    assert sent["all-gather"] == baseline["all-gather"] + gathers
    # Of each leaf the sums of squares for four reported norms, of gradients and updates, along up to two axes of the
    # mesh; and how many tokens count.
    numbers = sent["all-reduce"] - baseline["all-reduce"] - gradients - thin
    assert 0 <= numbers <= 4 * (2 * 4 * len(jax.tree.leaves(outlined.state.train)) + 4)
    assert set(sent) == set(baseline)
