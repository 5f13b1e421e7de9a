"""The report: tables that say what was computed, and a page that stands alone."""

import collections
import csv
import html.parser
import io
import math
import re

import numpy as np
import pytest
from etils import epath
from runs_on_disk import answers, experiment, write_run, write_scores, write_sweep

import sborax as sx
from sborax.cli.compare import published_beside
from sborax.cli.main import main
from sborax.cli.recipes import read_recipe
from sborax.evaluate.compare import page
from sborax.evaluate.compare.groups import compare, from_base
from sborax.evaluate.compare.rows import read_measurements, read_rows
from sborax.evaluate.compare.spectra import Change, Weights
from sborax.evaluate.compare.tables import csv_text, fronts, markdown, rate, tables
from tests.tiny_model import write_data, write_model

NOTHING = Weights({}, {})
EVIL = "<script>alert(1)</script>|`$x^2$`"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Three methods with three learning rates and two seeds each, scored; and a sweep one of whose members diverged."""
    place, random = tmp_path_factory.mktemp("compared"), np.random.default_rng(0)
    hard = random.gamma(2.0, 1.0, 50)
    runs = []
    for number, (method, gain) in enumerate([(sx.LoRA(rank=4), 0.0), (sx.Bone(rank=8), -0.3), (sx.SBoRA(rank=4), 0.2)]):
        for lr in (1e-4, 1e-3, 1e-2):
            for seed in (0, 1):
                loss = 1.5 + gain + 0.3 * abs(math.log10(lr) + 3) + 0.02 * seed
                losses = hard + gain + random.normal(0.0, 0.1, 50)
                items, metrics = answers([bool(hit) for hit in random.binomial(1, 0.5, 50)], list(losses))
                runs.append(write_run(
                    place / f"run{len(runs)}", experiment(method, lr, seed), loss, trained=1000 * (number + 1),
                    memory=(number + 1) << 30, seconds=0.5 / (number + 1),
                    scores={"arc_easy": items}, metrics={"arc_easy": metrics},
                ))  # fmt: skip
    swept = {(1e-3, 0): 1.0, (1e-2, 0): 1.3, (1e-1, 0): None}
    runs.append(write_sweep(place / "sweep", sx.DoRA(rank=4), swept, samples="90 samples"))
    return [str(run) for run in runs]


@pytest.fixture(scope="module")
def settings(places):
    return compare(read_rows(places))


def test_tables_say_what_was_computed(settings):
    first, second = settings
    assert [group.label for group in first.ranked] == ["Bone(rank=8)", "LoRA(rank=4)", "SBoRA(rank=4)"]
    main_table, accuracy, losses, costs, rates = tables(first, NOTHING)
    assert main_table.rows[0][:3] == ("1", "Bone(rank=8)", "1.2100")
    assert main_table.rows[0][-1] == "better" and main_table.rows[2][-1] == "worse"
    assert main_table.rows[1][5] == "reference"
    assert "95 % over items" in losses.header and "95 % over items" not in main_table.header
    assert losses.rows[0][-1] in ("better", "unclear") and accuracy.title == "arc_easy acc"
    assert costs.rows[0][2:4] == ("1e-3", "interior")
    # Bone is the best, LoRA the smallest, and SBoRA the fastest.
    assert [row[5] for row in costs.rows] == ["2,000 *", "1,000 *", "3,000"]
    assert [row[7] for row in costs.rows] == ["250 ms *", "500 ms", "167 ms *"]
    assert rates.header == ("group", "1e-4", "1e-3", "1e-2") and rates.rows[0][2].endswith(" *")
    assert all(len(row) == len(table.header) == len(table.numbers)
               for setting in settings for table in tables(setting, NOTHING) for row in table.rows)  # fmt: skip
    assert fronts(second).keys() == {"trained"}
    assert tables(second, NOTHING)[-1].rows[0][-1] == "diverged"


def test_markdown_has_every_table_and_note(settings):
    text = markdown(settings, [NOTHING, NOTHING])
    assert text.count("\n## ") == 2 and "| 1 | Bone(rank=8) | 1.2100 |" in text
    for setting in settings:
        assert setting.notes and all(note.split(":")[0].replace("_", "\\_") in text for note in setting.notes)
    columns = [line.count(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(columns) > 20


def test_csv_is_the_numbers(settings):
    lines = list(csv.DictReader(io.StringIO(csv_text(settings))))
    assert len(lines) == 3 * 3 + 1
    (bone,) = (line for line in lines if line["group"] == "Bone(rank=8)" and line["measure"] == "arc_easy answer loss")
    estimate = settings[0].groups[1].estimates["arc_easy answer loss"]
    assert float(bone["value"]) == estimate.value and float(bone["difference"]) == estimate.gap_items.value
    assert float(bone["low_items"]) == estimate.items.low and float(bone["high_seeds"]) == estimate.seeds.high
    assert (bone["items"], bone["seeds"], bone["lr"], bone["lr_interior"]) == ("50", "2", "0.001", "True")
    assert (bone["front_trained"], bone["front_step"], bone["trained_parameters"]) == ("True", "True", "2000")


def test_the_base_is_paired_by_item(settings, tmp_path):
    right, losses = [True] * 50, list(np.linspace(2.0, 3.0, 50))
    items, metrics = answers(right, losses)
    write_scores(tmp_path / "base", {"arc_easy": items}, {"arc_easy": metrics})
    base = read_measurements(epath.Path(tmp_path / "base"))
    gaps = from_base(settings[0], base)
    assert gaps.keys() == {"arc_easy acc", "arc_easy answer loss"} and from_base(settings[1], base) == {}
    group = settings[0].groups[1]
    gap = gaps["arc_easy answer loss"][group.label]
    assert gap.value == pytest.approx(group.estimates["arc_easy answer loss"].value - 2.5) and gap.over == "items"
    assert gaps["arc_easy acc"][group.label].value < 0
    assert "Difference from the base" in markdown(settings, [NOTHING, NOTHING], base)
    assert "Difference from the base" in page.page(settings, [NOTHING, NOTHING], base)
    write_scores(tmp_path / "fewer", {"arc_easy": items[1:]}, {"arc_easy": metrics})
    assert from_base(settings[0], read_measurements(epath.Path(tmp_path / "fewer"))) == {}


def test_learning_rates_are_written_short():
    assert [rate(lr) for lr in (1e-3, 3e-4, 2.5e-5, 1.0, 0.0316227766, None)] == [
        "1e-3", "3e-4", "2.5e-5", "1e0", "3.162e-2", ""
    ]  # fmt: skip


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes; tags that are open at the end."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def elements(text):
    parser = Elements()
    parser.feed(text)
    assert not parser.open
    return parser.tags


def some_weights(labels):
    random = np.random.default_rng(0)

    def change(layer):
        rows = np.arange(32) % 4 == layer % 4
        singular = np.sort(random.gamma(1.0, 0.01, 16))[::-1]
        return Change("layers/q_proj", layer, 0.02, singular, 16, 1, rows, np.ones(48, bool))

    changes = {label: [change(layer) for layer in range(4)] for label in labels}
    return Weights(changes, {labels[0]: {"layers/q_proj": (2, 4, 6, 8)}}, ("Bone: no spectrum",))


@pytest.fixture(scope="module")
def text(settings):
    return page.page(settings, [some_weights(["LoRA(rank=4)", "SBoRA(rank=4)"]), NOTHING])


def test_the_page_needs_no_network_and_no_script(text):
    tags = elements(text)
    names = {tag for tag, _ in tags}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    assert "http" not in text and "@import" not in text and "//" not in re.sub(r"base64,[^\"]*", "", text)
    for _, attributes in tags:
        for name in ("href", "src", "xlink:href"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:image/png;base64,")), address


def test_the_page_has_two_schemes_and_fits_a_narrow_screen(text):
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    # No colour of a figure is fixed but that of pictures.
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    colours = collections.Counter(
        colour for drawing in drawings for colour in re.findall(r"#[0-9a-fA-F]{6}\b", drawing)
    )
    assert not colours, colours
    widths = [float(width) for width in re.findall(r'viewBox="0 0 ([\d.]+)', text)]
    assert widths and max(widths) <= 400


def test_ids_are_unique_and_references_lead_somewhere(text):
    tags = elements(text)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert references and {first or second for first, second in references} <= set(ids)


def test_figures_are_there_and_named(text, settings):
    labels = [attributes["aria-label"] for tag, attributes in elements(text) if tag == "svg"]
    for expected in (
        "held-out loss of every group with its interval", "held-out loss against trained parameters",
        "held-out loss against memory", "held-out loss against step time", "loss of Bone(rank=8) by step",
        "held-out loss of LoRA(rank=4) by learning rate", "arc_easy acc of every group with its interval",
        "spectrum of the change by SBoRA(rank=4)", "LoRA(rank=4): layers/q_proj, rows, 25 % moved",
        "LoRA(rank=4): layers/q_proj, 20 in all", "held-out loss of DoRA(rank=4) by learning rate",
    ):  # fmt: skip
        assert expected in labels, expected
    assert "<title>1. Bone(rank=8): 1.2100, 2,000</title>" in text
    for setting in settings:
        assert all(note in text for note in setting.notes if "&" not in note and "'" not in note)


def test_the_page_is_the_same_every_time(settings, text):
    assert page.page(settings, [some_weights(["LoRA(rank=4)", "SBoRA(rank=4)"]), NOTHING]) == text


def test_names_of_strangers_are_text(tmp_path):
    rules = (sx.Rule(f"mlp|{re.escape(EVIL)}", sx.LoRA(rank=4)), sx.Rule("self_attn", sx.Bone(rank=4)))
    run = write_run(tmp_path / "run", experiment(rules=rules), 1.0)
    rows = read_rows([str(run)])
    comparison = compare(rows)
    assert "<script" in comparison[0].groups[0].label
    text = page.page(comparison, [NOTHING])
    assert not [tag for tag, _ in elements(text) if tag == "script"]
    assert "<script" not in markdown(comparison, [NOTHING]).replace("\\<", "")


def test_a_single_run_and_a_run_without_scores_have_a_page(tmp_path):
    run = write_run(tmp_path / "run", experiment(), 1.0)
    (setting,) = compare(read_rows([str(run)]))
    assert "held-out loss" in page.page([setting], [NOTHING])
    sweep = write_sweep(tmp_path / "sweep", sx.LoRA(rank=4), {(1e-3, 0): None, (1e-2, 0): None})
    (setting,) = compare(read_rows([str(sweep)]))
    assert not setting.measures and "2 of 2 runs diverged" in page.page([setting], [NOTHING])
    assert "2 of 2 runs diverged" in markdown([setting], [NOTHING])


# The command


@pytest.fixture(scope="module")
def trained(compiled_once, tmp_path_factory):
    """A sweep of SBoRA, a run of LoRA and one of full fine-tuning over a tiny model, scored where that is quick."""
    place = tmp_path_factory.mktemp("trained")
    model, data = str(write_model(place / "model")), str(write_data(place / "data.jsonl"))
    described = place / "described.py"
    described.write_text(f"""
