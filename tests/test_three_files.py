"""Adding a method touches three files: a copy of the checkout gets the worked example of docs/adding_a_method.md."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, ROOT, blocks

NAME = "Projected"
CONTRACT = ["test_contract.py", "test_finite.py"]
OTHERS = ["test_structure.py", "test_cli.py"]
SELECTED = f"{NAME} or test_structure.py or test_methods_tells_of_every_method"
TABLES = """
import runpy, types
conf = runpy.run_path("docs/conf.py")
conf["check"](types.SimpleNamespace(srcdir="docs"))
print(conf["method_row"]("Projected"), conf["peft_row"]("Projected"), conf["method_section"]("Projected"), sep="\\n")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with one method more: a new file, a line, a row."""
    place = tmp_path_factory.mktemp("checkout")
    for folder in ("sborax", "tests", "docs"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / file, place)
    (code,) = (block.code for block in blocks(DOCS / "adding_a_method.md") if f"class {NAME}" in block.code)
    (place / "sborax" / "methods" / "projected.py").write_text(code)
    line = f"from sborax.methods.projected import {NAME} as {NAME}\n"
    row = f'    Case("{NAME}", sx.{NAME}(rank=4), lambda i, o: 4 * o),\n'
    insert(line, "from sborax.methods.randlora", place / "sborax" / "methods" / "__init__.py")
    insert(row, '    Case("chain"', place / "tests" / "cases.py")
    return place


def insert(line: str, anchor: str, file: Path) -> None:
    """Insert a line before the one that begins with `anchor`."""
    head, match, tail = file.read_text().partition(f"\n{anchor}")
    assert match
    file.write_text(f"{head}\n{line}{anchor}{tail}")


def run(checkout: Path, *arguments: str) -> str:
    """The output of Python in the copy."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=checkout, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.nightly
def test_the_contract_takes_the_method(checkout):
    files = [f"tests/{name}" for name in (*CONTRACT, *OTHERS)]
    report = run(checkout, "-m", "pytest", "-q", "-n", "0", *files, "-k", SELECTED)
    assert "skipped" not in report and "failed" not in report


def test_the_tables_of_the_documentation_have_it(checkout):
    method, peft, *section = run(checkout, "-c", TABLES).splitlines()
    assert method.startswith(f"| [{NAME}](#projected) | `` y = x W + (x a) b, a ~ N(0, 1/in) frozen, b = 0 at init. ``")
    assert peft.startswith(f"| `{NAME}` | - | LORA |") and peft.endswith("| exact |")
    assert f"## {NAME}" in section and any(line.startswith("options: rank=8") for line in section)


@pytest.mark.nightly
def test_every_test_of_a_row_takes_the_method(checkout):
    for folder in ("benchmarks", "experiments", "examples", "scripts"):
        shutil.copytree(ROOT / folder, checkout / folder, dirs_exist_ok=True)
    ours = ("--ignore", "tests/test_three_files.py")
    run(checkout, "-m", "pytest", "-q", "-n", "0", "-m", "", "-k", NAME, *ours, "tests")
