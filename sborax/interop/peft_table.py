"""The methods that PEFT has too: one row says how a method reads in PEFT's config and where its tensors go.

PEFT keeps matrices as torch does, (out, in); ours are (in, out). To teach the reader and the writer another method
that PEFT knows, add its row to `TABLE`. Key names and shapes follow peft 0.21.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from sborax.adapters.core import AbstractMethod, Adapter, SboraxError
from sborax.interop.peft_layout import TYING
from sborax.interop.peft_others import OTHERS
from sborax.interop.peft_row import Fields, Fit, Row, Tensor, dropout_of, number_field, rank_field
from sborax.methods import Bat, Bone, DoRA, LoRA, OLoRA, PiSSA


def _scale(fields: Fields) -> float:
    rank = rank_field(fields)
    return number_field(fields, "lora_alpha") / (math.sqrt(rank) if fields["use_rslora"] else rank)


def _lora_fields(node: Adapter) -> dict[str, Any]:
    rank = node.train["a"].shape[-1]
    # A float32 times a whole number is exact in float64, so dividing it again gives the scale back.
    alpha = float(node.frozen["scale"]) * rank
    return {"r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "lora_dropout": dropout_of(node)}


def _read_lora(fields: Fields) -> Fit:
    return Fit(LoRA(rank=rank_field(fields), dropout=number_field(fields, "lora_dropout")), {"scale": _scale(fields)})


def _read_with_alpha(method: type[AbstractMethod]) -> Callable[[Fields], Fit]:
    def read(fields: Fields) -> Fit:
        rank, scale = rank_field(fields), _scale(fields)
        return Fit(
            method(rank=rank, alpha=scale * rank, dropout=number_field(fields, "lora_dropout")),  # type: ignore[call-arg]
            {"scale": scale},
        )

    return read


def _shards(mini: bool) -> tuple[Callable[[Fields], Fit], Callable[[Adapter], dict[str, Any] | None]]:
    def read(fields: Fields) -> Fit:
        width = rank_field(fields, "mini_r") if mini else None
        return Fit(Bone(rank=rank_field(fields), mini_rank=width, dropout=number_field(fields, "miss_dropout")), {})

    def write(node: Adapter) -> dict[str, Any] | None:
        method = node.method
        assert isinstance(method, Bone)
        if method.grouping != "strided" or (method.mini_rank is not None) != mini:
            return None
        own = {"mini_r": method.mini_rank} if mini else {}
        return {"r": method.rank, **own, "miss_dropout": dropout_of(node)}

    return read, write


PAIR = (Tensor("lora_A.weight", "a", (1, 0)), Tensor("lora_B.weight", "b", (1, 0)))
LORA_FIELDS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
LORA_READS = frozenset({TYING})
LORA_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
MISS_FIELDS = {"r": 64, "mini_r": 1, "miss_dropout": 0.0}
BLOCK = (Tensor("miss_block", "d", (0, 1)),)
BASE_UNTOUCHED = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base as it was, so that the tensors say everything."""
SHARED, MINI = _shards(mini=False), _shards(mini=True)

TABLE = (
    Row(
        LoRA, "LORA", {"use_dora": (False,), "init_lora_weights": BASE_UNTOUCHED}, LORA_FIELDS,
        PAIR, _read_lora, _lora_fields, LORA_PATTERNS, any_rank=True, reads=LORA_READS,
    ),
    Row(
        DoRA, "LORA", {"use_dora": (True,), "init_lora_weights": BASE_UNTOUCHED}, LORA_FIELDS,
        (*PAIR, Tensor("lora_magnitude_vector", "m", (0,))),
        _read_with_alpha(DoRA), _lora_fields, LORA_PATTERNS, any_rank=True, reads=LORA_READS,
    ),
    # PEFT takes these two from the base again on loading. We write them as LoRA, which needs no such step.
    Row(
        PiSSA, "LORA", {"use_dora": (False,), "init_lora_weights": ("pissa",)}, LORA_FIELDS,
        PAIR, _read_with_alpha(PiSSA), patterns=LORA_PATTERNS, reads=LORA_READS,
    ),
    Row(
        OLoRA, "LORA", {"use_dora": (False,), "init_lora_weights": ("olora",)}, LORA_FIELDS,
        PAIR, _read_with_alpha(OLoRA), patterns=LORA_PATTERNS, reads=LORA_READS,
    ),
    Row(Bone, "MISS", {"init_weights": (True, False)}, MISS_FIELDS, BLOCK, *SHARED),
    Row(Bone, "MISS", {"init_weights": ("mini",)}, MISS_FIELDS, BLOCK, *MINI),
    Row(
        Bat, "MISS", {"init_weights": ("bat",)}, MISS_FIELDS, (Tensor("miss_block", "d", (0, 1, 2)),),
        lambda fields: Fit(Bat(rank=rank_field(fields)), {}), lambda node: {"r": node.method.rank},
    ),
    *OTHERS,
)  # fmt: skip

PLAIN = TABLE[0]
"""Plain LoRA: what every method with thin factors can be written as."""

KNOWN_BY_DEFAULTS = {"use_dora": False, "init_lora_weights": True, "init_weights": True, "init_ia3_weights": True}

INERT = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode layers_pattern
    layers_to_transform loftq_config lora_ga_config megatron_core modules_to_save peft_type peft_version
    qalora_group_size revision runtime_config target_modules task_type
    """.split()
)
"""Fields that do not change the function of a saved adapter, or that are read by name elsewhere."""

NEUTRAL = {"bias": "none"}
"""Fields whose neutral value is not empty. Any field that no one here knows must be empty: None, False, 0, [] or {}."""

BIASES = r"all|\w+_only"
"""Values of `bias` under which PEFT stores biases, where a model has some."""


def row_for(config: Mapping[str, Any], biased: bool = True) -> Row:
    """The row of the file that `config` describes, for a model that has biases or none.

    Raises SboraxError for a kind or an option that no row reads.
    """
    kind = config.get("peft_type")
    rows = [row for row in TABLE if row.peft_type == kind]
    if not rows:
        known = ", ".join(sorted({row.peft_type for row in TABLE} | {"BONE"}))
        raise SboraxError(f"peft_type {str(kind)[:40]!r} is not supported; known: {known}")

    def answers(row: Row, name: str) -> bool:
        value = config.get(name, KNOWN_BY_DEFAULTS[name])
        return any(value == known and type(value) is type(known) for known in row.known_by[name])

    row = next((row for row in rows if all(answers(row, name) for name in row.known_by)), None)
    if row is None:
        asked = ", ".join(f"{name}={config.get(name, KNOWN_BY_DEFAULTS[name])!r}" for name in rows[0].known_by)
        raise SboraxError(
            f"{kind} with {asked[:120]} is not supported; if it changes the base, save it in PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    read = INERT | row.known_by.keys() | row.defaults.keys() | set(row.patterns.values()) | row.reads | row.inert
    for name, value in config.items():
        if name == "bias" and not biased and re.fullmatch(BIASES, str(value)):
            continue
        if name not in read and value and value != NEUTRAL.get(name):
            raise SboraxError(f"option {name[:60]}={str(value)[:60]} is not supported")
    return row
