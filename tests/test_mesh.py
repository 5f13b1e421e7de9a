"""One step over several devices: the numbers are those of one device, whatever the mesh."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nightly import nightly_unless
from tiny_model import WIDE, write_data, write_model

import sborax as sx
from sborax.layout.mesh import make_mesh
from sborax.layout.sharding import Layout
from sborax.layout.state import start, take_apart
from sborax.models import LanguageModel, Llama, LlamaConfig
from sborax.models.config import Experts
from sborax.models.nf4 import quantise
from sborax.train.experiment import Optimizer
from sborax.train.loop import train
from sborax.train.optimizer import make_optimizer
from sborax.train.step import make_step

STEPS = 30
RULES = [
    ("q_proj", sx.LoRA(rank=8)),
    ("k_proj", sx.DoRA(rank=8)),
    ("v_proj", sx.SBoRA(rank=8, variant="FB")),
    # Its input is cut under tensor parallelism, and so is that of down_proj.
    ("o_proj", sx.Bone(rank=8)),
    ("gate_proj", sx.LoRA(rank=8)),
    ("up_proj", sx.Bat(rank=16)),
    ("down_proj", sx.SBoRA(rank=8)),
]
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 4},
]
EXPERT_MESHES = [{"expert": 4, "fsdp": 2}, {"data": 2, "expert": 4}, {"expert": 2, "fsdp": 2, "tensor": 2}]


def spelled(sizes):
    return " ".join(f"{axis}{size}" for axis, size in sizes.items())


ODD = [
    ("down_proj", sx.LoRA(rank=6)),
    ("k_proj", sx.SBoRA(rank=6)),
    # Of eight devices only a factor of 4 divides its entries.
    ("v_proj", sx.FourierFT(coefficients=52)),
    # Eight devices are more than its four blocks of columns.
    ("o_proj", sx.Bat(rank=64)),
    ("gate_proj", sx.Bone(rank=6)),
    ("up_proj", sx.OFT(block=64)),
    ("q_proj", sx.SBoRA(rank=6, variant="FB")),
]
"""Leaves that are not cut where their kernel is."""


SPARSE = dataclasses.replace(
    WIDE, model_type="mixtral", experts=Experts(count=4, chosen=2, intermediate_size=WIDE.intermediate_size)
)


def curve(sizes, rules, config=WIDE):
    """Losses of 30 steps at lr 1e-3, and the gradients' norms of the first; gate_proj is in 4 bits."""
    model = LanguageModel(Llama(config, jnp.dtype("float32"), "cheap"), {}, config, None)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32)), model.abstract()
    )
    mlp = params["layers"]["mlp"]
    gate = (mlp["experts"] if config.experts else mlp)["gate_proj"]
    gate["kernel"] = quantise(gate["kernel"])
    params, adapters = sx.attach(jax.random.key(0), params, rules)
    layout, parts = Layout.of(sizes, 8), take_apart(params, adapters, train_also=["norm"])
    tx = make_optimizer(Optimizer(lr=1e-3, warmup=0, schedule="constant"), STEPS)
    parts = layout.place(parts, config)
    state, shardings = layout.state(start(parts, tx))
    step = make_step(model, tx, jax.random.key(1), shardings=shardings)
    tokens = rng.integers(0, config.vocab_size, (1, 8, 32)).astype(np.int32)
    counts = rng.random(tokens.shape) < 0.7
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 2), "counts": counts, "segments": np.ones_like(tokens)}
    losses = []
    with layout.context():
        for number in range(STEPS):
            state, numbers = step(state, parts.frozen, parts.base, layout.batch(batch))
            losses.append(numbers["loss"])
            if number == 0:
                first = jax.device_get(numbers["grad_norms"])
    assert step._cache_size() == 1
    if sizes:
        lying = jax.tree.map(lambda leaf: leaf.sharding, (state.train, state.opt))
        chex.assert_trees_all_equal(lying, jax.tree.map(lambda sharding: sharding, (shardings.train, shardings.opt)))
    return np.array(jax.device_get(losses)), first


alone = functools.cache(lambda rules, config: curve(None, rules, config))


@pytest.mark.parametrize(
    "sizes",
    nightly_unless([sizes for sizes in MESHES if len(sizes) > 2], MESHES),
    ids=spelled,
)
def test_every_mesh_trains_as_one_device_does(sizes):
    trains_as_one_device_does(sizes, tuple(RULES))


@pytest.mark.nightly
@pytest.mark.parametrize("count", [3, 7])
def test_leaves_that_are_not_cut_as_their_kernel_train_as_on_one_device(count):
    trains_as_one_device_does({"fsdp": 8}, tuple(ODD[:count]))


@pytest.mark.nightly
def test_leaves_that_are_not_cut_as_their_kernel_train_on_two_axes():
    trains_as_one_device_does({"fsdp": 4, "tensor": 2}, tuple(ODD))


