"""What reaches a terminal of names and texts that others wrote."""

import pytest

from sborax.cli.main import main
from sborax.config.terminal import print_text, say, visible

HOSTILE = "\x1b]0;pwned\x07 \u202e\u2066\x9b2J\rok\ud800"
SHOWN = "\\x1b]0;pwned\\x07 \\u202e\\u2066\\x9b2J\\rok\\ud800"


@pytest.mark.parametrize(
    "text",
    [
        "a\tb\nc",
        "naïve 日本語\u3000や\u00a0x",
        "مرحبا\u200f",
        "می\u200cخواهم",
        "\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e007f \u2764\ufe0f",
        "\ue000",
    ],
)
def test_ordinary_text_stays_as_it_is(text):
    assert visible(text) == text


def test_what_a_terminal_would_obey_is_written_out(capsys):
    say(HOSTILE)
    assert capsys.readouterr().out == SHOWN + "\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_models_text_is_made_visible_on_a_terminal_alone(terminal, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    text = HOSTILE[:-1]
    print_text(text)
    assert capsys.readouterr().out == (visible(text) if terminal else text)


def test_a_run_tells_of_a_hostile_model_name_what_can_be_read(tmp_path, capsys):
    name = "\\u001b]0;pwned\\u0007"
    data = tmp_path / "x.jsonl"
    data.write_text("{}")
    (tmp_path / "config.json").write_text(
        f'{{"model": "{name}", "data": {{"name": "{data}"}}, "rules": [["mlp", {{"type": "LoRA"}}]], "steps": 1}}'
    )
    assert main(["train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err and "\\x1b]0;pwned\\x07" in output.err
