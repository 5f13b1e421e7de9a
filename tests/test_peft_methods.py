"""The methods PEFT has too, against PEFT: its tensors in our leaves give its outputs and its merged weight."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer
from peft_configs import FILES
from safetensors.numpy import load_file, save_file
from torch_pair import build, equal_uniforms, in_subspaces, logits, reloaded, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.bank import link
from sborax.adapters.core import AbstractMethod, Adapter, linear
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft, save_peft
from sborax.interop.peft_structured import nearest_divisor
from sborax.methods.lokr import divisors
from sborax.methods.peanut import ACTIVATIONS
from sborax.methods.places import LARGEST_SEED, LONG, seeded_places

pytestmark = pytest.mark.usefixtures("strict")

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """`train` and `frozen` map PEFT's tensors, by the name of their parameter, to our leaves."""

    name: str
    config: peft.PeftConfig
    method: AbstractMethod
    train: Callable[[Tensors], dict[str, Any]]
    frozen: Callable[[Tensors], dict[str, Any]] = lambda _: {}
    shape: tuple[int, int] = (24, 18)


def flipped(**names: str) -> Callable[[Tensors], dict[str, Any]]:
    """Our leaf = PEFT's tensor with its axes reversed."""
    return lambda tensors: {leaf: tensors[name].T for leaf, name in names.items()}


def pick(**names: str) -> Callable[[Tensors], dict[str, Any]]:
    return lambda tensors: {leaf: tensors[name] for leaf, name in names.items()}


def joined(*parts: Callable[[Tensors], dict[str, Any]]) -> Callable[[Tensors], dict[str, Any]]:
    return lambda tensors: {leaf: value for part in parts for leaf, value in part(tensors).items()}


def scaled(scale: float) -> Callable[[Tensors], dict[str, Any]]:
    return lambda _: {"scale": np.float32(scale)}


def random_bases(small: str, large: str) -> Callable[[Tensors], dict[str, Any]]:
    def read(tensors: Tensors) -> dict[str, Any]:
        q, p = tensors["randlora_A"], tensors["randlora_B"]
        return {small: q[:, 0, :], large: p.transpose(1, 2, 0), "scale": np.float32(20.0)}

    return read


def gains(tensors: Tensors) -> dict[str, Any]:
    gain = np.zeros_like(tensors["unilora_theta_d"])
    for side in "AB":
        gain[tensors[f"unilora_indices_{side}"]] = tensors[f"unilora_scales_{side}"]
    return {"gain": gain}


def subspaces(tensors: Tensors) -> dict[str, Any]:
    numbers = range(sum(name.startswith("adamss_A.") for name in tensors))
    factors, columns, places = (
        [tensors[f"{name}.{k}"] for k in numbers] for name in ("adamss_A", "adamss_B", "seg_result")
    )
    return in_subspaces(factors, columns, places, max(map(len, factors)))


def config(kind: str, **fields: Any) -> peft.PeftConfig:
    return getattr(peft, kind)(target_modules=["proj"], **fields)