import sborax as sx
DATA = sx.Data({data!r}, template="{{instruction}}", answer=" {{output}}", max_length=32, buckets=(32,))
def experiment():
    return sx.Experiment({model!r}, DATA, (sx.Rule("q_proj|up_proj", sx.SBoRA(rank=4)),), sx.Optimizer(lr=1e-2),
                         steps=6, batch_size=2, eval=sx.Eval(sx.Data({data!r}, template="{{instruction}}",
                         answer=" {{output}}", max_length=32, buckets=(32,), limit=4), every=2))
""")
    lora = place / "lora.py"
    lora.write_text(described.read_text().replace("sx.SBoRA(rank=4)", "sx.LoRA(rank=sx.LinearRanks(2, 4))"))
    full = place / "full.py"
    full.write_text(described.read_text().replace('(sx.Rule("q_proj|up_proj", sx.SBoRA(rank=4)),)', "()").replace(
        "steps=6", "train_base=True, steps=6"))  # fmt: skip
    runs = [str(place / name) for name in ("lora-run", "full-run", "sweep")]
    assert main(["train", str(lora), "--out", runs[0]]) == 0
    assert main(["train", str(full), "--out", runs[1]]) == 0
    words = ["optimizer.lr=1e-3,1e-2", "seed_adapter=0,1"]
    assert main(["sweep", str(described), *words, "--out", runs[2]]) == 0
    return runs


def test_compare_writes_the_report(trained, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["compare", *trained, "--spectra", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: report.md, report.csv, report.html" in printed
    for label in ("LoRA(rank=LinearRanks(first=2, last=4))", "full fine-tuning", "SBoRA(rank=4)"):
        assert label in printed and label in (out / "report.html").read_text()
    lines = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert {line["group"]: line["runs"] for line in lines} == {
        "LoRA(rank=LinearRanks(first=2, last=4))": "1", "full fine-tuning": "1", "SBoRA(rank=4)": "4"
    }  # fmt: skip
    document = (out / "report.html").read_text()
    labels = [attributes["aria-label"] for tag, attributes in elements(document) if tag == "svg"]
    # Four rows of 32 moved, and two of SBoRA's kernels have a map; LoRA's ranks grow; all have a spectrum.
    assert sum("rows, 12.5 % moved" in label for label in labels) == 2
    assert sum(label.endswith("6 in all") for label in labels) == 2
    assert sum(label.startswith("spectrum of the change") for label in labels) == 3
    assert "Intruders" in (out / "report.md").read_text()
    # Again: the report is replaced.
    assert main(["compare", *trained, "--out", str(out)]) == 0
    assert "Intruders" not in (out / "report.md").read_text()


def test_compare_says_what_is_wrong_in_one_line(trained, tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "neither a run nor a sweep" in capsys.readouterr().err
    assert main(["compare", trained[0], "--by", "rank", "--out", str(tmp_path / "report")]) == 2
    assert "--by rank: no run has such a key" in capsys.readouterr().err
    assert main(["compare", trained[0], "--base", str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert "holds no scores" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


RECIPE = """# sborax train experiments/mine/table.py --out runs/mine
import sborax as sx
from sborax.cli.recipes import Row, method_change


