"""Greedy text for a batch of prompts of mixed length, here and in transformers, with the same shape and prompts."""

import time
from typing import Any

import numpy as np

from benchmarks.peers import THREADS
from benchmarks.shapes import EPS, SHAPES

NEVER: tuple[int, ...] = ()
"""No token ends a text, so that all rows are of one length."""


def prompts(vocab: int, batch: int) -> list[list[int]]:
    """A batch of prompts of 8 to 32 random ids."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab, int(length)).tolist() for length in rng.integers(8, 33, batch)]


def ours(shape: str, batch: int, new: int, rounds: int) -> dict[str, Any]:
    """Seconds of every call of `generate`, prefill included, after one that compiles."""
    import jax
    import jax.numpy as jnp

    from benchmarks.ours import plain_model
    from sborax.models import generate

    model = plain_model(SHAPES[shape])
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), model.abstract()
    )
    rows = prompts(model.config.vocab_size, batch)
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        texts = generate(model, params, None, rows, new, eos=NEVER)
        seconds.append(time.perf_counter() - began)
    assert all(len(text) == new for text in texts)
    return {"seconds": seconds[1:]}


def transformers(shape: str, batch: int, new: int, rounds: int) -> dict[str, Any]:
    """Seconds of every call of transformers' `generate`, eager, with its dynamic cache, after one that warms up."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], rms_norm_eps=EPS)).eval()
    rows = prompts(SHAPES[shape]["vocab_size"], batch)
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    seconds = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            began = time.perf_counter()
            model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                tokens,
                attention_mask=mask,
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:]}
