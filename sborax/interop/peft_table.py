"""The methods that PEFT has, too. A row says how a method reads in PEFT's config and which tensors it has.

PEFT keeps matrices as torch does, (out, in); ours are (in, out). A method that PEFT knows is exported and imported once
it has a row in one of the files from which `TABLE` is put together. Key names and shapes follow peft 0.21.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.interop.peft_base import KINDS
from sborax.interop.peft_low_rank import LOW_RANK
from sborax.interop.peft_projected import PROJECTED
from sborax.interop.peft_row import Row
from sborax.interop.peft_spectral import SPECTRAL
from sborax.interop.peft_structured import STRUCTURED

TABLE = (*LOW_RANK, *STRUCTURED, *PROJECTED, *SPECTRAL)

PLAIN = TABLE[0]
"""The row of plain LoRA, as which every method with thin factors can be written."""

KNOWN_BY_DEFAULTS = {
    "use_dora": False,
    "kasa_config": None,
    "init_lora_weights": True,
    "init_weights": True,
    "init_ia3_weights": True,
    "variant": "road_1",
    "use_idwt": True,
    "wavelet_family": "db1",
    "act_fn": "relu",
    "decomposition_method": "relu",
}
"""PEFT's defaults of the fields in `Row.known_by`."""

INERT = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config exclude_modules fan_in_fan_out inference_mode
    layers_pattern layers_to_transform loftq_config lora_ga_config megatron_core modules_to_save peft_type peft_version
    qalora_group_size revision runtime_config target_modules task_type
    """.split()
)
"""Fields of all kinds that do not change the function of a saved adapter, or that are read elsewhere.

`fan_in_fan_out` says that the base keeps its weights as (in, out), as GPT-2's Conv1D does. Every projection here is an
nn.Linear in PEFT, for which every kind sets the field to False with a warning.
"""

NEUTRAL = {"bias": "none"}
"""Neutral values that are not empty. Any other unknown field must be empty: None, False, 0, [] or {}."""

BIASES = r"all|\w+_only"
"""Values of `bias` with which PEFT stores biases. They mean nothing for a model without biases."""


UNREAD = {
    "PSOFT": "the file lacks the base's singular vectors, whose signs depend on the machine; save it in PEFT as LoRA, "
    "with save_as_lora"
}
"""Kinds whose files do not say the function."""


def row_for(config: Mapping[str, Any], biased: bool = True) -> Row:
    """The row of an adapter that `config` describes.

    Args:
    - config: the fields of `adapter_config.json`.
    - biased: whether the model has biases.

    Raises SboraxError for a kind or an option that no row reads.
    """
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in UNREAD:
        raise SboraxError(f"peft_type {kind!r} is not supported: {UNREAD[kind]}")
    rows = [row for row in TABLE if row.peft_type == kind]
    if not rows:
        known = ", ".join(sorted({row.peft_type for row in TABLE} | {kind.peft_type for kind in KINDS} | {"BONE"}))
        raise SboraxError(f"peft_type {str(kind)[:40]!r} is not supported; known: {known}")

    def is_of(row: Row, name: str) -> bool:
        value = config.get(name, KNOWN_BY_DEFAULTS[name])
        return any(_is(value, known) for known in row.known_by[name])

    row = next((row for row in rows if all(is_of(row, name) for name in row.known_by)), None)
    if row is None:
        values = ", ".join(f"{name}={config.get(name, KNOWN_BY_DEFAULTS[name])!r}" for name in rows[0].known_by)
        raise SboraxError(
            f"{kind} with {values[:120]} is not supported; if it changes the base, save it in PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    read = row.known_by.keys() | row.defaults.keys() | set(row.patterns.values()) | row.reads | row.inert
    check_options(config, INERT | read, biased)
    return row


def _is(value: Any, known: Any) -> bool:
    """Whether a field's value means a row: it is the known one, or one of the known class."""
    return isinstance(value, known) if isinstance(known, type) else value == known and type(value) is type(known)


def check_options(config: Mapping[str, Any], read: Iterable[str], biased: bool = True) -> None:
    """Raise SboraxError for a field with a value, unless it is read. biased: whether the model has biases."""
    for name, value in config.items():
        if name == "bias" and not biased and re.fullmatch(BIASES, str(value)):
            continue
        if name not in read and value and value != NEUTRAL.get(name):
            raise SboraxError(f"option {name[:60]}={str(value)[:60]} is not supported")
