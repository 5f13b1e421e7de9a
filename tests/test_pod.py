"""The true step, compiled for a slice of a TPU pod that is not there: `pytest -m nightly tests/test_pod.py`."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from published import ALL, PUBLISHED

import sborax as sx
from benchmarks.pods import SENT_GOALS, Pod, least_flops, least_sent
from sborax.adapters.grouped import grouped_linear
from sborax.adapters.grouped_matmul import Sizes, grouped_matmul
from sborax.adapters.tree import nodes
from sborax.models import LlamaConfig
from sborax.plans.ahead import argument_bytes, compiled, device_bytes, on_mesh, outline, pod_mesh
from sborax.plans.fit import best_mesh
from sborax.plans.hlo import collective_bytes, matmul_flops, memory_bytes
from sborax.plans.roofline import chip_of, torus_of
from sborax.train.head_loss import CHUNK

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("compiled_fully")]

METHODS = {
    "LoRA": (sx.LoRA(rank=16), None),
    "SBoRA-FA": (sx.SBoRA(rank=32), None),
    "Bone": (sx.Bone(rank=32), None),
    "NF4 LoRA": (sx.LoRA(rank=16), "nf4"),
}
GIB = 2**30


SIXTEEN = {"fsdp": 16}
SMALL = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "vocab_size": 4096}
SMALL |= {"num_attention_heads": 16, "num_key_value_heads": 16}
"""Wide enough that the compiler does not send sums of small arrays anyway."""


@functools.cache
def step_of(name):
    """The laid-out step of LLaMA-2-7B and its compiled program."""
    method, quant = METHODS[name]
    experiment = sx.Experiment(
        "LLaMA-2-7B",
        sx.Data("none", max_length=2048),
        ((ALL, method),),
        steps=10,
        batch_size=16,
        precision="bfloat16",
        quant=quant,
        remat="full",
    )
    config = LlamaConfig.from_hf(PUBLISHED["LLaMA-2-7B"])
    laid_out = on_mesh(outline(experiment, config, device="tpu"), pod_mesh("v5e:4x4", SIXTEEN))
    return laid_out, compiled(laid_out)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_seven_billion_compiles_for_sixteen_chips(name):
    laid_out, program = step_of(name)
    memory, sent, sizes = program.memory_analysis(), collective_bytes(program.as_text()), argument_bytes(laid_out)
    print(f"{name}: {sizes}, temporaries {memory.temp_size_in_bytes:,}, sent {sent}")
    # The compiler may pad: small arrays are whole tiles.
    assert sum(sizes.values()) <= memory.argument_size_in_bytes < 1.01 * sum(sizes.values())
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16 * GIB, "a v5e chip has 16 GiB"


@pytest.mark.parametrize("name", METHODS)
def test_a_step_computes_and_sends_near_the_least(name):
    """With `remat="full"` a layer runs twice forward, up to the input of `down_proj`."""
    laid_out, program = step_of(name)
    pod, trained, text = (
        Pod("LLaMA-2-7B", "v5e", name.replace("NF4 ", "Q"), 1, "full"),
        laid_out.parts.count,
        program.as_text(),
    )
    assert 1.3 < matmul_flops(text, 2048 // CHUNK) / least_flops(pod, trained) < 1.4
    assert sum(collective_bytes(text).values()) <= SENT_GOALS[pod.method] * least_sent(pod, trained)


@pytest.mark.parametrize("name", METHODS)
def test_a_chip_holds_its_share_of_what_is_trained(name):
    laid_out, _ = step_of(name)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((laid_out.state.train, laid_out.state.opt)))
    assert device_bytes((laid_out.state.train, laid_out.state.opt)) <= 1.3 * total / 16


def test_a_four_bit_base_is_sent_in_four_bits():
    """Codes are gathered and not what they stand for. Some gathers of few columns a chip are made of all-reduces."""
    packed, dense = (sum(collective_bytes(step_of(name)[1].as_text()).values()) for name in ("NF4 LoRA", "LoRA"))
    assert packed < 0.3 * dense


def test_a_four_bit_base_goes_through_hbm_in_four_bits():
    """Levels are selected within the products. What is gathered is smaller than a dense weight."""
    packed, dense = (memory_bytes(step_of(name)[1].as_text(), 2048 // CHUNK) for name in ("NF4 LoRA", "LoRA"))
    assert packed < 1.1 * dense


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jaxlib 0.10 cannot read programs for v5p")
def test_the_chosen_mesh_gathers_over_a_torus_of_three_dimensions():
    """The kernels of a small LLaMA come as gathers, which arrive once, and on a mesh of one axis as all-reduces."""
    topology = "v5p:4x4x4"
    config = LlamaConfig.from_hf(PUBLISHED["LLaMA-2-7B"] | SMALL)
    data = sx.Data("none", max_length=2048)
    experiment = sx.Experiment("x", data, ((ALL, sx.LoRA(rank=8)),), steps=1, batch_size=64, precision="bfloat16")
    step = outline(experiment, config, device="tpu")
    kernels = 2 * sum(leaf.size for path, leaf in step.parts.base.items() if path.endswith("/kernel"))

    def sent(sizes):
        return collective_bytes(compiled(on_mesh(step, pod_mesh(topology, sizes))).as_text())

    mesh = best_mesh(step, torus_of(topology), chip_of(topology))
    assert mesh == {"data": 4, "fsdp": 16, "tensor": 1}
    gathers, sums = sent(mesh), sent({"fsdp": 64})
    print(f"kernels {kernels:,}, gathered {gathers}, summed {sums}")
    # Forward and backward.
    assert gathers["all-gather"] > 1.8 * kernels > 10 * gathers["all-reduce"]
    assert sums["all-reduce"] > 1.8 * kernels > 10 * sums.get("all-gather", 0)


def test_rows_of_experts_are_multiplied_once():
    """The product of 131,072 rows with 16 experts, and its gradients, beside the least FLOPs."""
    rows, fan_in, fan_out, experts = 131_072, 768, 2048, 16
    mesh = pod_mesh("v5e:2x2", {"fsdp": 4})

    def step(x, weight, counts, g):
        y, transposed = jax.vjp(lambda x, weight: grouped_matmul(x, weight, Sizes(counts)), x, weight)
        return y, *transposed(g)

    everywhere = P()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(everywhere,) * 4, out_specs=(everywhere,) * 3, check_vma=False)
    shapes = [((rows, fan_in), jnp.bfloat16), ((experts, fan_in, fan_out), jnp.bfloat16), ((experts,), jnp.int32)]
    shapes.append(((rows, fan_out), jnp.bfloat16))
    arguments = [jax.ShapeDtypeStruct(*spec, sharding=NamedSharding(mesh, everywhere)) for spec in shapes]
    flops = jax.jit(mapped).lower(*arguments).compile().cost_analysis()["flops"]
    assert 1.0 <= flops / (3 * 2 * rows * fan_in * fan_out) < 1.1


@pytest.mark.parametrize("name", ["LoRA", "SBoRA-FA", "SBoRA-FB", "Bone"])
def test_adapters_of_experts_add_thin_products(name):
    """FLOPs of the projection and its gradients, beside those of the frozen product with eight thin products more."""
    method = sx.SBoRA(rank=32, variant="FB") if name == "SBoRA-FB" else METHODS[name][0]
    rows, fan_in, fan_out, experts = 131_072, 768, 2048, 16

    def attached():
        base = {"layers": {"proj": {"kernel": jnp.zeros((experts, fan_in, fan_out))}}}
        (node,) = nodes(sx.attach(jax.random.key(0), base, [("proj", method)])[1]).values()
        return node

    def step(x, weight, node, counts, g):
        def product(x, train):
            return grouped_linear(x, weight, Sizes(counts), sx.Adapter(train, node.frozen, node.method, node.in_axes))

        y, transposed = jax.vjp(product, x, node.train)
        return y, *transposed(g)

    mesh = pod_mesh("v5e:2x2", {"fsdp": 4})
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(),) * 5, out_specs=(P(),) * 3, check_vma=False)
    x, g = (jax.ShapeDtypeStruct((rows, side), jnp.bfloat16) for side in (fan_in, fan_out))
    weight = jax.ShapeDtypeStruct((experts, fan_in, fan_out), jnp.bfloat16)
    arguments = (x, weight, jax.eval_shape(attached), jax.ShapeDtypeStruct((experts,), jnp.int32), g)
    everywhere = NamedSharding(mesh, P())
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), arguments)
    flops = jax.jit(mapped).lower(*placed).compile().cost_analysis()["flops"]
    base, thin = 2 * 2 * rows * fan_in * fan_out, 2 * rows * method.rank * max(fan_in, fan_out)
    assert 1.0 <= flops / base < 1.1 + 8 * thin / base
