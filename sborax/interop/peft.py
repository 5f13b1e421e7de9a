"""PEFT's adapter directories: `adapter_config.json` and `adapter_model.safetensors`, written and read."""

from sborax.interop.peft_load import load_peft
from sborax.interop.peft_save import Exported, save_peft

__all__ = ["Exported", "load_peft", "save_peft"]
