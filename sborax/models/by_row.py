"""Text from several adapters of one base, in one batch where their structures agree."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sborax.adapters.core import SboraxError
from sborax.adapters.rows import by_row, together
from sborax.models.generate import generate
from sborax.models.language_model import LanguageModel, Params


def generate_by_row(
    model: LanguageModel,
    params: Sequence[Params],
    adapters: Sequence[Params | None],
    prompts: Sequence[Sequence[int]],
    choice: Sequence[int],
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """New tokens for each prompt, from the adapter that it chooses: what `generate` writes with that adapter alone.

    Adapters of one structure share a batch (`sborax.adapters.rows.together`); the batches run in turn. With a
    temperature every adapter has a batch of its own, since a drawn token depends on its place in the batch.

    Args:
    - params: what goes with each of `adapters`, the same arrays wherever a method leaves the base as it was.
    - adapters: trees of adapters; None for the base alone.
    - choice: for each prompt, the number of its adapter.
    - options: those of `generate`.

    Raises SboraxError as `generate` does, and for a number without an adapter.
    """
    if len(choice) != len(prompts) or not all(0 <= number < len(adapters) for number in choice):
        raise SboraxError(f"choice: every prompt needs the number of an adapter, 0 to {len(adapters) - 1}")
    active = sorted(set(choice))
    groups = together([params[number] for number in active], [adapters[number] for number in active])
    if options.get("temperature", 0.0) > 0:
        groups = [[place] for place in range(len(active))]
    texts: list[list[int]] = [[] for _ in prompts]
    for group in groups:
        numbers = [active[place] for place in group]
        rows = [[row for row, pick in enumerate(choice) if pick == number] for number in numbers]
        most = max(map(len, rows))
        # Each adapter has as many rows; what is missing are copies of its last one.
        places = np.concatenate([indices + indices[-1:] * (most - len(indices)) for indices in rows]).tolist()
        stacked = None if adapters[numbers[0]] is None else by_row([adapters[number] or {} for number in numbers])
        new = generate(
            model, params[numbers[0]], stacked, [prompts[row] for row in places], max_new_tokens, **options
        )  # fmt: skip
        for row, text in zip(places, new, strict=True):
            texts[row] = text
    return texts