LOHA = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
CASES = [
    Case("IA3", config("IA3Config", feedforward_modules=[]), sx.IA3(), lambda t: {"m_out": t["ia3_l"][:, 0]}),
    Case(
        "IA3-in",
        config("IA3Config", feedforward_modules=["proj"]),
        sx.IA3(side="in"),
        lambda t: {"m_in": t["ia3_l"][0]},
    ),
    Case(
        "VeRA",
        config("VeraConfig", r=5, init_weights=False),
        sx.VeRA(rank=5),
        pick(d="vera_lambda_d", m="vera_lambda_b"),
        joined(flipped(a="vera_A", b="vera_B"), scaled(1.0)),
    ),
    Case(
        "PVeRA",
        config("PveraConfig", r=5, init_weights=False),
        sx.PVeRA(rank=5),
        pick(d="pvera_lambda_d", m="pvera_lambda_b"),
        joined(flipped(a="pvera_A", b="pvera_B"), scaled(1.0)),
    ),
    Case(
        "TinyLoRA",
        config("TinyLoraConfig", r=3, u=5),
        sx.TinyLoRA(rank=3, coefficients=5),
        pick(v="tinylora_v"),
        joined(flipped(a="tinylora_A", b="tinylora_B"), lambda t: {"p": t["tinylora_P"].transpose(0, 2, 1)}),
    ),
    *(
        Case(
            name,
            config("PsoftConfig", r=5, **fields),
            method,
            pick(q="psoft_R", **({"g": "vector_a", "h": "vector_b"} if method.scaled else {})),
            lambda t: {"a": t["_psoft_A_cache"].T, "b": t["_psoft_B_cache"].T * (32 / 5)},
        )
        for name, method, fields in [
            ("PSOFT", sx.PSOFT(rank=5), {}),
            ("PSOFT-bare", sx.PSOFT(rank=5, scaled=False), {"psoft_mag_a": False, "psoft_mag_b": False}),
            (
                "PSOFT-series",
                sx.PSOFT(rank=5, terms=6),
                {"use_cayley_neumann": True, "num_cayley_neumann_terms": 6},
            ),
        ]
    ),
    *(
        Case(
            f"PEANuT-{activation}",
            config("PeanutConfig", r=5, act_fn=activation, scaling=1.5),
            sx.PEANuT(rank=5, activation=activation),
            flipped(u="peanut_A", b="peanut_B"),
            scaled(1.5),
        )
        for activation in ACTIVATIONS
    ),
    Case("LoHa", config("LoHaConfig", r=3, alpha=6), sx.LoHa(rank=3), flipped(**LOHA), scaled(2.0)),
    Case(
        "LoKr",
        config("LoKrConfig", r=2, alpha=4),
        sx.LoKr(rank=2),
        flipped(c="lokr_w1", a="lokr_w2_b", b="lokr_w2_a"),
        scaled(2.0),
    ),
    Case(
        "LoKr-whole",
        config("LoKrConfig", r=6, alpha=3, decompose_factor=3),
        sx.LoKr(rank=6, factor=3),
        flipped(c="lokr_w1", w="lokr_w2"),
        scaled(0.5),
    ),
    Case(
        "LoKr-both",
        config("LoKrConfig", r=1, alpha=2, decompose_both=True),
        sx.LoKr(rank=1, both=True),
        flipped(c_a="lokr_w1_b", c_b="lokr_w1_a", a="lokr_w2_b", b="lokr_w2_a"),
        scaled(2.0),
    ),
    Case(
        "SHiRA",
        config("ShiraConfig", r=2, random_seed=0),
        sx.SHiRA(rank=2),
        pick(values="shira_weight"),
        pick(idx="shira_indices"),
    ),
    Case("HiRA", config("HiraConfig", r=3), sx.HiRA(rank=3), flipped(a="hira_A", b="hira_B")),
    Case(
        "GLoRA",
        config("GloraConfig", r=3),
        sx.GLoRA(rank=3),
        lambda t: {
            **{"gain_a": t["glora_A.Xu"].T, "gain_b": t["glora_A.Xd"].T},
            **{"a": t["glora_B.Xu"].T, "b": t["glora_B.Xd"].T},
        },
    ),
    Case(
        "GLoRA-vector",
        config("GloraConfig", config_A_B="vector"),
        sx.GLoRA(weight="vector"),
        lambda t: {"gain": t["glora_A.X"][:, 0], "shift": t["glora_B.X"][:, 0]},
    ),
    Case(
        "GLoRA-constant",
        config("GloraConfig", config_A_B="constant"),
        sx.GLoRA(weight="constant"),
        lambda t: {"gain_constant": t["glora_A.X"][0], "shift_constant": t["glora_B.X"][0]},
    ),
    Case(
        "AdaMSS",
        config("AdamssConfig", r=10, num_subspaces=3, subspace_rank=2),
        sx.AdaMSS(rank=10, subspaces=3, subspace_rank=2),
        lambda t: {name: subspaces(t)[name] for name in ("a", "b")},
        lambda t: {"p": t["adamss_newB"].T, "idx": subspaces(t)["idx"]},
    ),
    Case(
        "DeLoRA",
        config("DeloraConfig", r=3, delora_lambda=4),
        sx.DeLoRA(rank=3),
        joined(flipped(a="delora_A", b="delora_B"), lambda t: {"strength": t["delora_lambda"][0]}),
    ),
    Case("OFT", config("OFTConfig", oft_block_size=8), sx.OFT(block=8), pick(q="oft_R")),
    Case("OFT-near", config("OFTConfig", oft_block_size=8, coft=True, eps=0.9), sx.OFT(8, eps=0.9), pick(q="oft_R")),
    Case(
        "OFT-long",
        config("OFTConfig", oft_block_size=6, num_cayley_neumann_terms=8),
        sx.OFT(block=6, terms=8),
        pick(q="oft_R"),
    ),
    Case("OFT-2", config("OFTConfig", oft_block_size=8, num_cayley_neumann_terms=2), sx.OFT(8, 2), pick(q="oft_R")),
    Case(
        "OFT-exact",
        config("OFTConfig", oft_block_size=8, use_cayley_neumann=False, block_share=True),
        sx.OFT(block=8, terms=None, share=True),
        pick(q="oft_R"),
    ),
    *(
        Case(
            f"BOFT-{factors}",
            config("BOFTConfig", boft_block_size=block, boft_n_butterfly_factor=factors),
            sx.BOFT(block=block, factors=factors),
            joined(pick(d="boft_R"), lambda t: {"m": t["boft_s"][:, 0]}),
        )
        for block, factors in [(3, 1), (4, 2), (2, 3)]
    ),
    Case("HRA", config("HRAConfig", r=6), sx.HRA(rank=6), pick(u="hra_u")),
    Case(
        "SuperTuning",
        config("SupertuningConfig", sparsity=0.8),
        sx.SuperTuning(sparsity=0.8),
        pick(values="supertuning_values"),
        pick(idx="supertuning_indices"),
    ),
    Case(
        "SuperTuning-hybrid",
        config("SupertuningConfig", sparsity=0.9, r=3, lora_alpha=9),
        sx.SuperTuning(sparsity=0.9, lora_rank=3),
        joined(pick(values="supertuning_values"), flipped(a="supertuning_lora_A", b="supertuning_lora_B")),
        joined(pick(idx="supertuning_indices"), scaled(3.0)),
    ),
    *(
        Case(
            f"DEFT-{projection}",
            config("DeftConfig", r=5, alpha=10, decomposition_method=projection),
            sx.DEFT(rank=5, projection=projection),
            joined(pick(p="deft_P"), flipped(a="deft_R")),
            scaled(2.0),
        )
        for projection in ("relu", "qr")
    ),
    Case(
        "RandLoRA",
        config("RandLoraConfig", r=4, randlora_alpha=80),
        sx.RandLoRA(rank=4),
        pick(l="randlora_lambda", g_out="randlora_gamma"),
        random_bases("q_out", "p_in"),
    ),
    Case(
        "RandLoRA-wide",
        config("RandLoraConfig", r=4, randlora_alpha=80),
        sx.RandLoRA(rank=4),
        pick(l="randlora_lambda", g_in="randlora_gamma"),
        random_bases("q_in", "p_out"),
        shape=(18, 24),
    ),
    Case(
        "C3A", config("C3AConfig", block_size=6), sx.C3A(block=6), lambda t: {"w": t["c3a_kernel"].transpose(1, 0, 2)}
    ),
    *(
        Case(
            f"FourierFT-{name}",
            config("FourierFTConfig", n_frequency=70, scaling=90.0, random_loc_seed=5),
            sx.FourierFT(coefficients=70, seed=5),
            pick(c="fourierft_spectrum"),
            joined(lambda t: {"idx": t["indices"].astype(np.int32)}, scaled(90.0)),
            shape=shape,
        )
        for name, shape in {"even": (24, 18), "odd": (15, 21), "even-odd": (12, 11)}.items()
    ),
    *(
        Case(
            f"RoAd-{variant}",
            config("RoadConfig", variant=f"road_{variant}", group_size=6),
            sx.RoAd(variant=variant, block=6),
            pick(theta="road_theta", alpha="road_alpha"),
        )
        for variant in ("1", "2", "4")
    ),
    Case(
        "GraLoRA",
        config("GraloraConfig", r=6, alpha=9, gralora_k=3),
        sx.GraLoRA(rank=6, blocks=3),
        pick(a_i="gralora_A", b_j="gralora_B"),
        scaled(1.5),
    ),
    Case(
        "GraLoRA-hybrid",
        config("GraloraConfig", r=4, hybrid_r=3, alpha=7),
        sx.GraLoRA(rank=4, hybrid=3),
        joined(pick(a_i="gralora_A", b_j="gralora_B"), flipped(u="gralora_A_general", v="gralora_B_general")),
        scaled(1.0),
    ),
    *(
        Case(
            f"WaveFT-{name}",
            config("WaveFTConfig", n_frequency=70, scaling=9.0, random_loc_seed=5, use_idwt=wavelet is not None),
            sx.WaveFT(coefficients=70, wavelet=wavelet, seed=5),
            pick(c="waveft_spectrum"),
            joined(lambda t: {"idx": t["waveft_indices"].astype(np.int32)}, scaled(9.0)),
            shape=shape,
        )
        for name, wavelet, shape in [
            ("even", "haar", (24, 18)),
            ("odd", "haar", (15, 21)),
            ("even-odd", "haar", (12, 11)),
            ("plain", None, (15, 18)),
        ]
    ),
    *(
        Case(
            f"VBLoRA-{top_k}",
            config("VBLoRAConfig", r=4, num_vectors=10, vector_length=6, topk=top_k),
            sx.VBLoRA(rank=4, vectors=10, length=6, top_k=top_k),
            joined(
                pick(logits_a="vblora_logits_A", bank="vblora_vector_bank"),
                lambda t: {"logits_b": t["vblora_logits_B"].transpose(1, 0, 2)},
            ),
        )
        for top_k in (1, 3)
    ),
    Case(
        "UniLoRA",
        config("UniLoraConfig", r=4, theta_d_length=50),
        sx.UniLoRA(rank=4, coefficients=50),
        pick(theta="unilora_theta_d"),
        joined(
            lambda t: {f"idx_{side.lower()}": t[f"unilora_indices_{side}"].T.astype(np.int32) for side in "AB"},
            gains,
        ),
    ),
    Case(
        "AdaLoRA",
        config("AdaLoraConfig", init_r=4, target_r=2, lora_alpha=6, total_step=10),
        sx.AdaLoRA(rank=4),
        joined(flipped(a="lora_A", b="lora_B"), lambda t: {"e": t["lora_E"][:, 0]}),
        scaled(6 / (4 + 1e-5)),
    ),
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def peft_side(case: Case) -> tuple[torch.nn.Module, torch.nn.Linear, Tensors]:
    """PEFT's model of one linear layer, with random trained tensors: (model, base layer, tensors by parameter)."""
    torch.manual_seed(0)
    base = torch.nn.Linear(*case.shape, bias=False)
    model = peft.get_peft_model(torch.nn.ModuleDict({"proj": base}), case.config).eval()
    layer = model.base_model.model["proj"]
    tensors = {}
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        store = getattr(layer, name, None) or {}
        if "default" not in store:
            continue
        value = store["default"]
        value = getattr(value, "weight", value)
        if isinstance(value, torch.nn.ParameterDict):
            (value,) = value.values()
        elif isinstance(value, torch.nn.Module):
            for part, leaf in value.named_parameters():
                torch.nn.init.normal_(leaf, std=0.3)
                tensors[f"{name}.{part}"] = leaf.detach().numpy().copy()
        elif isinstance(value, dict):
            tensors |= {f"{name}.{part}": leaf.numpy() for part, leaf in value.items()}
        for part in ("vector_a", "vector_b"):
            if isinstance(vector := getattr(store["default"], part, None), torch.nn.Parameter):
                torch.nn.init.normal_(vector, mean=1.0, std=0.3)
                tensors[part] = vector.detach().numpy().copy()
        if isinstance(value, torch.nn.Parameter) and value.requires_grad:
            torch.nn.init.normal_(value, std=0.3)
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().numpy().copy()
    return layer, layer.get_base_layer(), tensors


def our_side(case: Case, weight: np.ndarray, tensors: Tensors) -> Adapter:
    """Our adapter of the same weight, every leaf that PEFT stores taken from it."""
    params = {"proj": {"kernel": jnp.asarray(weight)}}
    _, adapters = sx.attach(jax.random.key(0), params, [("proj", case.method)])
    (node,) = link(nodes(adapters)).values()
    train, frozen = case.train(tensors), case.frozen(tensors)
    filled = Adapter(
        {name: jnp.asarray(train[name]) for name in node.train},
        {name: jnp.asarray(frozen.get(name, leaf)) for name, leaf in node.frozen.items()},
        node.method,
    )
    assert train.keys() == node.train.keys() and frozen.keys() <= node.frozen.keys()
    chex.assert_trees_all_equal_shapes_and_dtypes(filled, node)
    return filled


@by_case
def test_same_outputs_and_merged_weight_as_peft(case: Case):
    layer, base, tensors = peft_side(case)
    weight = base.weight.detach().numpy().T.copy()
    node = our_side(case, weight, tensors)
    x = np.random.default_rng(1).normal(size=(11, case.shape[0])).astype(np.float32)
    # Said outright, since torch warns of sparse tensors about which nothing is said.
    with torch.no_grad(), torch.sparse.check_sparse_tensor_invariants():
        theirs = layer(torch.from_numpy(x)).numpy()
        layer.merge()
        merged = base.weight.numpy().T.copy()
    assert np.abs(theirs - x @ weight).max() > 1e-2, "the adapter does nothing: the comparison proves nothing"
    ours = jax.jit(sx.linear)(jnp.asarray(x), jnp.asarray(weight), node)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    with jax.default_matmul_precision("highest"):
        dense = node.method.merge(jnp.asarray(weight), node)
    np.testing.assert_allclose(dense, merged, rtol=0, atol=1e-5 * np.abs(merged).max())


DROPPED = [
    dataclasses.replace(
        case,
        name=f"{case.name}, {rates}",
        config=dataclasses.replace(case.config, **rates, **scale),
        method=dataclasses.replace(case.method, **rates, **scale),
    )
    for case, scale in [
        *((case, {}) for case in CASES if case.name in ("LoHa", "LoKr")),
        *((case, {"rank_dropout_scale": True}) for case in CASES if case.name == "LoKr-both"),
    ]
    for rates in ({"rank_dropout": 0.4}, {"module_dropout": 0.4}, {"rank_dropout": 0.4, "module_dropout": 0.1})
]
DROPPED += [
    dataclasses.replace(
        case,
        name=f"{case.name}, {rate}",
        config=dataclasses.replace(case.config, boft_dropout=rate),
        method=dataclasses.replace(case.method, block_dropout=rate),
    )
    for case, rate in itertools.product([case for case in CASES if case.name in ("BOFT-1", "BOFT-3")], (0.4, 0.7))
]


@pytest.mark.parametrize("case", DROPPED, ids=lambda case: case.name)
def test_outputs_and_blocks_are_dropped_in_training_as_in_peft(case: Case, monkeypatch):
    equal_uniforms(monkeypatch)
    layer, base, tensors = peft_side(case)
    weight = base.weight.detach().numpy().T.copy()
    node = our_side(case, weight, tensors)
    x = np.random.default_rng(1).normal(size=(11, case.shape[0])).astype(np.float32)
    with torch.no_grad():
        scored, theirs = layer(torch.from_numpy(x)).numpy(), layer.train()(torch.from_numpy(x)).numpy()
    assert np.abs(theirs - scored).max() > 1e-2
    ours = sx.linear(jnp.asarray(x), jnp.asarray(weight), node, sx.Context(jax.random.key(0)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_oft_drops_nothing_in_peft_either():
    """PEFT makes a layer of its `module_dropout` and never calls it, so that the field says nothing to read."""
    case = next(case for case in CASES if case.name == "OFT")
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(11, case.shape[0])).astype(np.float32))
    layer, _, _ = peft_side(dataclasses.replace(case, config=dataclasses.replace(case.config, module_dropout=0.9)))
    assert layer.oft_dropout["default"].p == 0.9
    with torch.no_grad():
        assert torch.equal(layer(x), layer.train()(x))


def test_as_many_blocks_are_dropped_as_in_peft():
    weight, rate = jnp.ones((200, 3)), 0.29
    (node,) = nodes(sx.attach(jax.random.key(0), {"p": {"kernel": weight}}, [("p", sx.BOFT(2, 1, rate))])[1]).values()
    assert node.frozen["dropped"] == int(rate * 100) == 28


@by_case
def test_as_many_trained_parameters_as_in_peft(case: Case):
    layer, base, tensors = peft_side(case)
    node = our_side(case, base.weight.detach().numpy().T.copy(), tensors)
    theirs = sum(value.numel() for value in layer.parameters() if value.requires_grad)
    assert sx.count({"proj": {"kernel": node}}) == theirs


def test_the_gradient_of_a_rotation_that_is_scaled_down_is_that_of_peft():
    """PEFT scales the trained tensor itself, before the call that is differentiated."""
    case = next(case for case in CASES if case.name == "OFT-near")
    layer, base, tensors = peft_side(case)
    weight = base.weight.detach().numpy().T.copy()
    node = our_side(case, weight, tensors)
    x = np.random.default_rng(1).normal(size=(11, case.shape[0])).astype(np.float32)
    layer(torch.from_numpy(x)).square().sum().backward()
    (theirs,) = [value.grad.numpy() for value in layer.parameters() if value.grad is not None]

    def loss(q):
        scaled_down = Adapter({"q": q}, node.frozen, node.method)
        return jnp.square(sx.linear(jnp.asarray(x), jnp.asarray(weight), scaled_down)).sum()

    # PEFT's steps are taken at the scaled tensor, of which no norm is above the bound.
    norms = np.linalg.norm(tensors["oft_R"], axis=1) * 2**0.5
    assert (norms > 0.9 / 3**0.5).all()
    np.testing.assert_allclose(jax.grad(loss)(node.train["q"]), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_blocks_that_do_not_divide_are_adjusted_as_in_peft():
    adjusted = OFTLayer.adjust_oft_parameters
    for size in (*range(2, 60), 96, 210):
        for divisor in range(1, size + 3):
            assert nearest_divisor(size, divisor) == adjusted(None, size, divisor), (size, divisor)


def test_blocks_that_no_size_of_peft_gives_are_refused(pair, tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        rules = [("q_proj", sx.OFT(block=2)), ("down_proj", sx.OFT(block=48))]
        params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
        with pytest.raises(sx.SboraxError, match="no one block size or number of PEFT's OFT gives 2, 48 rows a block"):
            save_peft(tmp_path, pair.ours, params, adapters)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 16, 64])
def test_sides_split_as_in_peft(factor):
    for size in range(1, 200):
        assert divisors(size, factor) == factorization(size, factor), size


def test_kernels_of_every_size_share_one_random_projection():
    params = {"small": {"kernel": jnp.ones((8, 6))}, "large": {"kernel": jnp.ones((20, 30))}}
    for method, small, large in [
        (sx.VeRA(rank=4), ("a", "b"), ("a", "b")),
        (sx.PVeRA(rank=4), ("a", "b"), ("a", "b")),
        (sx.RandLoRA(rank=4), ("p_in", "q_out"), ("p_out", "q_in")),
    ]:
        _, adapters = sx.attach(jax.random.key(0), params, [(".*", method)])
        first, second = nodes(adapters)["small/kernel"].frozen, nodes(adapters)["large/kernel"].frozen
        for mine, yours in zip(small, large, strict=True):
            a, b = np.asarray(first[mine]), np.asarray(second[yours])
            np.testing.assert_array_equal(a, b[tuple(slice(size) for size in a.shape)])


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 96)])
@pytest.mark.parametrize("seed", [0, 777, LARGEST_SEED])
def test_places_are_those_that_torch_draws(seed, shape):
    """A file of PEFT's has the seed and not the places."""
    fan_in, fan_out = shape
    places = torch.randperm(fan_in * fan_out, generator=torch.Generator().manual_seed(seed)).numpy()
    for count in {1, min(40, places.size), places.size}:
        columns, rows = seeded_places(seed, count, shape)
        np.testing.assert_array_equal(columns * fan_in + rows, places[:count])


