"""Finds and tries the code blocks on a page of docs/.

A page is tried from top to bottom, in its own directory and namespace. Python runs; a block whose first line is
`# NAME.py` is also written to that file. Of bash, `sborax` runs in this process and a few tools run directly; for other
programs, arguments and files are checked. A block that begins with `# not run in the tests: REASON` is checked, too:
its commands by the real parser, and its imports from sborax. Text must have been printed by the block before.
"""

import ast
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markdown_it import MarkdownIt

from sborax.cli import main
from sborax.cli.main import _parse

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOT_RUN = re.compile(r"# not run in the tests: \w+")
MARK = "# not run"
FETCHED = '"$(python -m sborax.cli.fetch)"'
TOOLS = ("cat", "cp", "ls", "tail")
LAUNCHERS = ("mpirun", "sbatch", "srun")
PLACEHOLDERS = {"N": "1", "I": "0", "HOST:PORT": "localhost:1"}
"""Placeholders for the reader's values, each with a value that the parser accepts."""


class Block(NamedTuple):
    """One fenced block: its first line, its language, and its text."""

    line: int
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    fences = (token for token in MarkdownIt("commonmark").parse(page.read_text()) if token.type == "fence")
    return [Block((token.map or [0])[0] + 1, token.info.strip(), token.content) for token in fences]


def commands(code: str) -> Iterator[str]:
    """The commands of a bash block, without comments and blank lines."""
    for line in code.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line


def try_page(page: Path, model: str) -> int:
    """Try every block in the current directory, and return how many ran. Raises what they raise, and AssertionError."""
    names: dict[str, Any] = {"__name__": page.stem, "MODEL": model}
    printed, ran = "", 0
    for block in blocks(page):
        untried = NOT_RUN.match(block.code) is not None
        assert untried == (MARK in block.code), f"{page.name}:{block.line}: say `# not run in the tests: REASON` first"
        try:
            if block.language == "text":
                _check_printed(block.code, printed)
                continue
            with contextlib.redirect_stdout(io.StringIO()) as output:
                _try(block, names, model, untried)
        except BaseException as error:
            error.add_note(f"in the block at {page.name}:{block.line}")
            raise
        printed, ran = output.getvalue(), ran + (not untried)
    return ran


def _try(block: Block, names: dict[str, Any], model: str, untried: bool) -> None:
    if block.language == "python":
        (_import if untried else _run)(block.code, names)
    elif block.language == "bash":
        for line in commands(block.code):
            try_command(line.replace(FETCHED, model), run=not untried)
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "yaml":
        yaml.safe_load(block.code)
    elif block.language == "toml":
        tomllib.loads(block.code)
    else:
        raise AssertionError(f"unknown language {block.language!r}; use python, bash, json, yaml, toml or text")


def _run(code: str, names: dict[str, Any]) -> None:
    if name := re.match(r"# (\w+\.py)\n", code):
        Path(name[1]).write_text(code)
    exec(compile(code, names["__name__"], "exec"), names)


def _import(code: str, names: dict[str, Any]) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sborax"):
            for alias in node.names:
                getattr(importlib.import_module(node.module or ""), alias.name)


def _check_printed(code: str, printed: str) -> None:
    words = " ".join(printed.split())
    for line in code.splitlines():
        assert " ".join(line.split()) in words, f"{line!r} was not printed, but:\n{printed}"


def try_command(line: str, run: bool) -> None:
    """Try one line of bash. Raises AssertionError if it fails or its program is unknown."""
    words = shlex.split(line, comments=True)
    words = list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), words))
    words = words[:-1] if words[-1] == "&" else words
    program, *arguments = words
    if program == "sborax":
        _sborax(arguments, run)
    elif program in ("bash", "source"):
        assert arguments[0] == ".venv/bin/activate" or (ROOT / arguments[0]).is_file(), line
    elif program == "python":
        _python(arguments)
    elif program == "pip":
        _pip(arguments)
    elif program in TOOLS and run:
        process = subprocess.run(words, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        print(process.stdout)
    elif program in LAUNCHERS:
        assert "sborax" in arguments or any((ROOT / word).is_file() for word in arguments), line
    else:
        assert program == "export" or program in TOOLS, f"unknown program: {line!r}"


def _sborax(arguments: list[str], run: bool) -> None:
    parsed = _parse([PLACEHOLDERS.get(word, word) for word in arguments])
    if run:
        assert parsed.command != "quickstart", "it takes minutes"
        with contextlib.redirect_stderr(io.StringIO()) as complaint:
            code = main(arguments)
        assert code == 0, complaint.getvalue()


def _python(arguments: list[str]) -> None:
    """Check that a program has the options that it is given."""
    module = arguments[0] == "-m"
    program, *words = arguments[1:] if module else arguments
    options = [word for word in words if word.startswith("--")]
    source = ROOT / (f"{program.replace('.', '/')}/__main__.py" if module else program)
    source = source if source.is_file() else ROOT / f"{program.replace('.', '/')}.py"
    assert source.is_file(), f"there is no {program}"
    text = source.read_text()
    for option in options:
        assert f'"{option}"' in text, f"{program} has no option {option}"


def _pip(arguments: list[str]) -> None:
    """Check that the extras to install exist."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(word for word in arguments if "jax[" not in word)):
        assert set(extras.split(",")) <= set(groups), extras


def build_site(place: Path) -> None:
    """Build the site in `place`. Raises AssertionError with the first warning or error."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", f"{place}/trees", DOCS, place / "html"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert process.returncode == 0, process.stderr
