"""Every recipe is planned from its model's config, takes two steps on a tiny model and scores two items."""

import csv
import functools
import json
import math
import shlex

import pytest
from nightly import nightly_unless
from pages import DOCS, ROOT
from questions import QUESTIONS, instruction
from tiny_model import write_model

import sborax as sx
from sborax.cli import main
from sborax.cli.main import _parse
from sborax.cli.recipes import TAGS, config_of, cost, names, plannable, read_recipe
from sborax.config.codec import override
from sborax.layout.mesh import abstract_mesh
from sborax.layout.state import parameters
from sborax.models.language_model import abstract
from sborax.models.published import CONFIGS
from sborax.plans.ahead import on_mesh, outline

RECIPES = tuple(names())
PAPERS = """
bone cola dora lora lora_ga lora_plus lora_rite loraprune milora olora orthogonal peft pissa prilora reslora sara sbora
xgblora
""".split()
# One that scores by beams, by likelihood, by perplexity, by the harness, and one whose template is its own.
FEW = ("cola/rte",)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 768,
}
"""Every recipe's rank fits into these sides."""
SHORT = ["epochs=null", "steps=2", "batch_size=2", "accumulate=1", "precision=float32", "optimizer.warmup=0"]
SMALL = {
    "lora_ga/metamath": ["hint_batches=1", "data.max_length=768"],
    "orthogonal/two_experts": ["data.max_length=768"],
    "reslora/hellaswag": ["data.max_length=768"],
    "prilora/rte": ["procedure.every=1"],
    "xgblora/mmlu": ["procedure.every=1", "procedure.layers=1"],
}
"""What does not fit into two steps, two layers, or a tokenizer of letters, whose prompts are long."""


@functools.cache
def read(name):
    return read_recipe(name)


@functools.cache
def counted(model, rules, train_base, optimizer, procedure):
    """Trained parameters; tables share rows."""
    experiment = sx.Experiment(
        model, sx.Data("x"), rules, optimizer, steps=5000, train_base=train_base, procedure=procedure
    )
    return outline(experiment, config_of(model), 1).parts.count


def of_row(recipe, row):
    return override(recipe.experiment, row.changes)


def rounded(count, printed):
    """A count in the form in which another is printed: 56.1M, or 9,175,040."""
    if not printed.endswith("M"):
        return f"{count:,}"
    return f"{count / 1e6:.{len(printed.removesuffix('M').partition('.')[2])}f}M"


def test_every_paper_has_a_recipe():
    assert sorted({name.partition("/")[0] for name in RECIPES}) == sorted(PAPERS)


@pytest.mark.parametrize("name", RECIPES)
def test_counts_are_the_published_ones(name):
    recipe = read(name)
    for row in recipe.published:
        if row.changes is None:
            continue
        experiment = of_row(recipe, row)
        printed = row.counted or row.parameters
        if printed:
            settings = plannable(experiment)
            rules, optimizer = tuple(settings.rules), settings.optimizer
            count = counted(settings.model, rules, settings.train_base, optimizer, settings.procedure)
            assert rounded(count, printed) == printed, row.name


@pytest.mark.parametrize("name", RECIPES)
def test_rows_say_where_they_are_from(name):
    recipe = read(name)
    assert recipe.published and recipe.unknown and recipe.needs
    assert len({row.name for row in recipe.published}) == len(recipe.published)
    for row in recipe.published:
        assert row.source if row.scores or row.parameters else row.note.startswith("unknown: "), row.name
        assert "spec" not in row.source and ".md" not in row.source
        assert not row.note or row.note.partition(": ")[0] in TAGS and row.note.partition(": ")[2], row.name
        assert not row.counted or row.note.startswith("broken: "), row.name
        scores = [value for column, value in row.scores.items() if column != "avg"]
        if "avg" in row.scores and len(scores) > 5 and not row.note.startswith("broken: the printed average"):
            # Rounded to a tenth, each of them.
            assert math.fsum(scores) / len(scores) == pytest.approx(row.scores["avg"], abs=0.101), row.name
    for sentence in (*recipe.unknown, *recipe.needs, *recipe.differs):
        assert sentence.endswith(".") and "  " not in sentence, sentence


