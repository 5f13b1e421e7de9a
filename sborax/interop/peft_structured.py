"""Rows of the kinds with structured matrices: MISS (Bone, Bat), C3A, OFT, BOFT, HRA, SHIRA, IA3, ROAD, and others."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from sborax.adapters.core import Adapter, SboraxError, width
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
from sborax.interop.peft_targets import matched
from sborax.methods import BOFT, C3A, DEFT, HRA, IA3, OFT, OSF, Bat, Bone, GLoRA, PEANuT, RoAd, SHiRA, SuperTuning
from sborax.methods.glora_forms import CHOICES

STRUCTURED_OPTIONS = {
    "variant": "road_1", "act_fn": "relu", "decomposition_method": "relu", "init_ia3_weights": True
}  # fmt: skip
"""PEFT's defaults of the fields that tell rows apart."""
MISS_FIELDS = {"r": 64, "mini_r": 1, "miss_dropout": 0.0}
BLOCK = (Tensor("miss_block", "d", (0, 1)),)
MOST_LAYERS = 16
"""Encoders of PEANuT in a file, and as many decoders."""
GLORA_FORMS = {"weight": "A_B", "coupling": "C", "bias": "D_E"}
"""The end of PEFT's field for each of GLoRA's forms."""
OFT_FIELDS = {
    "oft_block_size": 32,
    "r": 0,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "block_share": False,
    "coft": False,
    "eps": 6e-5,
    "peft_version": None,
}
SERIES_SINCE = "0.18.0"
"""The version of PEFT that changed the series of OFT's rotations."""


def _bone(mini: bool) -> tuple[Callable[[Fields], Fit], Callable[[Adapter], dict[str, Any] | None]]:
    """How Bone is read and written, with `mini_r` or without."""

    def read(fields: Fields) -> Fit:
        mini_rank = rank_field(fields, "mini_r") if mini else None
        return Fit(Bone(rank=rank_field(fields), mini_rank=mini_rank, dropout=number_field(fields, "miss_dropout")), {})

    def write(node: Adapter) -> dict[str, Any] | None:
        method = node.method
        assert isinstance(method, Bone)
        if method.grouping != "strided" or (method.mini_rank is not None) != mini:
            return None
        sizes = {"r": method.rank, **({"mini_r": method.mini_rank} if mini else {})}
        return {**sizes, "miss_dropout": dropout_of(node)}

    return read, write


def nearest_divisor(size: int, target: int) -> int:
    """The divisor of `size` nearest to `target`, or the smaller of two, as PEFT's OFT adjusts its sizes."""
    return min(_divisors(size), key=lambda number: (abs(number - target), number))


@functools.cache
def _divisors(size: int) -> tuple[int, ...]:
    return tuple(number for number in range(1, size + 1) if size % number == 0)


