"""How docs/ becomes a site: `python -m sphinx -W --keep-going docs site`. Every page is plain Markdown.

Two kinds of comments in a page are filled in: `<!-- methods -->` by what `sborax methods` tells of each, and
`<!-- api: NAME NAME -->` by signatures and docstrings, to the letter. A public name that no page has is an error.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError

import sborax
from sborax import methods
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


def check(app: Any) -> None:
    """Raise ExtensionError unless every public name is on a page, once."""
    pages = [page.read_text() for page in Path(app.srcdir).glob("*.md")]
    shown = [name for page in pages for names in API.findall(page) for name in names.split()]
    shown += [name for page in pages for _ in METHODS.findall(page) for name in methods.__all__]
    wrong = sorted(set(sborax.__all__) ^ set(shown)) + sorted({name for name in shown if shown.count(name) > 1})
    if wrong:
        raise ExtensionError(f"not on exactly one page of docs/: {', '.join(wrong)}")


def fill(app: Any, page: str, source: list[str]) -> None:
    """Put what is generated into a page, and the tree of pages into the first."""
    text = METHODS.sub(lambda _: "\n".join(map(of_method, methods.__all__)), source[0])
    text = API.sub(lambda found: "\n".join(map(of_name, found[1].split())), text)
    source[0] = text + contents(app, text) if page == app.config.root_doc else text


def of_method(name: str) -> str:
    told = describe(name).partition("\n")[2]
    lines = [line.removeprefix("  ") for line in told.splitlines()]
    return "\n".join([f"## {name}", "", "```text", *lines, "```", ""])


def of_name(name: str) -> str:
    kind = "autoclass" if isinstance(getattr(sborax, name), type) else "autofunction"
    return "\n".join([f"### {name}", "", "```{eval-rst}", f".. {kind}:: sborax.{name}", "```", ""])


def contents(app: Any, first: str) -> str:
    """The pages in the order in which the first one links to them, then whatever else there is."""
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