@pytest.mark.parametrize("name", RECIPES)
def test_commands_are_ones(name):
    recipe = read(name)
    words = shlex.split(recipe.command)
    words = words[words.index("sborax") + 1 :]
    train = _parse(words)
    assert (train.command, train.experiment) == ("train", f"experiments/{name}.py")
    score = _parse(shlex.split(recipe.score_command.partition("sborax ")[2]))
    (target,) = score.target
    assert score.command == "eval" and target.removesuffix("/best") == train.out
    assert "arXiv:" in recipe.about.partition("\n")[0] or "github.com" in recipe.about.partition("\n")[0]
    if train.mesh is not None:
        experiment = override(recipe.experiment, [f"mesh={train.mesh}"])
        assert experiment.mesh is not None
        on_mesh(outline(plannable(experiment), config_of(experiment.model)), abstract_mesh(experiment.mesh))


def test_recipes_are_listed_without_a_network(capsys, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if "/" in line.partition(" ")[0]}
    assert tuple(lines) == RECIPES
    assert all(read(name).experiment.model in line for name, line in lines.items())
    assert "NVIDIA H100 80GB HBM3" in text and "40% of 989 TFLOP/s" in text


@pytest.mark.parametrize("name", ["sbora/commonsense", "sara/e2e", "peft"])
def test_a_recipe_is_printed_with_its_numbers(name, capsys):
    assert main(["recipes", name]) == 0
    text, recipe = capsys.readouterr().out, read(name)
    assert recipe.command in text and recipe.score_command in text
    rows = [line.split() for line in text.splitlines()]
    for row in recipe.published:
        printed = [*row.name.split(), row.parameters or "-", *(f"{value:g}" for value in row.scores.values())]
        assert any(line[: len(printed)] == printed for line in rows), row.name
    for sentence in (*recipe.unknown, *recipe.needs, *recipe.differs):
        assert sentence in " ".join(text.replace("\n  ", " ").split("\n"))


def test_an_unknown_name_is_one_line(capsys):
    for name, message in (
        ("sbora", "did you mean sbora/arithmetic or sbora/commonsense or sbora/mmlu?"),
        ("sbora/comonsense", "did you mean sbora/commonsense"),
        ("zzz", "`sborax recipes` lists them"),
    ):
        assert main(["recipes", name]) == 2
        assert message in capsys.readouterr().err


def test_hours_are_those_of_the_formula():
    """LLaMA-2-7B has 6,607,077,376 entries in kernels and head: all but norms and the embedding."""
    experiment = read("bone/metamathqa").experiment
    spent = cost(experiment, 395_000)
    tokens = 6172 * 64 * 512
    assert spent.devices == 1
    assert spent.hours == pytest.approx(4 * 6_607_077_376 * tokens / (0.4 * 989e12) / 3600)
    assert cost(experiment, None).hours is None
    trained = cost(override(experiment, ["rules=[]", "train_base=true", "epochs=null", "steps=1"]), None)
    assert trained.devices is not None and trained.devices > 1 and trained.hours is not None
    assert trained.hours * trained.devices == pytest.approx(1.5 * spent.hours / 6172)


@pytest.mark.parametrize("name", RECIPES)
def test_models_are_published_ones(name):
    recipe = read(name)
    models = {of_row(recipe, row).model for row in recipe.published if row.changes is not None}
    assert models | {recipe.experiment.model} <= set(CONFIGS)


def test_published_configs_have_the_published_sizes():
    sizes = {
        "meta-llama/Llama-2-7b-hf": 6_738_415_616,
        "meta-llama/Llama-3.1-8B": 8_030_261_248,
        "meta-llama/Llama-3.1-70B": 70_553_706_496,
        "meta-llama/Llama-3.2-3B": 3_212_749_824,
    }
    for model, size in sizes.items():
        assert parameters(abstract(config_of(model))) == size, model


def test_the_index_lists_every_recipe():
    page = (DOCS / "reproducing.md").read_text()
    for name in RECIPES:
        assert f"(../experiments/{name}.py)" in page, name


