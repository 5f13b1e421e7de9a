"""Meshes and settings with which a step fits a chip, and what a plan says of it; by formulas, without a TPU."""

import dataclasses
import functools
import json
import math

import jax
import pytest
from published import ALL, PUBLISHED, SPARSE
from tiny_model import WIDE

import sborax as sx
from benchmarks import pods
from sborax.cli import main
from sborax.cli.plan import _bytes, _judged, _summed
from sborax.layout.mesh import abstract_mesh, make_mesh
from sborax.models import LlamaConfig
from sborax.plans.ahead import compiled, on_mesh, outline
from sborax.plans.estimate import temporary_bytes
from sborax.plans.fit import best_mesh, held_bytes, link_bytes, mending, sums_kernels
from sborax.plans.roofline import CHIPS, chip_of, sums_gathers, torus_of

V5E = CHIPS["v5e"]


def run(batch_size, **settings):
    settings = {"steps": 10, "precision": "bfloat16", "batch_size": batch_size, **settings}
    return sx.Experiment("x", sx.Data("x", max_length=2048), ((ALL, sx.LoRA(rank=16)),), **settings)


def config_of(model):
    return LlamaConfig.from_hf(PUBLISHED[model])


@functools.cache
def seven_of_a_row():
    return outline(run(1), config_of("LLaMA-2-7B"), device="tpu")


def seven(rows):
    """The step of LLaMA-2-7B on one device."""
    planned = seven_of_a_row()
    batch = {name: jax.ShapeDtypeStruct((1, rows, 2048), leaf.dtype) for name, leaf in planned.batch.items()}
    return dataclasses.replace(planned, batch=batch)


FITTING = [
    (256, 256, ["remat=full"]),
    (256, 2048, ["remat=full", "batch_size=256", "accumulate=8"]),
    (8, 8, ["remat=full", "quant=nf4"]),
    (2, 2, None),
]
"""Chips, rows, and the changes with which LLaMA-3.1-70B fits."""


@pytest.mark.parametrize(
    ("chips", "rows", "words"), [FITTING[0], *(pytest.param(*case, marks=pytest.mark.nightly) for case in FITTING[1:])]
)
def test_what_makes_a_step_fit(chips, rows, words):
    experiment, config = run(rows), config_of("LLaMA-3.1-70B")
    assert held_bytes(on_mesh(outline(experiment, config, device="tpu"), abstract_mesh({"fsdp": chips}))) > V5E.memory
    assert mending(experiment, config, 2048, {"fsdp": chips}, "tpu", V5E.memory) == words


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("RESOURCE_EXHAUSTED: Ran out\nUsed 20.1G of 15.75G hbm. Exceeded", "does not fit: Used 20.1G of 15.75G hbm"),
        ("RESOURCE_EXHAUSTED: VmemOom:\nRan out of memory in memory space vmem", None),
    ],
)
def test_what_libtpu_does_not_compile_is_said_in_a_line(failure, message, monkeypatch):
    def fail(_):
        raise jax.errors.JaxRuntimeError(failure)

    monkeypatch.setattr("sborax.cli.plan.compiled", fail)
    planned = outline(run(1), LlamaConfig(16, 16, 16, 1, 1, 1, 16, 2048, 1e-5))
    if message is None:
        with pytest.raises(sx.SboraxError, match="libtpu does not compile this step: .*VmemOom: Ran out .* vmem$"):
            _bytes(planned, "v9:1x1")
    else:
        assert message in "\n".join(_bytes(planned, "v9:1x1"))


def test_a_chip_without_known_rates_is_not_judged():
    planned = outline(run(1), LlamaConfig(16, 16, 16, 1, 1, 1, 16, 2048, 1e-5))
    assert _bytes(planned, "v9:1x1")[-1] == "no least time, nor whether it fits: rates are known of v5e, v5p, v6e"


def test_a_mesh_is_chosen_by_what_fits_and_what_is_sent():
    assert best_mesh(seven(256), (16, 16), V5E) == {"fsdp": 256, "tensor": 1}
    # Fewer rows than chips: heads are shared.
    assert best_mesh(seven(64), (16, 16), V5E) == {"fsdp": 64, "tensor": 4}
    with pytest.raises(
        sx.SboraxError, match="no fsdp x tensor of 256 devices divides 3 rows and the heads; try batch_"
    ):
        best_mesh(seven(3), (16, 16), V5E)


