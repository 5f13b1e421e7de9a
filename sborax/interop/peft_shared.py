"""Rows of the kinds whose modules share tensors: VBLORA, UNILORA, LILY, FROD."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sborax.adapters.core import Adapter, SboraxError
from sborax.interop.peft_row import (
    ANY_START,
    NO_BIAS,
    PREFIX,
    TRANSPOSED,
    Completed,
    Fields,
    Fit,
    Row,
    Tensor,
    decimal_of,
    dropout_of,
    kind_of,
    number_field,
    rank_field,
    whole_field,
)
from sborax.methods import FRoD, Lily, UniLoRA, VBLoRA

START = "of the start of a trained tensor, which is in the file"

LONGEST = 1 << 26
"""The most entries of a shared vector in a file, many times those of PEFT's examples."""
UNCHOSEN = -1e4
"""The logit of vectors that a file of chosen ones lacks. PEFT has minus infinity, which no optimiser survives."""
LOGITS = ("vblora_logits_A", "vblora_logits_B")
INDICES, SHARES = "_topk_indices", "_topk_weights"


def _read_vb(fields: Fields) -> Fit:
    method = VBLoRA(
        rank=rank_field(fields),
        vectors=rank_field(fields, "num_vectors"),
        length=rank_field(fields, "vector_length"),
        top_k=rank_field(fields, "topk"),
        dropout=number_field(fields, "vblora_dropout"),
    )
    return Fit(method, {})


def _write_vb(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, VBLoRA)
    sizes = {"r": method.rank, "num_vectors": method.vectors, "vector_length": method.length, "topk": method.top_k}
    return sizes | {"vblora_dropout": dropout_of(node)}


def _logits_of_chosen(
    fields: Fields, shapes: Mapping[str, tuple[int, int]], read: Callable[[str], np.ndarray]
) -> Completed:
    """Logits of a file that has the indices of the chosen vectors and all of their shares but the last."""
    if not fields["save_only_topk_weights"]:
        return Completed({}, frozenset())
    tensors, spent = {}, set()
    for module in shapes:
        for name in LOGITS:
            key = f"{PREFIX}{module}.{name}"
            spent |= {key + INDICES, key + SHARES}
            tensors[key] = _logits(key, read(key + INDICES), read(key + SHARES), fields["num_vectors"], fields["topk"])
    return Completed(tensors, frozenset(spent))


def _logits(key: str, places: np.ndarray, shares: np.ndarray, vectors: int, top_k: int) -> np.ndarray:
    if places.ndim != 3 or places.shape[-1] != top_k or shares.shape != (*places.shape[:-1], top_k - 1):
        raise SboraxError(f"{key}: indices {places.shape} and shares {shares.shape} are not those of topk={top_k}")
    if places.dtype.kind not in "iu" or places.min() < 0 or places.max() >= vectors:
        raise SboraxError(f"{key}{INDICES}: an index lies outside the {vectors} vectors")
    shares = np.concatenate([shares, 1.0 - shares.sum(axis=-1, keepdims=True)], axis=-1)
    logits = np.full((*places.shape[:-1], vectors), UNCHOSEN, np.float32)
    # A share that rounding made zero or less still is the smallest of those chosen.
    np.put_along_axis(logits, places.astype(np.int64), np.log(np.maximum(shares, 1e-30)), axis=-1)
    return logits


def _read_uni(fields: Fields) -> Fit:
    size = whole_field(fields, "theta_d_length", 1, LONGEST)
    return Fit(UniLoRA(rank=rank_field(fields), coefficients=size, dropout=number_field(fields, "unilora_dropout")), {})


def _write_uni(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, UniLoRA)
    sizes = {"r": method.rank, "theta_d_length": method.coefficients}
    return sizes | {"unilora_dropout": dropout_of(node), "save_indices": True}


