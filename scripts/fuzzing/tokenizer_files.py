"""Tokenizer files, and the effect of their patterns and replacements on a text."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from sborax.models.tokenizer import read_tokenizer, text_of, tokens_of

from .mutations import harm, hostile, write
from .seeds import CHAT, Prepare, put, tokenizer


def tokenizers(home: Path) -> Prepare:
    """`tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`."""
    tokenizer().save_pretrained(str(home / "tokenizer"))
    valid = json.loads((home / "tokenizer" / "tokenizer.json").read_text())
    # A small vocabulary, so that mostly other values are harmed.
    letters = list(valid["model"]["vocab"])[:40]
    valid["model"]["vocab"] = {letter: number for number, letter in enumerate(letters)}
    about = json.loads((home / "tokenizer" / "tokenizer_config.json").read_text()) | {"chat_template": CHAT}
    named = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    keys = (
        "fast_tokenizer_files",
        "gguf_file",
        "init_inputs",
        "vocab_file",
        "auto_map",
        "tokenizer_file",
        "merges_file",
    )

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        case, files = random.randrange(4), {"json": valid, "config": about, "map": named}
        name = ("json", "json", "config", "map")[case]
        files[name] = harm(random, files[name])
        if name == "config" and random.randrange(3) == 0 and isinstance(files[name], dict):
            files[name][random.choice(keys)] = random.choice((["../outside/tokenizer.9.9.9.json"], hostile(random)))
        if case == 3:
            files["config"] = {name: value for name, value in about.items() if name != "added_tokens_decoder"}
            put(place, special_tokens_map__json=write(random, files["map"]))
        put(place, tokenizer__json=write(random, files["json"]), tokenizer_config__json=write(random, files["config"]))

        def read() -> Any:
            result = read_tokenizer(place)
            return result if result is None else tokens_of(result, "Two and 2 é.")["input_ids"]

        return read

    return prepare


PATTERNS = (
    "(a+)+$", r"(\w|\w)+$", r"(\w+\s?)+!", "(a|aa)+$", r"(?=(a+))a*b\1", "(.*)*x", "(", "[", "a{1000}{1000}", "(?R)",
    r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "", "^", "$", ".", r"\1", "(?<=a*)b", "(a?){40}a{40}",
)  # fmt: skip
CONTENTS = ("", "a", "aa", "a" * 100, "b" * 3, "\u2581", " ", "é" * 50, "A" * 64, "x" * 5_000)
PROMPTS = ("a" * 40 + "!", "Two and 2 é.", "a b " * 200, "\u00e9" * 64, " ", "b" * 30, "Once upon a time. " * 20)


def patterns(home: Path) -> Prepare:
    """The normalizer, pre-tokenizer and decoder of a `tokenizer.json`, applied to a text."""
    tokenizer().save_pretrained(str(home / "tokenizer"))
    valid = json.loads((home / "tokenizer" / "tokenizer.json").read_text())
    about = json.loads((home / "tokenizer" / "tokenizer_config.json").read_text())

    def pattern(random: Random) -> dict[str, str]:
        if random.randrange(2):
            return {"Regex": random.choice(PATTERNS)}
        return {"String": random.choice(("a", "aa", " ", "", "b", "A", "é", "\u2581", "x"))}

    def step(random: Random, kind: str) -> dict[str, Any]:
        replace = {"type": "Replace", "pattern": pattern(random), "content": random.choice(CONTENTS)}
        if random.randrange(3):
            return replace
        if kind == "decoder":
            return random.choice(({"type": "Fuse"}, {"type": "ByteFallback"}, {"type": "Strip", "content": "a",
                                  "start": 1, "stop": 0}))  # fmt: skip
        return random.choice(({"type": "Prepend", "prepend": random.choice(CONTENTS)}, {"type": "NFKD"},
                              {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True},
                              ))  # fmt: skip

    def sequence(random: Random, kind: str) -> dict[str, Any]:
        length = random.choice((1, 2, 3, 5, 8, 200) if random.randrange(10) == 0 else (1, 2, 3, 5))
        steps = [step(random, kind) for _ in range(length)]
        for _ in range(random.choice((0, 0, 1, 3))):
            steps = [{"type": "Sequence", f"{kind}s": steps}]
        return steps[0] if len(steps) == 1 else {"type": "Sequence", f"{kind}s": steps}

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        changed = dict(valid)
        if random.randrange(2):
            changed["normalizer"] = sequence(random, "normalizer")
        if random.randrange(2):
            split = {"type": "Split", "pattern": pattern(random), "invert": bool(random.randrange(2)),
                     "behavior": random.choice(("Isolated", "Removed", "MergedWithNext", "Contiguous"))}  # fmt: skip
            changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, valid["pre_tokenizer"]]}
        if random.randrange(3) == 0:
            changed["decoder"] = sequence(random, "decoder")
        put(place, tokenizer__json=write(random, changed), tokenizer_config__json=json.dumps(about).encode())
        prompt = random.choice(PROMPTS)

        def read() -> Any:
            result = read_tokenizer(place)
            assert result is not None
            return text_of(result, tokens_of(result, prompt)["input_ids"])

        return read

    return prepare
