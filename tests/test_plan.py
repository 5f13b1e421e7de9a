"""What a run needs on each device, told before there is one: `sborax plan`, from a model's config.json alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import ALL, PUBLISHED
from tiny_model import WIDE

import sborax as sx
from sborax.cli import main
from sborax.layout.mesh import abstract_mesh
from sborax.layout.sharding import Layout
from sborax.layout.state import parameters, start, take_apart
from sborax.models import LlamaConfig, load_config
from sborax.models.language_model import abstract
from sborax.plans.ahead import argument_bytes, on_mesh, outline
from sborax.plans.estimate import temporary_bytes
from sborax.train.base import quantise_base

PARAMETERS = {"LLaMA-2-7B": 6_738_415_616, "LLaMA-3.1-8B": 8_030_261_248, "LLaMA-3.1-70B": 70_553_706_496}
FIVE = "(q|k|v|up|down)_proj"


def config_of(model):
    return LlamaConfig.from_hf(PUBLISHED[model])


def run(model, rules, **settings):
    settings = {"steps": 10, "precision": "bfloat16", "batch_size": 256, **settings}
    return sx.Experiment(model, sx.Data(model, max_length=512), rules, **settings)


# Tables of arXiv:2407.05413 (SBoRA; five projections of LLaMA-7B, whose shapes LLaMA-2 kept, and of LLaMA-3-8B, which
# LLaMA-3.1 kept; its table of 4-bit runs prints half of what is trained) and of arXiv:2409.15371 (Bone, all seven;
# that LoRA's 89.9M are rank 36 follows from the number).
COUNTS = [
    *[("LLaMA-2-7B", FIVE, sx.SBoRA(rank=r, variant=v), n) for r, n in ((32, 28.0), (64, 56.1)) for v in ("FA", "FB")],
    *[("LLaMA-2-7B", FIVE, sx.LoRA(rank=r), n) for r, n in ((32, 56.1), (64, 112.2))],
    *[("LLaMA-2-7B", FIVE, sx.DoRA(rank=r), n) for r, n in ((32, 57.0), (64, 113.1))],
    *[("LLaMA-3.1-8B", FIVE, sx.SBoRA(rank=r), n) for r, n in ((32, 25.2), (64, 50.3))],
    *[("LLaMA-3.1-8B", FIVE, sx.SBoRA(rank=r, variant="FB"), n) for r, n in ((32, 31.5), (64, 62.9))],
    *[("LLaMA-3.1-8B", FIVE, sx.LoRA(rank=r), n) for r, n in ((32, 56.6), (64, 113.2))],
    *[("LLaMA-3.1-8B", FIVE, sx.DoRA(rank=r), n) for r, n in ((32, 57.4), (64, 114.0))],
    ("LLaMA-2-7B", ALL, sx.SBoRA(rank=64), 2 * 43.5),
    ("LLaMA-2-7B", ALL, sx.SBoRA(rank=64, variant="FB"), 72.9),
    ("LLaMA-2-7B", ALL, sx.DoRA(rank=64), 161.3),
    ("LLaMA-2-7B", ALL, sx.Bone(rank=64), 87.0),
    ("LLaMA-2-7B", ALL, sx.Bat(rank=64), 87.0),
    *[("LLaMA-2-7B", ALL, method(rank=36), 89.9) for method in (sx.LoRA, sx.OLoRA, sx.PiSSA)],
]


@pytest.mark.parametrize(("model", "where", "method", "millions"), COUNTS)
def test_trainable_counts_are_the_published_ones(model, where, method, millions):
    count = outline(run(model, ((where, method),)), config_of(model)).parts.count
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("devices", [1, 8, 64, 256])
def test_bytes_on_each_device_of_published_models(model, devices):
    """Matrices and trained leaves are cut into as many parts, norms are on every device."""
    config = config_of(model)
    step = outline(run(model, ((ALL, sx.LoRA(rank=16)),)), config)
    assert parameters(abstract(config)) == PARAMETERS[model]
    sizes = argument_bytes(on_mesh(step, abstract_mesh({"fsdp": devices})))
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert sizes["base"] == 2 * ((PARAMETERS[model] - norms) // devices + norms)
    assert (
        sizes["trained"] == 4 * step.parts.count // devices
        and 2 * sizes["trained"] < sizes["optimizer"] < 2 * sizes["trained"] + 100
    )
    assert sizes["batch"] == 256 // devices * 512 * 13
    if devices == 64:
        tensor = argument_bytes(on_mesh(step, abstract_mesh({"fsdp": 8, "tensor": 8})))
        assert (tensor["base"], tensor["trained"]) == (sizes["base"], sizes["trained"])


@pytest.mark.parametrize("devices", [1, 8, 64, 256])
def test_bytes_of_a_quantised_model(devices):
    """Half a byte a parameter, one for every 64, and nested scales (a 4096th) on every device."""
    config = config_of("LLaMA-2-7B")
    step = outline(run("x", ((ALL, sx.LoRA(rank=16)),), quant="nf4"), config)
    sizes = argument_bytes(on_mesh(step, abstract_mesh({"fsdp": devices})))
    tables = 2 * 32000 * 4096
    norms = 65 * 4096
    kernels = PARAMETERS["LLaMA-2-7B"] - tables - norms
    shared = 4 * (kernels // 2**14 + 7 * 32)
    assert sizes["base"] == kernels * 33 // 64 // devices + shared + 2 * (tables // devices + norms)


def lying(tree):
    """Bytes that arrays take on the fullest of the devices."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return max(sizes.values())


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_planned_bytes_are_those_of_arrays(quant, sizes):
    rules = (("q_proj", sx.DoRA(rank=8)), ("o_proj", sx.Bone(rank=8)), ("gate|down", sx.SBoRA(rank=8)))
    # adafactor's statistics have other shapes than their leaves.
    experiment = run(
        "x", rules, batch_size=16, quant=quant, optimizer=sx.Optimizer(name="adafactor"), precision="float32"
    )
    plan = on_mesh(outline(experiment, WIDE), abstract_mesh(sizes))
    layout, tx = Layout.of(sizes, 16), plan.prepared.tx
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract(WIDE))
    params, adapters = sx.attach(jax.random.key(0), quantise_base(params, quant), rules)
    parts = layout.place(take_apart(params, adapters), WIDE)
    state, _ = layout.state(start(parts, tx))
    batch = layout.batch({name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in plan.batch.items()})
    assert argument_bytes(plan) == {
        "base": lying(parts.base),
        "trained": lying(state.train),
        "indices, scales": lying(parts.frozen),
        "optimizer": lying((state.opt, state.step)),
        "batch": lying(batch),
    }


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        ("LLaMA-3.1-8B", {"tensor": 16}, "num_key_value_heads = 8 is not divisible by tensor = 16"),
        ("LLaMA-2-7B", {"fsdp": 3}, "256 rows are not divisible by data x fsdp = 3"),
        ("LLaMA-2-7B", {"rows": 3}, "mesh: no axis 'rows'; there are data, fsdp, expert, tensor"),
        (
            "LLaMA-3.1-8B",
            {"data": 1, "fsdp": 2**13},
            r"layers/mlp/down_proj/kernel: axis 2 of \(32, 14336, 4096\) .* axis 'fsdp' of size 8192",
        ),
    ],
)
def test_what_cannot_be_cut_is_named(model, sizes, message):
    with pytest.raises(sx.SboraxError, match=message):
        rows = 2**13 if "data" in sizes else 256
        on_mesh(outline(run(model, ((ALL, sx.LoRA(rank=8)),), batch_size=rows), config_of(model)), abstract_mesh(sizes))


