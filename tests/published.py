"""The LLaMAs whose steps the tests plan, by their names in papers."""

from sborax.models.published import CONFIGS

PUBLISHED = {
    "LLaMA-2-7B": CONFIGS["meta-llama/Llama-2-7b-hf"],
    "LLaMA-3.1-8B": CONFIGS["meta-llama/Llama-3.1-8B"],
    "LLaMA-3.1-70B": CONFIGS["meta-llama/Llama-3.1-70B"],
}
"""The contents of their `config.json`."""

SPARSE = {
    "Mixtral-8x7B": CONFIGS["mistralai/Mixtral-8x7B-v0.1"],
    "Qwen3-30B-A3B": CONFIGS["Qwen/Qwen3-30B-A3B"],
}
"""Those of models with experts."""

ALL = "self_attn|mlp"
"""A rule for all seven projections."""
