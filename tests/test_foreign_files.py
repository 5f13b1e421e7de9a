"""Files that others made: read as transformers reads them, as the text that they are, or refused in one line."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import transformers
from sborax_models import make, tokens_of, torch_logits
from tiny_model import tokenizer, write_data, write_model

import sborax as sx
from sborax.cli.main import main
from sborax.config.documents import read_object
from sborax.data import source
from sborax.data.source import read
from sborax.models import LlamaConfig, load_config, load_model
from sborax.models.checkpoint import INDEX, open_safetensors
from sborax.models.gguf_header import check_header
from sborax.records.adapter import read_adapter
from sborax.records.disk import refusal
from sborax.train.loop import train


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def model(sound, tmp_path):
    """A tiny model, to be harmed."""
    return shutil.copytree(sound, tmp_path / "model")


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_single_file_goes_before_an_index(tmp_path, capsys):
    """What transformers leaves behind when it saves a model over one in shards."""
    make("llama", tmp_path / "shards", "30KB")
    reference = make("llama", tmp_path / "both", "1GB", initializer_range=0.3)
    for file in (*(tmp_path / "shards").glob("model-*.safetensors"), tmp_path / "shards" / INDEX):
        shutil.copy(file, tmp_path / "both")
    model = load_model(tmp_path / "both")
    assert "model.safetensors is read, as by transformers" in capsys.readouterr().err
    tokens = tokens_of(model, 2, 9)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "both")
    np.testing.assert_array_equal(torch_logits(theirs, tokens), torch_logits(reference, tokens))
    np.testing.assert_allclose(model.apply(model.params, None, tokens), torch_logits(theirs, tokens), atol=1e-4)
    # The shards that the index lists may be gone.
    for file in (tmp_path / "both").glob("model-*.safetensors"):
        file.unlink()
    assert open_safetensors(tmp_path / "both").names()


def test_an_index_that_lists_the_single_file_is_no_news(model, capsys):
    names = open_safetensors(model).names()
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert open_safetensors(model).names() == names and capsys.readouterr().err == ""


def test_a_directory_that_is_an_adapter_too(model):
    """transformers would load another base with the adapter on it."""
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(sx.SboraxError, match=r"adapter_config.json: makes the directory a PEFT adapter"):
        load_model(model)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [-5, 258, 70_000, [1, -1]])
def test_an_end_token_outside_of_the_vocabulary(model, file, value):
    if not (model / file).exists():
        (model / file).write_text("{}")
    change(model / file, eos_token_id=value)
    with pytest.raises(sx.SboraxError, match=rf"{file}: eos_token_id: -?\d+ is no token of a vocabulary of 258"):
        load_model(model)


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_other_tokens_outside_of_the_vocabulary(model, key):
    change(model / "config.json", **{key: 258})
    with pytest.raises(sx.SboraxError, match=f"config.json: {key}: 258 is no token"):
        load_config(model)
    with pytest.raises(sx.SboraxError, match=f"^{key}: -2 is no token"):
        LlamaConfig(258, 8, 12, 2, 2, 1, 4, 32, 1e-5, **{key: -2})


def test_the_first_llamas_have_no_padding_token(model):
    change(model / "config.json", pad_token_id=-1)
    assert load_config(model).pad_token_id is None


def test_a_tokenizer_of_a_larger_vocabulary(tmp_path):
    place = write_model(tmp_path / "model", vocab_size=200)
    with pytest.raises(sx.SboraxError, match=r"the tokenizer's .* has id 2\d\d, vocab_size is 200"):
        load_model(place)


def _with_token(model: Path, **special: str) -> None:
    words = tokenizer()
    words.add_tokens(["<more>"])
    words.add_special_tokens(special)
    words.save_pretrained(model)


def test_an_end_token_that_the_model_never_knew(model):
    _with_token(model, eos_token="<more>")
    with pytest.raises(sx.SboraxError, match=r"the tokenizer's '<more>' has id 258, vocab_size is 258"):
        load_model(model)


def test_an_added_token_in_the_data_that_the_model_never_knew(model, tmp_path):
    """A mark for padding that is never used does no harm; in a text it would be another token, or NaN."""
    _with_token(model, pad_token="<more>")
    good, bad = write_data(tmp_path / "good.jsonl"), tmp_path / "bad.jsonl"
    bad.write_text(good.read_text() + json.dumps({"instruction": "Say <more>", "output": "no"}) + "\n")
    words = {"max_length": 120, "template": "{instruction}", "answer": "{output}"}
    for data, held_out in ((bad, good), (good, bad)):
        experiment = sx.Experiment(
            str(model),
            sx.Data(str(data), **words),
            [("mlp", sx.LoRA(rank=1))],
            steps=1,
            eval=sx.Eval(sx.Data(str(held_out), **words), every=1),
        )
        with pytest.raises(
            sx.SboraxError, match=r"bad.jsonl: sample 24 has token 258 \('<more>'\), the model has only 258 tokens"
        ):
            train(experiment, tmp_path / f"run-{data.stem}", echo=lambda line: None)


TYPED = 'instruction,output\na,007\nb,NA\nc,\nd,true\ne,1e5\nf,"x,y\r\nz"\n\ng,1.0\nh\n'


@pytest.mark.parametrize("separator", [",", "\t"], ids=["csv", "tsv"])
def test_cells_are_text(tmp_path, separator):
    file = tmp_path / ("x.csv" if separator == "," else "x.tsv")
    file.write_bytes(b"\xef\xbb\xbf" + TYPED.replace(",", separator).encode())
    cells = [record["output"] for record in read(str(file))]
    assert cells == ["007", "NA", "", "true", "1e5", f"x{separator}y\r\nz", "1.0", ""]


def test_cells_of_the_hub_are_text(tmp_path, monkeypatch):
    """A directory stands for a data set of the hub: `datasets` reads both alike."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("instruction,output\na,007\nb,NA\nc,\nd,true\n")
    assert [row["output"] for row in source._from_hub(str(tmp_path / "set"), "train")] == ["007", "NA", "", "true"]