@pytest.mark.parametrize("shape", [(24, 18), (15, 21), (12, 11)], ids=str)
@pytest.mark.parametrize(
    "method",
    [sx.FourierFT(coefficients=40), sx.WaveFT(coefficients=40), sx.WaveFT(coefficients=40, wavelet=None)],
    ids=["FourierFT", "WaveFT", "WaveFT without a wavelet"],
)
def test_coefficients_move_alike_one_by_one_and_by_a_product(method, shape, monkeypatch):
    x, base = (jax.random.normal(jax.random.key(seed), size) for seed, size in enumerate([(7, shape[0]), shape]))
    _, adapters = sx.attach(jax.random.key(2), {"proj": {"kernel": base}}, [("proj", method)])
    train, frozen = sx.split(adapters)
    train = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(3), leaf.shape), train)

    def loss(train, x):
        (adapter,) = nodes(sx.combine(train, frozen)).values()
        return jnp.sum(jnp.sin(linear(x, base, adapter)))

    monkeypatch.setattr("sborax.methods.places.DENSE", 0)
    singly = jax.value_and_grad(loss, argnums=(0, 1))(train, x)
    monkeypatch.setattr("sborax.methods.places.DENSE", 1000)
    chex.assert_trees_all_close(jax.value_and_grad(loss, argnums=(0, 1))(train, x), singly, rtol=1e-4, atol=1e-4)