MESHES_OF_EXPERTS = [
    ("Qwen3-30B-A3B", "v5e", (16, 16), {}, {"fsdp": 32, "expert": 8, "tensor": 1}),
    ("Qwen3-30B-A3B", "v5e", (16, 16), {"quant": "nf4"}, {"fsdp": 64, "expert": 4, "tensor": 1}),
    ("Qwen3-30B-A3B", "v5p", (2, 2, 4), {}, {"fsdp": 2, "expert": 8, "tensor": 1}),
    ("Mixtral-8x7B", "v5e", (8, 8), {}, {"fsdp": 32, "expert": 2, "tensor": 1}),
    ("Mixtral-8x7B", "v5e", (16, 16), {"quant": "nf4"}, {"fsdp": 256, "expert": 1, "tensor": 1}),
    ("Mixtral-8x7B", "v5p", (2, 2, 4), {}, {"fsdp": 8, "expert": 2, "tensor": 1}),
    ("Mixtral-8x7B", "v5p", (4, 4, 4), {}, {"data": 4, "fsdp": 8, "expert": 2, "tensor": 1}),
]


@pytest.mark.parametrize(
    ("model", "chip", "torus", "settings", "sizes"),
    [MESHES_OF_EXPERTS[0], *(pytest.param(*case, marks=pytest.mark.nightly) for case in MESHES_OF_EXPERTS[1:])],
)
def test_the_mesh_of_a_model_with_experts(model, chip, torus, settings, sizes):
    """Few experts whose kernels are gathered, or many tokens that are sent: the least of both that fits."""
    rows = math.prod(torus)
    planned = outline(run(rows, remat="full", **settings), LlamaConfig.from_hf(SPARSE[model]), device="tpu")
    assert best_mesh(planned, torus, CHIPS[chip]) == sizes
    assert held_bytes(on_mesh(planned, abstract_mesh(sizes))) < CHIPS[chip].memory / 2


@pytest.mark.parametrize(
    ("torus", "chips", "sums"),
    [
        ((4, 4, 4), 64, True),
        ((4, 4, 4), 16, False),
        ((4, 4, 12), 192, True),
        ((4, 8, 8), 256, True),
        ((4, 8, 8), 128, False),
        ((2, 4, 4), 32, False),
        ((2, 2, 4), 16, False),
        ((16, 16), 256, False),
    ],
)
def test_gathers_between_all_chips_of_a_torus_of_three_dimensions_are_sums(torus, chips, sums):
    """As read from compiled programs: docs/LOG.md."""
    assert sums_gathers(torus, chips) is sums


TORI = [
    ("v5p", (4, 4, 4), 64, {"data": 4, "fsdp": 16}),
    ("v5p", (4, 4, 8), 256, {"data": 4, "fsdp": 32}),
    ("v5p", (8, 8, 16), 1024, {"data": 8, "fsdp": 128}),
    # Too small a torus to send sums.
    ("v5p", (2, 4, 4), 32, {"fsdp": 32}),
    # A tensor axis leaves fewer chips to gather.
    ("v5p", (4, 8, 8), 64, {"fsdp": 64, "tensor": 4}),
    *(
        (chip, torus_of(pods.SLICES[chip]), 256 * pods.SETTINGS["LLaMA-2-7B", chip][0], mesh)
        for chip, mesh in pods.MESHES.items()
    ),
]
"""Chip, torus, rows, and the axes with which LLaMA-2-7B gathers; those of the stored steps among them."""


@pytest.mark.parametrize(
    ("chip", "torus", "rows", "sizes"),
    [case if case in TORI[::6] else pytest.param(*case, marks=pytest.mark.nightly) for case in TORI],
)
def test_the_mesh_on_a_torus_gathers(chip, torus, rows, sizes):
    planned = seven(rows)
    mesh = best_mesh(planned, torus, CHIPS[chip])
    assert mesh == {"tensor": 1, **sizes}
    assert not sums_kernels(on_mesh(planned, abstract_mesh(mesh)), torus)


