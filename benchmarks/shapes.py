"""Shapes of models. Speed does not depend on the values of weights, so nothing is downloaded."""

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "LLaMA-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "LLaMA-3.2-3B": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "LLaMA-2-7B": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "LLaMA-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "LLaMA-3.1-70B": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}
EPS = 1e-5


def kernels(shape: dict[str, Any]) -> list[tuple[int, int]]:
    """(in, out) of the seven linears of one layer."""
    d, f = shape["hidden_size"], shape["intermediate_size"]
    q, kv = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]


def minimum_flops(shape: dict[str, Any], batch: int, length: int, trained: int, full: bool = False) -> float:
    """The least FLOPs of a step, over its tokens: 4N + attention + adapter, or 6N + attention for full fine-tuning.

    Two passes over the base (forward, gradient in x) and a third if it is trained; three over attention without use of
    its mask; three over the adapter, in which each parameter is one multiply-add a token.
    """
    tokens, d = batch * length, shape["hidden_size"]
    layers, width = shape["num_hidden_layers"], shape["num_attention_heads"] * shape["head_dim"]
    base = layers * sum(i * o for i, o in kernels(shape)) + d * shape["vocab_size"]
    attention = layers * 3 * 2 * 2 * batch * length * length * width
    return (6 if full else 4) * base * tokens + attention + (0 if full else 6 * trained * tokens)


def model_flops(shape: dict[str, Any], batch: int, length: int) -> float:
    """4N FLOPs a token: the numerator of the model-FLOP utilisation of an adapter's step."""
    layers = shape["num_hidden_layers"]
    base = layers * sum(i * o for i, o in kernels(shape)) + shape["hidden_size"] * shape["vocab_size"]
    return 4.0 * base * batch * length