def test_a_long_weight_is_refused():
    """PyTorch draws the places of larger weights in another way."""
    with pytest.raises(sx.SboraxError, match="places are drawn for fewer than"):
        sx.FourierFT(coefficients=5).check((LONG, 1))


def test_other_places_than_those_of_the_seed_are_not_written(pair, tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        method = sx.FourierFT(coefficients=5)
        params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", method)])
        for node in nodes(adapters).values():
            node.frozen["idx"] = node.frozen["idx"][:, :, ::-1]
        with pytest.raises(sx.SboraxError, match="q_proj: 'idx' is not what PEFT's FOURIERFT draws from the seed"):
            save_peft(tmp_path, pair.ours, params, adapters)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base"))


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
)
@pytest.mark.parametrize("kind", FILES)
def test_files_both_ways(kind, pair, tmp_path):
    """PEFT's saved adapter gives PEFT's logits here; written by us it gives them in PEFT again."""
    with jax.numpy_dtype_promotion("standard"):
        theirs = with_peft(pair, copy.deepcopy(FILES[kind]))
        theirs.save_pretrained(tmp_path / "theirs")
        expected = torch_logits(theirs)
        assert np.abs(expected - torch_logits(pair.torch)).max() > 0.01
        params, adapters = load_peft(tmp_path / "theirs", pair.ours)
        np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, rtol=0, atol=1e-4)
        assert save_peft(tmp_path / "ours", pair.ours, params, adapters).errors == {}
        np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "method", [sx.VeRA(rank=4), sx.PVeRA(rank=4), sx.RandLoRA(rank=8)], ids=["VeRA", "PVeRA", "RandLoRA"]
)
def test_our_own_projections_in_peft(method, pair, tmp_path):
    """Kernels of several sizes cut one projection, which PEFT gets whole; two projections cannot be written."""
    with jax.numpy_dtype_promotion("standard"):
        params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj|down_proj", method)])
        adapters = shaken(adapters)
        save_peft(tmp_path, pair.ours, params, adapters)
        expected = logits(pair.ours, params, adapters)
        assert np.abs(expected - torch_logits(pair.torch)).max() > 0.01
        np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path)), expected, rtol=0, atol=1e-4)
        rules = [("q_proj", method), ("down_proj", dataclasses.replace(method, projection_seed=1))]
        params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
        with pytest.raises(sx.SboraxError, match="the same projection_seed"):
            save_peft(tmp_path / "two", pair.ours, params, adapters)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_psoft_is_written_as_lora_and_its_own_files_are_refused(pair, tmp_path):
    """They lack the singular vectors of the base, whose signs torch's LAPACK and JAX's do not agree on."""
    with jax.numpy_dtype_promotion("standard"):
        with_peft(pair, peft.PsoftConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "theirs")
        with pytest.raises(sx.SboraxError, match="'PSOFT' is not supported: the file lacks the base's singular"):
            load_peft(tmp_path / "theirs", pair.ours)
        params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj|down_proj", sx.PSOFT(rank=4))])
        adapters = shaken(adapters)
        exported = save_peft(tmp_path / "ours", pair.ours, params, adapters)
        assert exported.peft_type == "LORA" and exported.errors == {}
        expected = logits(pair.ours, params, adapters)
        assert np.abs(expected - torch_logits(pair.torch)).max() > 0.01
        np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("indices_A", 30, "indices_A: an index lies outside the 30 entries of the shared vector"),
        ("indices_B", -1, "indices_B: an index lies outside the 30 entries of the shared vector"),
        ("scales_B", 2.0, "scales_B: entries at one index of the vector differ"),
    ],
)
def test_entries_of_a_shared_vector_that_cannot_be_are_refused(tensor, value, message, pair, tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        method = sx.UniLoRA(rank=2, coefficients=30)
        save_peft(tmp_path, pair.ours, *sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", method)]))
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[f"base_model.model.model.layers.1.self_attn.q_proj.unilora_{tensor}"][1, 0] = value
        save_file(tensors, file)
        with pytest.raises(sx.SboraxError, match=message):
            load_peft(tmp_path, pair.ours)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("topk_indices", 20, "topk_indices: an index lies outside the 20 vectors"),
        ("topk_weights", None, "tensor .*topk_weights' is missing from adapter_model.safetensors"),
    ],
)
def test_chosen_vectors_that_cannot_be_are_refused(part, change, message, pair, tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        with_peft(pair, copy.deepcopy(FILES["VBLoRA-chosen"])).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        name = f"base_model.model.model.layers.1.self_attn.q_proj.vblora_logits_B_{part}"
        if change is None:
            del tensors[name]
        else:
            tensors[name][0, 0, 0] = change
        save_file(tensors, file)
        with pytest.raises(sx.SboraxError, match=message):
            load_peft(tmp_path, pair.ours)


@pytest.mark.parametrize("place", [(0, 32), (1, -1), "twice"])
def test_misplaced_entries_are_refused(place, pair, tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", sx.SHiRA(rank=2))])
        save_peft(tmp_path, pair.ours, params, adapters)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        indices = tensors["base_model.model.model.layers.1.self_attn.q_proj.shira_indices"]
        if place == "twice":
            indices[:, 1] = indices[:, 0]
        else:
            indices[place[0], 3] = place[1]
        save_file(tensors, file)
        with pytest.raises(sx.SboraxError, match=r"layers\.1.*an index lies outside .* or comes twice"):
            load_peft(tmp_path, pair.ours)
