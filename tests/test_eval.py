"""`sborax eval`: what it prints and keeps."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from questions import QUESTIONS, instruction
from tiny_model import write_data, write_model

from sborax import SboraxError
from sborax.cli import main
from sborax.evaluate import Scorer
from sborax.evaluate.tasks import chosen
from sborax.models import load_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(capsys, *words):
    capsys.readouterr()
    assert main(["eval", *(str(word) for word in words)]) == 0
    return capsys.readouterr().out


def fails(capsys, *words):
    capsys.readouterr()
    assert main(["eval", *(str(word) for word in words)]) == 2
    return capsys.readouterr().err


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and a run of it that was trained on two of the questions."""
    place = tmp_path_factory.mktemp("eval")
    write_model(place / "model", max_position_embeddings=512)
    (place / "arc.json").write_text(json.dumps([instruction(*question) for question in QUESTIONS]))
    subset = json.loads((place / "arc.json").read_text())[:2]
    (place / "train.json").write_text(json.dumps(subset))
    (place / "run.py").write_text(
        "import sborax as sx\n\n\ndef experiment():\n"
        f"    data = sx.Data({str(place / 'train.json')!r}, max_length=512)\n"
        f"    rules = (('q_proj', sx.LoRA(rank=2)),)\n"
        f"    return sx.Experiment({str(place / 'model')!r}, data, rules, steps=1, batch_size=2)\n"
    )
    assert main(["train", str(place / "run.py"), "--out", str(place / "run")]) == 0
    return place


def test_a_run_is_scored_and_its_training_data_are_looked_through(folder, capsys, tmp_path):
    data = f"arc_easy_labels={folder / 'arc.json'}"
    words = ["--tasks", "arc_easy_labels", "--data", data, "--batch-tokens", "2048"]
    output = run(capsys, folder / "run", *words, "--out", tmp_path / "all")
    assert "2 of 5 items are in the data that the run was trained on" in output
    items = lines(tmp_path / "all" / "arc_easy_labels.jsonl")
    assert [item["item"] for item in items] == [0, 1, 2, 3, 4]
    assert items[0]["prompt"].startswith("Below is an instruction") and len(items[4]["logprobs"]) == 5
    limited = run(capsys, folder / "run", *words, "--out", tmp_path / "some", "--limit", "2", "--seed", "1")
    assert "note: --limit 2: 2 of 5 items, drawn with seed 1" in limited and "(n 2, seed 1)" in limited
    (score,) = json.loads((tmp_path / "some" / "scores.json").read_text())["scores"]
    assert (score["n"], score["items"], score["limit"], score["seed"]) == (2, 5, 2, 1)
    sample = lines(tmp_path / "some" / "arc_easy_labels.jsonl")
    for item in sample:
        np.testing.assert_allclose(item["logprobs"], items[item["item"]]["logprobs"], rtol=1e-4)
    chat = run(capsys, folder / "run", *words, "--out", tmp_path / "chat", "--template", "chat")
    assert chat != output and "<|im_start|>" in lines(tmp_path / "chat" / "arc_easy_labels.jsonl")[0]["prompt"]


@pytest.mark.nightly
def test_answers_are_written_and_looked_for(folder, capsys, tmp_path):
    (tmp_path / "sums.json").write_text(
        json.dumps([{"instruction": f"{n} plus {n}?", "answer": f"{2 * n}.0"} for n in range(3)])
    )
    data = [
        "--data",
        f"llm_adapters_arc_easy={folder / 'arc.json'}",
        "--data",
        f"llm_adapters_svamp={tmp_path / 'sums.json'}",
    ]
    words = ["--tasks", "llm_adapters_arc_easy,llm_adapters_svamp", *data, "--limit", "3", "--out", tmp_path / "out"]
    output = run(capsys, folder / "model", *words)
    assert "the first answer in at most 32 tokens, 4 beams" in output
    items = lines(tmp_path / "out" / "llm_adapters_svamp.jsonl")
    assert items[0]["prompt"].endswith("### Response:\n                ") and len(items) == 3
    assert all(set(item) == {"item", "prompt", "text", "answer", "gold", "right"} for item in items)


