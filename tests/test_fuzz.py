"""What strangers' files may not do: the cases that once failed, and some hundred new ones of every reader."""

import ast
import copy
import dataclasses
import json
import os
import shutil
import struct
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

import sborax as sx
from sborax.config.codec import override
from sborax.data.samples import load_samples
from sborax.data.template import prompt_of, render
from sborax.interop.peft_targets import targeted, value_for
from sborax.models import load_config, load_model, save_hf
from sborax.models.checkpoint import open_safetensors
from sborax.models.gguf import open_gguf
from sborax.models.tokenizer import read_tokenizer
from sborax.records.adapter import LEAVES, PLAN, read_adapter, save_adapter
from sborax.records.report import METRICS, Metrics
from scripts.fuzzing.gguf_file import describe, pack
from scripts.fuzzing.readers import READERS
from scripts.fuzzing.runner import cases, furnish
from scripts.fuzzing.seeds import tiny, tokenizer

CASES = 30

PACKAGE = Path(__file__).resolve().parents[1] / "sborax"
RUNS_CODE = {"eval", "exec", "compile", "__import__", "execfile"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_is_run(path):
    """No pickles, no remote code, no evaluation. Experiments are Python by design, and imported in one place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve", "torch", "joblib"} & {
                name.split(".")[0] for name in names
            }
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in RUNS_CODE
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in ("unsafe_load", "full_load", "system", "popen")
            if node.func.attr == "exec_module":
                assert path.relative_to(PACKAGE) == Path("config/classes.py")


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """A model of two layers in shards, with its index."""
    place = tmp_path_factory.mktemp("tiny")
    save_hf(place, tiny(), tiny().params, shard_bytes=1_000)
    return place


@pytest.fixture
def model(tiny_files, tmp_path):
    """A copy, to be harmed."""
    return shutil.copytree(tiny_files, tmp_path / "model")


def refused(call, match):
    """The error's line."""
    with pytest.raises(sx.SboraxError, match=match) as caught:
        call()
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 2_000


def changed(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", "a\0.safetensors", 3, None, ["a"]]
)
def test_a_shard_lies_beside_its_index(model, shard):
    (model.parent / "outside.safetensors").write_bytes(min(model.glob("*.safetensors")).read_bytes())
    index = model / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    changed(index, weight_map={**listed, "x": shard})
    refused(lambda: open_safetensors(model), "is not the name of a safetensors file beside it")


def test_shards_may_be_links(model):
    """As in the hub's cache."""
    for shard in list(model.glob("*.safetensors")):
        shard.rename(model.parent / shard.name)
        shard.symlink_to(model.parent / shard.name)
    assert open_safetensors(model).names()


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"vocab_size": 10**6}, "config says"),
        ({"intermediate_size": 2**23}, "config says"),
        ({"num_hidden_layers": 4_000}, "too few tensors for the 4000 layers"),
        ({"vocab_size": 10**9}, "config.json: vocab_size must be at most 8,388,608, got 1,000,000,000"),
        ({"intermediate_size": 2**30}, "intermediate_size must be at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4,096"),
        ({"hidden_size": 10**30}, "below 2"),
        ({"model_type": ["llama"]}, "model_type .* is not supported"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type .* is not supported"),
        ({"rms_norm_eps": 1e999}, "must be a positive number"),
        ({"rms_norm_eps": 10**400}, "must be a positive number"),
        ({"eos_token_id": [{}]}, "the number of a token"),
        ({"bos_token_id": "<s>"}, "the number of a token"),
    ],
)
def test_a_config_is_checked_before_memory_is_taken(model, fields, match):
    changed(model / "config.json", **fields)
    refused(lambda: load_model(model), match)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 300 + "1" + "}" * 300, '{"a": ' + "9" * 5_000 + "}", "[]"])
def test_documents_that_python_cannot_take(model, text):
    for name in ("config.json", "model.safetensors.index.json"):
        (model / name).write_text(text)
    refused(lambda: load_config(model), "nested too deeply|not JSON|not a JSON object")
    refused(lambda: open_safetensors(model), "nested too deeply|not JSON|not a JSON object")