def test_copies_along_data_take_memory_and_sums_twice_the_bytes():
    planned, torus, chip = seven(64), (4, 4, 4), CHIPS["v5p"]
    sums, gathers = (on_mesh(planned, abstract_mesh({"data": data, "fsdp": 64 // data})) for data in (1, 4))
    assert sums_kernels(sums, torus) and not sums_kernels(gathers, torus)
    for memory, data in ((held_bytes(gathers), 4), (held_bytes(gathers) - 1, 1)):
        assert best_mesh(planned, torus, dataclasses.replace(chip, memory=memory)).get("data", 1) == data
    assert link_bytes(sums) == link_bytes(gathers) == link_bytes(gathers, torus)
    assert link_bytes(sums, torus) == 2 * link_bytes(sums) - 12 * planned.parts.count
    (line,) = _summed(sums, "v5p:4x4x4")
    assert line.endswith("cut over all dimensions of the torus; try --mesh data=4,fsdp=16")
    assert not _summed(gathers, "v5p:4x4x4")


@pytest.mark.nightly
def test_what_makes_a_step_fit_without_copies():
    """Copies of the base along data are given up before projections are shared."""
    experiment, config = run(64, remat="full", quant="nf4"), config_of("LLaMA-3.1-70B")
    laid = {
        data: held_bytes(
            on_mesh(outline(experiment, config, device="tpu"), abstract_mesh({"data": data, "fsdp": 64 // data}))
        )
        for data in (1, 16)
    }
    assert mending(experiment, config, 2048, {"data": 16, "fsdp": 4}, "tpu", sum(laid.values()) // 2) == [
        "--mesh fsdp=64"
    ]


@pytest.mark.parametrize(("tied", "copies"), [(True, 2), (False, 1)])
def test_the_table_with_trained_vectors_is_held_beside_the_base(tied, copies):
    """And its gradient, where the head is tied: as compiled, in float32, for which a CPU needs nothing more."""
    config = dataclasses.replace(WIDE, vocab_size=65536, tie_word_embeddings=tied)
    tokens = outline(run(4, train_tokens=(3, 5), precision="float32"), config, 32)
    plain = outline(run(4, precision="float32"), config, 32)
    table, vectors = 4 * 65536 * WIDE.hidden_size, 4 * 2 * WIDE.hidden_size
    assert temporary_bytes(tokens) - temporary_bytes(plain) == copies * table + vectors
    by_compiler = [compiled(step).memory_analysis().temp_size_in_bytes for step in (tokens, plain)]
    assert by_compiler[0] - by_compiler[1] > 0.7 * copies * table
    mesh = abstract_mesh({"fsdp": 2, "tensor": 2})
    shares = [temporary_bytes(on_mesh(step, mesh)) for step in (tokens, plain)]
    assert shares[0] - shares[1] == copies * table // 4 + vectors


def test_bytes_between_devices_by_the_formula():
    step = seven(256)
    kernels, trained = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000, step.parts.count
    assert link_bytes(on_mesh(step, abstract_mesh({"fsdp": 256}))) == 4 * kernels + 12 * trained
    shared = 2 * 4 * 32 * 2 * 2048 * 4096 * 2
    total = link_bytes(on_mesh(step, abstract_mesh({"fsdp": 128, "tensor": 2})))
    assert total == 2 * kernels + shared + 12 * trained


def test_a_compiled_step_is_judged():
    experiment = sx.Experiment("x", sx.Data("x", max_length=32), ((ALL, sx.LoRA(rank=4)),), steps=1, batch_size=8)
    laid = on_mesh(outline(experiment, WIDE), make_mesh({"fsdp": 8}))
    beside, time, share, fits = _judged(laid, compiled(laid), "v5e:2x4")
    assert beside == "0% of what is sent is sent beside products"
    assert time.startswith("least time of a step: the largest of 0.000 s of computing")
    assert share.endswith("% of the chip's peak, by the model's FLOPs") and fits == "fits: 0.0 of 16 GiB"


@pytest.mark.parametrize("topology", ["v5e", "v5e16x16", "v5e:16x", "v5e:axb"])
def test_a_slice_that_has_no_sides(topology):
    with pytest.raises(
        sx.SboraxError, match=f"topology {topology}: write a chip and the sides of a slice, such as v5e:"
    ):
        torus_of(topology)


def test_the_sides_of_a_slice():
    assert torus_of("v5p:4x8x8") == (4, 8, 8) and torus_of("v5p:4x4x8_twisted") == (4, 4, 8)
    assert chip_of("V5E:4x4") is V5E


@pytest.mark.parametrize("length", [-1, 0, 4097])
def test_rows_that_the_model_cannot_read(length, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["LLaMA-2-7B"]))
    assert main(["plan", str(tmp_path), "--mesh", "fsdp=16", "--length", str(length)]) == 2
    assert (
        capsys.readouterr().err == f"error: --length {length}: a row has 1 to 4096 tokens, the context of the model\n"
    )


def test_chips_that_are_not_known(tmp_path, capsys):
    with pytest.raises(sx.SboraxError, match="the rates of v9z are not known; those of v5e, v5p, v6e are"):
        chip_of("v9z:4x4")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["LLaMA-2-7B"]))
    assert main(["plan", str(tmp_path), "--mesh", "auto"]) == 2
    assert capsys.readouterr().err == "error: --mesh auto: say for which slice, such as --topology v5e:16x16\n"
    assert jax.device_count() == 8
