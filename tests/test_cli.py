"""The command line: what it prints, and that a mistake is one line and costs nothing."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import fails, prints
from safetensors.numpy import load_file
from tiny_model import write_data, write_model

import sborax as sx
from sborax import methods
from sborax.cli import main, quickstart
from sborax.models import load_model

EXPERIMENT = """
import sborax as sx

def experiment():
    return sx.Experiment(
        model={model!r},
        data=sx.Data(name={data!r}, template="chat", max_length=96),
        rules=(("self_attn/(q|v)", sx.SBoRA(rank=8)), ("up_proj", sx.LoRA(rank=4))),
        optimizer=sx.Optimizer(lr=1e-2, schedule="constant", warmup=0),
        steps=4,
        batch_size=2,
        save=sx.Save(every=2),
    )
"""


# A constant rate, and the same ranks and shapes throughout: nearly all runs here share one compiled step.


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with a model, data, an experiment, and a run of it."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    text = EXPERIMENT.format(model=str(folder / "model"), data=str(folder / "data.jsonl"))
    (folder / "small.py").write_text(text)
    assert main(["train", str(folder / "small.py"), "--out", str(folder / "run")]) == 0
    return folder


@pytest.mark.quick
def test_a_run_is_written_whole(workspace):
    run = workspace / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter", "checkpoints", "config.json", "metrics.jsonl", "sources.json", "summary.json",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_changes_stand_before_and_after_options(workspace, capsys, tmp_path):
    config = workspace / "run" / "config.json"
    words = [config, "steps=1", "--out", tmp_path / "run", "save.every=1", "rules.0.pattern=self_attn/[qv]_proj"]
    prints(capsys, "train", *words)
    fields = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (fields["steps"], fields["save"]["every"]) == (1, 1)
    assert fields["rules"][0]["pattern"] == "self_attn/[qv]_proj"


def test_resume_goes_on(workspace, capsys, tmp_path):
    source, out = workspace / "small.py", tmp_path / "run"
    prints(capsys, "train", source, "steps=2", "--out", out)
    assert "resuming after step 2" in prints(capsys, "train", source, "--out", out, "--resume")
    assert json.loads((out / "summary.json").read_text())["steps"] == 4


@pytest.mark.quick
def test_merge_writes_what_the_run_computes(workspace, capsys, tmp_path):
    prints(capsys, "merge", workspace / "run", tmp_path / "merged")
    base, merged = load_model(workspace / "model"), load_model(tmp_path / "merged")
    params, adapters = sx.load_adapter(workspace / "run" / "adapter", base.params)
    tokens = jnp.arange(24).reshape(2, 12) + 2
    want = base.apply(params, adapters, tokens)
    np.testing.assert_allclose(merged.apply(merged.params, None, tokens), want, rtol=1e-4, atol=1e-5)
    assert np.abs(want - base.apply(base.params, None, tokens)).max() > 1e-3


def test_export_is_an_adapter_for_the_model(workspace, capsys, tmp_path):
    assert "exact" in prints(capsys, "export", workspace / "run", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(workspace / "model")
    base = load_model(workspace / "model")
    run, export = sx.load_adapter(workspace / "run" / "adapter", base.params), sx.load_peft(tmp_path / "peft", base)
    tokens = jnp.arange(24).reshape(2, 12) + 2
    np.testing.assert_allclose(base.apply(*export, tokens), base.apply(*run, tokens), rtol=1e-4, atol=1e-5)
    words = ["--prompt", "1 plus 1?", "--max-new-tokens", "6"]
    with_adapter = prints(capsys, "generate", workspace / "model", "--adapter", tmp_path / "peft", *words)
    assert with_adapter == prints(capsys, "generate", workspace / "run", *words)


def test_generate_repeats_itself_and_keeps_the_prompt(workspace, capsys):
    words = ["generate", workspace / "run", "--prompt", "3 plus 3?", "--prompt", "4", "--max-new-tokens", "5"]
    first = prints(capsys, *words)
    assert first.startswith("3 plus 3?") and first == prints(capsys, *words)
    sampled = [prints(capsys, *words, "--temperature", "2", "--seed", seed) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    assert "plus" not in prints(capsys, *words[:4], "--template", "chat", "--max-new-tokens", "3")


def test_plan_counts_what_training_trains(workspace, capsys):
    output = prints(capsys, "plan", workspace / "small.py")
    summary = json.loads((workspace / "run" / "summary.json").read_text())
    assert f"trainable: {summary['trainable_parameters']:,} parameters" in output
    # Two layers: 8 rows of 32 and of 16 columns; (32 + 48) x 4.
    for module, size in (("self_attn/q_proj", 512), ("self_attn/v_proj", 256), ("mlp/up_proj", 640)):
        (line,) = (line for line in output.splitlines() if line.startswith(f"layers/{module}"))
        assert f" {size} " in line and "rank=" in line
    leaves = load_file(workspace / "run" / "adapter" / "adapter.safetensors")
    trained = sum(leaf.nbytes for name, leaf in leaves.items() if "/train/" in name)
    assert f"trained {trained:,}" in " ".join(output.split())
    assert prints(capsys, "plan", workspace / "run") == output


def test_plan_reads_no_weights(workspace, capsys, tmp_path):
    (tmp_path / "config.json").write_text((workspace / "model" / "config.json").read_text())
    output = prints(capsys, "plan", tmp_path)
    assert "layers/mlp/gate_proj" in output and f"{2 * 32 * 48:,}" in output
    changed = prints(capsys, "plan", workspace / "small.py", f"model={tmp_path}", "train_also=['norm']")
    assert "trained in the base itself: 160 parameters" in changed


@pytest.mark.quick
def test_methods_tells_of_every_method(capsys):
    output = prints(capsys, "methods")
    names = [line for line in output.splitlines() if line and not line.startswith(" ")]
    # Classes that other tests have defined are listed with their module.
    assert [name for name in names if ":" not in name] == methods.__all__
    for paragraph in output.split("\n\n"):
        for fact in ("options:", "paper:", "merge:", "PEFT:"):
            assert fact in paragraph
    text = prints(capsys, "methods", "sbora")
    assert "rank=64" in text and "x W + s x[idx] b" in text and "plain LoRA (exact)" in text and "alpha: s = " in text
    assert "use_dora=True" in prints(capsys, "methods", "DoRA")
    assert "did you mean SBoRA" in fails(capsys, "methods", "SBRA")


def test_quickstart_on_a_model_that_is_at_hand(workspace, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "smollm2", lambda: pytest.fail("fetched"))
    monkeypatch.setattr(quickstart, "conversations", lambda: pytest.fail("fetched"))
    model, data = f"model={workspace / 'model'}", f"data.name={workspace / 'data.jsonl'}"
    rank = "rules.0.method.rank=4"
    output = prints(capsys, "quickstart", model, data, rank, "steps=2", "--out", tmp_path / "run")
    assert output.count("before:") == output.count("after:") == 3 and "loss" in output
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").exists()


BAD_ARGUMENTS = {
    "no command": ((), "required: COMMAND"),
    "unknown command": (("trian",), "invalid choice: 'trian'"),
    "unknown option": (("merge", "a", "b", "--fast"), "unknown argument --fast"),
    "too many words": (("merge", "a", "b", "c"), "unknown argument c"),
    "no prompt": (("generate", "a"), "required: --prompt"),
    "not a number": (("generate", "a", "--prompt", "x", "--top-k", "many"), "--top-k: invalid int value: 'many'"),
    "missing experiment": (("train", "nowhere.py"), "nowhere.py: no such experiment"),
    "missing model": (("generate", "/no/where", "--prompt", "x"), "/no/where: no such directory"),
    "not a run": (("merge", "/no/where", "out"), "/no/where: not a run"),
    "plan of nothing": (("plan", "/no/where"), "/no/where: no such directory"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@pytest.mark.quick
def test_bad_arguments(name, capsys):
    argv, says = BAD_ARGUMENTS[name]
    assert says in fails(capsys, *argv)


def truncate(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def break_field(folder: Path) -> None:
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": "two"}))


def unknown_field(folder: Path) -> None:
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"logit_scale": 0.5}))


def break_config(folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{not json")


def break_line(folder: Path) -> None:
    with (folder / "data.jsonl").open("a") as file:
        file.write('{"instruction": "half\n')


def empty(folder: Path) -> None:
    (folder / "data.jsonl").write_text("")


def lengthen(folder: Path) -> None:
    rows = [{"instruction": "x" * 200, "output": "y"}] * 3
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def drop_column(folder: Path) -> None:
    (folder / "data.jsonl").write_text('{"question": "why?"}\n')


def break_code(folder: Path) -> None:
    (folder / "small.py").write_text("def experiment(:\n")


def remove_model(folder: Path) -> None:
    for file in (folder / "model").iterdir():
        file.unlink()


BAD_INPUT = {
    "truncated safetensors": (truncate, (), ["model.safetensors", "fetch it again"]),
    "wrong config field": (break_field, (), ["config.json", "num_hidden_layers", "'two'"]),
    "unknown config field": (unknown_field, (), ["config.json", "logit_scale"]),
    "config that is not JSON": (break_config, (), ["config.json", "not JSON"]),
    "model without files": (remove_model, (), ["config.json", "missing"]),
    "line that is not JSON": (break_line, (), ["data.jsonl", "line 25"]),
    "empty data": (empty, (), ["data.jsonl", "empty"]),
    "all too long": (lengthen, (), ["data.jsonl", "3 are longer", "max_length"]),
    "missing column": (drop_column, (), ["data.jsonl: line 1", "question"]),
    "code that does not parse": (break_code, (), ["small.py", "SyntaxError"]),
    "unknown key": (None, ("optimizer.learning_rate=1",), ["optimizer.learning_rate", "unknown key"]),
    "close key": (None, ("batchsize=1",), ["did you mean batch_size"]),
    "value of the wrong type": (None, ("steps=many",), ["steps", "many"]),
    "rule that matches nothing": (None, ("rules.0.pattern=nowhere",), ["'nowhere' matches no kernel"]),
    "rank beyond the matrix": (None, ("rules.0.method.rank=33",), ["q_proj", "1..32", "33"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
@pytest.mark.quick
def test_bad_input(name, workspace, capsys, tmp_path):
    spoil, changes, says = BAD_INPUT[name]
    write_model(tmp_path / "model") if spoil else None
    write_data(tmp_path / "data.jsonl")
    model = tmp_path / "model" if spoil else workspace / "model"
    text = EXPERIMENT.format(model=str(model), data=str(tmp_path / "data.jsonl"))
    (tmp_path / "small.py").write_text(text)
    if spoil:
        spoil(tmp_path)
    line = fails(capsys, "train", tmp_path / "small.py", *changes, "--out", tmp_path / "run")
    assert all(part in line for part in says), line


def test_some_too_long_are_dropped_and_counted(workspace, capsys, tmp_path):
    with write_data(tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "x" * 200, "output": "y"}) + "\n")
    words = [f"data.name={tmp_path / 'data.jsonl'}", "steps=1", "--out", tmp_path / "run"]
    assert "24 samples of 25 records, 1 too long (dropped)" in prints(capsys, "train", workspace / "small.py", *words)


def test_nothing_is_lost_when_the_loss_is_not_finite(workspace, capsys, tmp_path):
    """The step that breaks comes after a checkpoint, which stays good."""
    out = tmp_path / "run"
    changes = ["optimizer.name=lion", "optimizer.lr=4e17", "optimizer.clip=null", "save.every=1", "save.keep=9"]
    line = fails(capsys, "train", workspace / "small.py", *changes, "steps=40", "--out", out)
    assert "loss" in line and "step" in line
    saved = sorted(int(folder.name) for folder in (out / "checkpoints").iterdir())
    assert saved and saved[0] == 1
    # What was saved is finite, so the run can be taken up again; it breaks again where it broke.
    assert fails(capsys, "train", workspace / "small.py", *changes, "steps=40", "--out", out, "--resume") == line


def test_a_run_is_never_overwritten(workspace, capsys):
    contents = {path: path.read_bytes() for path in (workspace / "run").rglob("*") if path.is_file()}
    assert "not empty" in fails(capsys, "train", workspace / "small.py", "--out", workspace / "run")
    assert "already holds a model" in fails(capsys, "merge", workspace / "run", workspace / "model")
    assert contents == {path: path.read_bytes() for path in (workspace / "run").rglob("*") if path.is_file()}


def test_an_unwritable_place_is_an_error(workspace, capsys):
    assert "data.jsonl" in fails(capsys, "train", workspace / "small.py", "--out", workspace / "data.jsonl")
    assert "data.jsonl" in fails(capsys, "merge", workspace / "run", workspace / "data.jsonl" / "below")


def test_prompts_that_do_not_fit(workspace, capsys):
    assert "context of 128" in fails(capsys, "generate", workspace / "run", "--prompt", "x" * 200)
    assert "at least one token" in fails(capsys, "generate", workspace / "run", "--prompt", "")
    assert "--adapter" in fails(capsys, "generate", workspace / "run", "--adapter", "p", "--prompt", "x")
    bad = ["--template", "story", "--prompt", "x"]
    assert "--template 'story'" in fails(capsys, "generate", workspace / "run", *bad)


def test_debug_adds_the_traceback(capsys):
    assert main(["plan", "/no/where", "--debug"]) == 2
    output = capsys.readouterr().err
    assert output.startswith("Traceback") and output.splitlines()[-1].startswith("error: ")


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sborax.cli.plan.show", interrupt)
    assert main(["plan", "x"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.quick
def test_python_dash_m(tmp_path):
    """In a process of its own: the exit code, and a reader that goes away."""
    run = [sys.executable, "-m", "sborax"]
    result = subprocess.run([*run, "plan", "nowhere.py"], capture_output=True, text=True, cwd=tmp_path)
    assert (
        result.returncode == 2
        and result.stderr == "error: " + result.stderr.removeprefix("error: ").splitlines()[0] + "\n"
    )
    piped = subprocess.run(f"{sys.executable} -m sborax methods | head -1", shell=True, capture_output=True, text=True)
    assert (piped.stdout, piped.stderr) == (f"{methods.__all__[0]}\n", "")
