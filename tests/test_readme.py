"""README says what is so: its code runs, its tables are those of the code, its files exist."""

import re
import runpy
import typing
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_model

import sborax as sx
from sborax import procedures
from sborax.cli.main import _parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_table_lists_every_procedure_and_the_text_every_optimiser():
    section = README.partition("## Procedures and optimisers")[2].partition("## Speed")[0]
    known = {name for name in procedures.__all__ if isinstance(getattr(procedures, name), type)}
    concrete = {name for name in known if issubclass(getattr(procedures, name), procedures.AbstractProcedure)}
    listed = re.findall(r"^\| `(\w+)`", section, re.MULTILINE)
    assert sorted(listed) == sorted(concrete - {"AbstractProcedure"})
    assert all(getattr(sx, name) is getattr(procedures, name) for name in listed)
    for name in typing.get_args(typing.get_type_hints(sx.Optimizer)["name"]):
        assert f"`{name}`" in section


def test_every_command_is_shown():
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    shown = set(re.findall(r"^sborax (\w+)", blocks, re.MULTILINE)) | {"quickstart"}
    commands = next(action.choices for action in _parser()._actions if action.dest == "command")
    assert shown == set(commands)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name):
    text = (ROOT / name).read_text()
    named = re.findall(r"\]\(([^)#:]+)\)|(?:bash |`|sborax \w+ )(\w+/[\w/]+\.(?:sh|py))", text)
    assert named
    yours = {f"sborax/{room}/yours.py" for room in ("methods", "procedures")}
    for path in {first or second for first, second in named} - yours:
        assert (ROOT / path).exists(), path


def test_the_experiment_is_one():
    (block,) = (block for block in BLOCKS if "def experiment" in block)
    names = {}
    exec(block, names)
    assert isinstance(names["experiment"](), sx.Experiment)


def test_the_example_runs_and_learns(tmp_path, capsys):
    (block,) = (block for block in BLOCKS if "MODEL" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 18
    names = {"MODEL": write_model(tmp_path / "model")}
    exec(block, names)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10 and losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["fine_tune_linen", "fine_tune_nnx"])
def test_any_flax_model_learns(name):
    example = runpy.run_path(str(ROOT / "examples" / "any_flax_model.py"))
    losses, adapted, merged = example[name](steps=40)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    np.testing.assert_allclose(adapted, merged, rtol=0, atol=1e-4)
