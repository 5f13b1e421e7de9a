"""Data files and chat templates."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerFast

import sborax as sx
from sborax.data.samples import load_samples
from sborax.data.template import prompt_of

from .mutations import TEXTS, harm, harm_bytes, harm_text, write
from .seeds import CHAT, Prepare, put, tokenizer

CHAT_PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{% if true %}", "{% endif %}", "{{", "}}", "{%", "%}", "{#", "| tojson",
    "{{ messages }}", "{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ 1 / 0 }}", "{{ x.y.z }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ range(10**9) }}", "{{ 9 ** 9 }}", "loop.index",
    "{% include '/etc/passwd' %}", "{% import 'x' as y %}", "{% extends '../outside/x' %}", "{{ messages.append(1) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% generation %}", "{% set x = namespace(a=1) %}",
    "{{ 'a' | center(1000) }}", "{{ lipsum() }}", "{{ cycler }}", "message['content']", "message.role", "\0", "\ud800",
)  # fmt: skip

CHAT_BLOCKS = (
    "{{ messages }}", "{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ 1 / 0 }}", "{{ x.y.z }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ range(10**9) }}", "{{ 9 ** 9 }}",
    "{{ messages[9] }}",
    "{% include '/etc/passwd' %}", "{% import 'x' as y %}", "{{ messages.append(1) }}", "{{ messages | tojson }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% generation %}a{% endgeneration %}",
    "{{ self._TemplateReference__context }}",
    "{% set x = namespace(a=1) %}{% set x.a = 'b' * 9 %}{{ x.a }}", "{{ 'a' | center(1000) }}",
    "{{ messages | map(attribute='role') | join }}", "{{ messages | sort }}",
    "{{ cycler('a').__init__.__globals__ }}", "{{ lipsum.__globals__['os'].system('touch x') }}", "{{ (1, 2) | sum }}",
    "{{ messages | first | attr('__class__') }}", "{{ dict(a=messages) | items | list }}", "{{ 'a' | int + 'b' }}",
    "{% for a in range(9) %}{% if a > 3 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}", "{{ 'é\ud800' }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ 'a'.format_map(messages[0]) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ 10 ** 5000 }}", "{{ 'x' | replace('x', 'y') | upper | wordcount }}", "{# a #}", "{{ [1, 2][5] }}",
    "{{ none.a }}", "{{ 1.5 | round }}",
)  # fmt: skip
ENDLESS = (
    "{{ ('a b ' * 10**7) | wordwrap(1) | length }}",
    "{{ ('a' * 10**7) | replace('', 'b' * 99) | length }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
)
"""Templates that take all the time a conversation may have."""


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALLING = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3.", "weight": 1},
]
RECORDS = [
    {"instruction": "What is two and two?", "input": "", "output": "Four."},
    {"q": "A?", "a": "B.", "n": 3, "x": 1.5, "none": None},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"text": "Once upon a time."},
]


def jsonl(home: Path) -> Prepare:
    """A `.jsonl` or `.json` file of records, with every template."""
    templates = ("alpaca", "chat", "text", "{q}: {n}", "llm_adapters")
    fitting = {"alpaca": 0, "llm_adapters": 0, "chat": 2, "text": 3, "{q}: {n}": 1}

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        template = random.choice(templates)
        record = RECORDS[fitting[template] if random.randrange(8) else random.randrange(4)]
        records = [record, harm(random, record), record]
        name = random.choice(("data.jsonl", "data.jsonl", "data.json", "lines.json"))
        lines = [write(random, row) for row in records]
        raw = b"[" + b",".join(lines) + b"]" if name == "data.json" else b"\n".join(lines)
        (place / name).write_bytes(harm_bytes(random, raw) if random.randrange(8) == 0 else raw)
        if random.randrange(8) == 0:
            template = harm_text(random, template, (*TEXTS[:22], *record))
        overlong = random.choice(("drop", "truncate", "split"))

        def read() -> Any:
            data = sx.Data(str(place / name), template, "{a}", max_length=64, overlong=overlong)
            return load_samples(data, tokenizer(), 1, 128)

        return read

    return prepare


HUNGRY = (
    "{{ ([0]*10**9) | length }}", "{{ '%999999999d' | format(1) }}", "{{ 'a' | center(10**9) }}", "{{ 'a' * 10**10 }}",
    "{{ 'a\nb' | indent(10**9) }}", "{{ [1] | tojson(indent=10**9) }}", "{% for i in range(9999) %}{{ 'a' * 9999 }}"
    "{% endfor %}", "{{ 9 ** (9 ** 9) }}", "{{ range(10**5) | list | batch(1) | list | string }}",
    "{{ ['a'] * 10**6 }}",
)  # fmt: skip
"""Templates that take or write more memory than a conversation may have."""


def templates(home: Path) -> Prepare:
    """Chat templates."""
    bare = tokenizer().backend_tokenizer
    # Start the process that renders: cases may start none.
    prompt_of("chat", RECORDS[2], tokenizer())
    calling = {"messages": CALLING, "tools": TOOLS}

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        text = harm_text(random, CHAT, (*CHAT_PIECES, *TEXTS[:20]))
        if random.randrange(3):
            parts = CHAT.split("<")
            for _ in range(random.choice((1, 1, 2))):
                blocks = HUNGRY if random.randrange(20) == 0 else CHAT_BLOCKS
                block = random.choice(blocks if random.randrange(1_000) else ENDLESS)
                parts.insert(random.randrange(len(parts) + 1), block)
            text = "<".join(parts)
        chat = calling if random.randrange(4) == 0 else RECORDS[2]
        if chat == calling and random.randrange(3):
            text = "{{ tools | tojson }}" + text.replace("| trim }}", "| trim }}{{ message.tool_calls }}")
        changed = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<|im_start|>", chat_template=text)
        harmed = harm(random, chat) if random.randrange(4) == 0 else chat
        chat = harmed if isinstance(harmed, dict) else chat
        put(place, data__jsonl=write(random, chat))
        data = sx.Data(str(place / "data.jsonl"), "chat", max_length=64)
        return lambda: (prompt_of("chat", chat, changed), load_samples(data, changed, 1, 128))

    return prepare


def tables(home: Path) -> Prepare:
    """CSV and TSV files."""
    cells = (
        "",
        "NA",
        "007",
        "true",
        "1e5",
        "nan",
        "x, y",
        'say "no"',
        "two\nlines",
        "\r\n",
        "\0",
        "é",
        "\ufeff",
        "a" * 3_000,
    )

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        name = random.choice(("data.csv", "data.csv", "data.tsv"))
        separator, text = "\t" if name == "data.tsv" else ",", io.StringIO(newline="")
        lines = csv.writer(text, delimiter=separator, quoting=random.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
        lines.writerow(random.choice((*[["q", "a"]] * 9, ["", "q", "a"], ["q", "a", "a"], ["a"], ["a", "q"])))
        for _ in range(random.choice((0, 1, 5, 50))):
            lines.writerow([random.choice(cells) for _ in range(2 if random.randrange(40) else random.choice((1, 3)))])
        content = text.getvalue()
        if random.randrange(2):
            content = harm_text(random, content, (*TEXTS, '"', '""', separator, "\n", "\r", '"\n'))
        raw = content.encode(random.choice((*["utf-8"] * 9, "utf-8-sig", "utf-16")), "replace")
        (place / name).write_bytes(harm_bytes(random, raw) if random.randrange(8) == 0 else raw)

        def read() -> Any:
            data = sx.Data(str(place / name), "Q: {q}\nA: ", "{a}", max_length=64, overlong="split")
            return load_samples(data, tokenizer(), 1, 128)

        return read

    return prepare
