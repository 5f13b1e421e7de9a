"""The true step, compiled for a slice of a TPU pod that is not there: `pytest -m nightly tests/test_pod.py`."""

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


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_seven_billion_compiles_for_sixteen_chips(name):
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
    one = on_mesh(outline(experiment, config, device="tpu"), pod_mesh("v5e:4x4", {"fsdp": 16}))
    program = compiled(one)
    memory, sent, held = program.memory_analysis(), collective_bytes(program.as_text()), argument_bytes(one)
    print(f"{name}: {held}, temporaries {memory.temp_size_in_bytes:,}, sent {sent}")
    # The compiler may pad: small arrays are whole tiles.
    assert sum(held.values()) <= memory.argument_size_in_bytes < 1.01 * sum(held.values())
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16 * GIB, "a v5e chip has 16 GiB"