def _dealt_indices(
    fields: Fields, shapes: Mapping[str, tuple[int, int]], read: Callable[[str], np.ndarray]
) -> Completed:
    """Indices and scales of a file without them, as PEFT deals them out over all modules by its seed."""
    if fields["save_indices"]:
        return Completed({}, frozenset())
    rank, length = fields["r"], fields["theta_d_length"]
    sizes = {
        f"{module}.unilora_{{}}_{side}": shape
        for module, (fan_in, fan_out) in shapes.items()
        for side, shape in {"A": (rank, fan_in), "B": (fan_out, rank)}.items()
    }
    count = sum(rows * columns for rows, columns in sizes.values())
    # Every step is PEFT's (peft/tuners/unilora/model.py, generate_index), so that NumPy draws the same.
    rng = np.random.default_rng(whole_field(fields, "proj_seed", 0, (1 << 63) - 1))
    indices = np.repeat(np.arange(length), count // length)
    if count % length > 0:
        indices = np.concatenate([indices, rng.choice(length, size=count % length, replace=False)])
    rng.shuffle(indices)
    counts = np.bincount(indices, minlength=length)
    scales = np.where(counts > 0, 1.0 / np.sqrt(np.maximum(counts, 1)), 0.0).astype(np.float32)
    tensors, start = {}, 0
    for name, (rows, columns) in sizes.items():
        part = indices[start : start + rows * columns].reshape(rows, columns)
        start += rows * columns
        tensors[PREFIX + name.format("indices")] = part
        tensors[PREFIX + name.format("scales")] = scales[part]
    return Completed(tensors, frozenset())


def _read_lily(fields: Fields) -> Fit:
    """The weights that PEFT's router gives to a batch as a whole."""
    method = Lily(
        rank=rank_field(fields),
        stride=rank_field(fields, "stride_A"),
        experts=rank_field(fields, "num_B"),
        routing="batch",
    )
    return Fit(method, {"scale": number_field(fields, "scaling")})


def _write_lily(node: Adapter) -> dict[str, Any] | None:
    method = node.method
    assert isinstance(method, Lily)
    if method.routing != "batch":
        return None
    sizes = {"r": method.rank, "stride_A": method.stride, "num_B": method.experts}
    return sizes | {"scaling": decimal_of(node, "scale")}


def _tied_in_lily(config: Fields, shapes: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Modules of the same target and shape have one B, and blocks of `stride_A` of them one A."""
    targets = config["target_modules"]
    kinds: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for module, shape in shapes.items():
        target = targets if isinstance(targets, str) else [name for name in targets if module.endswith(name)][-1]
        kinds.setdefault((target, shape), []).append(PREFIX + module)
    stride = config["stride_A"]
    groups = [[f"{module}.lily_B.weight" for module in modules] for modules in kinds.values()]
    for modules in kinds.values():
        blocks = (modules[start : start + stride] for start in range(0, len(modules), stride))
        groups += [[f"{module}.lily_A.weight" for module in block] for block in blocks]
    return groups


def _read_frod(fields: Fields) -> Fit:
    method = FRoD(
        density=number_field(fields, "sparse_rate"),
        ridge=number_field(fields, "regularization_alpha"),
        dropout=number_field(fields, "frod_dropout"),
        basis="peft",
    )
    if not 0.0 < method.density <= 1.0:
        raise SboraxError(f"sparse_rate must lie in (0, 1], got {method.density}")
    return Fit(method, {})


def _write_frod(node: Adapter) -> dict[str, Any] | None:
    method = node.method
    assert isinstance(method, FRoD)
    if method.basis != "peft":
        raise SboraxError(
            "FROD's files hold a basis that PEFT makes again on loading, and only its own fits; start from a file of "
            "PEFT's, or use as_='lora' to truncate"
        )
    sizes = {"sparse_rate": method.density, "regularization_alpha": method.ridge}
    return sizes | {"frod_dropout": dropout_of(node)}


def _checked_frod(
    fields: Fields, shapes: Mapping[str, tuple[int, int]], read: Callable[[str], np.ndarray]
) -> Completed:
    """Nothing is completed. Raises SboraxError without a basis, and for kinds whose U in PEFT is rounding errors."""
    if not fields["save_projection"]:
        raise SboraxError(
            "save_projection=False: the basis is not in the file, and another machine makes another; save it in PEFT "
            "with save_projection=True"
        )
    outputs: dict[str, int] = {}
    for module, (_, fan_out) in shapes.items():
        outputs[kind_of(module)] = outputs.get(kind_of(module), 0) + fan_out
    for module, (fan_in, _) in shapes.items():
        if outputs[kind_of(module)] < fan_in:
            raise SboraxError(
                f"{module}: all layers of {kind_of(module)} have {outputs[kind_of(module)]} outputs together, fewer "
                f"than their {fan_in} inputs; PEFT's U then has rows of rounding errors, which are in no file"
            )
    return Completed({}, frozenset())


def _inverse(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        return {"v_inv": np.linalg.inv(leaves["v"].astype(np.float64)).astype(np.float32)}
    except np.linalg.LinAlgError:
        raise SboraxError("frod_V is singular") from None


SHARED = (
    Row(
        VBLoRA, "VBLORA", {},
        {
            "r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "vblora_dropout": 0.0,
            "save_only_topk_weights": False,
        },
        (
            Tensor(LOGITS[0], "logits_a", (0, 1, 2)), Tensor(LOGITS[1], "logits_b", (1, 0, 2)),
            Tensor("vblora_vector_bank", "bank", (0, 1), shared=True),
        ),
        _read_vb, _write_vb, inert=dict.fromkeys(["init_vector_bank_bound", "init_logits_std"], START),
        completed=_logits_of_chosen,
    ),
    Row(
        UniLoRA, "UNILORA", {},
        {"r": 4, "theta_d_length": 256, "unilora_dropout": 0.0, "save_indices": False, "proj_seed": 42},
        (
            Tensor("unilora_theta_d", "theta", (0,), shared=True),
            Tensor("unilora_indices_A", "idx_a", TRANSPOSED, into="gain"),
            Tensor("unilora_indices_B", "idx_b", TRANSPOSED, into="gain"),
            Tensor("unilora_scales_A", "gain", TRANSPOSED, at="idx_a"),
            Tensor("unilora_scales_B", "gain", TRANSPOSED, at="idx_b"),
        ),
        _read_uni, _write_uni, any_rank=True, inert=dict.fromkeys(["init_theta_d_bound", "init_weights"], START),
        completed=_dealt_indices,
    ),
    Row(
        Lily, "LILY", ANY_START, {"r": 32, "stride_A": 1, "num_B": 2, "scaling": 1.0},
        (
            Tensor("lily_A.weight", "a", TRANSPOSED), Tensor("lily_B.weight", "b", (0, 1)),
            Tensor("lily_router.weight", "router", TRANSPOSED),
        ),
        _read_lily, _write_lily, any_rank=True, constants=NO_BIAS, tied=_tied_in_lily,
    ),
    Row(
        FRoD, "FROD", ANY_START,
        {"sparse_rate": 0.01, "regularization_alpha": 1e-3, "frod_dropout": 0.0, "save_projection": True},
        (
            Tensor("frod_lambda_l", "l", (0,), over="l0"), Tensor("frod_lambda_s_values", "s", (0,)),
            Tensor("frod_V", "v", (0, 1), of_kind=True),
            Tensor("frod_s_indices", "idx", (0, 1), of_kind=True, places=True),
            Tensor("frod_s_size", "v", (0,), of_kind=True, places=True, begins=lambda v: np.asarray(v.shape)),
        ),
        _read_frod, _write_frod, any_rank=True, derived=_inverse, completed=_checked_frod,
        refused={"save_projection": "False: the file must hold the basis", "sparse_rate": "0: there is no S"},
        inert={
            "projection_prng_key": "of the places of S, which are in the file",
            "progressbar": "of what PEFT prints",
            "runtime_offload_base_weight": "where PEFT holds the base",
        },
    ),
)  # fmt: skip
