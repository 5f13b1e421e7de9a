"""`sborax eval`: what it prints and keeps, and that its numbers are those of transformers."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from tiny_model import write_data, write_model

from sborax.cli import main
from sborax.evaluate.instructions import parse
from sborax.models import load_model

QUESTIONS = [
    ("Which of these melts in the sun?", ("a stone", "an ice cube", "a glass bottle", "a wooden chair"), 1),
    ("What do plants take in through their roots?", ("water", "light", "music", "wool"), 0),
    ("Which animal lays eggs?", ("a cow", "a dog", "a cat", "a hen"), 3),
    ("What pulls a dropped ball to the ground?", ("heat", "gravity", "sound"), 1),
    ("Which is the largest?", ("a grain of sand", "a mountain", "a house", "a tree", "a leaf"), 1),
]


def instruction(question, options, gold):
    listed = " ".join(f"Answer{n}: {option}" for n, option in enumerate(options, start=1))
    form = "/".join(f"answer{n}" for n in range(1, len(options) + 1))
    text = f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {form}"
    return {
        "instruction": text,
        "input": "",
        "output": f"the correct answer is answer{gold + 1}",
        "answer": f"answer{gold + 1}",
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory, data_dir):
    """Data in the layout of $SBORAX_DATA: a slice of the real ones where they are at hand, else ours."""
    place = tmp_path_factory.mktemp("data")
    (place / "ARC-Easy").mkdir()
    (place / "wikitext-2").mkdir()
    real = data_dir / "ARC-Easy" / "test.json"
    ours = [instruction(*question) for question in QUESTIONS]
    items = json.loads(real.read_text())[:5] if real.exists() else ours
    (place / "ARC-Easy" / "test.json").write_text(json.dumps(items))
    text = data_dir / "wikitext-2" / "test.txt"
    plain = "\n".join([question for question, _, _ in QUESTIONS] * 20)
    (place / "wikitext-2" / "test.txt").write_text(text.read_text()[:4000] if text.exists() else plain)
    return place


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


def logprobs(reference, prompt, continuation):
    """ln p of each token of a continuation, from transformers."""
    ids = torch.tensor([[*prompt, *continuation]])
    with torch.no_grad():
        each = torch.log_softmax(reference(ids).logits[0, len(prompt) - 1 : -1].float(), -1)
    return each.gather(1, ids[0, len(prompt) :, None])[:, 0].double().numpy()


def test_a_real_model_scores_as_in_transformers(smollm2, home, capsys, tmp_path, monkeypatch):
    """Accuracy on ARC-Easy and perplexity on WikiText-2, by transformers' model and tokenizer."""
    monkeypatch.setenv("SBORAX_DATA", str(home))
    words = ["--tasks", "arc_easy,wikitext2_128", "--batch-tokens", "512", "--out", tmp_path / "out"]
    told = run(capsys, smollm2, *words)
    scores = {one["task"]: one for one in json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]}
    load = {"gguf_file": smollm2.name}
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, **load, dtype=torch.float32)
    tokenizer = load_model(smollm2).tokenizer  # transformers' own drops a rule of this one, see test_llama
    right = []
    records = json.loads((home / "ARC-Easy" / "test.json").read_text())
    for record, item in zip(records, lines(tmp_path / "out" / "arc_easy.jsonl"), strict=True):
        question, options = parse(record["instruction"])
        prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        want = [logprobs(reference, prompt, tokenizer(f" {text}")["input_ids"]).sum() for text in options.values()]
        np.testing.assert_allclose(item["logprobs"], want, atol=2e-3)
        right.append(list(options)[int(np.argmax(want))] == record["answer"])
    assert scores["arc_easy"]["metrics"]["acc"] == {
        "value": np.mean(right), "stderr": pytest.approx(np.std(right, ddof=1) / math.sqrt(5)),
    }  # fmt: skip
    rows = (home / "wikitext-2" / "test.txt").read_text().removesuffix("\n").split("\n")
    ids = tokenizer("\n\n".join(f"{row}\n" if row.strip() else "" for row in rows), verbose=False)["input_ids"]
    losses = [-logprobs(reference, ids[i : i + 1], ids[i + 1 : i + 128]) for i in range(0, len(ids) - 127, 128)]
    assert scores["wikitext2_128"]["metrics"]["perplexity"]["value"] == pytest.approx(
        math.exp(np.concatenate(losses).mean()), rel=1e-4
    )
    assert scores["wikitext2_128"]["n"] == len(losses) > 2
    assert f"arc_easy: acc {np.mean(right):.4f} ± " in told and "(n 5, seed 0)" in told
    assert "this copy has 5 items, the published set 2,376: not its score" in told


@pytest.fixture(scope="module")
def made(tmp_path_factory, home):
    """A tiny model, and a run of it that was trained on two of the questions."""
    place = tmp_path_factory.mktemp("eval")
    write_model(place / "model", max_position_embeddings=512)
    (place / "arc.json").write_text(json.dumps([instruction(*question) for question in QUESTIONS]))
    own = json.loads((place / "arc.json").read_text())[:2]
    (place / "train.json").write_text(json.dumps(own))
    (place / "run.py").write_text(
        "import sborax as sx\n\n\ndef experiment():\n"
        f"    data = sx.Data({str(place / 'train.json')!r}, max_length=512)\n"
        f"    rules = (('q_proj', sx.LoRA(rank=2)),)\n"
        f"    return sx.Experiment({str(place / 'model')!r}, data, rules, steps=1, batch_size=2)\n"
    )
    assert main(["train", str(place / "run.py"), "--out", str(place / "run")]) == 0
    return place


