"""Rows of the kinds with frozen random projections: VERA, PVERA and RANDLORA, whose modules share them, TINYLORA."""

from typing import Any

from sborax.adapters.core import Adapter, SboraxError
from sborax.interop.peft_row import (
    ANY_START,
    TRANSPOSED,
    Fields,
    Fit,
    Row,
    Tensor,
    alpha_of,
    dropout_of,
    number_field,
    rank_field,
)
from sborax.methods import PVeRA, RandLoRA, TinyLoRA, VeRA

SEEDED = {"projection_prng_key": "of the projections, which are in the file"}
START = "of the start of a trained tensor, which is in the file"
PROJECTION = {"save_projection": "False: the file must hold the projections"}


def _check_projected(fields: Fields) -> None:
    """Raise SboraxError unless the file holds the projections: only torch can draw them again from PEFT's seed."""
    if not fields["save_projection"]:
        raise SboraxError("save_projection=False: the file must hold the projections; save it again with True")


def _read_vera(fields: Fields) -> Fit:
    _check_projected(fields)
    return Fit(VeRA(rank=rank_field(fields), dropout=number_field(fields, "vera_dropout")), {"scale": 1.0})


def _read_pvera(fields: Fields) -> Fit:
    _check_projected(fields)
    return Fit(PVeRA(rank=rank_field(fields), dropout=number_field(fields, "pvera_dropout")), {"scale": 1.0})


def _read_randlora(fields: Fields) -> Fit:
    _check_projected(fields)
    rank = rank_field(fields)
    method = RandLoRA(rank=rank, dropout=number_field(fields, "randlora_dropout"))
    return Fit(method, {"scale": number_field(fields, "randlora_alpha") / rank})


def _write_randlora(node: Adapter) -> dict[str, Any]:
    rank = node.train["l"].shape[-2]
    return {"r": rank, "randlora_alpha": alpha_of(node, rank), "randlora_dropout": dropout_of(node)}


def _read_tinylora(fields: Fields) -> Fit:
    _check_projected(fields)
    size, rate = rank_field(fields, "u"), number_field(fields, "tinylora_dropout")
    return Fit(TinyLoRA(rank=rank_field(fields), coefficients=size, dropout=rate), {})


def _cut_rank(fields: Fields, shape: tuple[int, int]) -> dict[str, Any]:
    """The rank of TinyLoRA, which PEFT cuts to the number of a weight's singular values."""
    return {"r": min(rank_field(fields), *shape)}


def _write_tinylora(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, TinyLoRA)
    return {"r": method.rank, "u": method.coefficients, "tinylora_dropout": dropout_of(node)}


PROJECTED = (
    Row(
        VeRA, "VERA", ANY_START, {"r": 256, "vera_dropout": 0.0, "save_projection": True},
        (
            Tensor("vera_lambda_d", "d", (0,), times="scale"), Tensor("vera_lambda_b", "m", (0,)),
            Tensor("vera_A", "a", TRANSPOSED, shared=True), Tensor("vera_B", "b", TRANSPOSED, shared=True),
        ),
        _read_vera, lambda node: {"r": node.method.rank, "vera_dropout": dropout_of(node)},
        any_rank=True, inert=SEEDED | {"d_initial": START}, refused=PROJECTION,
    ),
    Row(
        PVeRA, "PVERA", ANY_START, {"r": 256, "pvera_dropout": 0.0, "save_projection": True},
        (
            Tensor("pvera_lambda_d", "d", (0,), times="scale"), Tensor("pvera_lambda_b", "m", (0,)),
            Tensor("pvera_A", "a", TRANSPOSED, shared=True), Tensor("pvera_B", "b", TRANSPOSED, shared=True),
        ),
        _read_pvera, lambda node: {"r": node.method.rank, "pvera_dropout": dropout_of(node)},
        any_rank=True, inert=SEEDED | {"d_initial": START, "generator_seed": "of draws in training"},
        refused=PROJECTION | {"sample_at_inference": "outputs would be drawn"},
    ),
    Row(
        RandLoRA, "RANDLORA", ANY_START,
        {"r": 32, "randlora_alpha": 640, "randlora_dropout": 0.0, "save_projection": True},
        (
            Tensor("randlora_lambda", "l", (0, 1)),
            Tensor("randlora_gamma", "g_in", (0, 1)), Tensor("randlora_gamma", "g_out", (0, 1)),
            Tensor("randlora_A", "q_in", (0, None, 1), shared=True, repeated=True),
            Tensor("randlora_A", "q_out", (0, None, 1), shared=True, repeated=True),
            Tensor("randlora_B", "p_in", (2, 0, 1), shared=True, repeated=True),
            Tensor("randlora_B", "p_out", (2, 0, 1), shared=True, repeated=True),
        ),
        _read_randlora, _write_randlora, any_rank=True, refused=PROJECTION,
        inert=SEEDED | dict.fromkeys(["sparse", "very_sparse"], "how projections are drawn, which are in the file"),
    ),
    Row(
        TinyLoRA, "TINYLORA", {"init_weights": (True, False, "uniform")},
        {"r": 2, "u": 64, "tinylora_dropout": 0.0, "save_projection": True},
        (
            Tensor("tinylora_v", "v", (0,), numbered=True), Tensor("tinylora_P", "p", (0, 2, 1)),
            Tensor("tinylora_A", "a", TRANSPOSED), Tensor("tinylora_B", "b", TRANSPOSED),
        ),
        _read_tinylora, _write_tinylora, by_shape=_cut_rank,
        inert={"projection_seed": SEEDED["projection_prng_key"], "init_v_bound": START},
        refused=PROJECTION | {"weight_tying": "modules would share trained vectors"},
    ),
)  # fmt: skip
