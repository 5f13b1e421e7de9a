"""The model card that goes beside an exported adapter."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

SIZES = {"r": "rank", "init_r": "rank", "oft_block_size": "block size", "block_size": "block size"}
"""The config fields that say how large an adapter is."""


def card(
    methods: Sequence[str],
    config: Mapping[str, Any],
    errors: Mapping[str, float],
    base: str | None,
    facts: Mapping[str, str],
) -> str:
    """A README.md: what was trained, how exact the export is, and how to load it in PEFT and in sborax."""
    name = base or "path/to/the/base/model"
    front = ["library_name: peft", *([f"base_model: {json.dumps(base)}"] if base else []), "tags: [sborax, adapter]"]
    size = next((f", {word} {config[field]}" for field, word in SIZES.items() if config.get(field)), "")
    size += ", with exceptions in `rank_pattern`" if config.get("rank_pattern") else ""
    lines = [
        f"Method: {', '.join(methods)}, stored as PEFT's `{config['peft_type']}`{size}.",
        f"Base model: {base or 'not recorded'}.",
        f"Adapted modules: {', '.join(config['target_modules'])}.",
        *([f"Layers: {config['layers_to_transform']}."] if "layers_to_transform" in config else []),
        *([f"Stored whole: {', '.join(config['modules_to_save'])}."] if "modules_to_save" in config else []),
        _exactness(errors),
        *(f"{key}: {value}" for key, value in facts.items()),
    ]
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            "# Adapter trained with sborax",
            "",
            *(f"- {line}" for line in lines),
            "",
            "With PEFT:",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name!r})",
            'model = PeftModel.from_pretrained(model, "path/to/this/directory")',
            "```",
            "",
            "With sborax:",
            "",
            "```python",
            "import sborax as sx",
            "",
            f"model = sx.load_model({name!r})",
            'params, adapters = sx.load_peft("path/to/this/directory", model)',
            "logits = model.apply(params, adapters, tokens)",
            "```",
            "",
        ]
    )


def _exactness(errors: Mapping[str, float]) -> str:
    if not errors:
        return "Exact: the adapted weights are those of the run, up to float32 rounding."
    mean = sum(errors.values()) / len(errors)
    return (
        f"Truncated: {len(errors)} modules keep the leading singular components of their change; relative Frobenius "
        f"error {mean:.3g} on average, {max(errors.values()):.3g} at most."
    )
