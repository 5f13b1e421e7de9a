"""The true step, compiled for a slice of a TPU pod that is not there: `pytest -m nightly tests/test_pod.py`."""

import functools

import pytest
from published import ALL, PUBLISHED

import sborax as sx
from sborax.models import LlamaConfig
from sborax.plans.ahead import argument_bytes, compiled, on_mesh, outline, pod_mesh
from sborax.plans.hlo import collective_bytes

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("compiled_fully")]

METHODS = {
    "LoRA": (sx.LoRA(rank=16), None),
    "SBoRA-FA": (sx.SBoRA(rank=32), None),
    "Bone": (sx.Bone(rank=32), None),
    "NF4 LoRA": (sx.LoRA(rank=16), "nf4"),
}
GIB = 2**30


SIXTEEN = {"fsdp": 16}


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
    memory, sent, held = program.memory_analysis(), collective_bytes(program.as_text()), argument_bytes(laid_out)
    print(f"{name}: {held}, temporaries {memory.temp_size_in_bytes:,}, sent {sent}")
    # The compiler may pad: small arrays are whole tiles.
    assert sum(held.values()) <= memory.argument_size_in_bytes < 1.01 * sum(held.values())
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16 * GIB, "a v5e chip has 16 GiB"


def test_a_four_bit_base_is_sent_in_four_bits():
    """Codes are gathered and not what they stand for. Some gathers of few columns a chip are made of all-reduces."""
    packed, dense = (sum(collective_bytes(step_of(name)[1].as_text()).values()) for name in ("NF4 LoRA", "LoRA"))
    assert packed < 0.3 * dense
