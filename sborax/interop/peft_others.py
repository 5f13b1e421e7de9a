"""The rows of the methods that are no LoRA and no Bone."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sborax.adapters.core import Adapter, SboraxError
from sborax.interop.peft_row import Fields, Fit, Row, Tensor, dropout_of, number_field, rank_field
from sborax.interop.peft_targets import matched, value_for
from sborax.methods import C3A, HRA, IA3, OFT, AdaLoRA, DeLoRA, HiRA, LoHa, LoKr, RandLoRA, SHiRA, VeRA

NO_BIAS: dict[str, Any] = {}
"""PEFT's config of this kind has no field `bias`."""
START = {"init_weights": (True, False)}
TURNED = (1, 0)
LYCORIS = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d"})
"""Dropout that our methods lack, which acts in training alone, and what concerns convolutions alone."""
SERIES_SINCE = "0.18.0"
"""The version of PEFT that changed the series of OFT's rotations."""


def _alpha(node: Adapter, rank: int) -> int | float:
    # A float32 times a whole number is exact in float64, so dividing it again gives the scale back.
    alpha = float(node.frozen["scale"]) * rank
    return int(alpha) if alpha.is_integer() else alpha


def _scale(fields: Fields) -> dict[str, float]:
    return {"scale": number_field(fields, "alpha") / rank_field(fields)}


def _read_lokr(fields: Fields) -> Fit:
    factor = fields["decompose_factor"]
    if factor != -1:
        factor = rank_field(fields, "decompose_factor")
    return Fit(LoKr(rank=rank_field(fields), factor=factor, both=bool(fields["decompose_both"])), _scale(fields))


def _write_lokr(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, LoKr)
    own = {"r": method.rank, "alpha": _alpha(node, method.rank)}
    return {**own, "decompose_both": method.both, "decompose_factor": method.factor}


def _read_oft(fields: Fields) -> Fit:
    if fields["r"] or not fields["oft_block_size"]:
        raise SboraxError(f"r={fields['r']}: OFT by the number of blocks is not supported; give oft_block_size")
    terms = None
    if fields["use_cayley_neumann"]:
        version = re.match(r"(\d+)\.(\d+)", str(fields["peft_version"]))
        if version is None or (int(version[1]), int(version[2])) < (0, 18):
            raise SboraxError(
                f"OFT's series was another one before PEFT {SERIES_SINCE}; save the adapter with a newer PEFT"
            )
        terms = rank_field(fields, "num_cayley_neumann_terms")
        if terms < 3:
            raise SboraxError(f"num_cayley_neumann_terms={terms}: shorter series than 3 are not supported")
        # PEFT's loop makes the same series of 3 as of 4.
        terms = max(terms, 4)
    return Fit(OFT(block=rank_field(fields, "oft_block_size"), terms=terms, share=bool(fields["block_share"])), {})


def _write_oft(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, OFT)
    series = method.terms is not None
    own = {"oft_block_size": method.block, "block_share": method.share, "use_cayley_neumann": series}
    own["peft_version"] = SERIES_SINCE
    return {**own, "num_cayley_neumann_terms": method.terms} if series else own


def _feedforward(config: Fields, module: str) -> dict[str, Any]:
    return {"feedforward": matched(config, "feedforward_modules", module)}


def _list_feedforward(modules: Mapping[str, Fields]) -> dict[str, Any]:
    chosen = [module for module, fields in modules.items() if fields["feedforward"]]
    kinds = {module.rpartition(".")[2] for module in chosen}
    whole = all(fields["feedforward"] for module, fields in modules.items() if module.rpartition(".")[2] in kinds)
    # As one expression: PEFT wants the names of a list among those of the targets, letter by letter.
    named = rf".*\.({'|'.join(sorted(kinds))})" if whole else "|".join(re.escape(module) for module in chosen)
    return {"feedforward_modules": named if chosen else []}


def _kept(config: Fields, module: str) -> dict[str, Any]:
    """How many of the first `init_r` ranks the allocator left to a module."""
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


def _read_adalora(fields: Fields) -> Fit:
    first, kept = rank_field(fields, "init_r"), fields["kept"]
    alpha = number_field(fields, "lora_alpha")
    # Without a positive alpha PEFT scales by the rank itself.
    scale = (alpha if alpha > 0 else kept) / (first + 1e-5)
    return Fit(AdaLoRA(rank=kept, dropout=number_field(fields, "lora_dropout")), {"scale": scale})


def _write_adalora(node: Adapter) -> dict[str, Any]:
    return {"kept": node.train["e"].shape[-1], "scale": node.frozen["scale"], "lora_dropout": dropout_of(node)}


