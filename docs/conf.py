"""Builds the site from docs/: `python -m sphinx -W --keep-going docs site`. Every page is plain Markdown.

Three kinds of comments in a page are replaced: `<!-- methods -->` by what `sborax methods` prints of each method,
`<!-- api: NAME NAME -->` by signatures and docstrings, and `<!-- options: COMMAND -->` by the options of a command. A
public name or a command that is not on exactly one page is an error.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError

import sborax
from sborax import methods
from sborax.cli.main import _parser
from sborax.cli.methods import describe

project = "sborax"
release = sborax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "sborax"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
python_maximum_signature_line_length = 90
autodoc_preserve_defaults = True

METHODS = re.compile(r"<!-- methods -->")
API = re.compile(r"<!-- api: (.*?) -->", re.DOTALL)
OPTIONS = re.compile(r"<!-- options: (\w+) -->")
EVERY = "every"
"""Stands for the options that all commands have."""


def check(app: Any) -> None:
    """Raise ExtensionError unless every public name and every command is on a page, once."""
    pages = [page.read_text() for page in Path(app.srcdir).glob("*.md")]
    shown = [name for page in pages for names in API.findall(page) for name in names.split()]
    shown += [name for page in pages for _ in METHODS.findall(page) for name in methods.__all__]
    shown += [f"sborax {command}" for page in pages for command in OPTIONS.findall(page)]
    known = {*sborax.__all__, *(f"sborax {command}" for command in [*commands(), EVERY])}
    wrong = sorted(known ^ set(shown)) + sorted({name for name in shown if shown.count(name) > 1})
    if wrong:
        raise ExtensionError(f"not on exactly one page of docs/: {', '.join(wrong)}")


def fill(app: Any, page: str, source: list[str]) -> None:
    """Put generated text into a page, and the tree of pages into the first one."""
    text = METHODS.sub(lambda _: "\n".join(map(of_method, methods.__all__)), source[0])
    text = API.sub(lambda match: "\n".join(map(of_name, match[1].split())), text)
    text = OPTIONS.sub(lambda match: of_command(match[1]), text)
    source[0] = text + contents(app, text) if page == app.config.root_doc else text


def of_method(name: str) -> str:
    text = describe(name).partition("\n")[2]
    lines = [line.removeprefix("  ") for line in text.splitlines()]
    return "\n".join([f"## {name}", "", "```text", *lines, "```", ""])


def of_name(name: str) -> str:
    kind = "autoclass" if isinstance(getattr(sborax, name), type) else "autofunction"
    return "\n".join([f"### {name}", "", "```{eval-rst}", f".. {kind}:: sborax.{name}", "```", ""])


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command."""
    return next(action.choices for action in _parser()._actions if action.dest == "command")


def of_command(command: str) -> str:
    """The options of a command as a table, without those that all commands have; `EVERY` for the latter."""
    options = {name: options_of(parser) for name, parser in commands().items()}
    common = set.intersection(*map(set, options.values()))
    chosen = next(iter(options.values())) if command == EVERY else options[command]
    rows = [row for row in chosen if (row in common) == (command == EVERY)]
    if not rows:
        return "It has no options of its own."
    return "\n".join(["| option | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows)])


def options_of(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """Each argument as it is written, and its help."""
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.dest == "help":
            continue
        value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest
        words = [*action.option_strings] if action.nargs == 0 else [*action.option_strings, str(value)]
        rows.append((" ".join(words), (action.help or "") % vars(action)))
    return [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]


def contents(app: Any, first: str) -> str:
    """The pages in the order in which the first one links to them, then whatever else there is."""
    linked = re.findall(r"\]\((\w+)\.md\)", first)
    others = sorted(app.env.found_docs - {app.config.root_doc})
    return "\n".join(["", "```{toctree}", ":hidden:", "", *dict.fromkeys([*linked, *others]), "```", ""])


def verbatim(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Show docstrings as they are: plain text with equations, not reStructuredText."""
    if lines:
        lines[:] = [".. code-block:: text", "", *(f"   {line}" for line in lines), ""]


def setup(app: Any) -> None:
    app.connect("builder-inited", check)
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", verbatim)
