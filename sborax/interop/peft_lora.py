"""Rows of LORA: LoRA itself, and its variants, which PEFT tells apart by a field of the config."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sborax.adapters.core import AbstractMethod, Adapter, SboraxError
from sborax.interop.peft_biases import OF_LORA
from sborax.interop.peft_experts import FIELD
from sborax.interop.peft_layout import TYING
from sborax.interop.peft_replication import REPLICATION
from sborax.interop.peft_row import (
    LARGEST_RANK,
    TRANSPOSED,
    Fields,
    Fit,
    Row,
    Tensor,
    alpha_of,
    decimal_of,
    dropout_of,
    number_field,
    rank_field,
    whole_field,
)
from sborax.interop.peft_tokens import TOKENS
from sborax.methods import BDLoRA, DoRA, KaSA, LoRA, MiCA, MonteCLoRA, OLoRA, PiSSA, QALoRA, VeLoRA
from sborax.methods.activated import Activated

PAIR = (
    Tensor("lora_A.weight", "a", TRANSPOSED, embedding="lora_embedding_A"),
    Tensor("lora_B.weight", "b", TRANSPOSED, embedding="lora_embedding_B"),
)
OF_PART = tuple(tensor._replace(leaf=f"part/{tensor.leaf}") for tensor in PAIR)
INVOCATION = "alora_invocation_tokens"
LORA_OPTIONS: dict[str, Any] = {
    "use_dora": False, "use_qalora": False, INVOCATION: None, "kasa_config": None, "use_bdlora": None,
    "monteclora_config": None, "velora_config": None,
}  # fmt: skip
"""PEFT's defaults of the fields that tell variants apart."""
LORA_FIELDS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
LORA_READS = frozenset({TYING, REPLICATION, TOKENS})
LORA_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
BASE_UNTOUCHED = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is, so that the tensors are the whole adapter."""
BLOCKS: dict[str, Any] = {
    "target_modules_bd_a": None, "target_modules_bd_b": None, "nblocks": 1, "match_strict": True
}  # fmt: skip
"""PEFT's defaults."""
KASA = {"beta": 1e-4, "gamma": 1e-3}
"""PEFT's defaults. They matter to `_get_kasa_loss` alone, and here `KaSALoss` has them."""
SAMPLER: dict[str, Any] = {
    "num_samples": 8, "use_entropy": False, "dirichlet_prior": 0.1, "sample_scaler": 1e-4, "kl_loss_weight": 1e-5,
    "buffer_size": 150,
}  # fmt: skip
"""PEFT's defaults. `MonteCLoRALoss` has those that matter to `_get_monteclora_loss` alone."""
SUB_TOKENS: dict[str, Any] = {"num_groups": 64, "scale": 1.0, "init_type": "batch_average"}
"""PEFT's defaults."""
DIRECTIONS = {"batch_average": "batch", "random": "fixed", "batch_average_once": "fixed"}
"""PEFT's values of `init_type`; the first of each is written."""
SIDES = {"in": "target_modules_bd_a", "out": "target_modules_bd_b"}
"""PEFT's lists of the modules whose a, or whose b, is block-diagonal."""
OTHER = "beside a method other than LoRA"
VARIANTS = {
    INVOCATION: OTHER,
    "arrow_config": "the file lacks the adapters that it mixes; load each of them, and mix them by sx.arrow",
    "kasa_config": "KaSA takes a part out of the base's singular values",
    "megatron_config": "of layers of Megatron-Core, which no model here has",
    "monteclora_config": OTHER,
    "use_bdlora": OTHER,
    "use_qalora": OTHER,
    "velora_config": OTHER,
}
"""Options of PEFT's LoRA that are not read."""


def _lora_scale(fields: Fields) -> float:
    rank = rank_field(fields)
    return number_field(fields, "lora_alpha") / (math.sqrt(rank) if fields["use_rslora"] else rank)


def _write_lora(node: Adapter) -> dict[str, Any]:
    rank = node.train["a"].shape[-1]
    return {"r": rank, "lora_alpha": alpha_of(node, rank), "lora_dropout": dropout_of(node)}


def _read_lora(fields: Fields) -> Fit:
    method = LoRA(rank=rank_field(fields), dropout=number_field(fields, "lora_dropout"))
    return Fit(method, {"scale": _lora_scale(fields)})