def test_a_run_is_scored_and_its_training_data_are_looked_through(made, capsys, tmp_path):
    data = f"arc_easy_labels={made / 'arc.json'}"
    words = ["--tasks", "arc_easy_labels", "--data", data, "--batch-tokens", "2048"]
    told = run(capsys, made / "run", *words, "--out", tmp_path / "all")
    assert "2 of 5 items are in the data that the run was trained on" in told
    items = lines(tmp_path / "all" / "arc_easy_labels.jsonl")
    assert [item["item"] for item in items] == [0, 1, 2, 3, 4]
    assert items[0]["prompt"].startswith("Below is an instruction") and len(items[4]["logprobs"]) == 5
    limited = run(capsys, made / "run", *words, "--out", tmp_path / "some", "--limit", "2", "--seed", "1")
    assert "note: --limit 2: 2 of 5 items, drawn with seed 1" in limited and "(n 2, seed 1)" in limited
    (score,) = json.loads((tmp_path / "some" / "scores.json").read_text())["scores"]
    assert (score["n"], score["items"], score["limit"], score["seed"]) == (2, 5, 2, 1)
    drawn = lines(tmp_path / "some" / "arc_easy_labels.jsonl")
    for item in drawn:
        np.testing.assert_allclose(item["logprobs"], items[item["item"]]["logprobs"], rtol=1e-4)
    other = run(capsys, made / "run", *words, "--out", tmp_path / "chat", "--template", "chat")
    assert other != told and "<|im_start|>" in lines(tmp_path / "chat" / "arc_easy_labels.jsonl")[0]["prompt"]


def test_answers_are_written_and_looked_for(made, capsys, tmp_path):
    (tmp_path / "sums.json").write_text(
        json.dumps([{"instruction": f"{n} plus {n}?", "answer": f"{2 * n}.0"} for n in range(3)])
    )
    data = [
        "--data",
        f"llm_adapters_arc_easy={made / 'arc.json'}",
        "--data",
        f"llm_adapters_svamp={tmp_path / 'sums.json'}",
    ]
    words = ["--tasks", "llm_adapters_arc_easy,llm_adapters_svamp", *data, "--limit", "3", "--out", tmp_path / "out"]
    told = run(capsys, made / "model", *words)
    assert "the first answer in at most 32 tokens, 4 beams" in told
    items = lines(tmp_path / "out" / "llm_adapters_svamp.jsonl")
    assert items[0]["prompt"].endswith("### Response:\n                ") and len(items) == 3
    assert all(set(item) == {"item", "prompt", "text", "answer", "gold", "right"} for item in items)


def test_mmlu_and_e2e_run(made, capsys, tmp_path):
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
    told = run(capsys, made / "model", "--tasks", "mmlu,e2e_nlg", *data, "--out", tmp_path / "out")
    assert "mmlu: acc over subjects " in told and "e2e_nlg: BLEU " in told and "CIDEr is absent" in told
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert {"acc of astronomy", "acc of virology"} <= scores[0]["metrics"].keys() and scores[1]["n"] == 2
    assert lines(tmp_path / "out" / "e2e_nlg.jsonl")[0]["references"] == ["A serves B.", "B at A."]


def test_mistakes_are_one_line(made, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("SBORAX_DATA", raising=False)
    model = made / "model"
    assert "give --tasks, --harness, or both" in fails(capsys, model)
    assert "no task 'arc'" in fails(capsys, model, "--tasks", "arc")
    assert "--data piqa=x: write TASK=PATH" in fails(capsys, model, "--tasks", "arc_easy", "--data", "piqa=x")
    assert "boolq has a prompt of its own" in fails(capsys, model, "--tasks", "boolq", "--template", "chat")
    assert "--mesh data: write AXIS=SIZE" in fails(capsys, model, "--tasks", "boolq", "--mesh", "data")
    missing = fails(capsys, model, "--tasks", "hellaswag", "--out", tmp_path / "none")
    assert "hellaswag: not under $SBORAX_DATA; --data TASK=PATH" in missing
    data = write_data(tmp_path / "data.jsonl")
    wrong = ["--tasks", "arc_easy", "--data", f"arc_easy={data}", "--out", tmp_path / "out"]
    assert "arc_easy: record 0: not an instruction of LLM-Adapters'" in fails(capsys, model, *wrong)
    assert "--limit 0: at least 1" in fails(capsys, model, *wrong, "--limit", "0")
    (tmp_path / "out" / "scores.json").write_text("{}")
    assert "scores.json: exists; choose another --out" in fails(capsys, model, *wrong)
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 300)
    assert "windows of 1024 tokens, the model's context has 512" in fails(
        capsys, model, "--tasks", "wikitext2_1024", "--data", f"wikitext2_1024={text}", "--out", tmp_path / "more"
    )


def test_tasks_are_listed(capsys):
    assert main(["tasks"]) == 0
    told = capsys.readouterr().out
    assert "arc_easy_labels " in told
    assert any(
        line.split()[:3] == ["llm_adapters_commonsense", "=", "llm_adapters_boolq,"] for line in told.splitlines()
    )
