"""Tiny torch models and how to compare with them."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from tiny_model import tokenizer

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def make(kind, directory, shard="5GB", **fields):
    """A random torch model, saved to `directory`; its norms and biases are random too."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(TINY | {"initializer_range": 0.2} | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def write_letters(directory):
    """A random model and its tokenizer: greedy text from it is letters, blanks and stops, and hardly repeats itself."""
    words = tokenizer()
    fields = {"vocab_size": len(words), "hidden_size": 64, "max_position_embeddings": 512, "initializer_range": 0.3}
    model = make("llama", directory, **fields)
    letters = words.convert_tokens_to_ids([*string.ascii_lowercase, "Ġ", ",", "."])
    mask = torch.ones(len(words), dtype=torch.bool)
    mask[letters] = False
    with torch.no_grad():
        model.lm_head.weight[mask] = 0  # never the largest logit
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def tokens_of(model, *shape):
    """Random ids."""
    return jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, shape), jnp.int32)


def torch_logits(model, tokens):
    """The torch model's logits."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.float().numpy()


def relative(got, want) -> float:
    """The largest difference over the largest entry."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def unrolled(model, tree):
    """A stacked tree with one subtree a layer."""
    layers = range(model.config.num_hidden_layers)
    return tree | {"layers": {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in layers}}