def test_a_key_given_twice_is_refused(model):
    """Readers take the first or the last: what one has checked, another would not use."""
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("{", '{"vocab_size": 16, ', 1))
    refused(lambda: load_config(model), "'vocab_size' is given twice")


def gguf_with(place, **changes):
    (place / "model.gguf").write_bytes(pack(describe() | changes))
    return place / "model.gguf"


def field(name, kind, value):
    """The fields of the sound file, with one in another's place."""
    return [row for row in describe()["fields"] if row[0] != name] + [[name, kind, value]]


def test_a_gguf_array_of_more_values_than_the_file_has_bytes(tmp_path):
    """The package would make empty values until memory ends."""
    raw = pack(describe() | {"counts": [0, 1], "fields": [], "tensors": []})
    head = raw[:24] + struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 0, 2**60)
    (tmp_path / "model.gguf").write_bytes(head)
    refused(lambda: open_gguf(tmp_path / "model.gguf"), "more than 4,194,304 values")
    (tmp_path / "model.gguf").write_bytes(head[:-8] + struct.pack("<Q", 2**20))
    refused(lambda: open_gguf(tmp_path / "model.gguf"), "ends within its header")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"counts": [2**63, 21]}, "ends within its header"),
        ({"counts": [11, 2**63]}, "unknown type|ends within"),
        ({"fields": field("a", 9, [9, [[4, [1]]]]), "counts": [11, 22]}, "arrays of arrays"),
        ({"fields": field("llama.attention.head_count", 4, 0)}, "num_attention_heads must be a positive whole number"),
        ({"fields": field("llama.embedding_length", 8, "wide")}, "hidden_size must be a positive whole number"),
        ({"fields": field("llama.rope.freq_base", 8, "far")}, "rope_theta must be a positive number"),
        ({"fields": field("general.architecture", 4, 7)}, "architecture 7 is not supported"),
        ({"tensors": describe()["tensors"][1:], "counts": [10, 21]}, "has no matrix 'token_embd.weight'"),
    ],
)
def test_gguf_metadata_that_lies(tmp_path, changes, match):
    file = gguf_with(tmp_path, **changes)
    refused(lambda: open_gguf(file).config(), match)


@pytest.mark.parametrize(
    "name, kind, value, match",
    [
        ("tokenizer.ggml.bos_token_id", 4, 32, "no token's number"),
        ("tokenizer.ggml.tokens", 4, 5, "no list of texts"),
        ("tokenizer.ggml.token_type", 9, [5, [1]], "a type of every token"),
        ("tokenizer.ggml.merges", 9, [8, ["ab"]], "is not of tokens"),
        ("tokenizer.ggml.merges", 9, [8, ["a z"]], "is not of tokens"),
        ("tokenizer.chat_template", 4, 5, "is no text"),
    ],
)
def test_gguf_tokenizers_that_lie(tmp_path, name, kind, value, match):
    file = gguf_with(tmp_path, fields=field(name, kind, value))
    refused(lambda: open_gguf(file).tokenizer(), match)


def test_a_sound_gguf_is_read(tmp_path):
    """What the cases above are made from."""
    file = open_gguf(gguf_with(tmp_path))
    assert file.config().num_hidden_layers == 1 and len(file.tokenizer()) == 32
    assert all(file.read(name).shape == file.shape(name) for name in file.names())


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", r"(?x)(\w|\w)#" + "\n*!", "(?i)q_proj", "(" + "mo|" * 400 + "m)" * 1 + "(" + "d|" * 400 + "d)x"],
)
@pytest.mark.parametrize("where", ["target_modules", "rank_pattern"])
def test_patterns_of_an_adapter_end(pattern, where):
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)]
    began = time.monotonic()
    try:
        if where == "rank_pattern":
            value_for({where: {pattern: 3}}, where, modules[0], 1)
        else:
            targeted({where: pattern}, modules)
    except sx.SboraxError as error:
        assert str(error).isprintable()
    assert time.monotonic() - began < 2