def _list_kept(modules: Mapping[str, Fields]) -> dict[str, Any]:
    """The largest rank as the one that all began with, and which ranks of it a module has kept."""
    first = max(fields["kept"] for fields in modules.values())
    alphas = {
        module: float(str(np.float32(float(fields["scale"]) * (first + 1e-5)))) for module, fields in modules.items()
    }
    (one, common), *others = alphas.items()
    for other, alpha in others:
        if alpha != common:
            raise SboraxError(
                f"lora_alpha is {common:g} for {one} and {alpha:g} for {other}: ADALORA has one for all; use as_='lora'"
            )
    if common <= 0:
        raise SboraxError(f"lora_alpha is {common:g}, for which PEFT's ADALORA takes the rank; use as_='lora'")
    flags = {
        f"{module}.lora_E": [rank < fields["kept"] for rank in range(first)]
        for module, fields in modules.items()
        if fields["kept"] < first
    }
    return {"init_r": first, "lora_alpha": common, **({"rank_pattern": flags} if flags else {})}


def _followed(config: Fields, module: str) -> dict[str, Any]:
    """HiRA's rank where the tensors follow a `rank_pattern`, which PEFT does not; the reader drops it otherwise."""
    return {"r": value_for(config, "rank_pattern", module, config.get("r", 32))}


def _read_randlora(fields: Fields) -> Fit:
    _check_projected(fields)
    rank = rank_field(fields)
    method = RandLoRA(rank=rank, dropout=number_field(fields, "randlora_dropout"))
    return Fit(method, {"scale": number_field(fields, "randlora_alpha") / rank})


def _write_randlora(node: Adapter) -> dict[str, Any]:
    rank = node.train["l"].shape[-2]
    return {"r": rank, "randlora_alpha": _alpha(node, rank), "randlora_dropout": dropout_of(node)}


def _read_vera(fields: Fields) -> Fit:
    _check_projected(fields)
    return Fit(VeRA(rank=rank_field(fields), dropout=number_field(fields, "vera_dropout")), {"scale": 1.0})


def _ranked(method: Callable[..., Any], dropout: str) -> Callable[[Fields], Fit]:
    return lambda fields: Fit(method(rank=rank_field(fields), dropout=number_field(fields, dropout)), {})


def _rank_and(dropout: str) -> Callable[[Adapter], dict[str, Any]]:
    return lambda node: {"r": node.method.rank, dropout: dropout_of(node)}


SEEDED = frozenset({"projection_prng_key"})


def _check_projected(fields: Fields) -> None:
    """PEFT can draw projections again from a seed, which is torch's own affair; a file must hold them."""
    if not fields["save_projection"]:
        raise SboraxError("save_projection=False: the file must hold the projections; save it again with True")


