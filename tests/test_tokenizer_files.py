"""Tokenizers of strangers: patterns that give up, replacements that grow."""

import json

import pytest
from tiny_model import tokenizer, write_data, write_model

import sborax as sx
from sborax.cli.main import main
from sborax.models.tokenizer import read_tokenizer, text_of, tokens_of


def write_tokenizer(place, **parts):
    tokenizer().save_pretrained(place)
    file = place / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return place


def cut(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False,
            "trim_offsets": True, "use_regex": False}]}  # fmt: skip


@pytest.mark.parametrize("pattern", ["(a+)+$", r"(\w|\w)+$"])
def test_a_pattern_that_gives_up_is_one_line(tmp_path, capfd, pattern):
    model = write_model(tmp_path / "model")
    write_tokenizer(model, pre_tokenizer=cut(pattern))
    text = "a" * 40 + "!"
    with pytest.raises(sx.SboraxError, match="the tokenizer gives up on a text"):
        tokens_of(read_tokenizer(model), text)
    data = tmp_path / "x.jsonl"
    data.write_text(json.dumps({"instruction": text, "output": "b"}) + "\n")
    (tmp_path / "e.py").write_text(
        "import sborax as sx\ndef experiment():\n"
        f"    data = sx.Data({str(data)!r}, max_length=100)\n"
        f"    return sx.Experiment({str(model)!r}, data, [('mlp', sx.LoRA(rank=1))], steps=1)\n"
    )
    for words in (["generate", model, "--prompt", text], ["train", tmp_path / "e.py", "--out", tmp_path / "run"]):
        assert main([str(word) for word in words]) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and "gives up" in errors[0]


def test_a_decoder_that_gives_up(tmp_path):
    step = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    words = read_tokenizer(
        write_tokenizer(tmp_path, decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, step]})
    )
    with pytest.raises(sx.SboraxError, match="the tokenizer gives up on tokens"):
        text_of(words, tokens_of(words, "a" * 40 + "!")["input_ids"])


def test_a_pattern_that_gives_up_at_loading(tmp_path):
    with pytest.raises(sx.SboraxError, match="not a readable tokenizer"):
        read_tokenizer(write_tokenizer(tmp_path, pre_tokenizer=cut("(")))


def grow(step, times, content="a" * 100):
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": content} for _ in range(times)]
    return {"type": "Sequence", f"{step}s": steps}


@pytest.mark.parametrize("kind", ["normalizer", "decoder"])
def test_replacements_of_replacements_have_bounds(tmp_path, kind):
    for times in (2, 5):
        with pytest.raises(sx.SboraxError, match=f"its {kind} makes more than 4,096 letters of one"):
            read_tokenizer(write_tokenizer(tmp_path, **{kind: grow(kind, times)}))
    with pytest.raises(sx.SboraxError, match="more than 128"):
        read_tokenizer(write_tokenizer(tmp_path, **{kind: grow(kind, 129, "a")}))
    lower = {"type": "Lowercase"}
    if kind == "normalizer":
        hidden = {"type": "Sequence", "normalizers": [grow(kind, 1, "A" * 100), lower, grow(kind, 1)]}
        with pytest.raises(sx.SboraxError, match="makes more than"):
            read_tokenizer(write_tokenizer(tmp_path, normalizer=hidden))
    # What real ones have.
    assert read_tokenizer(write_tokenizer(tmp_path, **{kind: grow(kind, 1, "\u2581")})) is not None


def test_no_raw_lines_about_long_texts(tmp_path, capfd):
    model = write_model(tmp_path / "model")
    about = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(about | {"model_max_length": 8}))
    data = write_data(tmp_path / "x.jsonl")
    assert data.exists()
    assert main(["generate", str(model), "--prompt", "a long text of many letters", "--max-new-tokens", "1"]) == 0
    assert "Token indices" not in capfd.readouterr().err
