"""Rows of the other kinds with low-rank factors: ADALORA, HIRA, DELORA, LOHA, LOKR, GRALORA."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sborax.adapters.core import Adapter, SboraxError
from sborax.interop.peft_biases import OF_LORA
from sborax.interop.peft_experts import FIELD
from sborax.interop.peft_layout import TYING
from sborax.interop.peft_lora import VARIANTS
from sborax.interop.peft_replication import REPLICATION
from sborax.interop.peft_row import (
    ANY_START,
    LARGEST_RANK,
    NO_BIAS,
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
from sborax.interop.peft_targets import value_for
from sborax.interop.peft_tokens import TOKENS
from sborax.methods import AdaLoRA, DeLoRA, GraLoRA, HiRA, LoHa, LoKr

LYCORIS_FIELDS = {"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0}
CONVOLUTIONS = {"use_effective_conv2d": "of convolutions, which no model here has"}


def _kept_ranks(config: Fields, module: str) -> dict[str, Any]:
    """The number of ranks, of the first `init_r`, that AdaLoRA's allocator kept in a module."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise SboraxError(f"rank_pattern: expected an object, got {str(pattern)[:60]}")
    first, flags = config.get("init_r", 12), pattern.get(f"{module}.lora_E")
    if flags is None:
        return {"kept": first}
    if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
        raise SboraxError(f"rank_pattern: expected a list of booleans for {module}, got {str(flags)[:60]}")
    if len(flags) != first:
        raise SboraxError(f"rank_pattern: {len(flags)} flags for {module}, but init_r is {first}")
    return {"kept": sum(flags)}


def _list_kept_ranks(modules: Mapping[str, Fields]) -> dict[str, Any]:
    """`init_r` is the largest rank; `rank_pattern` flags the ranks that a module has."""
    first = max(fields["kept"] for fields in modules.values())
    alphas = {
        module: float(str(np.float32(float(fields["scale"]) * (first + 1e-5)))) for module, fields in modules.items()
    }
    (module, common), *remainder = alphas.items()
    for rival, alpha in remainder:
        if alpha != common:
            raise SboraxError(
                f"lora_alpha is {common:g} for {module} and {alpha:g} for {rival}: ADALORA has one for all; "
                "use as_='lora'"
            )
    if common <= 0:
        raise SboraxError(f"lora_alpha is {common:g}, for which PEFT's ADALORA takes the rank; use as_='lora'")
    flags = {
        f"{module}.lora_E": [rank < fields["kept"] for rank in range(first)]
        for module, fields in modules.items()
        if fields["kept"] < first
    }
    return {"init_r": first, "lora_alpha": common, **({"rank_pattern": flags} if flags else {})}


def _read_adalora(fields: Fields) -> Fit:
    first, rank = rank_field(fields, "init_r"), fields["kept"]
    alpha = number_field(fields, "lora_alpha")
    # Without a positive alpha PEFT scales by the rank.
    scale = (alpha if alpha > 0 else rank) / (first + 1e-5)
    return Fit(AdaLoRA(rank=rank, dropout=number_field(fields, "lora_dropout")), {"scale": scale})


def _write_adalora(node: Adapter) -> dict[str, Any]:
    return {"kept": node.train["e"].shape[-1], "scale": node.frozen["scale"], "lora_dropout": dropout_of(node)}


def _hira_rank(config: Fields, module: str) -> dict[str, Any]:
    """HiRA's rank where the tensors follow `rank_pattern`. PEFT ignores it, and then the reader drops it."""
    return {"r": value_for(config, "rank_pattern", module, config.get("r", 32))}


def _lycoris_scale(fields: Fields) -> dict[str, float]:
    return {"scale": number_field(fields, "alpha") / rank_field(fields)}


def _lycoris_rates(fields: Fields) -> dict[str, float]:
    return {name: number_field(fields, name) for name in ("rank_dropout", "module_dropout")}


def _write_lycoris(node: Adapter, rank: int) -> dict[str, Any]:
    rates = {name: decimal_of(node, name) for name in ("rank_dropout", "module_dropout")}
    return {"r": rank, "alpha": alpha_of(node, rank), **rates}


def _read_lokr(fields: Fields) -> Fit:
    factor = fields["decompose_factor"]
    if factor != -1:
        factor = rank_field(fields, "decompose_factor")
    scaled, rates = bool(fields["rank_dropout_scale"]), _lycoris_rates(fields)
    method = LoKr(
        rank=rank_field(fields), factor=factor, both=bool(fields["decompose_both"]), rank_dropout_scale=scaled, **rates
    )
    return Fit(method, _lycoris_scale(fields))


def _write_lokr(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, LoKr)
    sizes = {"decompose_both": method.both, "decompose_factor": method.factor}
    return {**_write_lycoris(node, method.rank), **sizes, "rank_dropout_scale": method.rank_dropout_scale}


def _read_gralora(fields: Fields) -> Fit:
    rank, hybrid = rank_field(fields), whole_field(fields, "hybrid_r", 0, LARGEST_RANK)
    blocks, rate = rank_field(fields, "gralora_k"), number_field(fields, "gralora_dropout")
    method = GraLoRA(rank=rank, blocks=blocks, hybrid=hybrid, dropout=rate)
    return Fit(method, {"scale": number_field(fields, "alpha") / (rank + hybrid)})


