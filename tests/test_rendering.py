"""Chat templates: to the letter what transformers makes of them, in a process that has bounds."""

import copy
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_model import tokenizer

import sborax as sx
from sborax.data import renderer
from sborax.data.options import Data
from sborax.data.samples import load_samples
from sborax.data.template import apply, prompt_of, render

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi \u2028 é \U0001f600 <b>"},
    {"role": "assistant", "content": "Ho\n", "reasoning": "Hm"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Sum.", "parameters": {"type": "object", "properties": {"a": {}}}},
    }
]
CALLING = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None, 0.5]}}}]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]  # fmt: skip
QWEN = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}<|im_start|>user\n<response>{{ message.content }}"
    "</response><|im_end|>\n{%- else %}<|im_start|>{{ message.role }}{{ '\\n' }}{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}<call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</call>{%- endfor %}<|im_end|>{{ '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
TEMPLATES = [
    QWEN,
    "{{ bos_token }}{% for m in messages %}  {% if m.role == 'system' %}\n  [{{ m['content'] | trim }}]\n  {% endif %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
    "{% set ns.n = ns.n + m['content'] | length %}{% endfor %}{{ ns.n }}{{ messages | tojson }}{{ dict(a=1) }}"
    "{{ messages[2] | tojson(indent=2) }}{{ documents is none }}{{ tools is none }}{{ pad_token is defined }}",
    "{% macro one(m) %}{{ m.role | upper }}: {{ m.get('content', '') }}{{ m.reasoning_content or '' }}{% endmacro %}"
    "{% for m in messages %}{{ one(m) }}\n{% endfor %}{{ strftime_now('%Y') }}{{ '%5.2f' | format(1.5) }}",
]


def speaking(template):
    words = copy.deepcopy(tokenizer())
    words.chat_template = template
    return words


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
@pytest.mark.parametrize("generate", [True, False])
def test_texts_are_those_of_transformers(template, generate):
    words = speaking(template)
    theirs = words.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generate)
    assert apply(words, TALK, generate=generate) == theirs
    if template == QWEN:
        theirs = words.apply_chat_template(CALLING, tools=TOOLS, tokenize=False, add_generation_prompt=generate)
        assert apply(words, CALLING, TOOLS, generate=generate) == theirs


def test_a_template_for_tools_is_chosen_where_there_are_any():
    words = speaking({"default": "{{ messages[0].content }}", "tool_use": QWEN})
    for tools in (None, TOOLS):
        messages = CALLING if tools else TALK
        theirs = words.apply_chat_template(messages, tools=tools, tokenize=False)
        assert apply(words, messages, tools, generate=False) == theirs


def test_calls_of_tools_are_learnt(tmp_path):
    """The answers are the calls and the last turn, with their ends; not what the tool says."""
    words = speaking(QWEN)
    for tools in (TOOLS, json.dumps(TOOLS)):
        (tmp_path / "x.jsonl").write_text(json.dumps({"messages": CALLING, "tools": tools}) + "\n")
        (sample,), _ = load_samples(Data(str(tmp_path / "x.jsonl"), "chat", max_length=1000), words, 1, 1000)
        theirs = words.apply_chat_template(CALLING, tools=TOOLS, tokenize=False)
        assert words.decode(sample.tokens.tolist()) == theirs
        learnt = [words.decode(part.tolist()) for part in np.split(sample.tokens, np.flatnonzero(
            np.diff(sample.counts.astype(int))) + 1)][1::2]  # fmt: skip
        assert learnt == ['<call>add {"a": 1, "b": [2, null, 0.5]}</call><|im_end|>', "It is 3.<|im_end|>"]
    prompt = prompt_of("chat", {"messages": CALLING, "tools": TOOLS}, words)
    assert prompt == words.apply_chat_template(CALLING[:-1], tools=TOOLS, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "record, match",
    [
        ({"messages": CALLING}, "line 2: data.template: the tokenizer's chat template ignores tool_calls"),
        ({"messages": TALK, "tools": TOOLS}, "line 2: data.template: the tokenizer's chat template ignores tools"),
        ({"messages": TALK, "tools": "x"}, "line 2: column 'tools' is text that is not JSON"),
        ({"messages": TALK, "tools": [3]}, "line 2: column 'tools' must be a list of objects"),
        ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, "line 2: message 1, .* has no content"),
        ({"messages": [{"role": "user"}]}, "line 2: message 0, of role 'user', has no content"),
        ({"messages": TALK[2:]}, "line 2: the first message is the assistant's"),
    ],
)
def test_what_a_template_would_drop_is_refused(tmp_path, record, match):
    (tmp_path / "x.jsonl").write_text(f"{json.dumps({'messages': TALK})}\n{json.dumps(record)}\n")
    with pytest.raises(sx.SboraxError, match=match):
        load_samples(Data(str(tmp_path / "x.jsonl"), "chat"), tokenizer(), 1, 1000)


@pytest.mark.parametrize(
    "template, match",
    [
        ("{{ ([0]*10**9) | length }}", "more than 512 MiB"),
        ("{{ '%999999999d' | format(1) }}", "more than 512 MiB"),
        ("{{ 'a' | center(10**9) }}", "more than 512 MiB"),
        ("{{ 'a\nb' | indent(10**9) }}", "more than 512 MiB"),
        ("{{ [1] | tojson(indent=10**9) }}", "more than 512 MiB"),
        ("{{ 10**(10**9) }}", "more than 0.5 seconds|more than 512 MiB"),
        ("{{ ('a' * 10**7) | replace('', 'b' * 99) | length }}", "more than"),
        ("{{ ('a b ' * 10**7) | wordwrap(1) | length }}", "more than"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 seconds"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 524,288 letters"),
    ],
)
def test_a_template_has_bounds(template, match, monkeypatch):
    monkeypatch.setattr(renderer, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(sx.SboraxError, match=match) as caught:
        apply(speaking(template), TALK, generate=False)
    assert time.monotonic() - began < 30 and str(caught.value).isprintable()


def test_the_process_is_kept_and_begun_anew():
    words = speaking(QWEN)
    text = apply(words, TALK, generate=False)
    child = renderer._process()._child
    assert apply(words, TALK, generate=False) == text and renderer._process()._child is child
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert apply(words, TALK, generate=False) == text and renderer._process()._child is not child


def test_the_process_sees_little_of_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    renderer._process().end()
    apply(speaking(QWEN), TALK, generate=False)
    raw = Path(f"/proc/{renderer._process()._child.pid}/environ").read_text()
    assert "PATH" in raw and "secret" not in raw


def test_a_sample_keeps_its_pieces():
    """As before: every answer with its end mark, the line break after it not."""
    pieces = render("chat", "", {"messages": TALK}, tokenizer()).pieces
    assert [piece.text for piece in pieces if piece.answer] == ["Ho\n<|im_end|>", "No<|im_end|>"]
    assert "".join(piece.text for piece in pieces) == tokenizer().apply_chat_template(TALK, tokenize=False)
