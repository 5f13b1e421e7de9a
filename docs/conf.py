"""How docs/ becomes a site: `python -m sphinx -W --keep-going docs site`. Every page is plain Markdown.

Comments in a page are filled in:

- `<!-- method table -->`: a row for every method, its name, the first sentence of its docstring, and its paper;
- `<!-- methods -->`: a section for every method, with what `sborax methods NAME` prints;
- `<!-- peft table -->`: a row for every method, how it goes to PEFT and comes back;
- `<!-- api: NAME NAME -->`: signatures and docstrings of public names, verbatim;
- `<!-- options: COMMAND -->`: the options of a command.

A public name or a command that is not on exactly one page is an error.
"""

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError

import sborax
from sborax import methods
from sborax.adapters.core import AbstractFactored, AbstractMethod, SboraxError
from sborax.adapters.depth import AbstractLinked
from sborax.cli.main import make_parser
from sborax.cli.methods import describe
from sborax.config.classes import instance
from sborax.interop.peft_table import PLAIN, TABLE

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

API = re.compile(r"<!-- api: (.*?) -->", re.DOTALL)
OPTIONS = re.compile(r"<!-- options: (\w+) -->")
EVERY = "every"
"""Stands for the options that all commands have."""

SENTENCE = re.compile(r".*?(?<!\.)\.(?=\s|$)", re.DOTALL)
"""Up to the first full stop; `...` inside an equation is none."""


def check(app: Any) -> None:
    """Raise ExtensionError unless every public name and every command is on a page, once."""
    pages = [page.read_text() for page in Path(app.srcdir).glob("*.md")]
    shown = [name for page in pages for names in API.findall(page) for name in names.split()]
    shown += [name for page in pages if "<!-- methods -->" in page for name in methods.__all__]
    shown += [f"sborax {command}" for page in pages for command in OPTIONS.findall(page)]
    known = {*sborax.__all__, *(f"sborax {command}" for command in [*commands(), EVERY])}
    wrong = sorted(known ^ set(shown)) + sorted({name for name in shown if shown.count(name) > 1})
    if wrong:
        raise ExtensionError(f"not on exactly one page of docs/: {', '.join(wrong)}")


def fill(app: Any, page: str, source: list[str]) -> None:
    """Replace the comments of a page, and append the tree of pages to the first one."""
    text = source[0]
    for comment, build in GENERATED.items():
        if f"<!-- {comment} -->" in text:
            text = text.replace(f"<!-- {comment} -->", build())
    text = API.sub(lambda match: "\n".join(map(api_section, match[1].split())), text)
    text = OPTIONS.sub(lambda match: option_table(match[1]), text)
    source[0] = text + contents(app, text) if page == app.config.root_doc else text


def table(head: str, row: Callable[[str], str]) -> str:
    """A table with a row for every method."""
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *map(row, methods.__all__)])


def method_table() -> str:
    return table("| method | the adapted projection | paper |", method_row)


def method_row(name: str) -> str:
    """`| name | first sentence of the docstring | paper |`."""
    method = getattr(methods, name)
    text = " ".join((inspect.getdoc(method) or "").split())
    match = SENTENCE.match(text)
    # A bar would end the cell, even within code.
    sentence = (match[0] if match else text).replace("|", r"\|")
    cell = f"`` {sentence} ``" if "=" in sentence else sentence
    return f"| [{name}](#{name.lower()}) | {cell} | {method.paper} |"


def method_sections() -> str:
    return "\n".join(map(method_section, methods.__all__))


def method_section(name: str) -> str:
    lines = [line.removeprefix("  ") for line in describe(name).splitlines()[1:]]
    return "\n".join([f"## {name}", "", "```text", *lines, "```", ""])


def peft_table() -> str:
    return table("| method | in | out (native) | exceptions | `--as lora` |", peft_row)


def peft_row(name: str) -> str:
    """What PEFT's table and the class declare: `| name | kinds read | kind written | patterns | as plain LoRA |`."""
    method = getattr(methods, name)
    rows = [row for row in TABLE if row.method is method]
    thin = issubclass(method, AbstractFactored | AbstractLinked)
    kinds = " or ".join(dict.fromkeys(row.peft_type for row in rows))
    written = kinds if any(row.write for row in rows) else PLAIN.peft_type if thin else ""
    chosen = rows if written != PLAIN.peft_type else [PLAIN]
    patterns = sorted({pattern for row in chosen for pattern in row.patterns.values()})
    patterns += ["layers_to_transform"] * any(row.layered for row in chosen)
    exceptions = ", ".join(f"`{pattern}`" for pattern in patterns) if written else ""
    as_lora = "exact" if thin or method is PLAIN.method else "truncated"
    cells = [kinds, written, exceptions, "no" if _has_no_merge(method) else as_lora]
    return f"| `{name}` | {' | '.join(cell or '-' for cell in cells)} |"


def _has_no_merge(method: type[AbstractMethod]) -> bool:
    """On its defaults: what a method declares may depend on its options."""
    try:
        return bool(instance(method).no_merge)
    except SboraxError:
        return False


GENERATED: dict[str, Callable[[], str]] = {
    "method table": method_table,
    "methods": method_sections,
    "peft table": peft_table,
}
"""What replaces each comment."""


def api_section(name: str) -> str:
    kind = "autoclass" if isinstance(getattr(sborax, name), type) else "autofunction"
    return "\n".join([f"### {name}", "", "```{eval-rst}", f".. {kind}:: sborax.{name}", "```", ""])


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command."""
    return next(action.choices for action in make_parser()._actions if action.dest == "command")


def option_table(command: str) -> str:
    """The options of a command as a table, without those that all commands have; `EVERY` for the latter."""
    options = {name: option_rows(parser) for name, parser in commands().items()}
    common = set.intersection(*map(set, options.values()))
    chosen = next(iter(options.values())) if command == EVERY else options[command]
    rows = [row for row in chosen if (row in common) == (command == EVERY)]
    if not rows:
        return "It has no options of its own."
    return "\n".join(["| option | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows)])


def option_rows(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
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
    """The pages in the order in which the first one links to them, then the others."""
    linked = re.findall(r"\]\((\w+)\.md\)", first)
    others = sorted(app.env.found_docs - {app.config.root_doc})
    return "\n".join(["", "```{toctree}", ":hidden:", "", *dict.fromkeys([*linked, *others]), "```", ""])


def verbatim(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with equations, and not reStructuredText."""
    if lines:
        lines[:] = [".. code-block:: text", "", *(f"   {line}" for line in lines), ""]


def setup(app: Any) -> None:
    app.connect("builder-inited", check)
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", verbatim)