def _common(modules: Mapping[str, Fields], name: str, field: str, advice: str = "use as_='lora'") -> Any:
    """The value that all modules have. field: where PEFT keeps it."""
    (module, common), *remainder = ((module, fields[name]) for module, fields in modules.items())
    for rival, value in remainder:
        if value != common:
            raise SboraxError(
                f"{name} is {common} for {module} and {value} for {rival}: PEFT's {field} has one for all; {advice}"
            )
    return common


def _groups(fields: Fields, shape: tuple[int, int]) -> dict[str, Any]:
    group = rank_field(fields, "qalora_group_size")
    if group == 1 or shape[0] % group:
        raise SboraxError(f"qalora_group_size={group} must be 2 or more and divide {shape[0]} rows")
    return {"groups": shape[0] // group}


def _read_qalora(fields: Fields) -> Fit:
    """PEFT multiplies the means of groups by their number."""
    group, rate = rank_field(fields, "qalora_group_size"), number_field(fields, "lora_dropout")
    scale = _lora_scale(fields) * fields["groups"] / group
    return Fit(QALoRA(rank=rank_field(fields), group=group, dropout=rate), {"scale": scale})


def _write_qalora(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, QALoRA)
    groups, rank = node.train["a"].shape
    alpha = float(str(np.float32(float(node.frozen["scale"]) * rank * method.group / groups)))
    sizes = {"r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha}
    return {**sizes, "qalora_group_size": method.group, "lora_dropout": dropout_of(node)}


def _invocation(config: Fields, module: str) -> dict[str, Any]:
    """The tokens of aLoRA, which are the same for all modules."""
    tokens = config[INVOCATION]
    if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise SboraxError(f"{INVOCATION}: expected a list of token ids, got {str(tokens)[:60]}")
    return {"tokens": tuple(tokens)}


def _common_invocation(modules: Mapping[str, Fields]) -> dict[str, Any]:
    return {INVOCATION: list(_common(modules, "tokens", INVOCATION, "save them as two adapters"))}


def _read_activated(fields: Fields) -> Fit:
    plain = _read_lora(fields)
    assert isinstance(plain.method, LoRA)
    return Fit(Activated(plain.method, fields["tokens"]), {f"part/{name}": leaf for name, leaf in plain.frozen.items()})


def _write_activated(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, Activated)
    ((part, _),) = method.children(node)
    if not isinstance(part.method, LoRA):
        raise SboraxError(f"PEFT activates LoRA alone, and not {type(part.method).__name__}")
    return {**_write_lora(part), "tokens": method.tokens}


def _block_side(config: Fields, module: str) -> dict[str, Any]:
    """The block-diagonal factor of a module, for which PEFT looks for parts of the module's name."""
    options = {**BLOCKS, **config["use_bdlora"]}
    sides = {}
    for side, name in SIDES.items():
        parts = options[name] or []
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise SboraxError(f"{name} of use_bdlora: expected a list of names, got {str(parts)[:60]}")
        sides[side] = any(part in module for part in parts)
    if all(sides.values()):
        raise SboraxError(f"use_bdlora: {module} is among {' and among '.join(SIDES.values())}")
    if options["match_strict"] and not any(sides.values()):
        raise SboraxError(f"use_bdlora: {module} is in neither list, and match_strict is set")
    side = "in" if sides["in"] else "out"
    return {"side": side, "blocks": whole_field(options, "nblocks", 1, LARGEST_RANK) if any(sides.values()) else 1}


def _list_block_sides(modules: Mapping[str, Fields]) -> dict[str, Any]:
    """One number of blocks for all modules; those with a single block are plain LoRA, and in neither list."""
    cut = {module: fields for module, fields in modules.items() if fields["blocks"] > 1}
    blocks = _common(cut, "blocks", "use_bdlora") if cut else 1

    def listed(names: Mapping[str, str]) -> dict[str, Any]:
        sides = {
            name: sorted({names[module] for module, fields in cut.items() if fields["side"] == side})
            for side, name in SIDES.items()
        }
        return {"use_bdlora": {**sides, "nblocks": blocks, "match_strict": len(cut) == len(modules)}}

    def means(config: Fields) -> bool:
        try:
            sides = {module: _block_side(config, module) for module in modules}
        except SboraxError:
            return False
        return all(
            read == {"side": cut[module]["side"], "blocks": blocks} if module in cut else read["blocks"] == 1
            for module, read in sides.items()
        )

    short = listed({module: module.rpartition(".")[2] for module in modules})
    return short if means(short) else listed({module: module for module in modules})


def _read_bdlora(fields: Fields) -> Fit:
    rate, sizes = number_field(fields, "lora_dropout"), {name: fields[name] for name in ("side", "blocks")}
    return Fit(BDLoRA(rank=rank_field(fields), dropout=rate, **sizes), {"scale": _lora_scale(fields)})


def _write_bdlora(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, BDLoRA)
    fields = {"r": method.rank, "lora_alpha": alpha_of(node, method.rank), "lora_dropout": dropout_of(node)}
    return {**fields, "side": method.side, "blocks": method.blocks}


def _sampler(config: Fields, module: str) -> dict[str, Any]:
    options = {**SAMPLER, **config["monteclora_config"]}
    return {
        "samples": whole_field(options, "num_samples", 1, LARGEST_RANK),
        "noise": number_field(options, "sample_scaler"),
    }


def _list_sampler(modules: Mapping[str, Fields]) -> dict[str, Any]:
    samples, noise = (_common(modules, name, "monteclora_config") for name in ("samples", "noise"))
    return {"monteclora_config": {**SAMPLER, "num_samples": samples, "sample_scaler": noise}}


def _read_monteclora(fields: Fields) -> Fit:
    rate = number_field(fields, "lora_dropout")
    method = MonteCLoRA(rank=rank_field(fields), samples=fields["samples"], dropout=rate)
    return Fit(method, {"scale": _lora_scale(fields), "noise": fields["noise"]})


def _write_monteclora(node: Adapter) -> dict[str, Any]:
    return {**_write_lora(node), "samples": node.train["g"].shape[-1], "noise": decimal_of(node, "noise")}


def _sub_tokens(config: Fields, module: str) -> dict[str, Any]:
    options = {**SUB_TOKENS, **config["velora_config"]}
    start, groups = options["init_type"], whole_field(options, "num_groups", 1, LARGEST_RANK)
    if start not in DIRECTIONS:
        raise SboraxError(f"init_type of velora_config must be among {', '.join(DIRECTIONS)}, got {str(start)[:40]}")
    return {"groups": groups, "gain": number_field(options, "scale"), "direction": DIRECTIONS[start]}


def _list_sub_tokens(modules: Mapping[str, Fields]) -> dict[str, Any]:
    groups, gain, direction = (_common(modules, name, "velora_config") for name in ("groups", "gain", "direction"))
    start = next(name for name, ours in DIRECTIONS.items() if ours == direction)
    return {"velora_config": {"num_groups": groups, "scale": gain, "init_type": start}}


def _read_velora(fields: Fields) -> Fit:
    rate, sizes = number_field(fields, "lora_dropout"), {name: fields[name] for name in ("groups", "direction")}
    method = VeLoRA(rank=rank_field(fields), dropout=rate, **sizes)
    return Fit(method, {"scale": _lora_scale(fields), "gain": fields["gain"]})


def _write_velora(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, VeLoRA)
    sizes = {"groups": method.groups, "gain": decimal_of(node, "gain"), "direction": method.direction}
    return {**_write_lora(node), **sizes}


def _read_with_alpha(method: type[AbstractMethod]) -> Callable[[Fields], Fit]:
    def read(fields: Fields) -> Fit:
        rank, scale = rank_field(fields), _lora_scale(fields)
        return Fit(
            method(rank=rank, alpha=scale * rank, dropout=number_field(fields, "lora_dropout")),  # type: ignore[call-arg]
            {"scale": scale},
        )

    return read


PLAIN_START = (True, False, "gaussian", "orthogonal")
"""Those of `BASE_UNTOUCHED` that need no data."""


def _known_by(**fields: Any) -> dict[str, tuple[Any, ...]]:
    """`Row.known_by` of a variant by these fields: a LoRA that is no DoRA and no KaSA, on the base as it is."""
    return {"use_dora": (False,), "init_lora_weights": BASE_UNTOUCHED, "kasa_config": (None,), **fields}


LORA = (
    Row(
        LoRA, "LORA", _known_by(), LORA_FIELDS,
        PAIR, _read_lora, _write_lora, LORA_PATTERNS, any_rank=True, reads=LORA_READS | {OF_LORA, FIELD},
        refused=VARIANTS | {
            "init_lora_weights": "a start that changes the base and that PEFT draws at random: save it with "
            "path_initial_model_for_weight_conversion",
            FIELD: "parameters other than those of experts",
            OF_LORA: "of a projection without a bias",
        },
    ),
    Row(
        DoRA, "LORA", {"use_dora": (True,), "init_lora_weights": BASE_UNTOUCHED}, LORA_FIELDS,
        (*PAIR, Tensor("lora_magnitude_vector", "m", (0,))),
        _read_with_alpha(DoRA), _write_lora, LORA_PATTERNS, any_rank=True, reads=LORA_READS, refused=VARIANTS,
    ),
    Row(
        QALoRA, "LORA", _known_by(use_qalora=(True,), init_lora_weights=PLAIN_START),
        LORA_FIELDS | {"qalora_group_size": 16}, PAIR, _read_qalora, _write_qalora, LORA_PATTERNS, any_rank=True,
        by_shape=_groups, reads=frozenset({REPLICATION, TOKENS}),
        refused={"qalora_group_size": "1, which PEFT's files on other bases cannot be told from"},
    ),
    Row(
        Activated, "LORA", _known_by(use_qalora=(False,)) | {INVOCATION: ([], list)},
        LORA_FIELDS, OF_PART, _read_activated, _write_activated, LORA_PATTERNS, any_rank=True, reads=LORA_READS,
        by_module=_invocation, in_config=_common_invocation, refused=VARIANTS,
    ),
    Row(
        BDLoRA, "LORA", _known_by(use_bdlora=(BLOCKS, dict), init_lora_weights=PLAIN_START),
        LORA_FIELDS,
        (
            Tensor("lora_A.weight", "a_i", ((0, 2), 1)), Tensor("lora_A.weight", "a", ((0, 2), 1)),
            Tensor("lora_B.weight", "b_i", ((0, 2), 1)), Tensor("lora_B.weight", "b", (2, (0, 1))),
        ),
        _read_bdlora, _write_bdlora, LORA_PATTERNS,
        by_module=_block_side, in_config=_list_block_sides, reads=LORA_READS,
    ),
    Row(
        MonteCLoRA, "LORA", _known_by(monteclora_config=(SAMPLER, dict)),
        LORA_FIELDS,
        (
            *(Tensor(tensor.suffix, tensor.leaf, TRANSPOSED) for tensor in PAIR),
            Tensor("lora_monteclora_sampler.std_prior", "d", (0,)),
            Tensor("lora_monteclora_sampler.expert_weights_prior", "g", (0,)),
            Tensor(
                "lora_monteclora_sampler.gaussian_var_prior", "d", (0, 1),
                begins=lambda d: np.eye(len(d), dtype=np.float32),
            ),
            Tensor(
                "lora_monteclora_sampler.expert_weights", "g", (0,),
                begins=lambda g: np.full(len(g), 1 / len(g), np.float32),
            ),
        ),
        _read_monteclora, _write_monteclora, LORA_PATTERNS, any_rank=True,
        by_module=_sampler, in_config=_list_sampler, reads=LORA_READS,
    ),
    Row(
        VeLoRA, "LORA", _known_by(velora_config=(SUB_TOKENS, dict)),
        LORA_FIELDS,
        (*(Tensor(tensor.suffix, tensor.leaf, TRANSPOSED) for tensor in PAIR), Tensor("lora_velora_embed", "v", (0,))),
        _read_velora, _write_velora, LORA_PATTERNS, any_rank=True,
        by_module=_sub_tokens, in_config=_list_sub_tokens, reads=LORA_READS,
    ),
    Row(
        MiCA, "LORA", {"use_dora": (False,), "init_lora_weights": ("mica",)}, LORA_FIELDS,
        PAIR, _read_with_alpha(MiCA), _write_lora, LORA_PATTERNS, reads=LORA_READS,
    ),
    # PEFT truncates the base on loading, too.
    Row(
        KaSA, "LORA",
        _known_by(kasa_config=(KASA, dict)),
        LORA_FIELDS, (*PAIR, Tensor("lora_diag", "e", (0,))),
        _read_with_alpha(KaSA), _write_lora, LORA_PATTERNS, reads=LORA_READS,
    ),
    # PEFT starts these two from the base again on loading. They are written as LoRA, which needs no such step.
    Row(
        PiSSA, "LORA", {"use_dora": (False,), "init_lora_weights": ("pissa",)}, LORA_FIELDS,
        PAIR, _read_with_alpha(PiSSA), patterns=LORA_PATTERNS, reads=LORA_READS, refused=VARIANTS,
    ),
    Row(
        OLoRA, "LORA", {"use_dora": (False,), "init_lora_weights": ("olora",)}, LORA_FIELDS,
        PAIR, _read_with_alpha(OLoRA), patterns=LORA_PATTERNS, reads=LORA_READS, refused=VARIANTS,
    ),
)  # fmt: skip