def _write_gralora(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, GraLoRA)
    sizes = {"r": method.rank, "hybrid_r": method.hybrid, "gralora_k": method.blocks}
    return {**sizes, "alpha": alpha_of(node, method.rank + method.hybrid), "gralora_dropout": dropout_of(node)}


LOW_RANK = (
    Row(
        AdaLoRA, "ADALORA", {"init_lora_weights": (True, False)},
        {"init_r": 12, "lora_alpha": 8, "lora_dropout": 0.0},
        (Tensor("lora_A", "a", TRANSPOSED), Tensor("lora_B", "b", TRANSPOSED), Tensor("lora_E", "e", (0, None))),
        _read_adalora, _write_adalora, any_rank=True,
        by_module=_kept_ranks, in_config=_list_kept_ranks, reads=frozenset({"rank_pattern", REPLICATION, TOKENS}),
        inert={
            **dict.fromkeys("target_r tinit tfinal deltaT beta1 beta2 total_step".split(), "of the budget in training"),
            "orth_reg_weight": "of the loss in training",
            **dict.fromkeys("r alpha_pattern use_rslora".split(), "of LORA; PEFT's ADALORA ignores it"),
        },
        refused=VARIANTS | dict.fromkeys(["use_dora", OF_LORA, TYING, FIELD], "it is read of LORA alone"),
        constants={"bias": "none", "total_step": 1},
    ),
    Row(
        HiRA, "HIRA", {"init_weights": (True, False, "gaussian")}, {"r": 32, "hira_dropout": 0.0},
        (Tensor("hira_A", "a", TRANSPOSED), Tensor("hira_B", "b", TRANSPOSED)),
        lambda fields: Fit(HiRA(rank=rank_field(fields), dropout=number_field(fields, "hira_dropout")), {}),
        lambda node: {"r": node.train["a"].shape[-1], "hira_dropout": dropout_of(node)},
        any_rank=True, by_module=_hira_rank, reads=frozenset({"rank_pattern"}), constants=NO_BIAS,
    ),
    Row(
        DeLoRA, "DELORA", ANY_START, {"r": 8, "module_dropout": 0.0},
        (
            Tensor("delora_A", "a", TRANSPOSED), Tensor("delora_B", "b", TRANSPOSED),
            Tensor("delora_lambda", "strength", (None,)), Tensor("delora_w_norm", "norms", (0,)),
        ),
        lambda fields: Fit(DeLoRA(rank=rank_field(fields), dropout=number_field(fields, "module_dropout")), {}),
        lambda node: {"r": node.method.rank, "module_dropout": dropout_of(node)},
        {"r": "rank_pattern"}, any_rank=True,
        inert=dict.fromkeys(["delora_lambda", "lambda_pattern"], "of the start of a tensor that is in the file"),
    ),
    Row(
        LoHa, "LOHA", ANY_START, LYCORIS_FIELDS,
        (
            Tensor("hada_w1_b", "a1", TRANSPOSED), Tensor("hada_w1_a", "b1", TRANSPOSED),
            Tensor("hada_w2_b", "a2", TRANSPOSED), Tensor("hada_w2_a", "b2", TRANSPOSED),
        ),
        lambda fields: Fit(LoHa(rank=rank_field(fields), **_lycoris_rates(fields)), _lycoris_scale(fields)),
        lambda node: _write_lycoris(node, node.train["a1"].shape[-1]),
        {"r": "rank_pattern", "alpha": "alpha_pattern"}, any_rank=True, inert=CONVOLUTIONS, constants=NO_BIAS,
    ),
    Row(
        LoKr, "LOKR", {"init_weights": (True, False, "lycoris")},
        {**LYCORIS_FIELDS, "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False},
        (
            Tensor("lokr_w1", "c", TRANSPOSED), Tensor("lokr_w2", "w", TRANSPOSED),
            Tensor("lokr_w1_b", "c_a", TRANSPOSED), Tensor("lokr_w1_a", "c_b", TRANSPOSED),
            Tensor("lokr_w2_b", "a", TRANSPOSED), Tensor("lokr_w2_a", "b", TRANSPOSED),
        ),
        _read_lokr, _write_lokr, {"r": "rank_pattern", "alpha": "alpha_pattern"}, any_rank=True,
        inert=CONVOLUTIONS, constants=NO_BIAS,
    ),
    Row(
        GraLoRA, "GRALORA", ANY_START,
        {"r": 32, "hybrid_r": 0, "alpha": 64, "gralora_k": 2, "gralora_dropout": 0.0},
        (
            Tensor("gralora_A", "a_i", (0, 1, 2)), Tensor("gralora_B", "b_j", (0, 1, 2)),
            Tensor("gralora_A_general.weight", "u", TRANSPOSED), Tensor("gralora_B_general.weight", "v", TRANSPOSED),
        ),
        _read_gralora, _write_gralora,
    ),
)  # fmt: skip
