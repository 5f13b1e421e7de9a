"""The documentation is true: its code runs, its site is built without a warning, its links lead somewhere."""

import html
import json
import re
import runpy
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from nightly import nightly_unless
from pages import DOCS, ROOT, blocks, build_site, commands, try_command, try_page
from published import PUBLISHED, SPARSE
from questions import QUESTIONS, instruction
from tiny_model import write_data, write_model

import sborax as sx
from sborax import methods
from sborax.adapters.tree import over_stack
from sborax.cli import main
from sborax.cli.main import make_parser
from sborax.cli.methods import describe
from sborax.interop.peft_base import KINDS
from sborax.interop.peft_table import TABLE

PAGES = sorted(DOCS.glob("*.md"))
LONG = (
    "LOG",
    "cli",
    "compare",
    "concepts",
    "devices",
    "evaluation",
    "own_loop",
    "peft",
    "plans",
    "reproducing",
    "sweeps",
)
"""Pages whose commands take longest. The nightly run follows them."""
REAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY = """
import dataclasses, runpy
import sborax as sx

def experiment():
    full = runpy.run_path({path!r})["experiment"]()
    data, held_out = (dataclasses.replace(data, max_length=1024) for data in (full.data, full.eval.data))
    return dataclasses.replace(full, data=data, eval=sx.Eval(held_out), steps=2, batch_size=2)
"""
# A vocabulary of bytes makes long prompts; SBoRA's rank of 64 asks for as many rows.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 1024}
SEVEN = ("yahma/llama-7b-hf", "meta-llama/Llama-2-7b-hf")
THIRTY = "Qwen/Qwen3-30B-A3B"