def _block_of_oft(fields: Fields, shape: tuple[int, int]) -> dict[str, Any]:
    """OFT's block of a weight: PEFT's config has its size or the number of blocks, whichever is not 0.

    What does not divide the weight's rows is adjusted to the nearest number that does, with a warning in PEFT.
    """
    blocks, size = (whole_field(fields, name, 0, LARGEST_RANK) for name in ("r", "oft_block_size"))
    if (blocks == 0) == (size == 0):
        raise SboraxError(f"r={blocks} and oft_block_size={size}: exactly one of them must be 0")
    return {"block": nearest_divisor(shape[0], size) if size else shape[0] // nearest_divisor(shape[0], blocks)}


def _size_of_oft(modules: Mapping[str, Fields]) -> dict[str, Any]:
    """The config's size of a block, or else number of blocks, from which PEFT gets every module's block."""
    pairs = {(fields["shape"][0], fields["block"]) for fields in modules.values()}
    widest = max(fan_in for fan_in, _ in pairs)
    blocks = sorted({block for _, block in pairs})
    for size in (*blocks, *range(1, widest + 1)):
        if all(nearest_divisor(fan_in, size) == block for fan_in, block in pairs):
            return {"oft_block_size": size, "r": 0}
    for number in range(1, widest + 1):
        if all(nearest_divisor(fan_in, number) * block == fan_in for fan_in, block in pairs):
            return {"oft_block_size": 0, "r": number}
    raise SboraxError(
        f"no one block size or number of PEFT's OFT gives {', '.join(map(str, blocks))} rows a block; use as_='lora'"
    )


def _read_oft(fields: Fields) -> Fit:
    """With `coft`, PEFT scales the skew matrices down before every call, to the norm eps / sqrt(number of matrices)."""
    frozen = {}
    if fields["coft"]:
        frozen["eps"] = number_field(fields, "eps")
        if frozen["eps"] <= 0.0:
            raise SboraxError(f"eps must be above 0, got {frozen['eps']:g}")
    terms = None
    if fields["use_cayley_neumann"]:
        version = re.match(r"(\d+)\.(\d+)", str(fields["peft_version"]))
        if version is None or (int(version[1]), int(version[2])) < (0, 18):
            raise SboraxError(
                f"OFT's series was another one before PEFT {SERIES_SINCE}; save the adapter with a newer PEFT"
            )
        terms = rank_field(fields, "num_cayley_neumann_terms")
        if terms == 1:
            raise SboraxError("num_cayley_neumann_terms=1: such a series is the identity, whatever is trained")
        # PEFT's loop computes the same series for 3 as for 4.
        terms = 4 if terms == 3 else terms
    return Fit(OFT(fields["block"], terms, bool(fields["block_share"]), frozen.get("eps")), frozen)


def _write_oft(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, OFT)
    fields = {
        "block": method.block,
        "block_share": method.share,
        "coft": "eps" in node.frozen,
        "eps": decimal_of(node, "eps") or OFT_FIELDS["eps"],
        "use_cayley_neumann": method.terms is not None,
        "peft_version": SERIES_SINCE,
    }
    return fields if method.terms is None else {**fields, "num_cayley_neumann_terms": method.terms}


def _block_of_boft(fields: Fields, shape: tuple[int, int]) -> dict[str, Any]:
    """BOFT's block of a weight: PEFT's config has its size or the number of blocks, whichever is not 0."""
    blocks, size = (whole_field(fields, name, 0, LARGEST_RANK) for name in ("boft_block_num", "boft_block_size"))
    if (blocks == 0) == (size == 0):
        raise SboraxError(f"boft_block_num={blocks} and boft_block_size={size}: exactly one of them must be 0")
    if blocks and shape[0] % blocks:
        raise SboraxError(f"boft_block_num={blocks} must divide {shape[0]} rows")
    return {"block": size or shape[0] // blocks}


def _size_of_boft(modules: Mapping[str, Fields]) -> dict[str, Any]:
    """The config's size of a block where all modules have the same, or else their number of blocks."""
    sizes = sorted({fields["block"] for fields in modules.values()})
    numbers = {fields["shape"][0] // fields["block"] for fields in modules.values()}
    if len(sizes) == 1:
        return {"boft_block_size": sizes[0], "boft_block_num": 0}
    if len(numbers) == 1:
        return {"boft_block_size": 0, "boft_block_num": numbers.pop()}
    raise SboraxError(
        f"blocks of {', '.join(map(str, sizes))} rows follow from no one size or number of PEFT's BOFT; use as_='lora'"
    )


def _read_boft(fields: Fields) -> Fit:
    factors, rate = rank_field(fields, "boft_n_butterfly_factor"), number_field(fields, "boft_dropout")
    return Fit(BOFT(block=fields["block"], factors=factors, block_dropout=rate), {})


def _write_boft(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, BOFT)
    rate = decimal_of(node, "block_dropout")
    return {"block": method.block, "boft_n_butterfly_factor": method.factors, "boft_dropout": rate}


def _read_osf(fields: Fields) -> Fit:
    rank = fields["effective_rank"]
    if rank is not None and number_field(fields, "effective_rank") > 1.0:
        rank = int(rank)
    return Fit(OSF(kept=rank), {"scale": 1.0})


def _write_osf(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, OSF)
    return {"effective_rank": method.kept}


def _read_super(fields: Fields) -> Fit:
    """Without a rank there is neither scale nor dropout."""
    sparsity, largest = number_field(fields, "sparsity"), bool(fields["select_top"])
    if not fields["save_precomputed_indices"]:
        raise SboraxError("save_precomputed_indices=False: the file must hold the places; save it again with True")
    if fields["r"] is None:
        return Fit(SuperTuning(sparsity=sparsity, largest=largest), {})
    rank, rate = rank_field(fields), number_field(fields, "lora_dropout")
    scale = 2.0 if fields["lora_alpha"] is None else number_field(fields, "lora_alpha") / rank
    method = SuperTuning(sparsity=sparsity, largest=largest, lora_rank=rank, dropout=rate)
    return Fit(method, {"scale": scale})


def _write_super(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, SuperTuning)
    fields = {"sparsity": method.sparsity, "select_top": method.largest}
    rank = method.lora_rank
    return fields | ({"r": rank, "lora_alpha": alpha_of(node, rank), "lora_dropout": dropout_of(node)} if rank else {})


def _cut_to_outputs(fields: Fields, shape: tuple[int, int]) -> dict[str, Any]:
    """The rank of DEFT, which PEFT cuts to the number of outputs."""
    return {"r": min(rank_field(fields), shape[1])}


def _deft(projection: Literal["relu", "qr"]) -> Row:
    """The row of one projection of DEFT."""

    def read(fields: Fields) -> Fit:
        rank = rank_field(fields)
        method = DEFT(rank=rank, projection=projection, dropout=number_field(fields, "deft_dropout"))
        # PEFT takes an alpha of 0 for none.
        return Fit(method, {"scale": number_field(fields, "alpha") / rank if fields["alpha"] else 1.0})

    def write(node: Adapter) -> dict[str, Any] | None:
        method = node.method
        assert isinstance(method, DEFT)
        if method.projection != projection:
            return None
        return {"r": method.rank, "alpha": alpha_of(node, method.rank), "deft_dropout": dropout_of(node)}

    tensors = (Tensor("deft_P", "p", (0, 1)), Tensor("deft_R", "a", TRANSPOSED))
    known_by = {"decomposition_method": (projection,), **ANY_START}
    defaults = {"r": 8, "alpha": None, "deft_dropout": 0.0}
    inert = {"init_scale": "of the start, which is in the file"}
    refused = {"para": "PaRa, which takes a subspace away and puts nothing in its place"}
    return Row(
        DEFT, "DEFT", known_by, defaults, tensors, read, write, by_shape=_cut_to_outputs, inert=inert, refused=refused
    )


def _road(variant: Literal["1", "2", "4"]) -> Row:
    """The row of one variant of RoAd."""

    def read(fields: Fields) -> Fit:
        return Fit(RoAd(variant=variant, block=rank_field(fields, "group_size")), {})

    def write(node: Adapter) -> dict[str, Any] | None:
        method = node.method
        assert isinstance(method, RoAd)
        return {"group_size": method.block} if method.variant == variant else None

    tensors = (Tensor("road_theta", "theta", (0,)), Tensor("road_alpha", "alpha", (0,)))
    known_by = {"variant": (f"road_{variant}",), **ANY_START}
    return Row(RoAd, "ROAD", known_by, {"group_size": 64}, tensors, read, write, constants=NO_BIAS, layered=False)


def _peanut(activation: Literal["relu", "silu", "gelu"]) -> Row:
    """The row of one activation of PEANuT."""

    def read(fields: Fields) -> Fit:
        depth = whole_field(fields, "depth", 0, MOST_LAYERS)
        return Fit(
            PEANuT(rank=rank_field(fields), depth=depth, activation=activation),
            {"scale": number_field(fields, "scaling")},
        )

    def write(node: Adapter) -> dict[str, Any] | None:
        method = node.method
        assert isinstance(method, PEANuT)
        if method.activation != activation or method.depth > MOST_LAYERS:
            return None
        return {"r": method.rank, "depth": method.depth, "scaling": decimal_of(node, "scale")}

    layers = [
        Tensor(f"peanut_{side}.{i}.weight", f"{side[0]}{i}", TRANSPOSED)
        for side in ("encoders", "decoders")
        for i in range(MOST_LAYERS)
    ]
    tensors = (Tensor("peanut_A.weight", "u", TRANSPOSED), Tensor("peanut_B.weight", "b", TRANSPOSED), *layers)
    known_by = {"act_fn": (activation,), **ANY_START}
    defaults = {"r": 32, "depth": 0, "scaling": 1.0}
    refused = {
        "act_fn": "other activations than relu, silu and gelu",
        "depth": f"more than {MOST_LAYERS}",
    }
    return Row(
        PEANuT, "PEANUT", known_by, defaults, tensors, read, write, any_rank=True, constants=NO_BIAS, refused=refused
    )


def _read_glora(fields: Fields) -> Fit:
    forms = {name: fields[f"config_{letters}"] for name, letters in GLORA_FORMS.items()}
    if forms["weight"] == "none":
        raise SboraxError("config_A_B='none' is not supported: nothing is left to train where there is no bias")
    for name, form in forms.items():
        if form not in CHOICES[name]:
            choices = ", ".join(CHOICES[name])
            raise SboraxError(f"config_{GLORA_FORMS[name]} must be among {choices}, got {str(form)[:40]!r}")
    return Fit(GLoRA(rank=rank_field(fields), **forms), {})


def _write_glora(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, GLoRA)
    rank = next((node.train[name].shape[-1] for name in ("gain_a", "c_a") if name in node.train), width(method.rank))
    return {"r": rank} | {f"config_{letters}": getattr(method, name) for name, letters in GLORA_FORMS.items()}


def _zeros_of_glora(leaves: Collection[str], shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    fan_in, fan_out = shape
    zeros = {} if {"c", "c_a"} & set(leaves) else {"glora_C.zeros": (fan_in, 1)}
    bare = not {"bias_gain", "bias_gain_constant"} & set(leaves)
    return zeros | ({"glora_D.zeros": (fan_out,), "glora_E.zeros": (fan_out,)} if bare else {})


def _feedforward(config: Fields, module: str) -> dict[str, Any]:
    return {"feedforward": matched(config, "feedforward_modules", module)}


def _list_feedforward(modules: Mapping[str, Fields]) -> dict[str, Any]:
    feedforward = [module for module, fields in modules.items() if fields["feedforward"]]
    kinds = {module.rpartition(".")[2] for module in feedforward}
    uniform = all(fields["feedforward"] for module, fields in modules.items() if module.rpartition(".")[2] in kinds)
    # A pattern and not a list: PEFT wants the names of a list to be literally among those of the targets.
    pattern = rf".*\.({'|'.join(sorted(kinds))})" if uniform else "|".join(re.escape(module) for module in feedforward)
    return {"feedforward_modules": pattern if feedforward else []}


STRUCTURED = (
    Row(Bone, "MISS", {"init_weights": (True, False)}, MISS_FIELDS, BLOCK, *_bone(mini=False)),
    Row(Bone, "MISS", {"init_weights": ("mini",)}, MISS_FIELDS, BLOCK, *_bone(mini=True)),
    Row(
        Bat, "MISS", {"init_weights": ("bat",)}, MISS_FIELDS, (Tensor("miss_block", "d", (0, 1, 2)),),
        lambda fields: Fit(Bat(rank=rank_field(fields)), {}), lambda node: {"r": node.method.rank},
    ),
    Row(
        C3A, "C3A", {"init_weights": (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")},
        {"block_size": 256}, (Tensor("c3a_kernel", "w", (1, 0, 2)),),
        lambda fields: Fit(C3A(block=rank_field(fields, "block_size")), {}),
        lambda node: {"block_size": node.train["w"].shape[-1]}, {"block_size": "block_size_pattern"},
        pattern_form=r".*\.{}$",
    ),
    Row(
        OFT, "OFT", ANY_START, OFT_FIELDS, (Tensor("oft_R.weight", "q", (0, 1)),), _read_oft, _write_oft,
        by_shape=_block_of_oft, in_config=_size_of_oft,
        inert={"module_dropout": "PEFT makes a layer of it and never calls it, in training either"},
        refused={
            "num_cayley_neumann_terms": "1, for which PEFT's rotation is the identity",
            "eps": "0 and below, with coft",
            "peft_version": "before 0.18, whose series was another one",
        },
    ),
    Row(
        BOFT, "BOFT", ANY_START,
        {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "boft_dropout": 0.0},
        (Tensor("boft_R", "d", (0, 1, 2, 3)), Tensor("boft_s", "m", (0, None))), _read_boft, _write_boft,
        by_shape=_block_of_boft, in_config=_size_of_boft,
    ),
    Row(
        OSF, "OSF", ANY_START, {"effective_rank": None},
        (
            Tensor("osf_svd_params.V_low", "a", TRANSPOSED), Tensor("osf_svd_params.U_low", "b", TRANSPOSED),
            Tensor("osf_svd_params.S_low", "e", (0,)),
        ),
        _read_osf, _write_osf, {"effective_rank": "rank_pattern"}, pattern_form=r".*?({})",
        refused={"effective_rank": "a number that keeps all singular values, or none"},
        constants=NO_BIAS, layered=False,
        inert={"target_svd_config": "PEFT reads it nowhere"},
        keeps_base=True,
    ),
    Row(
        HRA, "HRA", ANY_START, {"r": 8}, (Tensor("hra_u", "u", (0, 1)),),
        lambda fields: Fit(HRA(rank=rank_field(fields)), {}), lambda node: {"r": node.method.rank},
        any_rank=True, refused={"apply_GS": "PEFT orthogonalises the vectors before every call"},
    ),
    Row(
        SHiRA, "SHIRA", ANY_START, {"r": 32},
        (Tensor("shira_weight", "values", (0,)), Tensor("shira_indices", "idx", (0, 1), places=True)),
        lambda fields: Fit(SHiRA(rank=rank_field(fields)), {}), lambda node: {"r": node.method.rank},
        inert=dict.fromkeys(["mask_type", "random_seed"], "how places are drawn, which are in the file"),
        constants=NO_BIAS, layered=False,
    ),
    Row(
        SuperTuning, "SUPERTUNING", ANY_START,
        {
            "sparsity": 0.99, "select_top": True, "r": None, "lora_alpha": None, "lora_dropout": 0.0,
            "save_precomputed_indices": True,
        },
        (
            Tensor("supertuning_values", "values", (0,)), Tensor("supertuning_indices", "idx", (0,), places=True),
            Tensor("supertuning_lora_A.weight", "a", TRANSPOSED), Tensor("supertuning_lora_B.weight", "b", TRANSPOSED),
        ),
        _read_super, _write_super, constants=NO_BIAS, layered=False,
        refused={"save_precomputed_indices": "False: the file must hold the places"},
    ),
    Row(
        GLoRA, "GLORA", ANY_START, {"r": 8, "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"},
        (
            Tensor("glora_A.Xu", "gain_a", TRANSPOSED), Tensor("glora_A.Xd", "gain_b", TRANSPOSED),
            Tensor("glora_A.X", "gain", (0, None)), Tensor("glora_A.X", "gain_constant", (None,)),
            Tensor("glora_B.Xu", "a", TRANSPOSED), Tensor("glora_B.Xd", "b", TRANSPOSED),
            Tensor("glora_B.X", "shift", (0, None)), Tensor("glora_B.X", "shift_constant", (None,)),
            Tensor("glora_C.Xd", "c_a", (0, 1)), Tensor("glora_C.Xu", "c_b", (0, None)),
            Tensor("glora_C.X", "c", (0, None)),
            Tensor("glora_D.X", "bias_gain", (0,)), Tensor("glora_D.X", "bias_gain_constant", (None,)),
            Tensor("glora_E.X", "bias_shift", (0,)), Tensor("glora_E.X", "bias_shift_constant", (None,)),
        ),
        _read_glora, _write_glora, any_rank=True, layered=False, blanks=_zeros_of_glora,
        refused={"config_A_B": "'none', which leaves nothing to train where there is no bias"},
    ),
    Row(
        IA3, "IA3", {"init_ia3_weights": (True, False)}, {},
        (Tensor("ia3_l", "m_out", (0, None)), Tensor("ia3_l", "m_in", (None, 0))),
        lambda fields: Fit(IA3(side="in" if fields["feedforward"] else "out"), {}),
        lambda node: {"feedforward": "m_in" in node.train},
        by_module=_feedforward, in_config=_list_feedforward, reads=frozenset({"feedforward_modules"}),
        constants=NO_BIAS, layered=False,
    ),
    _road("1"),
    _road("2"),
    _road("4"),
    _peanut("relu"),
    _peanut("silu"),
    _peanut("gelu"),
    _deft("relu"),
    _deft("qr"),
)  # fmt: skip
