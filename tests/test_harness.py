"""lm-evaluation-harness gives our models the results of its own Hugging Face models, on the same weights and items."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sborax_models import make
from tiny_model import tokenizer

import sborax as sx
from sborax.evaluate import Scorer
from sborax.models import load_model

# What the harness and its dependencies warn of is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_choice: "{{options}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "tiny_written": """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e", "zz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A torch model with a tokenizer, and a directory of tasks over items of many lengths."""
    place = tmp_path_factory.mktemp("harness")
    make("llama", place / "model", vocab_size=258, eos_token_id=1, bos_token_id=0)
    tokenizer().save_pretrained(place / "model")
    rng = np.random.default_rng(0)
    words = ["apple", "be", "cat", "door", "ending", "fig"]

    def text(count):
        return " ".join(rng.choice(words, count))

    items = [
        {
            "question": text(rng.integers(1, 16)),
            "options": [text(rng.integers(1, 4)) for _ in range(3)],
            "gold": int(rng.integers(3)),
            "text": text(rng.integers(5, 40)),
            "answer": "x",
        }
        for _ in range(6)
    ]
    data = place / "items.json"
    data.write_text(json.dumps(items))
    (place / "tasks").mkdir()
    for name, fields in TASKS.items():
        common = COMMON.format(data=data).replace("{{question}}", "" if "rolling" in name else "{{question}}")
        (place / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{common}{fields}")
    return place


@pytest.fixture(scope="module")
def results(workspace):
    """The harness on its own model, and on ours."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from sborax.evaluate.harness import run_harness

    theirs = simple_evaluate(
        model=HFLM(pretrained=str(workspace / "model"), dtype="float32", device="cpu", batch_size=4),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(workspace / "tasks"), include_defaults=False),
        bootstrap_iters=100,
    )
    model = load_model(workspace / "model")
    lines = []
    ours = run_harness(
        list(TASKS),
        Scorer.of(model, model.params),
        include=str(workspace / "tasks"),
        out=workspace / "out",
        echo=lines.append,
    )
    return theirs, ours, lines


def test_every_score_is_that_of_the_hugging_face_model(results):
    theirs, ours, lines = results
    for name in TASKS:
        scores = [{k: v for k, v in run["results"][name].items() if isinstance(v, float)} for run in (theirs, ours)]
        assert scores[0].keys() == scores[1].keys() and scores[0]
        for key, value in scores[0].items():
            if "stderr" not in key:
                assert scores[1][key] == pytest.approx(value, rel=1e-4), key
    assert any(line.startswith("tiny_choice: acc,none ") and "(n 6 of 6, seed 0)" in line for line in lines)


def test_every_answer_is_that_of_the_hugging_face_model(results):
    theirs, ours, _ = results
    for name in TASKS:
        pairs = list(zip(theirs["samples"][name], ours["samples"][name], strict=True))
        assert len(pairs) == 6
        for expected, output in pairs:
            if name == "tiny_written":
                assert expected["resps"] == output["resps"]
            elif name == "tiny_rolling":
                np.testing.assert_allclose(output["resps"], expected["resps"], rtol=1e-4)
            else:
                got, want = ([response[0] for response in sample["resps"]] for sample in (output, expected))
                assert [bool(greedy) for _, greedy in got] == [bool(greedy) for _, greedy in want]
                np.testing.assert_allclose([v for v, _ in got], [v for v, _ in want], rtol=1e-4)
    texts = [sample["resps"][0][0] for sample in ours["samples"]["tiny_written"]]
    assert len(set(texts)) > 1 and not any("e" in text for text in texts)


def test_items_are_saved_and_results_never_overwritten(results, workspace):
    from sborax.evaluate.harness import run_harness

    assert len((workspace / "out" / "tiny_choice.jsonl").read_text().splitlines()) == 6
    assert set(json.loads((workspace / "out" / "harness.json").read_text())["results"]) == set(TASKS)
    model = load_model(workspace / "model")
    scorer = Scorer.of(model, model.params)
    with pytest.raises(sx.SboraxError, match=r"harness\.json: exists"):
        run_harness(["tiny_choice"], scorer, out=workspace / "out")


def test_an_adapter_is_scored_with_its_model(results, workspace):
    from sborax.evaluate.harness import HarnessModel

    model = load_model(workspace / "model")
    params, adapters = sx.attach(jax.random.key(0), model.params, [("q_proj|up_proj", sx.LoRA(rank=2))])
    train, frozen = sx.split(adapters)
    adapters = sx.combine(jax.tree.map(lambda leaf: leaf + jnp.float32(0.05), train), frozen)

    @dataclasses.dataclass
    class Request:
        args: tuple

    requests = [Request(("apple", " be")), Request(("", "cat door"))]
    plain, adapted, merged = (
        HarnessModel(Scorer.of(model, *arguments)).loglikelihood(requests, disable_tqdm=True)
        for arguments in ((model.params,), (params, adapters), (sx.merge(params, adapters),))
    )
    np.testing.assert_allclose([v for v, _ in adapted], [v for v, _ in merged], rtol=1e-4)
    assert abs(adapted[0][0] - plain[0][0]) > 1e-3


def test_git_is_not_asked_where_it_is(tmp_path, monkeypatch, capfd):
    """Outside of a checkout it would complain on the terminal."""
    from sborax.evaluate import harness

    monkeypatch.chdir(tmp_path)
    with harness._without_git():
        assert harness.evaluator.get_git_commit_hash() == ""
    assert capfd.readouterr().err == ""