@pytest.mark.parametrize(
    "text, match",
    [
        ("a,b\n1,2\n1,2,3\n", "line 3 has 3 cells, the first line 2"),
        ("a,a\n1,2\n", "line 1 names a column twice"),
        ('a,b\n"1,2\n', "line 2 is not CSV"),
        ('a,b\n"1"x,2\n', "line 2 is not CSV"),
        ("a\n" + "x" * ((1 << 24) + 1) + "\n", "is not CSV .field larger"),
    ],
)
def test_csv_that_is_none(tmp_path, text, match):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(sx.SboraxError, match=match):
        read(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_one_record_has_bounds(tmp_path, name):
    record = json.dumps({"text": "x" * ((1 << 24) + 1)})
    (tmp_path / name).write_text(f"[{record}]" if name == "x.json" else record)
    with pytest.raises(sx.SboraxError, match="more than 16,777,216"):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    "value, match", [(float("nan"), "holds nan"), ([1], "holds a list"), ({"a": 1}, "holds a dict")]
)
def test_values_that_are_no_text(value, match):
    from sborax.data.template import render

    with pytest.raises(sx.SboraxError, match=match):
        render("{q}", "{a}", {"q": "x", "a": value}, None)
    assert [render("{q}", "{a}", {"q": 7, "a": 1.5}, None).pieces[i].text for i in (0, 1)] == ["7", "1.5"]


def _pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def _endless(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("harm", [_pipe, _endless])
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
     "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/x.jinja"],
)  # fmt: skip
def test_a_file_of_a_model_is_a_file(model, harm, name):
    (model / name).parent.mkdir(exist_ok=True)
    harm(model / name)
    with pytest.raises(sx.SboraxError, match=f"{name}: not a regular file"):
        load_model(model)


