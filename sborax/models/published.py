"""The `config.json` of published models by hub id, less the keys that say nothing about shapes.

They let a run be planned where neither the model nor a network is at hand.
"""

from collections.abc import Mapping
from typing import Any


def _llama(layers: int, hidden: int, wide: int, heads: int, kv_heads: int, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **fields,
    }


def _rope(factor: float) -> dict[str, Any]:
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


_FIRST = {"max_position_embeddings": 2048, "vocab_size": 32000, "rms_norm_eps": 1e-06, "torch_dtype": "float16"}
_SECOND = {"max_position_embeddings": 4096, "vocab_size": 32000}
_THIRD = {"max_position_embeddings": 8192, "vocab_size": 128256, "rope_theta": 500000.0}
_LATER = {**_THIRD, "max_position_embeddings": 131072}


def _gemma(layers: int, hidden: int, wide: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
        "torch_dtype": "bfloat16",
    }


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "yahma/llama-7b-hf": _llama(32, 4096, 11008, 32, 32, **_FIRST),
    "huggyllama/llama-7b": _llama(32, 4096, 11008, 32, 32, **_FIRST),
    "huggyllama/llama-13b": _llama(40, 5120, 13824, 40, 40, **_FIRST),
    "meta-llama/Llama-2-7b-hf": _llama(32, 4096, 11008, 32, 32, **_SECOND),
    "meta-llama/Llama-2-13b-hf": _llama(40, 5120, 13824, 40, 40, **_SECOND),
    "meta-llama/Meta-Llama-3-8B": _llama(32, 4096, 14336, 32, 8, **_THIRD),
    "meta-llama/Meta-Llama-3-70B": _llama(80, 8192, 28672, 64, 8, **_THIRD),
    "meta-llama/Llama-3.1-8B": _llama(32, 4096, 14336, 32, 8, **_LATER, rope_scaling=_rope(8.0)),
    "meta-llama/Llama-3.1-70B": _llama(80, 8192, 28672, 64, 8, **_LATER, rope_scaling=_rope(8.0)),
    "meta-llama/Llama-3.2-3B": {
        **_llama(28, 3072, 8192, 24, 8, **_LATER, rope_scaling=_rope(32.0)),
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-360M": {
        **_llama(32, 960, 2560, 15, 5, max_position_embeddings=8192, vocab_size=49152, rope_theta=100000),
        "tie_word_embeddings": True,
    },
    "mistralai/Mistral-7B-v0.1": {
        **_llama(32, 4096, 14336, 32, 8, max_position_embeddings=32768, vocab_size=32000),
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 4096,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        **_llama(32, 4096, 14336, 32, 8, max_position_embeddings=32768, vocab_size=32000, rope_theta=1000000.0),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "Qwen/Qwen3-30B-A3B": {
        **_llama(48, 2048, 6144, 32, 4, max_position_embeddings=40960, vocab_size=151936, rope_theta=1000000.0),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "rms_norm_eps": 1e-06,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "google/gemma-2b": _gemma(18, 2048, 16384, 8, 1),
    "google/gemma-7b": _gemma(28, 3072, 24576, 16, 16),
}
