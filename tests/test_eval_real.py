"""`sborax eval` on a real model: its numbers are those of transformers."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from questions import QUESTIONS, instruction

from sborax.cli import main
from sborax.evaluate.instructions import parse
from sborax.models import load_model, save_hf
from scripts import check_scores

# test_llama compares the logits of the same model in every run.
pytestmark = [pytest.mark.usefixtures("compiled_fully"), pytest.mark.nightly]


@pytest.fixture
def home(tmp_path, data_dir):
    """Data in the layout of $SBORAX_DATA: a slice of the real ones where they are at hand, else ours."""
    place = tmp_path / "data"
    (place / "ARC-Easy").mkdir(parents=True)
    (place / "wikitext-2").mkdir()
    real = data_dir / "ARC-Easy" / "test.json"
    ours = [instruction(*question) for question in QUESTIONS]
    items = json.loads(real.read_text())[:5] if real.exists() else ours
    (place / "ARC-Easy" / "test.json").write_text(json.dumps(items))
    text = data_dir / "wikitext-2" / "test.txt"
    plain = "\n".join([question for question, _, _ in QUESTIONS] * 10)
    (place / "wikitext-2" / "test.txt").write_text(text.read_text()[:2000] if text.exists() else plain)
    return place


def logprobs(reference, prompt, continuation):
    """ln p of each token of a continuation, from transformers."""
    ids = torch.tensor([[*prompt, *continuation]])
    with torch.no_grad():
        table = torch.log_softmax(reference(ids).logits[0, len(prompt) - 1 : -1].float(), -1)
    return table.gather(1, ids[0, len(prompt) :, None])[:, 0].double().numpy()


def test_arc_and_wikitext_score_as_in_transformers(smollm2, home, capsys, tmp_path, monkeypatch):
    """Accuracy on ARC-Easy and perplexity on WikiText-2, by transformers' model and tokenizer."""
    monkeypatch.setenv("SBORAX_DATA", str(home))
    # As safetensors, which transformers reads in a tenth of the time: test_llama compares the two from the GGUF file.
    target = tmp_path / "model"
    model = load_model(smollm2)
    save_hf(target, model, model.params)
    words = ["--tasks", "arc_easy,wikitext2_128", "--batch-tokens", "768", "--out", tmp_path / "out"]
    assert main(["eval", *map(str, (target, *words))]) == 0
    output = capsys.readouterr().out
    scores = {score["task"]: score for score in json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]}
    reference = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    items = [json.loads(line) for line in (tmp_path / "out" / "arc_easy.jsonl").read_text().splitlines()]
    right = []
    records = json.loads((home / "ARC-Easy" / "test.json").read_text())
    for record, item in zip(records, items, strict=True):
        question, options = parse(record["instruction"])
        prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        want = [logprobs(reference, prompt, tokenizer(f" {text}")["input_ids"]).sum() for text in options.values()]
        np.testing.assert_allclose(item["logprobs"], want, atol=2e-3)
        right.append(list(options)[int(np.argmax(want))] == record["answer"])
    assert scores["arc_easy"]["metrics"]["acc"] == {
        "value": np.mean(right), "stderr": pytest.approx(np.std(right, ddof=1) / math.sqrt(5)),
    }  # fmt: skip
    text = home / "wikitext-2" / "test.txt"
    rows = text.read_text().removesuffix("\n").split("\n")
    ids = tokenizer("\n\n".join(f"{row}\n" if row.strip() else "" for row in rows), verbose=False)["input_ids"]
    losses = [-logprobs(reference, ids[i : i + 1], ids[i + 1 : i + 128]) for i in range(0, len(ids) - 127, 128)]
    assert scores["wikitext2_128"]["metrics"]["perplexity"]["value"] == pytest.approx(
        math.exp(np.concatenate(losses).mean()), rel=1e-4
    )
    assert scores["wikitext2_128"]["n"] == len(losses) > 2
    monkeypatch.setattr("sys.argv", ["check_scores.py", str(target), str(tmp_path / "out"), "--text", str(text)])
    assert check_scores.main() == 0
    compared = capsys.readouterr().out
    assert f"arc_easy: acc {np.mean(right):.6f} here, {np.mean(right):.6f} by transformers, n 5;" in compared
    assert f"by transformers, n {len(losses)};" in compared
    assert f"arc_easy: acc {np.mean(right):.4f} ± " in output and "(n 5, seed 0)" in output
    assert "this copy has 5 items, the published set 2,376: not its score" in output