OTHERS = (
    Row(
        AdaLoRA, "ADALORA", {"init_lora_weights": (True, False)},
        {"init_r": 12, "lora_alpha": 8, "lora_dropout": 0.0},
        (Tensor("lora_A", "a", TURNED), Tensor("lora_B", "b", TURNED), Tensor("lora_E", "e", (0, None))),
        _read_adalora, _write_adalora, any_rank=True,
        by_module=_kept, in_config=_list_kept, reads=frozenset({"rank_pattern"}),
        inert=frozenset(
            "r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step alpha_pattern use_rslora".split()
        ),
        constants={"bias": "none", "total_step": 1},
    ),
    Row(
        IA3, "IA3", {"init_ia3_weights": (True, False)}, {},
        (Tensor("ia3_l", "m_out", (0, None)), Tensor("ia3_l", "m_in", (None, 0))),
        lambda fields: Fit(IA3(side="in" if fields["feedforward"] else "out"), {}),
        lambda node: {"feedforward": "m_in" in node.train},
        by_module=_feedforward, in_config=_list_feedforward, reads=frozenset({"feedforward_modules"}),
        constants=NO_BIAS, layered=False,
    ),
    Row(
        LoHa, "LOHA", START, {"r": 8, "alpha": 8},
        (
            Tensor("hada_w1_b", "a1", TURNED), Tensor("hada_w1_a", "b1", TURNED),
            Tensor("hada_w2_b", "a2", TURNED), Tensor("hada_w2_a", "b2", TURNED),
        ),
        lambda fields: Fit(LoHa(rank=rank_field(fields)), _scale(fields)),
        lambda node: {"r": node.train["a1"].shape[-1], "alpha": _alpha(node, node.train["a1"].shape[-1])},
        {"r": "rank_pattern", "alpha": "alpha_pattern"}, any_rank=True, inert=LYCORIS, constants=NO_BIAS,
    ),
    Row(
        LoKr, "LOKR", {"init_weights": (True, False, "lycoris")},
        {"r": 8, "alpha": 8, "decompose_both": False, "decompose_factor": -1},
        (
            Tensor("lokr_w1", "c", TURNED), Tensor("lokr_w1_b", "c_a", TURNED), Tensor("lokr_w1_a", "c_b", TURNED),
            Tensor("lokr_w2", "w", TURNED), Tensor("lokr_w2_b", "a", TURNED), Tensor("lokr_w2_a", "b", TURNED),
        ),
        _read_lokr, _write_lokr, {"r": "rank_pattern", "alpha": "alpha_pattern"}, any_rank=True,
        inert=LYCORIS | {"rank_dropout_scale"}, constants=NO_BIAS,
    ),
    Row(
        HiRA, "HIRA", {"init_weights": (True, False, "gaussian")}, {"r": 32, "hira_dropout": 0.0},
        (Tensor("hira_A", "a", TURNED), Tensor("hira_B", "b", TURNED)),
        _ranked(HiRA, "hira_dropout"),
        lambda node: {"r": node.train["a"].shape[-1], "hira_dropout": dropout_of(node)},
        by_module=_followed, reads=frozenset({"rank_pattern"}), constants=NO_BIAS,
    ),
    Row(
        DeLoRA, "DELORA", START, {"r": 8, "module_dropout": 0.0},
        (
            Tensor("delora_A", "a", TURNED), Tensor("delora_B", "b", TURNED),
            Tensor("delora_lambda", "strength", (None,)), Tensor("delora_w_norm", "norms", (0,)),
        ),
        _ranked(DeLoRA, "module_dropout"), _rank_and("module_dropout"),
        {"r": "rank_pattern"}, inert=frozenset({"delora_lambda", "lambda_pattern"}),
    ),
    Row(
        OFT, "OFT", START,
        {
            "oft_block_size": 32, "r": 0, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5,
            "block_share": False, "peft_version": None,
        },
        (Tensor("oft_R.weight", "q", (0, 1)),), _read_oft, _write_oft, inert=frozenset({"eps", "module_dropout"}),
    ),
    Row(
        HRA, "HRA", START, {"r": 8}, (Tensor("hra_u", "u", (0, 1)),),
        lambda fields: Fit(HRA(rank=rank_field(fields)), {}), lambda node: {"r": node.method.rank},
        any_rank=True,
    ),
    Row(
        SHiRA, "SHIRA", START, {"r": 32},
        (Tensor("shira_weight", "values", (0,)), Tensor("shira_indices", "idx", (0, 1), places=True)),
        lambda fields: Fit(SHiRA(rank=rank_field(fields)), {}), lambda node: {"r": node.method.rank},
        inert=frozenset({"mask_type", "random_seed"}), constants=NO_BIAS, layered=False,
    ),
    Row(
        VeRA, "VERA", START, {"r": 256, "vera_dropout": 0.0, "save_projection": True},
        (
            Tensor("vera_lambda_d", "d", (0,), times="scale"), Tensor("vera_lambda_b", "m", (0,)),
            Tensor("vera_A", "a", TURNED, shared=True), Tensor("vera_B", "b", TURNED, shared=True),
        ),
        _read_vera, _rank_and("vera_dropout"), any_rank=True, inert=SEEDED | {"d_initial"},
    ),
    Row(
        RandLoRA, "RANDLORA", START,
        {"r": 32, "randlora_alpha": 640, "randlora_dropout": 0.0, "save_projection": True},
        (
            Tensor("randlora_lambda", "l", (0, 1)),
            Tensor("randlora_gamma", "g_in", (0, 1)), Tensor("randlora_gamma", "g_out", (0, 1)),
            Tensor("randlora_A", "q_in", (0, None, 1), shared=True, repeated=True),
            Tensor("randlora_A", "q_out", (0, None, 1), shared=True, repeated=True),
            Tensor("randlora_B", "p_in", (2, 0, 1), shared=True, repeated=True),
            Tensor("randlora_B", "p_out", (2, 0, 1), shared=True, repeated=True),
        ),
        _read_randlora, _write_randlora, any_rank=True, inert=SEEDED | {"sparse", "very_sparse"},
    ),
    Row(
        C3A, "C3A", {"init_weights": (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")},
        {"block_size": 256}, (Tensor("c3a_kernel", "w", (1, 0, 2)),),
        lambda fields: Fit(C3A(block=rank_field(fields, "block_size")), {}),
        lambda node: {"block_size": node.train["w"].shape[-1]}, {"block_size": "block_size_pattern"},
        pattern_form=r".*\.{}$",
    ),
)  # fmt: skip