@pytest.fixture
def seven(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["LLaMA-2-7B"]))
    return tmp_path


def output_of(capsys, *words):
    assert main(["plan", *map(str, words)]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_config_is_planned_for_a_mesh_that_is_not_here(seven, capsys):
    rules = "rules=[['self_attn|mlp', {'type': 'Bone', 'rank': 64}]]"
    words = ["--mesh", "fsdp=64,tensor=4", "precision=bfloat16", rules, "--length", "2048"]
    output = output_of(capsys, seven / "config.json", *words)
    assert "trainable: 87,031,808 parameters" in output
    assert "bytes on each of 256 devices (fsdp 64 x tensor 4), a step of 64 x 2048 tokens:" in output
    config = load_config(seven)
    rules = ((ALL, sx.Bone(rank=64)),)
    experiment = sx.Experiment("x", sx.Data("x"), rules, steps=1, precision="bfloat16", batch_size=64)
    step = on_mesh(outline(experiment, config, 2048), abstract_mesh({"fsdp": 64, "tensor": 4}))
    sizes = argument_bytes(step)
    assert f"base {sizes['base']:,} trained {sizes['trained']:,}" in output
    assert f"arguments {sum(sizes.values()):,} temporaries {temporary_bytes(step):,}" in output
    assert "temporaries by a formula" in output
    assert output_of(capsys, seven, *words) == output


def test_plans_that_cannot_be(seven, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for words, message in (
        (["--mesh", "fsdp"], "--mesh fsdp: write sizes of axes, such as fsdp=8,tensor=2"),
        (["--mesh", "tensor=3"], "num_attention_heads = 32 is not divisible by tensor = 3"),
        (["--topology", "v5e:16x16"], "pip install 'sborax[topology]'"),
    ):
        assert main(["plan", str(seven), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