BANKS = [
    ("q_proj|k_proj|o_proj|down_proj", sx.VBLoRA(rank=4, vectors=12, length=16, bound=0.5)),
    ("v_proj|gate_proj|up_proj", sx.UniLoRA(rank=4, coefficients=300, bound=1.0)),
]
"""Leaves that all kernels share."""


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", MESHES, ids=spelled)
def test_leaves_that_all_kernels_share_train_as_on_one_device(sizes):
    trains_as_one_device_does(sizes, tuple(BANKS))


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", EXPERT_MESHES[::2], ids=spelled)
def test_leaves_that_all_experts_share_train_as_on_one_device(sizes):
    trains_as_one_device_does(sizes, tuple(BANKS), SPARSE)


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", [*MESHES[1:4], *EXPERT_MESHES], ids=spelled)
def test_experts_train_as_on_one_device(sizes):
    trains_as_one_device_does(sizes, tuple(RULES), SPARSE)


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", [*MESHES[1:4], MESHES[4]], ids=spelled)
@pytest.mark.parametrize(("pattern", "tied"), [("embed_tokens", True), *[("embed_tokens|lm_head", t) for t in (0, 1)]])
def test_embeddings_train_as_on_one_device(pattern, tied, sizes):
    """Their vocabulary is cut, and so are their adapters."""
    config = dataclasses.replace(WIDE, tie_word_embeddings=bool(tied))
    trains_as_one_device_does(sizes, ((pattern, sx.LoRA(rank=8)), RULES[0]), config)


def trains_as_one_device_does(sizes, rules, config=WIDE):
    (losses, first), (expected, norms) = curve(sizes, rules, config), alone(rules, config)
    assert expected[-1] < expected[0] - 0.02
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(first, norms, rtol=1e-5)


@pytest.mark.nightly
def test_a_run_on_a_mesh_is_resumed_on_another(tmp_path):
    model = write_model(tmp_path / "model", num_key_value_heads=2)
    text = str(write_data(tmp_path / "data.jsonl"))
    data = sx.Data(text, template="{instruction}", answer=" {output}", max_length=64)
    settings = {
        "model": str(model),
        "data": data,
        "rules": (("q_proj", sx.LoRA(rank=2, dropout=0.1)), ("down_proj", sx.Bone(rank=4))),
        "steps": 4,
        "optimizer": sx.Optimizer(lr=1e-2),
        "eval": sx.Eval(data),
    }
    lines = []
    reference = train(sx.Experiment(**settings), tmp_path / "whole", echo=lines.append)
    assert not any(line.startswith("mesh") for line in lines)
    on_mesh = sx.Experiment(**{**settings, "mesh": {"fsdp": 2, "tensor": 2}})
    sharded = train(on_mesh, tmp_path / "sharded", echo=lines.append)
    assert "mesh: fsdp 2 x tensor 2 of 8 devices" in lines
    assert sharded.device.startswith("4 x ")
    for name in ("first_loss", "last_loss", "eval_loss"):
        assert getattr(sharded, name) == pytest.approx(getattr(reference, name), abs=1e-5)
    samples = [
        [json.loads(line) for line in (tmp_path / name / "eval_losses.jsonl").read_text().splitlines()]
        for name in ("whole", "sharded")
    ]
    for sample, second in zip(*samples, strict=True):
        assert second == sample | {"loss": pytest.approx(sample["loss"], rel=1e-5)}
    further = {**settings, "steps": 6}
    resumed = [
        train(sx.Experiment(**{**further, "mesh": mesh}), tmp_path / name, resume=True, echo=lines.append)
        for mesh, name in ((None, "sharded"), ({"data": 4}, "whole"))
    ]
    assert resumed[0].last_loss == pytest.approx(resumed[1].last_loss, abs=1e-5)


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        ({"fsdp": 16}, 16, "fsdp 16 needs 16 devices, there are 8"),
        ({"data": 2, "fsdp": 4}, 4, "4 rows are not divisible by data x fsdp = 8 of the mesh; try 8$"),
    ],
)
def test_a_mesh_that_cannot_be(sizes, batch, message):
    with pytest.raises(sx.SboraxError, match=message):
        Layout.of(sizes, batch)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX reads of a TPU chip to lay out a mesh."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0
    slice_index: int = 0


CHIPS = [Chip(16 * row + column, (column, row, 0)) for row in range(16) for column in range(16)]


@pytest.mark.parametrize("sizes", [{"fsdp": 256}, {"fsdp": 64, "tensor": 4}, {"data": 2, "fsdp": 16, "tensor": 8}])
def test_an_axis_may_take_a_part_of_a_dimension_of_the_torus(sizes):
    mesh = make_mesh(sizes, CHIPS)
    assert {name: size for name, size in mesh.shape.items() if size > 1} == sizes
    assert {chip.id for chip in mesh.devices.flat} == set(range(256))


def test_a_mesh_over_slices_says_how_many():
    chips = CHIPS + [dataclasses.replace(chip, id=chip.id + 256, slice_index=1) for chip in CHIPS]
    with pytest.raises(sx.SboraxError, match="fsdp 512 takes devices of 2 slices; write slices=2, and sizes in each"):
        make_mesh({"fsdp": 512}, chips)
    assert make_mesh({"slices": 2, "fsdp": 64, "tensor": 4}, chips).shape["data"] == 2


def test_what_cannot_be_cut_is_named():
    model = LanguageModel(Llama(WIDE), {}, WIDE, None)
    params, adapters = sx.attach(
        jax.random.key(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.abstract()), [("q", sx.C3A(block=64))]
    )
    with pytest.raises(sx.SboraxError, match=r"q_proj/kernel/train/w: axis . of .* is not divisible by mesh axis"):
        Layout.of({"tensor": 8}, 8).place(take_apart(params, adapters), WIDE)
    odd = LlamaConfig(**{**vars(WIDE), "num_key_value_heads": 4})
    with pytest.raises(sx.SboraxError, match="num_key_value_heads = 4 is not divisible by tensor = 8"):
        Layout.of({"tensor": 8}, 8).place(take_apart(params, {}), odd)