def experiment():
    return sx.Experiment("models/tiny", sx.Data("train.jsonl"), (sx.Rule("mlp", sx.LoRA(rank=8)),), steps=1)


PUBLISHED = (
    Row("LoRA of rank 8", {"ARC-e": 55.5, "BoolQ": 60.0}, "the paper's table 3"),
    Row("LoRA, stabilised", {"ARC-e": 56.5}, "the paper's table 3", changes=(
        method_change(sx.LoRA(rank=8, alpha=16.0, rslora=True)),), note="broken: the mean is not that of its row"),
    Row("OLoRA", {"BoolQ": 61.0}, "another table", changes=None, note="contaminated: test items in the data"),
)
UNKNOWN = NEEDS = ()
SCORED = "TASKS"
"""


def recipe(place, tasks="arc_easy,boolq", published=None):
    text = RECIPE.replace("TASKS", tasks)
    place.write_text(text if published is None else text + f"PUBLISHED = {published}\n")
    return str(place)


def test_published_scores_stand_beside_those_of_the_runs(settings, tmp_path):
    beside = published_beside(read_recipe(recipe(tmp_path / "table.py")), settings)
    # The sweep was not scored.
    assert beside[0] is not None and beside[1] is None
    table = beside[0].table
    assert table.header == ("method", "ARC-e", "BoolQ", "source", "tag")
    ours = {group.label: f"{100 * group.estimates['arc_easy acc'].value:.2f}" for group in settings[0].groups}
    # Under the runs' LoRA that of rank 8; at the end what the runs have no like of.
    assert table.rows == (
        ("Bone(rank=8)", ours["Bone(rank=8)"], "", "ours", ""),
        ("LoRA(rank=4)", ours["LoRA(rank=4)"], "", "ours", ""),
        ("published: LoRA of rank 8", "55.5", "60", "[1]", ""),
        ("SBoRA(rank=4)", ours["SBoRA(rank=4)"], "", "ours", ""),
        ("published: LoRA, stabilised", "56.5", "", "[1]", "broken"),
        ("published: OLoRA", "", "61", "[2]", "contaminated"),
    )
    weights = [NOTHING, NOTHING]
    reports = markdown(settings, weights, beside=beside), page.page(settings, weights, beside=beside)
    for words in ("published: LoRA, stabilised", "paper", "Broken: the mean is not that of its row.", "another table"):
        assert all(words in text for text in reports), words
    # They enter no statistic: all else in the report stays as it is.
    assert set(markdown(settings, weights).splitlines()) < set(reports[0].splitlines())


def test_published_scores_that_cannot_be_shown_are_one_clear_line(tmp_path, capsys):
    items, metrics = answers([True, False], [0.5, 1.0])
    run = write_run(tmp_path / "run", experiment(), scores={"arc_easy": items}, metrics={"arc_easy": metrics})
    for name, message in (
        ("nobody/nothing", "there is no recipe 'nobody/nothing'"),
        ("nobody/nothing.py", "there is no recipe nobody/nothing.py"),
        (recipe(tmp_path / "none.py", published="()"), "holds no published scores"),
        (recipe(tmp_path / "other.py", "arc_easy_labels"), "sborax eval RUN --tasks arc_easy_labels --out RUN/scores"),
        ("bone/metamathqa", "scored by --harness gsm8k, whose scores are not compared"),
    ):
        assert main(["compare", str(run), "--published", name, "--out", str(tmp_path / "report")]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "report").exists()


def test_without_matplotlib_there_is_no_page(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["compare", trained[0], "--out", str(tmp_path / "report")]) == 0
    assert "pip install 'sborax[report]'" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.csv", "report.md"]
