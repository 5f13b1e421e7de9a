"""The house keeps its order: imports flow one way, and Flax stays in one room."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
PACKAGE = Path(__file__).resolve().parents[1] / "sborax"
ORDER = [
    "errors",
    "adapters",
    "methods",
    "optim",
    "procedures",
    "config",
    "models",
    "interop",
    "data",
    "layout",
    "records",
    "train",
    "sweep",
    "plans",
    "evaluate",
    "cli",
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__main__.py",) and path.parent != PACKAGE)
ROOT = ("__init__.py", "__main__.py", "public.py")
"""Files of the package itself, which may import everything."""
MODULES += sorted(path for path in PACKAGE.glob("*.py") if path.name not in ROOT)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path):
    home = room(path)
    assert home in ORDER, f"{home} has no place in the order"
    for name in imported(path):
        if name.startswith("sborax."):
            target = name.split(".")[1]
            if target in ORDER:
                assert ORDER.index(target) <= ORDER.index(home), f"{home} imports {target}"
        if name.split(".")[0] == "flax":
            assert home == "models"
            assert "nnx" not in name or path.name == "nnx.py"


def test_imports_have_no_circles():
    dotted = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES}
    graph = {name: imported(path) & set(dotted.values()) for path, name in dotted.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_root_has_a_place_for_everything():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    assert entries - {"py.typed", "public"} == set(ORDER)
    assert len(ORDER) <= 16


def test_contributors_find_every_room_and_file():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    rooms, files = (
        page.partition(head)[2].partition("\n\n")[0] for head in ("| folder | holds |", "| to change | touch |")
    )
    assert re.findall(r"^\| `(\w+)(?:/|\.py)` \|", rooms, re.M) == ORDER
    named = re.findall(r"`([\w/]+(?:\.py|/))`", files)
    assert named
    for name in named:
        assert "yours" in name or (PACKAGE / name).exists() or (PACKAGE.parent / name).exists(), name


def test_no_method_is_named_in_shared_code():
    names = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__", "lowrank"}
    for shared in (PACKAGE / "adapters").glob("*.py"):
        for name in imported(shared):
            assert not (name.startswith("sborax.methods") or name.split(".")[-1] in names)


def test_paths_are_written_in_one_file():
    writing = [path for path in MODULES if re.search(r"keystr|key\.key", path.read_text())]
    assert [path.name for path in writing] == ["leaves.py"]


def test_methods_stay_small():
    lines = {path.name: len(path.read_text().splitlines()) for path in (PACKAGE / "methods").glob("*.py")}
    assert {name: count for name, count in lines.items() if count > 130} == {}


def test_importing_the_package_imports_none_of_the_slow_ones():
    """And no transformers before the command line has silenced it."""
    slow = {"flax", "transformers", "orbax", "datasets", "grain", "torch"}
    code = f"import sys, sborax, sborax.cli.main; print(sorted({slow} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_printed_goes_through_one_place(path: Path):
    """Names of strangers could be what a terminal obeys. The launcher hands on lines that its child has printed."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    prints = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert not prints or path.name in ("terminal.py", "launcher.py")
