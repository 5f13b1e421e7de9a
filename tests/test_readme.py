"""README is true: its code runs, its tables are those of the code, its files exist."""

import inspect
import re
import runpy
import typing
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_model

import sborax as sx
from sborax import methods, procedures
from sborax.adapters.core import AbstractFactored
from sborax.adapters.depth import AbstractLinked
from sborax.cli.main import make_parser
from sborax.interop.peft_table import TABLE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_the_table_of_families_names_methods_once():
    table = README.partition("## Methods")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")]
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert len(named) == len(set(named)) and set(named) <= set(methods.__all__)


def test_there_are_as_many_methods_as_it_says():
    """A later method may make it too modest."""
    classes = {name: getattr(methods, name) for name in methods.__all__}
    read = {row.method for row in TABLE}.intersection(classes.values())
    native = {row.method for row in TABLE if row.write}
    thin = (AbstractFactored, AbstractLinked)
    exports = [method for method in classes.values() if method in native or issubclass(method, thin)]
    counts = re.search(r"\| methods \| (\d+), .*; (\d+) are read from PEFT's files, (\d+) are written as such", README)
    assert counts is not None
    assert all(int(count) <= len(group) for count, group in zip(counts.groups(), (classes, read, exports), strict=True))


def test_every_procedure_and_optimiser_is_named():
    section = README.partition("## Procedures and optimisers")[2].partition("\n## ")[0]
    kinds = {name: getattr(procedures, name) for name in procedures.__all__}
    concrete = [
        name
        for name, kind in kinds.items()
        if issubclass(kind, procedures.AbstractProcedure) and not inspect.isabstract(kind)
    ]
    listed = [name for name in re.findall(r"`(\w+)`", section.partition("Optimisers")[0]) if name in kinds]
    assert sorted(listed) == sorted(concrete)
    assert all(getattr(sx, name) is getattr(procedures, name) for name in listed)
    for name in typing.get_args(typing.get_type_hints(sx.Optimizer)["name"]):
        assert f"`{name}`" in section


def test_findings_are_those_of_the_results():
    """Each difference and each interval, rounded, stands in the claims that the studies made."""
    results = (ROOT / "docs" / "RESULTS.md").read_text()
    number = r"([+-]?\d+\.\d+)"
    claims = {
        tuple(float(value) for value in values)
        for values in re.findall(
            rf"{number}(?: times)? \((?:[^()]*items, )?{number} \.\. {number} over seeds\)", results
        )
    }
    findings = re.findall(rf"{number}(?: times)? \({number} \.\. {number}\)", README.partition("| figure |")[0])
    assert len(findings) == 9
    for values in findings:
        assert any(
            all(abs(float(value) - reference) <= 0.0006 for value, reference in zip(values, exact, strict=True))
            for exact in claims
        ), values


def test_every_command_is_shown():
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    examples = set(re.findall(r"^sborax (\w+)", blocks, re.MULTILINE)) | {"quickstart"}
    commands = next(action.choices for action in make_parser()._actions if action.dest == "command")
    assert examples == set(commands)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name):
    text = (ROOT / name).read_text()
    named = re.findall(r"\]\(([^)#:]+)\)|(?:bash |`|sborax \w+ )(\w+/[\w/]+\.(?:sh|py))", text)
    assert named
    yours = {f"sborax/{room}/yours.py" for room in ("methods", "procedures")}
    for path in {first or second for first, second in named} - yours:
        assert (ROOT / path).exists(), path


def test_the_example_runs_and_learns(tmp_path, capsys):
    (block,) = BLOCKS
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
