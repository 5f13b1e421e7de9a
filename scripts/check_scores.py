"""Recomputes the scores in a directory of `sborax eval --out SCORES` with transformers, on the same items.

python scripts/check_scores.py MODEL SCORES --text $SBORAX_DATA/wikitext-2/test.txt

MODEL is a directory that transformers reads, or a GGUF file. transformers (5.23) ignores the rules that a GGUF file's
tokenizer applies before the merges, such as SmolLM2's, which splits digits: save sborax's tokenizer and pass it as
--tokenizer. Compares every task of SCORES whose items are options or windows. The exit code is 1 if a log-likelihood
differs by more than --tolerance.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


class Reference:
    """transformers' model and tokenizer.

    tokenizer: a directory with a tokenizer to use instead of the model's.
    """

    def __init__(self, model: Path, tokenizer: Path | None) -> None:
        place, file = (model.parent, {"gguf_file": model.name}) if model.suffix == ".gguf" else (model, {})
        source, options = (place, file) if tokenizer is None else (tokenizer, {})
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **file)
        self.model.eval()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with the special tokens that the tokenizer adds."""
        return self.tokenizer(text, verbose=False)["input_ids"]

    def logprobs(self, rows: list[list[int]], starts: list[int]) -> list[float]:
        """The sum of ln p over the tokens of each row, from its start on. Rows are padded on the right."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            # In float32 torch's log_softmax over 49,152 tokens is 1.6e-5 too high for each (docs/LOG.md).
            logprobs = torch.log_softmax(self.model(ids, attention_mask=mask).logits[:, :-1].double(), -1)
        target_logprobs = logprobs.gather(2, ids[:, 1:, None])[:, :, 0]
        spans = enumerate(zip(rows, starts, strict=True))
        return [float(target_logprobs[i, start - 1 : len(row) - 1].sum()) for i, (row, start) in spans]

    def options(self, items: list[dict[str, Any]]) -> Iterator[list[float]]:
        """The log-likelihood of every option of each item."""
        for item in items:
            start = len(self.encode(item["prompt"]))
            rows = [self.encode(item["prompt"] + option) for option in item["options"]]
            yield self.logprobs(rows, [start] * len(rows))

    def windows(self, items: list[dict[str, Any]], text: str) -> Iterator[list[float]]:
        """The log-likelihood of each window of a WikiText file, without the window's first token."""
        lines = text.removesuffix("\n").split("\n")
        tokens = self.encode("\n\n".join(f"{line}\n" if line.strip() else "" for line in lines))
        for item in items:
            size = item["tokens"] + 1
            yield self.logprobs([tokens[item["window"] * size :][:size]], [1])


def main() -> int:
    """Compare all tasks. Returns the exit code, 1 if something differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--text", type=Path, help="the file that windows were cut from")
    parser.add_argument("--tokenizer", type=Path, help="directory with a tokenizer to use instead of the model's")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of a log-likelihood, in nats (default: 0.01)")
    words = parser.parse_args()
    reference, worst = Reference(words.model, words.tokenizer), 0.0
    for score in json.loads((words.scores / "scores.json").read_text())["scores"]:
        name = score["task"]
        items = [json.loads(line) for line in (words.scores / f"{name}.jsonl").read_text().splitlines()]
        if "window" in items[0] and words.text is not None:
            theirs = list(reference.windows(items, words.text.read_text()))
            value = math.exp(np.mean([-logp / item["tokens"] for (logp,), item in zip(theirs, items, strict=True)]))
            metric, ours = "perplexity", [[item["logprob"]] for item in items]
        elif "options" in items[0]:
            theirs = list(reference.options(items))
            right = [np.argmax(options) == item["gold"] for options, item in zip(theirs, items, strict=True)]
            value = float(np.mean(right))
            metric, ours = "acc", [item["logprobs"] for item in items]
        else:
            print(f"{name}: neither options nor windows of --text, left out")
            continue
        difference = max(float(np.abs(np.subtract(*pair)).max()) for pair in zip(ours, theirs, strict=True))
        saved = score["metrics"][metric]["value"]
        print(f"{name}: {metric} {saved:.6f} here, {value:.6f} by transformers, n {len(items):,}; "
              f"log-likelihoods differ by {difference:.1e} at most", flush=True)  # fmt: skip
        worst = max(worst, difference)
    return int(not worst <= words.tolerance)


if __name__ == "__main__":
    sys.exit(main())