def write_json(file: Path, rows: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def workshop(compiled_once, tmp_path_factory):
    """A directory where the names on the pages are small models, data, experiments and a run."""
    place = tmp_path_factory.mktemp("workshop")
    write_model(place / REAL, **SIZES)
    (place / "model").symlink_to(place / REAL)
    for name in SEVEN:
        (place / name).mkdir(parents=True)
        (place / name / "config.json").write_text(json.dumps(PUBLISHED["LLaMA-2-7B"]))
    (place / THIRTY).mkdir(parents=True)
    (place / THIRTY / "config.json").write_text(json.dumps(SPARSE["Qwen3-30B-A3B"]))
    rows = [instruction(*question) for question in QUESTIONS]
    prompt = (
        "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false"
    )
    yes_no = [{"instruction": prompt, "input": "", "output": "the correct answer is true", "answer": "true"}] * 4
    for name in ("ARC-Easy/test.json", "commonsense_170k/train.json", "commonsense_170k/validation.json"):
        write_json(place / "data" / name, rows)
    for name in ("boolq/train.json", "boolq/test.json"):
        write_json(place / "data" / name, yes_no)
    (place / "data" / "wikitext-2").mkdir()
    # Two windows of the tiny context: every token of a longer text would cost a pass, and a byte is a token.
    text = (ROOT / "LICENSE").read_text()[:2000]
    (place / "data" / "wikitext-2" / "test.txt").write_text(text)
    write_data(place / "conversations.jsonl")
    (place / "LICENSE").write_text(text)
    (place / "experiments").mkdir()
    (place / "experiments" / "sbora_smollm2.py").write_text(
        TINY.format(path=str(ROOT / "experiments" / "sbora_smollm2.py"))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("SBORAX_DATA", str(place / "data"))
        assert main(["train", "experiments/sbora_smollm2.py", "--out", "runs/one"]) == 0
    shutil.copytree(place / "runs" / "one", place / "runs" / "quickstart")
    return place


# Warnings of peft, torch and the harness are not ours to fix.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "page", nightly_unless([page for page in PAGES if page.stem not in LONG], PAGES), ids=lambda page: page.stem
)
def test_every_block_of(page, workshop, tmp_path, monkeypatch):
    if not blocks(page):
        return
    place = tmp_path / "here"
    shutil.copytree(workshop, place, symlinks=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("SBORAX_DATA", str(place / "data"))
    ran = try_page(page, "model")
    assert ran or "not run in the tests" in page.read_text()


def test_blocks_that_are_wrong_fail(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fence, code in (
        ("python", "1 / 0"),
        ("python", "# not run in the tests: slow\nfrom sborax import nothing"),
        ("bash", "sborax train x.py --unknown"),
        ("bash", "# not run in the tests: slow\nsborax train x.py --unknown"),
        ("bash", "sborax plan missing.py"),
        ("bash", "unheard-of --of"),
        ("bash", "bash scripts/missing.sh"),
        ("bash", "pip install 'sborax[missing]'"),
        ("bash", "python -m benchmarks --missing"),
        ("json", "{"),
        ("ruby", "puts 1"),
        ("text", "nobody printed this"),
        ("bash", "# not run, since it is slow\nls"),
    ):
        page = tmp_path / "page.md"
        page.write_text(f"# Page\n\n```{fence}\n{code}\n```\n")
        with pytest.raises((AssertionError, ZeroDivisionError, AttributeError, ValueError)):
            try_page(page, "model")


def test_commands_of_readme_and_contributing_are_ones(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "CONTRIBUTING.md"):
        for block in blocks(ROOT / name):
            if block.language == "bash":
                for line in commands(block.code):
                    try_command(line, run=False)


def test_the_quickstart_can_be_followed():
    """scripts/follow_quickstart.sh runs each line as a command."""
    code = "".join(block.code for block in blocks(DOCS / "quickstart.md"))
    assert {block.language for block in blocks(DOCS / "quickstart.md")} == {"bash"}
    assert len(list(commands(code))) == len(code.splitlines())
    words = " ".join(commands(code))
    assert all(f"sborax {verb} " in words for verb in ("train", "generate", "eval", "merge", "export"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("site")
    build_site(place)
    return place / "html"


def plain(source: str) -> str:
    """What a reader sees of HTML, blanks joined."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", source)).split())


def text_of(page: Path) -> str:
    return plain(page.read_text())


def rows_of(page: Path) -> list[list[str]]:
    """The cells of every row of a page's tables, without the heads."""
    rows = re.findall(r"<tr.*?</tr>", page.read_text(), re.DOTALL)
    return [cells for row in rows if (cells := [plain(cell) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)])]


@pytest.mark.nightly
def test_the_site_has_every_method_to_the_letter(site):
    text, source = text_of(site / "methods.html"), (site / "methods.html").read_text()
    for name in methods.__all__:
        assert f'id="{name.lower()}"' in source, name
        assert " ".join(describe(name).partition("\n")[2].split()) in text, name


def test_the_site_has_tables_of_every_method(site):
    table = {name: (sentence, paper) for name, sentence, paper in rows_of(site / "methods.html")}
    assert list(table) == methods.__all__
    for name, (sentence, paper) in table.items():
        method = getattr(methods, name)
        docstring = " ".join((method.__doc__ or "").split()).replace("`", "")
        assert docstring.startswith(sentence.replace("`", "")) and sentence.endswith(".") and paper == method.paper, (
            name
        )
    assert [name for name, *_ in rows_of(site / "peft.html")] == methods.__all__


def test_the_site_has_every_public_name(site):
    source = (site / "api.html").read_text()
    for name in set(sx.__all__) - set(methods.__all__):
        assert f'id="sborax.{name}"' in source, name


def test_the_site_has_every_option_of_every_command(site):
    text = text_of(site / "cli.html")
    commands = next(action.choices for action in make_parser()._actions if action.dest == "command")
    for name, parser in commands.items():
        section = text.partition(f" {name}¶ ")[2].partition("¶")[0]
        for action in parser._actions:
            if action.help != "==SUPPRESS==" and action.dest not in ("help", "debug", "imports"):
                option = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
                assert option in section, f"{name} {option}"
    assert "--import MODULE" in text and "--debug" in text


@pytest.mark.parametrize(
    ("page", "old", "new", "missing"),
    [("api", " attach ", " ", "attach"), ("cli", "<!-- options: merge -->", "", "sborax merge")],
)
def test_a_name_without_a_page_is_an_error(page, old, new, missing, tmp_path):
    conf = runpy.run_path(str(DOCS / "conf.py"))
    app = type("App", (), {"srcdir": str(tmp_path)})()
    for name in ("api", "methods", "cli"):
        text = (DOCS / f"{name}.md").read_text()
        (tmp_path / f"{name}.md").write_text(text.replace(old, new) if name == page else text)
    with pytest.raises(conf["ExtensionError"], match=f"not on exactly one page of docs/: {missing}$"):
        conf["check"](app)


def test_every_page_is_in_the_tree_and_nothing_is_fetched(site):
    first = (site / "index.html").read_text()
    for page in PAGES:
        assert page.stem == "index" or f'href="{page.stem}.html"' in first, page
    for page in site.glob("*.html"):
        addresses = re.findall(
            r"<(?:script|link|img|iframe|object)\b[^>]*?(?:src|href|data)=\"([^\"]+)\"", page.read_text()
        )
        assert addresses and not [address for address in addresses if re.match(r"(https?:)?//", address)], page


def test_a_run_directory_has_the_drawn_files(workshop):
    drawing = (DOCS / "concepts.md").read_text().partition("    runs/one/\n")[2].partition("\n\n")[0]
    entries = set(re.findall(r"[├└]── ([\w.]+)", drawing))
    run = workshop / "runs" / "one"
    assert {entry.name for entry in run.iterdir()} <= entries
    assert {entry.name for entry in (run / "adapter").iterdir()} <= entries


def test_kinds_of_adapters_are_those_of_the_table():
    table = (DOCS / "from_peft.md").read_text().partition("## Other kinds")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    kinds = {kind.peft_type for kind in (*TABLE, *KINDS)} | {"BONE"}
    assert sorted(re.findall(r"`([A-Z0-9_]+)`", " ".join(first))) == sorted(kinds)


def test_the_notebook_runs(tmp_path, monkeypatch):
    """As Jupyter would run it, but for the installation and the model."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    install, *sources = ("".join(cell["source"]) for cell in code)
    assert re.fullmatch(r"%pip install .*\./sborax\n?", install)
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", **SIZES)
    assert f'MODEL = "{REAL}"' in sources[0]
    names = {}
    for source in sources:
        exec(source.replace(f'MODEL = "{REAL}"', 'MODEL = "model"'), names)
    assert len(names["losses"]) == 20 and names["losses"][-1] < 0.9 * names["losses"][0]
    params, _ = sx.load_peft("peft", sx.load_model("model"))
    chex.assert_trees_all_equal(params, names["model"].params)
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.usefixtures("strict")
def test_the_worked_example_is_a_method():
    code = next(block.code for block in blocks(DOCS / "adding_a_method.md") if block.language == "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    space = {"__name__": "worked_example"}
    exec(code, space)
    method = space["Projected"](rank=4)
    params = {"layers": {"proj": {"kernel": jax.random.normal(jax.random.key(0), (3, 16, 24))}}}
    for composed in (method, sx.add(method, sx.scale(method, 0.5))):
        rules = [sx.Rule("proj", composed, layers=(0, 2))]
        _, adapters = sx.attach(jax.random.key(1), params, rules)
        chex.assert_trees_all_equal(sx.merge(params, adapters), params)
        train, frozen = sx.split(adapters)
        node = sx.combine(jax.tree.map(lambda leaf: leaf + 0.1, train), frozen)["layers"]["proj"]["kernel"]
        x = jax.random.normal(jax.random.key(2), (5, 16))
        kernel = params["layers"]["proj"]["kernel"]
        y = over_stack(lambda w, n, x=x: sx.linear(x, w, n), (3,))(kernel, node)
        merged = sx.merge(params, {"layers": {"proj": {"kernel": node}}})["layers"]["proj"]["kernel"]
        chex.assert_trees_all_close(y, jnp.einsum("ti,lio->lto", x, merged), atol=2e-5)
        assert not jnp.array_equal(merged[0], kernel[0])
    assert sx.count(adapters) == 2 * 2 * 4 * 24