def test_a_rule_that_never_ends_is_refused():
    rule = sx.Rule(r"(\w|\w)*[!?]", sx.LoRA(rank=1))
    params = {"layers": {"self_attn": {"a_long_name_of_a_projection": {"kernel": np.ones((1, 4, 4))}}}}
    refused(lambda: sx.plan(params, [rule]), "takes too long")


def test_a_pattern_too_long_to_compile_is_refused():
    """`regex` compiles a million characters in ten seconds, and nothing stops it."""
    refused(lambda: sx.Rule("(a|" * 2**15 + ")" * 2**15, sx.LoRA(2)), "65,536 are the most")


EXPERIMENT = sx.Experiment("m", sx.Data("d"), (("mlp", sx.LoRA(rank=1)),), steps=1)


@pytest.mark.parametrize(
    "word",
    [
        f"steps={'(' * 5_000}", f"steps={'-' * 100_000}1", f"steps=0x{'f' * 5_000}", f"rules.{'9' * 5_000}.pattern=x",
        "optimizer.lr=nan", "optimizer.lr=1e999", f"optimizer.lr={10**400}", "steps={1, 2}", "mesh={1: 2}", "steps=1j",
        "rules.0.layers={'slice': [0, 1, 0]}", "rules.0.layers={'slice': ['a', {}, 1]}", "steps=b'a'", "steps=...",
        "steps=__import__('os').system('touch x')", f"data.max_length={'[' * 300}{']' * 300}",
    ],
)  # fmt: skip
def test_overrides_are_read_and_never_run(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: override(EXPERIMENT, [word]), ".")
    assert not list(tmp_path.iterdir())


def test_a_sweep_has_bounds():
    grid = {f"optimizer.{name}": [float(i) for i in range(100)] for name in ("lr", "eps", "decay", "clip")}
    refused(lambda: sx.Sweep(EXPERIMENT, grid), "100,000,000 members are more than the 512")


@pytest.mark.parametrize(
    "line, match",
    [
        ("[" * 100_000, "line 1: is nested too deeply"),
        ('{"text": ' + "9" * 5_000 + "}", "line 1: has a number of too many digits"),
        ('{"text": "\\ud800"}', "line 1: not text"),
    ],
)
def test_records_that_python_cannot_take(tmp_path, line, match):
    (tmp_path / "data.jsonl").write_text(line + "\n")
    data = sx.Data(str(tmp_path / "data.jsonl"), "text")
    refused(lambda: load_samples(data, tokenizer(), 1, 1_000), match)


@pytest.mark.parametrize("template", ["{text:>99999999999}", "{text!r}", "{text.__class__}", "{text[0]}", "{", "{0}"])
def test_prompts_take_the_names_of_columns_and_no_more(template):
    with pytest.raises(sx.SboraxError, match="only the name of a column|no column|not a format string"):
        render(template, "{text}", {"text": "a"}, None)


def test_a_column_may_have_any_name():
    record = {"a.b": 1, "0": "x", "c d": None}
    assert render("{a.b}{0}{c d}", "{0}", record, None).pieces[0].text == "1x"


