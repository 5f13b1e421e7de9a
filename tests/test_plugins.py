"""Classes of a user's own: told apart from sborax's, and taken by every command."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from tiny_model import write_data, write_model

import sborax as sx
from sborax.adapters.core import AbstractMethod, SboraxError
from sborax.cli import main
from sborax.cli.methods import find
from sborax.config.classes import check_imported, import_source, load_plugins
from sborax.config.codec import decode, encode
from sborax.methods.bone import Bone

CLASHING = '''
import dataclasses

from sborax.methods import bone


@dataclasses.dataclass(frozen=True)
class Bone(bone.Bone):
    """Bone of half the strength."""

    def add_to(self, y, x, adapter, ctx):
        return y + 0.5 * (super().add_to(y, x, adapter, ctx) - y)

    def add_to_weight(self, weight, adapter):
        return weight + 0.5 * (super().add_to_weight(weight, adapter) - weight)
'''
PROJECTED = '''
import dataclasses

import jax
import jax.numpy as jnp

from sborax.adapters.core import AbstractFactored, Fitted, cast, check_rank


@dataclasses.dataclass(frozen=True)
class Projected(AbstractFactored):
    """y = x W + (x a) b, a frozen."""

    paper = "an example"
    rank: int = 8

    @property
    def axes(self):
        return {"a": ("in", "rank"), "b": ("rank", "out")}

    def check(self, shape):
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key, weight, hint):
        a = jax.random.normal(key, (weight.shape[0], self.rank)) / weight.shape[0] ** 0.5
        return Fitted(train={"b": jnp.zeros((self.rank, weight.shape[1]))}, frozen={"a": a})

    def add_to(self, y, x, adapter, ctx):
        return y + (x @ cast(adapter.frozen["a"], x)) @ cast(adapter.train["b"], x)

    def add_to_weight(self, weight, adapter):
        return weight + adapter.frozen["a"] @ adapter.train["b"]

    def factors(self, adapter, shape):
        return adapter.frozen["a"], adapter.train["b"]
'''
EXPERIMENT = """
import sborax as sx
{imports}

def experiment():
    return sx.Experiment(
        model={model!r},
        data=sx.Data(name={data!r}, template="chat", max_length=96),
        rules=(("q_proj", {method}),),
        optimizer=sx.Optimizer(lr=1e-1, schedule="constant", warmup=0),
        steps=2,
        batch_size=2,
        save=sx.Save(every=1, best=True),
        eval=sx.Eval(data=sx.Data(name={data!r}, template="chat", max_length=96), every=1),
    )
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    (folder / "text.txt").write_text("".join(f"{a} plus {a} is {2 * a}. " for a in range(40)))
    return folder


def write_source(workshop: Path, folder: Path, name: str, imports: str, method: str) -> Path:
    file = folder / name
    text = EXPERIMENT.format(
        imports=imports, model=str(workshop / "model"), data=str(workshop / "data.jsonl"), method=method
    )
    file.write_text(text)
    return file


