"""Language models in Flax Linen."""

from sborax.models.config import LlamaConfig, Rope
from sborax.models.generate import generate
from sborax.models.language_model import LanguageModel, abstract
from sborax.models.llama import Llama
from sborax.models.load import load_config, load_model
from sborax.models.names import hf_module
from sborax.models.save import save_hf

__all__ = [
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "Rope",
    "abstract",
    "generate",
    "hf_module",
    "load_config",
    "load_model",
    "save_hf",
]
