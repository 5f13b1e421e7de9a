"""Every reader by name: how valid files are harmed, and the call that must not fail."""

from collections.abc import Callable
from pathlib import Path

from .adapter_files import adapter, peft
from .data_files import jsonl, tables, templates
from .model_files import beside, config, gguf, index, pipes, safetensors, sizes
from .run_files import leftovers, meshes, overrides, run
from .seeds import Prepare
from .tokenizer_files import patterns, tokenizers

READERS: dict[str, Callable[[Path], Prepare]] = {
    "safetensors": safetensors, "index": index, "config": config, "peft": peft, "adapter": adapter, "run": run,
    "overrides": overrides, "gguf": gguf, "jsonl": jsonl, "tokenizer": tokenizers, "template": templates,
    "mesh": meshes, "leftovers": leftovers, "beside": beside, "pipes": pipes, "sizes": sizes, "csv": tables,
    "patterns": patterns,
}  # fmt: skip