@pytest.mark.parametrize("harm", [_pipe, _endless])
@pytest.mark.parametrize(
    "name, call",
    [
        ("x.json", read_object),
        ("x.gguf", check_header),
        ("x.jsonl", lambda file: read(str(file))),
        ("x.csv", lambda file: read(str(file))),
        ("x.parquet", lambda file: read(str(file))),
        ("x.txt", lambda file: read(str(file))),
        ("adapter.safetensors", lambda file: read_adapter(file.parent)),
        ("plan.json", lambda file: read_adapter(file.parent)),
    ],
)
def test_other_files_are_files(tmp_path, harm, name, call):
    for beside in ("adapter.safetensors", "plan.json"):
        (tmp_path / beside).write_bytes(struct.pack("<Q", 2) + b"{}")
    harm(tmp_path / name)
    with pytest.raises(sx.SboraxError, match=f"{name}: not a regular file"):
        call(tmp_path / name)


@pytest.mark.parametrize("size", [2**17, 2**26, 2**30])
def test_a_head_wider_than_any(model, size):
    """Its frequencies would be computed before its shapes are compared."""
    change(model / "config.json", head_dim=size)
    with pytest.raises(sx.SboraxError, match="config.json: head_dim must be at most"):
        load_model(model)


def test_more_layers_than_any():
    with pytest.raises(sx.SboraxError, match="layer_sizes: 300 entries are more than 256"):
        LlamaConfig(16, 8, 12, 300, 2, 1, 4, 32, 1e-5, layer_sizes=((2, 1, 12),) * 300)
    with pytest.raises(sx.SboraxError, match="num_hidden_layers must be at most 4,096, got 100,000"):
        LlamaConfig(16, 8, 12, 10**5, 2, 1, 4, 32, 1e-5, layer_sizes=((2, 1, 12),) * 10**5)


@pytest.mark.parametrize("tensors, fields", [(10**8, 0), (0, 2 * 10**8)])
def test_a_gguf_file_of_too_many_things(tmp_path, tensors, fields):
    """Sparse, so that there is room for what it announces."""
    file = tmp_path / "x.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)
    file.write_bytes(head)
    with pytest.raises(sx.SboraxError, match="ends within its header"):
        check_header(file)
    with file.open("r+b") as stream:
        stream.truncate(3 * 10**9)
    with pytest.raises(sx.SboraxError, match="announces more than"):
        check_header(file)


def test_a_plan_of_sizes_that_no_machine_holds(tmp_path, capsys):
    raw = dict(model_type="llama", vocab_size=2**31 - 1, hidden_size=2**31 - 2, intermediate_size=2**31 - 1,
               num_hidden_layers=2**31 - 1, num_attention_heads=2**15, head_dim=2, num_key_value_heads=1,
               max_position_embeddings=2**31 - 1, rms_norm_eps=1e-5)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for words in ([], ["rules.0.method=LoRA"], ["--mesh", "fsdp=8"]):
        code = main(["plan", str(tmp_path / "config.json"), *words])
        assert code in (0, 2), capsys.readouterr()


def test_metrics_that_are_no_text(tmp_path):
    from etils import epath

    from sborax.records.report import METRICS, Metrics

    (tmp_path / METRICS).write_bytes(b'{"step": 1, "loss": 2}\n{"step": 2, "loss": \xff\xfe}\n')
    assert Metrics(epath.Path(tmp_path), 2).losses() == [2.0]


@pytest.mark.parametrize(
    "number, remedy", [(errno.ENOSPC, "make room"), (errno.EROFS, "fix that"), (errno.EISDIR, "fix that")]
)
def test_room_is_advised_where_it_helps(number, remedy):
    assert f"({os.strerror(number)}); {remedy}, then" in str(refusal("x", OSError(number, os.strerror(number), "x")))
    assert f"; {remedy}, then" in str(refusal("x", ValueError(f"tensorstore [os_error_code='{number}']")))