def test_mmlu_and_e2e_run(folder, capsys, tmp_path):
    home = tmp_path / "mmlu"
    home.mkdir()
    subjects = ("astronomy", "virology")
    rows = [
        {"subject": s, "question": f"{n}?", "choices": list("wxyz"), "answer": n} for s in subjects for n in range(4)
    ]
    for split in ("dev", "test"):
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "e2e.csv").write_text(
        'mr,ref\n"name[A], food[B]",A serves B.\n"name[A], food[B]",B at A.\nname[C],C.\n'
    )
    data = ["--data", f"mmlu={home}", "--data", f"e2e_nlg={tmp_path / 'e2e.csv'}"]
    output = run(capsys, folder / "model", "--tasks", "mmlu,e2e_nlg", *data, "--out", tmp_path / "out")
    assert "mmlu: acc over subjects " in output and "e2e_nlg: BLEU " in output and "CIDEr is absent" in output
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert {"acc of astronomy", "acc of virology"} <= scores[0]["metrics"].keys() and scores[1]["n"] == 2
    assert lines(tmp_path / "out" / "e2e_nlg.jsonl")[0]["references"] == ["A serves B.", "B at A."]


def test_mmlu_needs_answered_questions_that_are_not_asked(folder, capsys, tmp_path):
    """An item among its own examples would have its answer in its prompt."""
    rows = [{"subject": "astronomy", "question": f"{n}?", "choices": list("wxyz"), "answer": n} for n in range(2)]
    for file in (tmp_path / "test.jsonl", tmp_path / "one" / "test.jsonl", tmp_path / "linked" / "test.jsonl"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "linked" / "dev.jsonl").symlink_to(tmp_path / "linked" / "test.jsonl")
    both = "is both the questions and the answered examples; name a folder with a file for each of test and dev"
    refusals = {"test.jsonl": both, "linked": both, "one": "no file is named like split 'dev'; name one: test.jsonl"}
    (task,), model = chosen("mmlu"), load_model(str(folder / "model"))
    scorer = Scorer.of(model, model.params)
    for name, message in refusals.items():
        # The data are looked at before the model.
        error = fails(capsys, "no such model", "--tasks", "mmlu", "--data", f"mmlu={tmp_path / name}")
        assert message in error and error.count("\n") == 1
        with pytest.raises(SboraxError, match=message):
            dataclasses.replace(task, data=str(tmp_path / name)).measure(rows, scorer, 0)


def test_mistakes_are_one_line(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("SBORAX_DATA", raising=False)
    model = folder / "model"
    assert "give --tasks, --harness, or both" in fails(capsys, model)
    for unread in (["--template", "chat"], ["--data", "boolq=x"]):
        assert "--data and --template are for --tasks" in fails(capsys, model, "--harness", "boolq", *unread)
    assert "--include is for --harness" in fails(capsys, model, "--tasks", "boolq", "--include", "x")
    assert "no task 'arc'" in fails(capsys, model, "--tasks", "arc")
    assert "--data piqa=x: write TASK=PATH" in fails(capsys, model, "--tasks", "arc_easy", "--data", "piqa=x")
    assert "boolq has a prompt of its own" in fails(capsys, model, "--tasks", "boolq", "--template", "chat")
    assert "--mesh data: write sizes of axes" in fails(capsys, model, "--tasks", "boolq", "--mesh", "data")
    missing = fails(capsys, model, "--tasks", "hellaswag", "--out", tmp_path / "none")
    assert "hellaswag: not under $SBORAX_DATA; --data TASK=PATH" in missing
    data = write_data(tmp_path / "data.jsonl")
    wrong = ["--tasks", "arc_easy", "--data", f"arc_easy={data}", "--out", tmp_path / "out"]
    assert "arc_easy: record 0: not an instruction of LLM-Adapters'" in fails(capsys, model, *wrong)
    assert "--limit 0: at least 1" in fails(capsys, model, *wrong, "--limit", "0")
    assert "--seed -1: must lie in 0..2**32 - 1" in fails(capsys, model, *wrong, "--limit", "2", "--seed", "-1")
    (tmp_path / "out" / "scores.json").write_text("{}")
    assert "scores.json: exists; choose another --out" in fails(capsys, model, *wrong)
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 300)
    assert "windows of 1024 tokens, the model's context has 512" in fails(
        capsys, model, "--tasks", "wikitext2_1024", "--data", f"wikitext2_1024={text}", "--out", tmp_path / "more"
    )


