"""A mesh is written in one way in every command, and as a change of an experiment."""

import pytest
from etils import epath
from tiny_model import write_data, write_model

import sborax as sx
from sborax.cli.layout import read_mesh, with_mesh
from sborax.cli.main import main
from sborax.config.codec import override
from sborax.train.experiment import save_experiment

SIZES = {"fsdp": 2, "tensor": 2}
SPELLINGS = [
    ["mesh=fsdp=2,tensor=2"],
    ["mesh.fsdp=2", "mesh.tensor=2"],
    ['mesh={"fsdp": 2, "tensor": 2}'],
    ["mesh={'fsdp': 2}", "mesh=fsdp=2, tensor=2"],
]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A model, and an experiment on it."""
    place = tmp_path_factory.mktemp("example")
    data = sx.Data(str(write_data(place / "data.jsonl")), template="{instruction}", answer=" {output}", max_length=32)
    model = str(write_model(place / "model"))
    experiment = sx.Experiment(model, data, [("q_proj", sx.LoRA(rank=2))], steps=1, batch_size=2)
    save_experiment(experiment, epath.Path(place))
    return experiment, model, str(place / "config.json")


@pytest.mark.parametrize("changes", SPELLINGS, ids=" ".join)
@pytest.mark.parametrize("start", [None, {"data": 8}], ids=str)
def test_spellings_of_a_change(example, changes, start):
    experiment = override(example[0], [f"mesh={start}".replace("None", "null")])
    expected = {**(start or {}), **SIZES} if "mesh.fsdp=2" in changes else SIZES
    assert override(experiment, changes).mesh == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("mesh=fsdp", 'mesh: must be .*, got "fsdp"'),
        ("mesh=fsdp=two", "mesh.fsdp: must be a whole number"),
        ("mesh=fsdp=2,", 'mesh: must be .*, got "fsdp=2,"'),
        ("mesh.model=2", "mesh: no axis 'model'; there are data, fsdp, expert, tensor"),
        ("mesh.fsdp.x=2", "mesh: no axis 'fsdp.x'"),
    ],
)
def test_mistakes_name_the_key(example, change, words):
    with pytest.raises(sx.SboraxError, match=words):
        override(example[0], [change])


def test_one_parser():
    assert read_mesh(["fsdp=2", "tensor=2"]) == read_mesh(["fsdp=2,tensor=2"]) == read_mesh([str(SIZES)]) == SIZES
    assert read_mesh([]) == {} and with_mesh(["steps=1"], None) == ["steps=1"]
    for words in (["fsdp"], ["fsdp=2,"], ["fsdp=x"], [""], ["fsdp=2.5"]):
        with pytest.raises(sx.SboraxError, match="--mesh .*: write sizes of axes, such as fsdp=8,tensor=2"):
            read_mesh(words)


@pytest.mark.nightly
def test_commands(example, tmp_path, capsys):
    _, model, config = example
    plans = []
    for words in (["--mesh", "fsdp=2,tensor=2"], SPELLINGS[0]):
        assert main(["plan", config, "--length", "16", *words]) == 0
        plans.append(capsys.readouterr().out)
        assert "bytes on each of 4 devices (fsdp 2 x tensor 2)" in plans[-1]
    assert len(set(plans)) == 1
    assert main(["plan", model, "--length", "16", "--mesh", "fsdp=2,tensor=2"]) == 0
    assert "bytes on each of 4 devices (fsdp 2 x tensor 2)" in capsys.readouterr().out
    assert main(["train", config, "--mesh", "fsdp=2,tensor=2", "--out", str(tmp_path / "run")]) == 0
    assert "mesh: fsdp 2 x tensor 2 of 8 devices" in capsys.readouterr().out
    assert sx.load_experiment(str(tmp_path / "run")).mesh == SIZES
    texts = []
    for words in ([], ["--mesh", "fsdp=2,tensor=2"]):
        prompts = ["--prompt", "1 plus 1?", "--max-new-tokens", "4"]
        assert main(["generate", str(tmp_path / "run"), *prompts, *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
