"""The methods that PEFT has, too. A row says how a method reads in PEFT's config and which tensors it has.

PEFT keeps matrices as torch does, (out, in); ours are (in, out). A method that PEFT knows is exported and imported once
it has a row in one of the files from which `TABLE` is put together. Key names and shapes follow peft 0.21.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.interop.peft_base import KINDS
from sborax.interop.peft_biases import BIAS
from sborax.interop.peft_lora import LORA, LORA_OPTIONS
from sborax.interop.peft_low_rank import LOW_RANK
from sborax.interop.peft_projected import PROJECTED
from sborax.interop.peft_row import START_OPTIONS, Row
from sborax.interop.peft_shared import SHARED
from sborax.interop.peft_spectral import SPECTRAL, SPECTRAL_OPTIONS
from sborax.interop.peft_structured import STRUCTURED, STRUCTURED_OPTIONS

TABLE = (*LORA, *LOW_RANK, *STRUCTURED, *PROJECTED, *SPECTRAL, *SHARED)

PLAIN = TABLE[0]
"""The row of plain LoRA, as which every method with thin factors can be written."""

KNOWN_BY_DEFAULTS = START_OPTIONS | LORA_OPTIONS | SPECTRAL_OPTIONS | STRUCTURED_OPTIONS
"""PEFT's defaults of the fields in `Row.known_by`."""

SELECTING = frozenset(
    "exclude_modules layers_pattern layers_to_transform modules_to_save peft_type target_modules".split()
)
"""Fields of all kinds that say what the adapter is and where. `peft_load` and `peft_targets` read them."""
INERT = {
    "peft_version": "of the PEFT that saved the file",
    "auto_mapping": "the class of the model in PEFT",
    "base_model_name_or_path": "the base is the model that is given",
    "revision": "of the base that PEFT would download",
    "task_type": "the class that PEFT puts around the model",
    "inference_mode": "whether PEFT trains the adapter after loading it",
    "fan_in_fan_out": "for bases whose weights are (in, out); PEFT clears it for every projection that is an nn.Linear",
    "megatron_core": "the name of a library",
    "runtime_config": "how PEFT computes, and not what",
    "qalora_group_size": "unused without use_qalora",
    **dict.fromkeys(["corda_config", "eva_config", "loftq_config", "lora_ga_config"], "how PEFT makes the start"),
}
"""Fields of all kinds that do not change the function of a saved adapter, with the reason."""

NEUTRAL = {"bias": "none"}
"""Neutral values that are not empty. Any other unknown field must be empty: None, False, 0, [] or {}."""

NO_WEIGHT = "it trains inputs or states of the model, and no weight"
UNREAD = {
    **dict.fromkeys("PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING CPT CARTRIDGE".split(), NO_WEIGHT),
    "ADAPTION_PROMPT": "it adds attention to trained prompts, and changes no weight",
    "SHADOW": "it runs a second, smaller model beside the base",
    "XLORA": "it mixes several adapters by a classifier that reads hidden states",
    "POLY": "it mixes several adapters by the task of each row",
    "PSOFT": "the file lacks the base's singular vectors, whose signs depend on the machine; save it in PEFT as LoRA, "
    "with save_as_lora",
    "ADAMSS": "the file lacks the places of its outputs, which K-means and a random SVD make again",
}
"""Kinds that are not read, with the reason."""


def row_for(config: Mapping[str, Any]) -> Row:
    """The row of an adapter that `config` describes, the fields of `adapter_config.json`.

    Raises SboraxError for a kind or an option that no row reads.
    """
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in UNREAD:
        raise SboraxError(f"peft_type {kind!r} is not supported: {UNREAD[kind]}")
    rows = [row for row in TABLE if row.peft_type == kind]
    if not rows:
        names = ", ".join(sorted({row.peft_type for row in TABLE} | {kind.peft_type for kind in KINDS} | {"BONE"}))
        raise SboraxError(f"peft_type {str(kind)[:40]!r} is not supported; known: {names}")

    def is_of(row: Row, name: str) -> bool:
        value = config.get(name, KNOWN_BY_DEFAULTS[name])
        return any(_is(value, meaning) for meaning in row.known_by[name])

    fitting = [row for row in rows if all(is_of(row, name) for name in row.known_by)]
    if not fitting:
        values = ", ".join(f"{name}={config.get(name, KNOWN_BY_DEFAULTS[name])!r}" for name in rows[0].known_by)
        raise SboraxError(
            f"{kind} with {values[:120]} is not supported; if it changes the base, save it in PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    # The row that knows most of the config: one for an option is beside one for the kind without it.
    row = max(fitting, key=lambda row: len(row.known_by))
    read = row.known_by.keys() | row.defaults.keys() | set(row.patterns.values()) | row.reads | {BIAS}
    check_options(config, SELECTING | INERT.keys() | row.inert.keys() | read, row.refused)
    return row


def _is(value: Any, kind: Any) -> bool:
    """Whether a field has a value that means a row: an instance of `kind` if that is a class, else `kind` itself."""
    return isinstance(value, kind) if isinstance(kind, type) else value == kind and type(value) is type(kind)


def check_options(config: Mapping[str, Any], read: Collection[str], reasons: Mapping[str, str]) -> None:
    """Raise SboraxError for a field with a value, unless it is read. reasons: why fields are not, where it is known."""
    for name, value in config.items():
        if name not in read and value and value != NEUTRAL.get(name):
            why = f": {reasons[name]}" if name in reasons else ""
            raise SboraxError(f"option {name[:60]}={str(value)[:60]} is not supported{why}")