@pytest.mark.nightly
def test_the_example_compares_a_run_with_its_base(folder, capsys, tmp_path, monkeypatch):
    questions = [instruction(*question) for question in QUESTIONS]
    yes = {"instruction": "Please answer with true or false, question: is it?\n\nAnswer format: true/false"}
    for name in ("ARC-Easy", "boolq"):
        (tmp_path / name).mkdir()
        for split, part in (("train", slice(0, 3)), ("test", slice(2, 5))):
            records = [{**yes, "answer": "true"}] * 2 if name == "boolq" else questions[part]
            (tmp_path / name / f"{split}.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    options = {"--data": tmp_path, "--out": out, "--steps": 1, "--tasks": "arc_easy,boolq"}
    words = [str(folder / "model"), *(str(word) for pair in options.items() for word in pair)]
    monkeypatch.setenv("SBORAX_DATA", "")
    monkeypatch.setattr("sys.argv", ["commonsense.py", *words])
    runpy.run_path(str(EXAMPLES / "commonsense.py"), run_name="__main__")
    assert "2 training samples" in capsys.readouterr().out
    samples = lines(out / "train.jsonl")
    assert samples[0]["prompt"] == "Question: Which of these melts in the sun?\nAnswer:"
    assert samples[0]["option"] == " an ice cube"
    *rows, mean = (out / "table.md").read_text().splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["arc_easy", "boolq"]
    assert mean.startswith("| mean |")


def test_an_experiment_names_the_tasks_that_its_run_is_scored_on(folder, capsys, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = ["train", str(folder / "run.py"), "--out", str(out)]
    monkeypatch.setenv("SBORAX_DATA", str(tmp_path))
    for wrong, message in (("arc", "there is no task 'arc'"), ("piqa", "piqa: not under $SBORAX_DATA")):
        assert main([*words, f"eval.tasks=['{wrong}']"]) == 2
        assert message in capsys.readouterr().err and not out.exists()
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy" / "test.json").write_text((folder / "arc.json").read_text())
    named = [*words, "eval.tasks=['arc_easy']"]
    assert main(named) == 0
    assert "arc_easy: acc " in capsys.readouterr().out
    scores = (out / "scores" / "scores.json").read_text()
    # The card of an export tells them.
    assert main(["export", str(out), str(tmp_path / "peft")]) == 0
    acc, count = json.loads(scores)["scores"][0]["metrics"]["acc"], json.loads(scores)["scores"][0]["n"]
    line = f"- Score on arc_easy: acc {acc['value']:.4f} ± {acc['stderr']:.4f}, n {count}, seed 0; this copy has "
    assert line in (tmp_path / "peft" / "README.md").read_text()
    for broken in ('{"scores": 3}', '{"scores": [{"task": "arc_easy"}]}'):
        (out / "scores" / "scores.json").write_text(broken)
        capsys.readouterr()
        assert main(["export", str(out), str(tmp_path / "again")]) == 2
        assert re.fullmatch(r"error: .*of sborax; delete it\n", capsys.readouterr().err)
    (out / "scores" / "scores.json").write_text(scores)
    assert main([*named, "--resume"]) == 0
    assert "is scored already" in capsys.readouterr().out
    # Scores of an adapter that was replaced are none of the next one.
    measured = f'eval.data={{"name": "{folder / "train.json"}"}}'
    assert main([*named, measured, "--resume"]) == 2
    assert "eval.data differs from the data of its recorded losses; the run has ended" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["eval"]["data"] is None
    assert main([*named, "steps=2", "--resume"]) == 0
    output = capsys.readouterr().out
    assert f"{out / 'scores'}: renamed to earlier-scores-1, since these scores are of an earlier adapter" in output
    assert (out / "earlier-scores-1" / "scores.json").read_text() == scores
    assert "is scored already" not in output and "arc_easy: acc " in output
    scores, named = (out / "scores" / "scores.json").read_text(), [*named, "steps=2"]
    # Scores of some items are not those of the task, and nobody's scores are deleted.
    limited = json.loads(scores)
    limited["scores"][0]["limit"] = 1
    (out / "scores" / "scores.json").write_text(json.dumps(limited))
    assert main([*named, "--resume"]) == 0
    assert "renamed to earlier-scores-2, since they are of other tasks, or incomplete" in capsys.readouterr().out
    assert json.loads((out / "earlier-scores-2" / "scores.json").read_text()) == limited
    # Scores that were cut short are made again.
    (out / "scores" / "scores.json").unlink()
    assert main([*named, "--resume"]) == 0
    second = json.loads((out / "scores" / "scores.json").read_text())["scores"][0]["metrics"]
    assert second == json.loads(scores)["scores"][0]["metrics"]


def test_tasks_are_listed(capsys):
    assert main(["tasks"]) == 0
    output = capsys.readouterr().out
    assert "arc_easy_labels " in output
    assert any(
        line.split()[:3] == ["llm_adapters_commonsense", "=", "llm_adapters_boolq,"] for line in output.splitlines()
    )