@pytest.mark.parametrize(
    "template, match",
    [
        ("{{ ''.__class__.__mro__ }}", "chat template failed .*unsafe"),
        ("{{ lipsum.__globals__['os'].system('touch x') }}", "chat template failed"),
        ("{% include '/etc/passwd' %}", "chat template failed"),
        ("{{ 1 / 0 }}", "chat template failed .*division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template failed"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.2 seconds"),
    ],
)
def test_chat_templates_that_fail(template, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sborax.data.renderer.SECONDS", 0.2)
    chat_tokenizer = copy.deepcopy(tokenizer())
    chat_tokenizer.chat_template = template
    refused(lambda: prompt_of("chat", {"messages": [{"role": "user", "content": "Hi"}]}, chat_tokenizer), match)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "about",
    [
        {"fast_tokenizer_files": ["../outside/tokenizer.9.9.9.json"]},
        {"init_inputs": ["x"]},
        {"gguf_file": "/etc/passwd"},
        {"chat_template": [{"name": "../../x", "template": "{{ 1 }}"}]},
        {"model_max_length": [1]},
    ],
)
def test_tokenizers_that_point_elsewhere(tmp_path, about):
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert read_tokenizer(tmp_path) is not None
    changed(tmp_path / "tokenizer_config.json", **about)
    refused(lambda: read_tokenizer(tmp_path), "only tokenizer.json|no plain name|not a readable tokenizer")


def test_a_tokenizer_with_several_templates_is_saved(tmp_path):
    """Of the others, files in a folder are made."""
    chat_tokenizer = copy.deepcopy(tokenizer())
    chat_tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    save_hf(tmp_path, dataclasses.replace(tiny(), tokenizer=chat_tokenizer), tiny().params)
    assert read_tokenizer(tmp_path).chat_template == chat_tokenizer.chat_template


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapter")
    _, adapters = sx.attach(jax.random.key(0), tiny().params, [("q_proj", sx.LoRA(rank=1))])
    save_adapter(place, adapters)
    return place


@pytest.mark.parametrize(
    "harm, match",
    [
        (lambda plan: plan.pop("sites"), "sites is missing"),
        (lambda plan: plan.update(base=[]), "base is missing or has the wrong type"),
        (lambda plan: plan["sites"].append(3), "expected a path, a method and in_axes"),
        (lambda plan: plan["sites"][0].update(in_axes="1"), "cannot hold an adapter"),
        (lambda plan: plan["sites"][0].update(path=["layers"]), "cannot hold an adapter"),
        (lambda plan: plan["sites"].append(plan["sites"][0] | {"path": "layers"}), "the parent of another path"),
        (lambda plan: plan["sites"][0]["method"].update(type="SBoRA"), "unknown key|no leaf"),
        (lambda plan: plan.update(rules=[[]]), "rules.0"),
    ],
)
def test_plans_that_lie(adapter_files, tmp_path, harm, match):
    place = shutil.copytree(adapter_files, tmp_path / "adapter")
    plan = json.loads((place / PLAN).read_text())
    harm(plan)
    (place / PLAN).write_text(json.dumps(plan))
    refused(lambda: read_adapter(place), match)


def test_leaves_that_do_not_go_together(adapter_files, tmp_path):
    place = shutil.copytree(adapter_files, tmp_path / "adapter")
    leaves = load_file(place / LEAVES)
    name = next(name for name in leaves if name.endswith("/a"))
    save_file(leaves | {name: np.zeros(3, np.float32)}, place / LEAVES)
    refused(lambda: read_adapter(place), "is damaged, its digest does not match")
    # Files of before had no digests.
    plan = json.loads((place / PLAN).read_text())
    del plan["digests"]
    (place / PLAN).write_text(json.dumps(plan))
    refused(lambda: read_adapter(place), "which lacks an axis")


def test_a_rank_of_no_layer():
    rule = ("q_proj", sx.LoRA(rank=()))
    refused(lambda: sx.attach(jax.random.key(0), tiny().params, [rule]), r"rank must lie in 1\.\.")


@pytest.mark.parametrize("loss", ["9" * 400, "-" + "9" * 400, '"3"', "[]"])
def test_metrics_end_before_a_loss_that_is_no_number(tmp_path, loss):
    """A run that is resumed writes that step anew."""
    (tmp_path / METRICS).write_text(f'{{"step": 1, "loss": 2}}\n{{"step": 2, "loss": {loss}}}\n')
    assert Metrics(epath.Path(tmp_path), 2).losses() == [2.0]


def test_errors_are_one_line_whatever_they_quote():
    error = str(sx.SboraxError("a\nb\x1b[2J\ud800" + "c" * 10_000 + " mend it"))
    assert error.startswith(r"a\nb\x1b[2J\ud800ccc") and error.endswith("ccc mend it") and len(error) <= 2_020


@pytest.mark.parametrize("reader", READERS)
def test_every_reader(reader, tmp_path):
    """New cases with a fixed seed, in this process."""
    jail = tmp_path / "jail"
    furnish(jail)
    folder = os.getcwd()
    try:
        tally = cases(reader, 1, jail, range(CASES))
    finally:
        os.chdir(folder)
    assert tally.wrong == [] and tally.done == CASES
    # Neither all nor none: the harmed files reach what lies behind the first check.
    assert tally.fine and len(tally.lines) > 2
