"""Model cards of exported adapters and models: README.md, with the front matter that the hub reads."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from huggingface_hub import ModelCardData

from sborax.adapters.core import SboraxError
from sborax.interop.peft_replication import REPLICATION
from sborax.interop.peft_tokens import TOKENS

README = "README.md"
TAG = "sborax"
"""A tag of every card; a README.md without it was not written by sborax."""
SIZES = {"r": "rank", "init_r": "rank", "oft_block_size": "block size", "block_size": "block size"}
"""Config fields that give the size of an adapter, and their names on the card."""


def adapter_card(
    methods: Sequence[str],
    config: Mapping[str, Any],
    errors: Mapping[str, float],
    base: str | None,
    facts: Mapping[str, str],
    vocabulary: int | None = None,
) -> str:
    """The card of an adapter: what was trained, how exact the export is, and how to load it in PEFT and in sborax.

    Args:
    - methods: class names of the methods that were trained.
    - config: the fields of `adapter_config.json`.
    - errors: relative Frobenius error of every truncated module; empty if the export is exact.
    - base: the base model, a hub id or a path; None if unknown.
    - facts: further lines, such as data and metrics.
    - vocabulary: number of tokens of the base, if tensors depend on it; None (default) if not. A base with another
      number has to be resized first.
    """
    name = base or "path/to/the/base/model"
    size = next((f", {word} {config[field]}" for field, word in SIZES.items() if config.get(field)), "")
    size += ", with exceptions in `rank_pattern`" if config.get("rank_pattern") else ""
    targets = config["target_modules"]
    lines = [
        f"Method: {', '.join(methods)}, stored as PEFT's `{config['peft_type']}`{size}.",
        f"Base model: {base or 'not recorded'}.",
        f"Adapted modules: {targets if isinstance(targets, str) else ', '.join(targets)}.",
        *([f"Layers: {config['layers_to_transform']}."] if "layers_to_transform" in config else []),
        *([f"Stored in full: {', '.join(config['modules_to_save'])}."] if "modules_to_save" in config else []),
        *(["Vectors of some tokens were trained: `trainable_token_indices`."] if config.get(TOKENS) else []),
        *(
            []
            if vocabulary is None
            else [f"Vocabulary: {vocabulary:,} tokens. A base with more or fewer is resized first."]
        ),
        _exactness(errors),
        *(f"{key}: {value}" for key, value in facts.items()),
    ]
    ranges = config.get(REPLICATION)
    in_peft = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({name!r})",
        *([] if vocabulary is None else [f"model.resize_token_embeddings({vocabulary})  # unless it has as many"]),
        'model = PeftModel.from_pretrained(model, "path/to/this/directory")',
    ]
    in_sborax = [
        "import sborax as sx",
        "",
        f"model = sx.load_model({name!r})",
        *(
            []
            if vocabulary is None
            else [f"model = sx.resize_vocabulary(model, {vocabulary})  # unless it has as many"]
        ),
        *([f"model = sx.replicate_layers(model, {ranges})"] if ranges else []),
        'params, adapters = sx.load_peft("path/to/this/directory", model)',
        "logits = model.apply(params, adapters, tokens)",
    ]
    front = _front("peft", base, "adapter", [str(config["peft_type"]).lower(), *methods])
    loads = {"With PEFT:": in_peft, "With sborax:": in_sborax}
    return _page(front, "Adapter trained with sborax", lines, loads) + _errors(errors)


def model_card(origin: str, methods: Sequence[str], base: str | None, facts: Mapping[str, str], hf: bool = True) -> str:
    """The card of a dense model: how it was made, from what, and how to load it.

    Args:
    - origin: a sentence about how the model was made.
    - methods: class names of the methods that were trained.
    - base: the base model, a hub id or a path; None if unknown.
    - facts: further lines, such as data and metrics.
    - hf: whether transformers can load the model.
    """
    lines = [f"Base model: {base or 'not recorded'}.", origin, *(f"{key}: {value}" for key, value in facts.items())]
    in_transformers = [
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
    ]
    in_sborax = [
        "import sborax as sx",
        "",
        'model = sx.load_model("path/to/this/directory")',
        "logits = model.apply(model.params, None, tokens)",
    ]
    front = _front("transformers" if hf else "sborax", base, "finetune", methods)
    loads = {**({"With transformers:": in_transformers} if hf else {}), "With sborax:": in_sborax}
    return _page(front, "Model fine-tuned with sborax", lines, loads)


def check_card(directory: epath.PathLike) -> None:
    """Raise SboraxError if the directory has a README.md that sborax did not write, and which would be lost."""
    file = epath.Path(directory) / README
    if not file.exists():
        return
    front = file.read_text().partition("\n---\n")[0].splitlines()
    if front[:1] != ["---"] or f"- {TAG}" not in front:
        raise SboraxError(f"{file}: is there already and was not written by sborax; choose another directory")


def write_card(directory: epath.PathLike, text: str) -> None:
    """Write a card as the directory's README.md. Raises SboraxError if `check_card` does."""
    check_card(directory)
    (epath.Path(directory) / README).write_text(text)


def _front(library: str, base: str | None, relation: str, methods: Sequence[str]) -> str:
    on_hub = base is not None and re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not Path(base).exists()
    tags = [TAG, *dict.fromkeys(method.lower() for method in methods)]
    data = ModelCardData(
        library_name=library,
        # The hub refuses values that are not hub ids. The text of the card names the base in any case.
        base_model=base if on_hub else None,
        pipeline_tag="text-generation",
        tags=tags,
        base_model_relation=relation if on_hub else None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _page(front: str, title: str, lines: Sequence[str], loads: Mapping[str, Sequence[str]]) -> str:
    blocks = [line for title, code in loads.items() for line in (title, "", "```python", *code, "```", "")]
    return "\n".join([front, "", f"# {title}", "", *(f"- {line}" for line in lines), "", *blocks])


def _exactness(errors: Mapping[str, float]) -> str:
    if not errors:
        return "Exact: the adapted weights are those of the run, up to float32 rounding."
    mean = sum(errors.values()) / len(errors)
    return (
        f"Truncated: {len(errors)} modules keep the leading singular components of their change; relative Frobenius "
        f"error {mean:.3g} on average, {max(errors.values()):.3g} at most."
    )


def _errors(errors: Mapping[str, float]) -> str:
    if not errors:
        return ""
    rows = [f"| {module} | {error:.3g} |" for module, error in errors.items()]
    return "\n".join(["", "| truncated module | relative Frobenius error |", "|---|---|", *rows, ""])
