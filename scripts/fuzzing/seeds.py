"""Small valid models, tokenizers and experiments, from which cases are made."""

import functools
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sborax as sx
from sborax.models.config import LlamaConfig
from sborax.models.language_model import LanguageModel, abstract
from sborax.models.llama import Llama

Prepare = Callable[[Random, Path], Callable[[], Any]]
"""Writes the files of a case into an empty directory, and returns the call to try."""

CHAT = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte."""
    vocabulary = {
        letter: number
        for number, letter in enumerate(["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    bare = Tokenizer(models.BPE(vocabulary, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHAT
    )


@functools.cache
def tiny() -> LanguageModel:
    """A model with two layers and parameters of 1."""
    config = LlamaConfig(16, 8, 12, 2, 2, 1, 4, 32, 1e-5)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract(config))
    return LanguageModel(Llama(config), params, config, None)


def put(place: Path, **files: bytes) -> None:
    """Write files. `__` in a name stands for a dot."""
    for name, content in files.items():
        (place / name.replace("__", ".")).write_bytes(content)


@functools.cache
def abstract_tiny() -> Any:
    return abstract(tiny().config)


@functools.cache
def experiment() -> sx.Experiment:
    """An experiment with a value in every field."""
    return sx.Experiment(
        model="tiny",
        data=sx.Data(name="data.jsonl", template="Q: {q}\nA: ", answer="{a}", buckets=(16, 32)),
        rules=(
            sx.Rule(r"self_attn/(q|v)_proj", sx.LoRA(rank=2, alpha=4.0), layers=slice(0, 1)),
            sx.Rule(r"mlp/", sx.add(sx.SBoRA(rank=2), sx.LoRA(rank=1)), layers=(1,)),
            sx.Rule(r"lm_head", None),
            sx.Rule(r"o_proj", sx.chain(sx.LoRA(rank=2), sx.DoRA())),
        ),
        optimizer=sx.Optimizer(lr=1e-3, betas=(0.9, 0.99)),
        steps=4,
        mesh={"fsdp": 1},
        eval=sx.Eval(data=sx.Data(name="held.jsonl"), every=2),
        save=sx.Save(best=True),
    )