ROW = {
    "instruction": "Name a colour.",
    "input": "",
    "output": "the correct answer is answer1",
    "query": "What is 1 + 1?",
    "response": "The answer is: 2",
    "question": "What is 1 + 1?",
    "answer": "1 + 1 = 2\n#### 2",
}
WRITTEN = {"instruction": "What is 1 + 1?", "input": "", "output": "2", "answer": "2"}
YES_NO = "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false"
PAIR = {"sentence1": "Ice is cold.", "sentence2": "Ice is hot.", "label": "not_entailment"}
MEANING = {"mr": "name[Blue Spice], eatType[coffee shop]", "ref": "Blue Spice is a coffee shop."}
MARK = {"subject": "heat", "question": "What is cold?", "choices": ["ice", "fire", "sun", "oven"], "answer": 0}


def write(place, rows):
    """Rows as JSON, JSONL, CSV or TSV."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".jsonl":
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif place.suffix == ".json":
        place.write_text(json.dumps(rows))
    else:
        with place.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if place.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


TASK = """
task: gsm8k
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def workshop(compiled_once, tmp_path_factory):
    """A tiny model, and made-up data under every name that recipes and their tasks read."""
    place = tmp_path_factory.mktemp("recipes")
    write_model(place / "model", **TINY)
    data = place / "data"
    choices = [instruction(*question) for question in QUESTIONS]
    for name in ("ARC-Easy", "openbookqa", "hellaswag", "commonsense_170k"):
        for split in ("train", "test", "validation"):
            write(data / name / f"{split}.json", choices)
    for split in ("train", "test"):
        rows = [{**ROW, "instruction": YES_NO, "output": "the correct answer is true", "answer": "true"}] * 4
        write(data / "boolq" / f"{split}.json", rows)
        write(data / "gsm8k" / f"{split}.jsonl", [ROW] * 4)
    for name in ("math_10k", "alpaca_gpt4"):
        for split in ("train", "validation"):
            write(data / name / f"{split}.json", [WRITTEN] * 4)
    for name in ("meta-math/MetaMathQA", "tatsu-lab/alpaca", "MBZUAI/LaMini-instruction"):
        write(data / name / "train.json", [ROW] * 4)
    for name in ("gsm8k", "MultiArith"):
        write(data / name / "test.json", [WRITTEN] * 2)
    write(data / "glue" / "RTE" / "train.jsonl", [PAIR] * 4)
    write(data / "glue" / "RTE" / "dev.tsv", [PAIR] * 4)
    write(data / "mmlu" / "dev.jsonl", [MARK] * 5)
    write(data / "mmlu" / "test.jsonl", [MARK] * 2)
    write(data / "e2e_nlg" / "trainset.csv", [MEANING] * 4)
    write(data / "e2e_nlg" / "testset_w_refs.csv", [MEANING, {**MEANING, "mr": "name[Alimentum], area[riverside]"}])
    (data / "wikitext-2").mkdir()
    (data / "wikitext-2" / "test.txt").write_text((ROOT / "LICENSE").read_text()[:1024])
    write(place / "items.json", [ROW] * 2)
    (place / "tasks").mkdir()
    (place / "tasks" / "gsm8k.yaml").write_text(TASK.format(data=place / "items.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SBORAX_DATA", str(data))
        yield place


FIRST = {
    "llm_adapters_commonsense": "llm_adapters_arc_easy",
    "llm_adapters_arithmetic": "llm_adapters_multiarith",
}
"""One task of a group."""


# What the harness and its dependencies warn of is theirs to mend.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", nightly_unless(FEW, RECIPES))
def test_two_steps_and_two_items(name, workshop, tmp_path, capsys):
    recipe = read(name)
    changes = [f"model={workshop / 'model'}", *SHORT, *SMALL.get(name, [])]
    changes += ["eval.every=2"] if recipe.experiment.eval.data is not None else []
    run = tmp_path / "run"
    code = main(["train", str(ROOT / "experiments" / f"{name}.py"), *changes, "--out", str(run)])
    assert code == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    target, out = run / "best" if recipe.experiment.save.best else run, tmp_path / "scores"
    task = recipe.scored.partition(",")[0]
    words = ["--tasks", FIRST.get(task, task)] if task else ["--harness", recipe.harness]
    words += ["--include", str(workshop / "tasks")] if recipe.harness else []
    code = main(["eval", str(target), *words, "--limit", "2", "--out", str(out)])
    assert code == 0, capsys.readouterr().err
    items = next(file for file in out.iterdir() if file.suffix == ".jsonl").read_text().splitlines()
    assert len(items) == 2