def fails(capsys, *argv) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def prints(capsys, *argv) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def test_a_class_with_the_name_of_a_builtin_one_stays_itself(workshop, tmp_path, capsys):
    source = write_source(workshop, tmp_path, "clashing_bone.py", CLASHING, "Bone(rank=4)")
    prints(capsys, "train", source, "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["rules"][0]["method"]["type"] == "clashing_bone:Bone"
    for place in ("adapter", "best"):
        plan = json.loads((tmp_path / "run" / place / "plan.json").read_text())
        assert plan["sites"][0]["method"]["type"] == plan["rules"][0]["method"]["type"] == "clashing_bone:Bone"
    experiment = sx.load_experiment(str(tmp_path / "run"))
    assert type(experiment.rules[0].method) is not Bone
    assert type(experiment.rules[0].method).__module__.endswith("clashing_bone")


def test_a_builtin_name_alone_is_ours_whatever_is_imported(tmp_path):
    (tmp_path / "made_bone.py").write_text(CLASHING)
    namesake = vars(sys.modules[import_source(str(tmp_path / "made_bone.py"))])["Bone"]
    assert type(decode(AbstractMethod, {"type": "Bone"})) is Bone
    assert type(decode(AbstractMethod, encode(namesake(rank=3)))) is namesake
    assert decode(AbstractMethod, encode(namesake(rank=3))) != Bone(rank=3)
    assert encode(Bone())["type"] == "Bone"


def test_a_name_of_two_methods_needs_the_module(tmp_path):
    for name in ("first_pair", "second_pair"):
        (tmp_path / f"{name}.py").write_text(PROJECTED.replace("class Projected", "class Paired"))
        import_source(str(tmp_path / f"{name}.py"))
        if name == "first_pair":
            assert find("paired").__module__ == name
    with pytest.raises(SboraxError, match="several methods: first_pair:Paired, second_pair:Paired; give the module"):
        find("Paired")
    assert find("second_pair:paired").__module__ == "second_pair"


def test_a_class_that_is_not_imported_is_one_line_that_says_what_to_import():
    with pytest.raises(SboraxError, match="--import absent_module.py") as caught:
        decode(AbstractMethod, {"type": "absent_module:Bone"})
    assert "\n" not in str(caught.value)


def test_a_method_in_a_file_goes_through_every_command(workshop, tmp_path, capsys, monkeypatch):
    file, run = tmp_path / "made_projection.py", tmp_path / "run"
    file.write_text(PROJECTED)
    source = write_source(
        workshop, tmp_path, "of_made_projection.py", "from made_projection import Projected\n", "Projected(4)"
    )
    with_file = ["--import", file]
    prints(capsys, "train", source, "--out", run, "steps=1", *with_file)
    monkeypatch.delitem(sys.modules, "made_projection")
    # As in another process: nothing is imported for the sake of a config.json.
    for words in (["generate", run, "--prompt", "1"], ["merge", run, tmp_path / "no"], ["plan", run]):
        line = fails(capsys, *words)
        assert line.endswith(f"if you trust that code, add --import {file}"), line
        assert "made_projection" not in sys.modules
    prints(capsys, "train", run / "config.json", "steps=2", "--out", run, "--resume", *with_file)
    config = json.loads((run / "config.json").read_text())
    assert config["rules"][0]["method"] == {"type": "made_projection:Projected", "rank": 4}
    assert config["imports"] == [str(file)]
    prints(capsys, "generate", run, "--prompt", "1 plus 1?", "--max-new-tokens", "2", *with_file)
    prints(capsys, "generate", run / "best", "--prompt", "1 plus 1?", "--max-new-tokens", "2", *with_file)
    words = ["--tasks", "wikitext2_128", "--limit", "1", "--data", f"wikitext2_128={workshop / 'text.txt'}"]
    prints(capsys, "eval", run, *words, "--out", tmp_path / "scores", *with_file)
    prints(capsys, "merge", run, tmp_path / "dense", *with_file)
    assert prints(capsys, "methods", "made_projection:projected", *with_file).startswith("made_projection:Projected")
    assert "exact" in prints(capsys, "export", run, tmp_path / "peft", *with_file)
    peft = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(b"old")
    (tmp_path / "peft" / "notes.txt").write_text("mine")
    line = fails(capsys, "export", run, tmp_path / "peft", *with_file)
    assert line.endswith("is not an empty directory; choose another OUT_DIR, or --overwrite an earlier export")
    assert "exact" in prints(capsys, "export", run, tmp_path / "peft", "--overwrite", *with_file)
    final = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    assert final == peft | {"notes.txt": b"mine"}
    assert "Projected(rank=4)" in prints(capsys, "plan", run, *with_file)
    changed = prints(capsys, "plan", run, "rules.0.method=made_projection:Projected", *with_file)
    assert "Projected(rank=8)" in changed
    half = sys.modules["made_projection"].Projected(4.5)
    with pytest.raises(sx.SboraxError, match="Projected: rank must be a whole number, got 4.5"):
        sx.plan({"proj": {"kernel": jnp.ones((8, 8))}}, [("proj", half)])
    prints(capsys, "sweep", run, "optimizer.lr=1e-2,1e-3", "save.best=false", "--out", tmp_path / "two", *with_file)
    prints(capsys, "generate", tmp_path / "two" / "lr=1e-2", "--prompt", "1", "--max-new-tokens", "1", *with_file)


@pytest.mark.nightly
def test_a_run_of_a_method_in_a_file_is_cut_smaller(workshop, tmp_path, capsys, monkeypatch):
    file, run, small = tmp_path / "made_pruned.py", tmp_path / "run", tmp_path / "small"
    file.write_text(PROJECTED)
    source = write_source(
        workshop, tmp_path, "of_made_pruned.py", "from made_pruned import Projected\n", "Projected(4)"
    )
    procedure = {"type": "LoRAPrune", "metric": "magnitude", "warmup": 0, "cooldown": 0.3, "every": 1, "protect": 0}
    changes = ["rules.0.pattern=self_attn|mlp", f"procedure={json.dumps(procedure)}", "steps=4", "save.best=false"]
    prints(capsys, "train", source, "--out", run, *changes, "--import", file)
    monkeypatch.delitem(sys.modules, "made_pruned")
    assert fails(capsys, "slim", run, small).endswith(f"if you trust that code, add --import {file}")
    assert "made_pruned" not in sys.modules and not small.exists()
    output = prints(capsys, "slim", run, small, "--import", file)
    masked, cut = (re.search(rf"{words}: [\d.]+ \(loss ([\d.]+)\)", output)[1] for words in ("masked", "cut out"))
    assert float(cut) == pytest.approx(float(masked), abs=2e-4)
    assert "- projected\n- pruned\n" in (small / "README.md").read_text()
    # A smaller model needs the method no more.
    monkeypatch.delitem(sys.modules, "made_pruned")
    prints(capsys, "generate", small, "--prompt", "1 plus 1?", "--max-new-tokens", "1")
    assert "made_pruned" not in sys.modules


def test_suggestions_name_no_internals():
    with pytest.raises(SboraxError) as caught:
        decode(AbstractMethod, {"type": "Projectd"})
    assert not {"PromptRouter", "Scaled", "Masked", "Chain"} & set(str(caught.value).replace("?", " ").split())
    assert type(decode(AbstractMethod, {"type": "lora"})).__name__ == "LoRA"


def test_an_entry_point_is_loaded_when_a_name_is_not_known(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "made_package.py").write_text(PROJECTED)
    place = tmp_path / "made_package-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: made-package\nVersion: 1.0\n")
    (place / "entry_points.txt").write_text("[sborax.plugins]\nmade = made_package\n")
    load_plugins.cache_clear()
    decode(AbstractMethod, {"type": "LoRA"})
    assert "made_package" not in sys.modules
    check_imported(["made_package"], "config.json")
    assert type(decode(AbstractMethod, {"type": "made_package:Projected"})).__module__ == "made_package"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("json.py", "", "there is another module json"),
        ("two-words.py", "", "rename the file"),
        ("absent.py", None, "no such file"),
        ("failing_module.py", "1 / 0", "ZeroDivisionError"),
        ("no_such_module", None, "ModuleNotFoundError"),
    ],
)
def test_imports_that_fail(tmp_path, name, text, words, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    source = tmp_path / name if name.endswith(".py") else name
    assert words in fails(capsys, "methods", "--import", source)


OTHERS = """
import dataclasses
from typing import ClassVar

import optax

from sborax import AbstractOptimizer
from sborax.data.template import AbstractTemplate, Piece
from sborax.evaluate import AbstractTask
from sborax.evaluate.task import Measured, mean
from sborax.models.families import Family
from sborax.procedures import COLA


@dataclasses.dataclass(frozen=True)
class Heavy(AbstractOptimizer):
    lr: float = 1e-2
    momentum: float = 0.5

    def rate(self, steps):
        return optax.constant_schedule(self.lr)

    def build(self, lr):
        return optax.sgd(lr, self.momentum)


@dataclasses.dataclass(frozen=True)
class Patient(COLA):
    pass


class Asked(AbstractTemplate):
    def pieces(self, record, tokenizer):
        return [Piece(f"{record['instruction']} = ", False), Piece(record["output"], True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths(AbstractTask):
    name: str = "lengths"
    data: str = "none"
    about: str = "length of a text"

    def check(self):
        pass

    def units(self, scorer):
        return [{"text": "ab"}, {"text": "abcd"}]

    def measure(self, units, scorer, seed):
        return Measured({"length": mean([float(len(unit["text"])) for unit in units])}, [{} for _ in units])


@dataclasses.dataclass(frozen=True)
class Newer(Family):
    model_type: ClassVar[str] = "newer"
    causal_lm: str = "NewerForCausalLM"
    optional: frozenset = frozenset({"attention_bias", "mlp_bias"})
"""


def test_optimisers_procedures_templates_tasks_and_families(workshop, tmp_path, capsys):
    file, run, model = tmp_path / "made_others.py", tmp_path / "run", tmp_path / "model"
    file.write_text(OTHERS)
    shutil.copytree(workshop / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "newer"}))
    source = write_source(workshop, tmp_path, "of_made_others.py", "", "sx.LoRA(4)")
    procedure = '{"type": "made_others:Patient", "every": 1}'
    changes = [f"model={model}", 'optimizer={"type": "heavy", "momentum": 0.5}', f"procedure={procedure}"]
    changes += ["data.template=Asked", "eval.data=null", "eval.every=null", "save.best=false", "eval.tasks=['lengths']"]
    assert "model_type 'newer' is not supported" in fails(capsys, "plan", model)
    output = prints(capsys, "train", source, "--out", run, *changes, "--import", file)
    assert "lengths: length 3.0000" in output
    raw = json.loads((run / "config.json").read_text())
    assert raw["optimizer"] == {"type": "made_others:Heavy", "lr": 1e-2, "momentum": 0.5}
    assert raw["procedure"]["type"] == "made_others:Patient" and raw["imports"] == [str(file)]
    prints(capsys, "export", run, tmp_path / "peft", "--import", file)
    assert ", Heavy, " in (tmp_path / "peft" / "README.md").read_text()
    words = ["--template", "Asked", "--prompt", "1 plus 1?", "--max-new-tokens", "1", "--import", file]
    prints(capsys, "generate", run, *words)
    assert "lengths" in prints(capsys, "tasks", "--import", file)
    assert "did you mean lengths" in fails(capsys, "eval", run, "--tasks", "length", "--import", file)
    grid = ["optimizer.lr=1e-2,1e-3", "optimizer.momentum=0.25", "procedure=null", "--out", tmp_path / "two"]
    assert "2 members" in prints(capsys, "sweep", run, *grid, "--import", file)


def test_an_export_is_not_overwritten(workshop, tmp_path, capsys):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "notes.txt").write_text("mine")
    assert "not an empty directory" in fails(capsys, "export", tmp_path, tmp_path / "peft")
    assert "notes.txt: exists and is not a directory" in fails(
        capsys, "export", tmp_path, tmp_path / "peft" / "notes.txt", "--overwrite"
    )


def test_data_of_a_task_is_looked_for_before_the_model(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SBORAX_DATA", raising=False)
    assert "ARC-Easy: not under $SBORAX_DATA" in fails(capsys, "eval", tmp_path / "absent", "--tasks", "arc_easy")
    line = fails(capsys, "eval", tmp_path / "absent", "--tasks", "arceasy")
    assert "there is no task 'arceasy'; did you mean arc_easy" in line


def test_types_are_shipped():
    assert (Path(sx.__file__).parent / "py.typed").exists()
