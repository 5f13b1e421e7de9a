"""A random LLaMA with a tokenizer of its own, small enough to be made anew in a test run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sborax.models import LanguageModel, LlamaConfig, save_hf
from sborax.models.language_model import decoder_of

CONTEXT = 128
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WIDE = LlamaConfig(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=(2,),
)
"""Wide enough to be cut into eight along every axis."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML's marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    bare = Tokenizer(models.BPE(vocabulary, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHAT
    )


def write_model(directory: Path, **changes: Any) -> Path:
    """A Hugging Face directory that `sborax` and transformers load."""
    plain = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=(1,),
    )
    config = dataclasses.replace(plain, **changes)
    module = decoder_of(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save_hf(directory, LanguageModel(module, params, config, tokenizer()), params)
    return directory


def write_data(file: Path, rows: int = 24) -> Path:
    """Questions and answers as JSON lines."""
    pairs = [{"instruction": f"{a} plus {a}?", "input": "", "output": f"{2 * a}."} for a in range(rows)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file
