"""PEFT's tuners, their options and the model families, as a matrix of cells with the outcome that each must have."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import peft

TWO = ["q_proj", "down_proj"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "deep": ("llama", {"num_hidden_layers": 4}),
    "biased": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma": ("gemma", {"head_dim": 8}),
    "nf4": ("llama", {"hidden_size": 64, "intermediate_size": 128}),
    # Not tied, and windows shorter than the text in its first layer.
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
"""transformers' kind of model, and its fields beside `test_peft_matrix.SIZES`."""
BIASED, TIED = frozenset({"biased", "qwen2"}), frozenset({"tied", "gemma"})

LORA = {"r": 4, "lora_alpha": 6}
IN, OUT = ["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
TUNERS: dict[str, tuple[type[peft.PeftConfig], dict[str, Any]]] = {
    "LoRA": (peft.LoraConfig, LORA),
    "rsLoRA": (peft.LoraConfig, {**LORA, "use_rslora": True}),
    "DoRA": (peft.LoraConfig, {**LORA, "use_dora": True}),
    "PiSSA": (peft.LoraConfig, {**LORA, "init_lora_weights": "pissa"}),
    "OLoRA": (peft.LoraConfig, {**LORA, "init_lora_weights": "olora"}),
    "QA-LoRA": (peft.LoraConfig, {**LORA, "use_qalora": True, "qalora_group_size": 8}),
    # Without a task, PEFT does not look for the tokens.
    "aLoRA": (peft.LoraConfig, {**LORA, "alora_invocation_tokens": [32, 17], "task_type": "CAUSAL_LM"}),
    "BD-LoRA": (
        peft.LoraConfig,
        {**LORA, "use_bdlora": peft.BdLoraConfig(IN, OUT, nblocks=2, match_strict=False)},
    ),
    "MonteCLoRA": (
        peft.LoraConfig,
        {**LORA, "monteclora_config": peft.MontecloraConfig(num_samples=3, sample_scaler=0.05, buffer_size=2)},
    ),
    "VeLoRA": (peft.LoraConfig, {**LORA, "velora_config": peft.VeloraConfig(num_groups=8, init_type="random")}),
    "MiCA": (peft.LoraConfig, {**LORA, "init_lora_weights": "mica"}),
    "KaSA": (peft.LoraConfig, {**LORA, "kasa_config": peft.KasaConfig()}),
    "AdaLoRA": (peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}),
    "LoHa": (peft.LoHaConfig, {"r": 3, "alpha": 5}),
    "LoKr": (peft.LoKrConfig, {"r": 2, "alpha": 3}),
    "HiRA": (peft.HiraConfig, {"r": 4}),
    "GLoRA": (peft.GloraConfig, {"r": 4}),
    "DeLoRA": (peft.DeloraConfig, {"r": 4, "delora_lambda": 3}),
    "OFT": (peft.OFTConfig, {"oft_block_size": 8}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 8}),
    "OSF": (peft.OSFConfig, {"effective_rank": 0.75}),
    "HRA": (peft.HRAConfig, {"r": 4}),
    "SHiRA": (peft.ShiraConfig, {"r": 2, "random_seed": 0}),
    "VeRA": (peft.VeraConfig, {"r": 6, "d_initial": 1.0}),
    "PVeRA": (peft.PveraConfig, {"r": 6, "d_initial": 1.0}),
    "TinyLoRA": (peft.TinyLoraConfig, {"r": 4, "u": 40, "init_weights": "uniform", "init_v_bound": 0.1}),
    "RandLoRA": (peft.RandLoraConfig, {"r": 8, "randlora_alpha": 16}),
    "C3A": (peft.C3AConfig, {"block_size": 8}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 40}),
    "RoAd": (peft.RoadConfig, {"group_size": 8}),
    "GraLoRA": (peft.GraloraConfig, {"r": 4, "alpha": 6}),
    "WaveFT": (peft.WaveFTConfig, {"n_frequency": 40}),
    "PEANuT": (peft.PeanutConfig, {"r": 4}),
    "SuperTuning": (peft.SupertuningConfig, {"sparsity": 0.9}),
    "DEFT": (peft.DeftConfig, {"r": 4}),
    "VBLoRA": (
        peft.VBLoRAConfig,
        {"r": 3, "num_vectors": 20, "vector_length": 8, "init_vector_bank_bound": 0.5, "init_logits_std": 0.3},
    ),
    "UniLoRA": (peft.UniLoraConfig, {"r": 3, "theta_d_length": 200, "init_theta_d_bound": 2.0}),
    "Lily": (peft.LilyConfig, {"r": 4}),
    # Of a single layer, down_proj has fewer outputs than inputs.
    "FRoD": (peft.FrodConfig, {"sparse_rate": 0.05, "progressbar": False, "target_modules": ["q_proj", "up_proj"]}),
    "MiSS": (peft.MissConfig, {"r": 5}),
    "Bat": (peft.MissConfig, {"r": 8, "init_weights": "bat"}),
    "Mini": (peft.MissConfig, {"r": 4, "mini_r": 8, "init_weights": "mini"}),
}
BASE: dict[str, tuple[type[peft.PeftConfig], dict[str, Any]]] = {
    "norms": (peft.LNTuningConfig, {"target_modules": ["input_layernorm", "norm"]}),
    "biases": (peft.BeftConfig, {"target_modules": ["q_proj", "v_proj"]}),
    "tokens": (peft.TrainableTokensConfig, {"target_modules": ["embed_tokens"], "token_indices": [5, 17, 40]}),
}
"""Kinds without adapters."""
LORAS = ("LoRA", "rsLoRA", "DoRA", "PiSSA", "OLoRA", "MiCA")


@dataclasses.dataclass(frozen=True)
class Option:
    """One way of configuring a tuner.

    refused, unsaved: a part of the error on loading, and on writing back; None where it must be equal.
    in_families: further outcomes on loading, by family.
    everywhere: in every family, and not only where the spread puts it.
    also_in: families in which it is for certain.
    stored: fields that are put into the saved config.
    prepare: allocates ranks of PEFT's model, in its `rank_pattern`, before it is saved.
    vocabulary: tokens to which the base is resized. The files then have the embedding and the head.
    """

    tuner: str
    name: str
    fields: Mapping[str, Any]
    refused: str | None = None
    unsaved: str | None = None
    in_families: Mapping[str, str] = dataclasses.field(default_factory=dict)
    everywhere: bool = False
    also_in: Set[str] = frozenset()
    stored: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Any], None] | None = None
    vocabulary: int | None = None

    @property
    def rewrites_base(self) -> bool:
        fields = {**{**TUNERS, **BASE}[self.tuner][1], **self.fields}
        return fields.get("init_lora_weights") in ("pissa", "olora") or self.tuner in ("KaSA", "OSF")

    @property
    def config(self) -> peft.PeftConfig:
        kind, fields = {**TUNERS, **BASE}[self.tuner]
        return kind(**{"target_modules": TWO, **fields, **self.fields})


@dataclasses.dataclass(frozen=True)
class Cell:
    family: str
    option: Option

    @property
    def refused(self) -> str | None:
        otherwise = self.option.refused
        if self.family == "nf4" and self.option.rewrites_base:
            otherwise = "takes its start out of the base, which is quantised here"
        return self.option.in_families.get(self.family, otherwise)

    def __str__(self) -> str:
        return f"{self.family}-{self.option.tuner}-{self.option.name}"


def anywhere(families: Set[str], message: str) -> dict[str, str]:
    return dict.fromkeys(families, message)


TIED_HEAD = anywhere(TIED, "cannot adapt the table of the embedding")
TIED_TABLE = anywhere(TIED, "the embedding, to which the head is tied here")
COMMON: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "two": ({}, {}),
    "all": ({"target_modules": "all-linear"}, {}),
    "expression": ({"target_modules": r".*\.(q|k|v)_proj"}, {}),
    "layer": ({"layers_to_transform": [1]}, {}),
    "layers of a pattern": ({"layers_to_transform": 0, "layers_pattern": "layers"}, {}),
    "excluded": ({"exclude_modules": ["layers.0.mlp.down_proj"]}, {}),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, TIED_HEAD),
    "norms": ({"modules_to_save": ["layernorm", "model.norm"]}, {}),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, TIED_TABLE),
    "rows": ({"trainable_token_indices": [32, 17]}, {}),
}
"""What every tuner whose config has the fields can do: the fields, and the outcome in families where it is refused."""
THIN = (
    "LoRA", "rsLoRA", "QA-LoRA", "MiCA", "AdaLoRA", "LoHa", "DeLoRA", "VeRA", "TinyLoRA", "GraLoRA", "VBLoRA",
    "UniLoRA", "MiSS", "Mini", "BD-LoRA", "VeLoRA",
)  # fmt: skip
"""Tuners whose change is a product of thin factors, so that they also adapt a head that is tied."""
LAYERS = {f"model.layers.{i}.self_attn.q_proj": 2 + i for i in range(2)}


def allocation(*flags: str) -> Callable[[Any], None]:
    """Ranks that AdaLoRA's allocator leaves to q_proj, and to down_proj, of layers 0 and 1."""

    def prepare(model: Any) -> None:
        names = [
            f"model.layers.{i}.{name}.lora_E.default" for name in ("self_attn.q_proj", "mlp.down_proj") for i in (0, 1)
        ]
        model.peft_config["default"].rank_pattern = {
            name: [flag == "1" for flag in row] for name, row in zip(names, flags, strict=True)
        }

    return prepare


ALLOCATED = allocation("0111", "1010", "1111", "0100")


def of_loras() -> Iterator[Option]:
    """What plain LoRA and its relatives share."""
    for tuner in LORAS:
        yield Option(tuner, "ranks", {"rank_pattern": {"q_proj": 2}})
        yield Option(tuner, "alphas", {"alpha_pattern": {"down_proj": 5}})
        yield Option(
            tuner, "ragged", {"rank_pattern": LAYERS, "alpha_pattern": {r"^model.layers.1.mlp.down_proj": 2.5}}
        )
        yield Option(
            tuner,
            "patterns in a layer",
            {"rank_pattern": {"q_proj": 3}, "alpha_pattern": LAYERS, "layers_to_transform": [1]},
        )
        yield Option(
            tuner,
            "tied embedding",
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            everywhere=tuner == "LoRA",
        )
        yield Option(tuner, "dropout", {"lora_dropout": 0.25})


SINGLE: dict[str, dict[str, dict[str, Any]]] = {
    "LoRA": {
        "wide": {"r": 40},
        "adapted embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "alpha 0.5": {"lora_alpha": 0.5},
        "alpha 7 of 3": {"r": 3, "lora_alpha": 7},
        "negative alpha": {"lora_alpha": -3},
        "gaussian": {"init_lora_weights": "gaussian"},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "eva": {"init_lora_weights": "eva", "rank_pattern": LAYERS, "alpha_pattern": {k: 6 for k in LAYERS}},
        "saved k_proj": {"modules_to_save": ["k_proj"]},
        "layers at both ends": {"layers_to_transform": [0, -1]},
    },
    "rsLoRA": {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}, "r 3": {"r": 3}},
    "DoRA": {"r 1": {"r": 1}, "alpha 0.5": {"lora_alpha": 0.5}},
    "PiSSA": {"r 1": {"r": 1}, "alpha 7 of 3": {"r": 3, "lora_alpha": 7}},
    "OLoRA": {"r 1": {"r": 1}, "alpha 7 of 3": {"r": 3, "lora_alpha": 7}},
    "QA-LoRA": {
        "group 2": {"qalora_group_size": 2},
        "group 16": {"qalora_group_size": 16},
        "ranks": {"rank_pattern": {"q_proj": 2}},
        "alphas": {"alpha_pattern": LAYERS},
        "rsLoRA": {"use_rslora": True},
        "dropout": {"lora_dropout": 0.25},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "wide": {"r": 40},
    },
    "aLoRA": {
        "one token": {"alora_invocation_tokens": [40]},
        "the whole of a text": {"alora_invocation_tokens": [52]},
        "ranks": {"rank_pattern": {"q_proj": 2}},
        "ragged": {"rank_pattern": LAYERS, "alpha_pattern": {"down_proj": 5}},
        "rsLoRA": {"use_rslora": True},
        "dropout": {"lora_dropout": 0.25},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "wide": {"r": 40},
    },
    "BD-LoRA": {
        "four blocks": {"use_bdlora": peft.BdLoraConfig(IN, OUT, nblocks=4)},
        "one block": {"use_bdlora": peft.BdLoraConfig(IN, OUT)},
        "the other sides": {"use_bdlora": peft.BdLoraConfig(OUT, IN, nblocks=2)},
        "some layers": {
            "use_bdlora": peft.BdLoraConfig(["layers.1.mlp"], ["0.self_attn.q"], nblocks=2, match_strict=False)
        },
        "ranks": {"rank_pattern": {"q_proj": 2}},
        "alphas": {"alpha_pattern": LAYERS},
        "rsLoRA": {"use_rslora": True},
        "dropout": {"lora_dropout": 0.25},
        "wide": {"r": 40},
    },
    "MonteCLoRA": {
        "one sample": {"monteclora_config": peft.MontecloraConfig(num_samples=1, buffer_size=2)},
        "regularised": {
            "monteclora_config": peft.MontecloraConfig(use_entropy=True, kl_loss_weight=0.1, buffer_size=2)
        },
        "ranks": {"rank_pattern": {"q_proj": 2}},
        "alphas": {"alpha_pattern": LAYERS},
        "rsLoRA": {"use_rslora": True},
        "dropout": {"lora_dropout": 0.25},
        "wide": {"r": 40},
    },
    "VeLoRA": {
        "of batches": {"velora_config": peft.VeloraConfig()},
        "of the first batch": {"velora_config": peft.VeloraConfig(num_groups=7, init_type="batch_average_once")},
        "scaled": {"velora_config": peft.VeloraConfig(num_groups=1, scale=0.3, init_type="random")},
        "ranks": {"rank_pattern": {"q_proj": 2}},
        "alphas": {"alpha_pattern": LAYERS},
        "rsLoRA": {"use_rslora": True},
        "dropout": {"lora_dropout": 0.25},
        "wide": {"r": 40},
    },
    "MiCA": {"r 1": {"r": 1}, "alpha 7 of 3": {"r": 3, "lora_alpha": 7}},
    "AdaLoRA": {
        "wide": {"init_r": 40},
        "alpha 2.5": {"lora_alpha": 2.5},
        "alpha 0": {"lora_alpha": 0},
        "ignored alphas": {"alpha_pattern": {"q_proj": 40}},
        "ignored rsLoRA": {"use_rslora": True},
        "dropout": {"lora_dropout": 0.25},
    },
    "IA3": {
        "feedforward": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "expression of feedforward": {"feedforward_modules": r".*\.layers\.1\.mlp\.\w+"},
        "both sides": {"target_modules": ["q_proj", "k_proj"], "feedforward_modules": ["q_proj"]},
    },
    "LoHa": {
        "ranks": {"rank_pattern": {"q_proj": 2}},
        "alphas": {"alpha_pattern": {"layers.1.mlp.down_proj": 2.5}},
        "patterns in a layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": LAYERS, "layers_to_transform": [1]},
        "wide": {"r": 40},
        "alpha 0.5": {"alpha": 0.5},
        "dropout": {"rank_dropout": 0.5, "module_dropout": 0.5},
        "convolutions": {"use_effective_conv2d": True},
    },
    "LoKr": {
        **{f"factor {factor}": {"decompose_factor": factor} for factor in (2, 3, 7, 16, 64)},
        "both": {"r": 1, "decompose_both": True},
        "whole": {"r": 6, "decompose_factor": 4},
        "lycoris": {"init_weights": "lycoris"},
        "ranks": {"rank_pattern": {"q_proj": 1}, "decompose_factor": 2},
        "alphas": {"alpha_pattern": {"layers.1.mlp.down_proj": 7}},
        "patterns in a layer": {"rank_pattern": {"q_proj": 1}, "alpha_pattern": LAYERS, "layers_to_transform": [1]},
        "wide": {"r": 40},
        "dropout": {"rank_dropout": 0.5, "module_dropout": 0.5, "rank_dropout_scale": True},
        "convolutions": {"use_effective_conv2d": True},
    },
    "HiRA": {
        "ignored ranks": {"rank_pattern": {"q_proj": 2}},
        "gaussian": {"init_weights": "gaussian"},
        "dropout": {"hira_dropout": 0.25},
        "wide": {"r": 40},
    },
    "GLoRA": {
        "vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        "constants": {"config_A_B": "constant"},
        "no bias": {"config_C": "none", "config_D_E": "none"},
        "random start": {"init_weights": False},
        "wide": {"r": 40},
    },
    "DeLoRA": {
        "ranks": {"rank_pattern": {"q_proj": 2}},
        "strengths": {"lambda_pattern": {"q_proj": 7}},
        "patterns in a layer": {"rank_pattern": {"q_proj": 2}, "lambda_pattern": LAYERS, "layers_to_transform": [1]},
        "dropout": {"module_dropout": 0.25},
        "wide": {"r": 40},
    },
    "OFT": {
        "block 2": {"oft_block_size": 2},
        "block 16": {"oft_block_size": 16},
        "shared": {"block_share": True},
        "exact": {"use_cayley_neumann": False},
        "exact and shared": {"use_cayley_neumann": False, "block_share": True},
        **{f"{terms} terms": {"num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 6)},
        "dropout": {"module_dropout": 0.5},
    },
    "BOFT": {
        "block 4": {"boft_block_size": 4},
        "two factors": {"boft_n_butterfly_factor": 2},
        "three factors": {"boft_block_size": 4, "boft_n_butterfly_factor": 3},
        "blocks by their number": {"boft_block_size": 0, "boft_block_num": 4},
        "factors of blocks by their number": {
            "boft_block_size": 0,
            "boft_block_num": 8,
            "boft_n_butterfly_factor": 3,
        },
        "random start": {"init_weights": False},
        "dropout": {"boft_dropout": 0.5},
    },
    "OSF": {
        "half": {"effective_rank": None},
        "a number": {"effective_rank": 24},
        "ranks": {"rank_pattern": {"q_proj": 8}},
        "ranks of a layer and shares": {"rank_pattern": {"layers.1.*q_proj": 8, "down": 0.5}},
        "ranks by an expression": {"effective_rank": 0.25, "rank_pattern": {r"^model.layers.1|v_proj": 24}},
        "random start": {"init_weights": False},
    },
    "HRA": {"r 1": {"r": 1}, "r 5": {"r": 5}, "wide": {"r": 40}},
    "SHiRA": {"r 1": {"r": 1}, "seed 3": {"random_seed": 3}, "random start": {"init_weights": False}},
    "VeRA": {
        "wide": {"r": 40},
        "d 0.1": {"d_initial": 0.1},
        "another seed": {"projection_prng_key": 7},
        "dropout": {"vera_dropout": 0.25},
    },
    "PVeRA": {
        "wide": {"r": 40},
        "d 0.1": {"d_initial": 0.1},
        "another seed": {"projection_prng_key": 7},
        "a seed of draws": {"generator_seed": 7},
        "random start": {"init_weights": False},
        "dropout": {"pvera_dropout": 0.25},
    },
    "TinyLoRA": {
        "u 1": {"u": 1, "init_v_bound": 1.0},
        "r 1": {"r": 1},
        "another seed": {"projection_seed": 7},
        "dropout": {"tinylora_dropout": 0.25},
        "wide": {"r": 40},
    },
    "RandLoRA": {
        "sparse": {"sparse": True},
        "very sparse": {"very_sparse": True},
        "r 5": {"r": 5},
        "wide": {"r": 40},
        "strong": {"randlora_alpha": 160},
        "dropout": {"randlora_dropout": 0.25},
    },
    "C3A": {
        "block 1": {"block_size": 1},
        "block 16": {"block_size": 16},
        "gaussian": {"init_weights": "gaussian"},
        "blocks": {"block_size_pattern": {"q_proj": 16}},
        "blocks of a layer": {"block_size_pattern": {"model.layers.1.self_attn.q_proj": 4}},
        "blocks by the end of a name": {"block_size_pattern": {"proj": 16}},
    },
    "FourierFT": {
        "scale 1.3": {"scaling": 1.3, "n_frequency": 1000},
        "another seed": {"random_loc_seed": 4294967295},
        "start at zero": {"init_weights": True},
        "every place": {"n_frequency": 1024, "scaling": 20.0, "target_modules": ["q_proj"]},
        "frequencies": {"n_frequency_pattern": {"q_proj": 7}},
        "frequencies of a layer": {"n_frequency_pattern": {"model.layers.1.self_attn.q_proj": 4}},
        "frequencies by the end of a name": {"n_frequency_pattern": {"proj": 16}},
    },
    "RoAd": {
        "pairs": {"group_size": 2},
        "one group": {"group_size": 32},
        "random start": {"init_weights": False},
        "by output": {"variant": "road_2"},
        "by term": {"variant": "road_4"},
    },
    "GraLoRA": {
        "one block": {"gralora_k": 1},
        "four blocks": {"gralora_k": 4},
        "hybrid": {"hybrid_r": 2},
        "alpha 0.5": {"alpha": 0.5},
        "alpha 7 of 3": {"r": 2, "hybrid_r": 1, "alpha": 7},
        "random start": {"init_weights": False},
        "dropout": {"gralora_dropout": 0.25, "hybrid_r": 1},
        "wide": {"r": 40},
    },
    "WaveFT": {
        "scale 0.3": {"scaling": 0.3},
        "another seed": {"random_loc_seed": 0},
        "random start": {"init_weights": False},
        "every place": {"n_frequency": 1024, "target_modules": ["q_proj"]},
        "frequencies": {"n_frequency_pattern": {"q_proj": 7}},
        "frequencies by a part of a name": {"n_frequency_pattern": {"layers.1.self_attn.q_proj": 4}},
        "without a transform": {"use_idwt": False},
        "a wavelet without a transform": {"use_idwt": False, "wavelet_family": "db2"},
    },
    "PEANuT": {
        "deep": {"depth": 3},
        "silu": {"act_fn": "silu", "depth": 1},
        "gelu": {"act_fn": "gelu"},
        "scale 0.3": {"scaling": 0.3},
        "random start": {"init_weights": False},
        "wide": {"r": 40},
    },
    "SuperTuning": {
        "dense": {"sparsity": 0.0},
        "smallest": {"select_top": False},
        "hybrid": {"r": 3},
        "hybrid, alpha 2.5": {"r": 3, "lora_alpha": 2.5, "lora_dropout": 0.25},
        "random start": {"init_weights": False, "r": 2},
        "wide": {"r": 40},
    },
    "DEFT": {
        "qr": {"decomposition_method": "qr"},
        "alpha 7 of 3": {"r": 3, "alpha": 7},
        "random start": {"init_weights": False, "init_scale": 2.0},
        "dropout": {"deft_dropout": 0.25},
        "wide": {"r": 40},
    },
    "VBLoRA": {
        "chosen": {"save_only_topk_weights": True},
        "chosen, one": {"save_only_topk_weights": True, "topk": 1},
        "chosen, all": {"save_only_topk_weights": True, "topk": 20},
        "chosen of many": {"save_only_topk_weights": True, "num_vectors": 300},
        "one": {"topk": 1},
        "dropout": {"vblora_dropout": 0.25},
        "wide": {"r": 40},
    },
    "UniLoRA": {
        "indices": {"save_indices": True},
        "another seed": {"proj_seed": 7},
        "a vector longer than all factors": {"theta_d_length": 3000},
        "a random start": {"init_weights": False},
        "one entry": {"theta_d_length": 1},
        "dropout": {"unilora_dropout": 0.25, "save_indices": True},
        "wide": {"r": 40},
    },
    "FRoD": {
        "one entry": {"sparse_rate": 1e-6},
        "every entry": {"sparse_rate": 1.0},
        "another ridge": {"regularization_alpha": 0.1},
        "another seed": {"projection_prng_key": 7},
        "random start": {"init_weights": False},
        "dropout": {"frod_dropout": 0.25},
        "base on the host": {"runtime_offload_base_weight": True},
    },
    "Lily": {
        "four experts": {"num_B": 4},
        "layers that share": {"stride_A": 2},
        "more than there are": {"stride_A": 5},
        "scale 0.3": {"scaling": 0.3},
        "random start": {"init_weights": False},
        "wide": {"r": 40},
    },
    "MiSS": {
        "r 32": {"r": 32},
        "r 1": {"r": 1},
        "random start": {"init_weights": False},
        "dropout": {"miss_dropout": 0.25},
    },
    "Bat": {"r 4": {"r": 4}, "r 16": {"r": 16}},
    "Mini": {"r 8 of 4": {"r": 8, "mini_r": 4}, "r 5 of 16": {"r": 5, "mini_r": 16}},
}
"""Options of one tuner, which are equal unless `UNEQUAL` says otherwise."""


def of_one_tuner() -> Iterator[Option]:
    for tuner, options in SINGLE.items():
        for name, fields in options.items():
            outcome = {"also_in": BIASED} if tuner == "GLoRA" else {}
            yield Option(tuner, name, fields, **outcome, **UNEQUAL.get((tuner, name), {}))


TOO_WIDE = anywhere(FAMILIES.keys() - {"nf4"}, "rank must lie in")
"""The model with NF4 weights alone has sides of 40 and more."""
UNEQUAL: dict[tuple[str, str], dict[str, Any]] = {
    ("BD-LoRA", "wide"): {"in_families": TOO_WIDE},
    ("GraLoRA", "wide"): {"in_families": TOO_WIDE},
    ("SuperTuning", "wide"): {"in_families": TOO_WIDE},
    ("VBLoRA", "wide"): {"in_families": TOO_WIDE},
    ("LoRA", "saved k_proj"): {"in_families": {"nf4": "but it is quantised in this model"}, "everywhere": True},
}


def of_biases() -> Iterator[Option]:
    """Biases that are trained beside an adapter, wherever there are any."""
    for tuner, (kind, _) in TUNERS.items():
        if "bias" in {field.name for field in dataclasses.fields(kind)}:
            yield Option(tuner, "all biases", {"bias": "all"}, also_in=BIASED)
            # PEFT reads the end of the value, but Uni-LoRA's config takes its own alone.
            value = "unilora_only" if kind is peft.UniLoraConfig else "lora_only"
            yield Option(tuner, "biases of the adapted", {"bias": value}, also_in=BIASED)
    yield Option("LoRA", "biases of a layer", {"bias": "lora_only", "layers_to_transform": [1]}, also_in=BIASED)
    yield Option(
        "LoRA", "biases beside norms", {"bias": "all", "modules_to_save": ["layernorm", "model.norm"]}, also_in=BIASED
    )
    yield Option(
        "LoRA",
        "a bias of a saved module",
        {"bias": "all", "modules_to_save": ["k_proj"]},
        in_families=anywhere(BIASED, "k_proj of modules_to_save has a bias, which comes twice"),
        also_in=BIASED,
    )
    unbiased = anywhere(FAMILIES.keys() - BIASED, "which has no bias to add it to")
    for name, fields in {
        "lora_bias": {},
        "lora_bias and its scale": {"r": 3, "lora_alpha": 7, "use_rslora": True},
        "lora_bias beside the base's": {"bias": "lora_only"},
    }.items():
        only = {"target_modules": ["q_proj"], "lora_bias": True}
        yield Option("LoRA", name, {**only, **fields}, in_families=unbiased, also_in=BIASED)


def refused() -> Iterator[Option]:
    """What is refused by the name of its field, or of a tensor."""
    by_field: list[tuple[str, dict[str, Any], str]] = [
        ("QA-LoRA", {"qalora_group_size": 1}, "qalora_group_size=1 must be 2 or more"),
        ("QA-LoRA", {"init_lora_weights": "olora"}, "use_qalora=True is not supported: beside a method other"),
        ("aLoRA", {"init_lora_weights": "olora"}, "[32, 17] is not supported: beside a method other than LoRA"),
        ("GLoRA", {"config_A_B": "none"}, "config_A_B='none'"),
        ("LoRA", {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ("LoRA", {"target_parameters": ["up_proj.weight"]}, "target_parameters"),
        ("OFT", {"oft_block_size": 0, "r": 64}, "block must be at least 2"),
        ("OFT", {"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms=1"),
        ("OFT", {"coft": True, "eps": -1.0}, "eps must be above 0"),
        ("BOFT", {"boft_block_size": 0, "boft_block_num": 32, "target_modules": ["q_proj"]}, "block must be"),
        ("SuperTuning", {"save_precomputed_indices": False}, "save_precomputed_indices=False"),
        ("DEFT", {"para": True}, "option para=True"),
        ("OSF", {"effective_rank": 32}, "kept must leave 1..31"),
        ("HRA", {"apply_GS": True}, "apply_GS"),
        ("VeRA", {"save_projection": False}, "save_projection=False"),
        ("PVeRA", {"save_projection": False}, "save_projection=False"),
        ("PVeRA", {"sample_at_inference": True}, "sample_at_inference=True"),
        ("TinyLoRA", {"save_projection": False}, "save_projection=False"),
        ("TinyLoRA", {"weight_tying": 0.5}, "weight_tying=0.5"),
        ("PEANuT", {"act_fn": "tanh"}, "act_fn='tanh'"),
        ("PEANuT", {"depth": 17}, "depth must be a whole number in 0..16"),
        ("WaveFT", {"wavelet_family": "sym2"}, "wavelet_family='sym2'"),
        ("WaveFT", {"proportional_parameters": True}, "proportional_parameters"),
        ("RandLoRA", {"save_projection": False}, "save_projection=False"),
        ("FRoD", {"save_projection": False}, "save_projection=False"),
        ("FRoD", {"sparse_rate": 0.0}, "sparse_rate must lie in (0, 1]"),
        ("FRoD", {"target_modules": ["down_proj"], "layers_to_transform": [1]}, "outputs together, fewer than their"),
    ]
    for tuner, fields, message in by_field:
        yield Option(tuner, " ".join(fields), fields, refused=message, in_families={"nf4": message})
    for tuner, field in BESIDE_LORA.items():
        yield Option(tuner, "of DoRA", {}, refused=f"option {field}=", stored={"use_dora": True})


BESIDE_LORA = {"BD-LoRA": "use_bdlora", "VeLoRA": "velora_config", "MonteCLoRA": "monteclora_config"}
"""Variants that PEFT refuses beside DoRA, as a file may have them."""
LATER: list[tuple[str, dict[str, Any]]] = [
    *(("OFT", {"oft_block_size": 0, "r": blocks}) for blocks in (1, 4, 5, 12)),
    ("OFT", {"oft_block_size": 0, "r": 4, "block_share": True}),
    *(("OFT", {"oft_block_size": size}) for size in (7, 12, 100)),
    ("OFT", {"oft_block_size": 12, "block_share": True}),
    ("OFT", {"coft": True, "eps": 0.5}),
    ("OFT", {"coft": True, "eps": 0.8, "block_share": True}),
    ("OFT", {"coft": True, "eps": 0.8, "use_cayley_neumann": False, "oft_block_size": 0, "r": 4}),
    ("OFT", {"coft": True, "eps": 1000.0}),
    ("HRA", {"r": 41}),
    ("DEFT", {"r": 40, "decomposition_method": "qr"}),
]
"""Options that are equal, too."""


def of_the_base() -> Iterator[Option]:
    """Kinds without adapters."""
    no_bias = anywhere(FAMILIES.keys() - BIASED, "only projections with a bias can have it")
    yield Option("norms", "two", {})
    yield Option("norms", "excluded", {"exclude_modules": ["layers.0.input_layernorm"]})
    yield Option("biases", "two", {}, in_families=no_bias, also_in=BIASED)
    yield Option("tokens", "three", {})
    for tuner in ("norms", "biases"):
        saved = {"modules_to_save": ["lm_head"]}
        yield Option(tuner, "more modules", {}, "option modules_to_save", stored=saved)


def of_rows() -> Iterator[Option]:
    """Rows of the embedding and of the head that are trained beside an adapter."""
    field = "trainable_token_indices"
    yield Option("LoRA", "rows everywhere", {field: [40, 5, 17]}, everywhere=True)
    yield Option("LoRA", "rows by name", {field: {"embed_tokens": [17]}, "ensure_weight_tying": True}, also_in=TIED)
    yield Option("LoRA", "rows of both", {field: dict.fromkeys(["embed_tokens", "lm_head"], [32, 17])}, also_in=TIED)
    families = anywhere(TIED, "the rows of lm_head are not those of the embedding")
    yield Option("LoRA", "rows of the head", {field: {"lm_head": [3, 5]}}, in_families=families, also_in=TIED)
    yield Option("LoRA", "rows beside an adapted head", {field: [32], "target_modules": ["lm_head"]}, also_in=TIED)
    yield Option("LoRA", "rows beside norms", {field: [32, 17], "modules_to_save": ["layernorm"]})
    yield Option("LoRA", "rows beside biases", {field: [32, 17], "bias": "all"}, also_in=BIASED)
    yield Option("LoRA", "rows and copies of layers", {field: [32, 17], "layer_replication": [[0, 2], [1, 2]]})
    yield Option("LoRA", "no rows", {field: {}})


def of_copies() -> Iterator[Option]:
    """Adapters of a model that PEFT makes of copies of the base's layers."""
    for tuner in ("LoRA", "DoRA", "QA-LoRA", "aLoRA", "BD-LoRA", "MonteCLoRA", "VeLoRA", "MiCA", "AdaLoRA"):
        yield Option(tuner, "copies of layers", {"layer_replication": [[0, 2], [1, 2], [0, 1]]})
    saved = {"layer_replication": [[0, 1], [0, 2]], "modules_to_save": ["layernorm"], "layers_to_transform": [0, 2]}
    yield Option("LoRA", "norms of copies", saved)
    yield Option("LoRA", "fewer layers", {"layer_replication": [[1, 2]]})
    for tuner in ("PiSSA", "OLoRA", "KaSA"):
        refused = {"refused": "share one weight", "in_families": {"nf4": "share one weight"}}
        yield Option(tuner, "copies of layers", {"layer_replication": [[0, 2], [1, 2]]}, **refused)


def of_other_vocabularies() -> Iterator[Option]:
    """Adapters of a resized base, of which the files have the embedding and the head."""
    field = "trainable_token_indices"
    for tuner in TUNERS:
        yield Option(tuner, "more tokens", {}, vocabulary=70, everywhere=tuner == "LoRA")
    yield Option("LoRA", "fewer tokens", {}, vocabulary=63, also_in=TIED | {"nf4"})
    yield Option("LoRA", "as many tokens", {}, vocabulary=64, also_in=TIED)
    yield Option("LoRA", "rows of more tokens", {field: [68, 17]}, vocabulary=70, also_in=TIED | {"nf4"})
    tables = {"modules_to_save": ["embed_tokens", "lm_head"]}
    apart = anywhere(TIED, "differs from the embedding, to which the head is tied here")
    yield Option("LoRA", "both saved of more tokens", tables, vocabulary=70, in_families=apart, also_in=TIED)
    embedding = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    yield Option("LoRA", "embedding saved of more tokens", embedding, vocabulary=70, also_in=TIED)
    yield Option("LoRA", "biases and more tokens", {"bias": "all"}, vocabulary=70, also_in=BIASED)
    copied = {"layer_replication": [[0, 2], [1, 2]]}
    yield Option("LoRA", "more tokens and copies of layers", copied, vocabulary=70, also_in=TIED)
    yield Option("norms", "more tokens", {}, vocabulary=70, also_in=TIED)
    yield Option("tokens", "more tokens", {"token_indices": [68, 17]}, vocabulary=70, also_in=TIED)


STORED: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "base_model_name_or_path": "another/model",
    "revision": "another",
    "task_type": "CAUSAL_LM",
    "fan_in_fan_out": True,
    "megatron_core": "another.core",
    "qalora_group_size": 8,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 1.5},
    "loftq_config": {"loftq_bits": 8},
    "lora_ga_config": {"stable_gamma": 8},
    "mask_type": "another",
    "target_svd_config": {"q_proj": 3},
}
"""Values of fields that change nothing, once the adapter is saved."""
BUDGET: dict[str, Any] = {
    "r": 5,
    "target_r": 3,
    "tinit": 1,
    "tfinal": 1,
    "deltaT": 2,
    "beta1": 0.5,
    "beta2": 0.5,
    "orth_reg_weight": 0.1,
    "total_step": 50,
}


def of_no_consequence() -> Iterator[Option]:
    for tuner, (kind, _) in {**TUNERS, **BASE}.items():
        stored = {field.name: STORED[field.name] for field in dataclasses.fields(kind) if field.name in STORED}
        only = {"in_families": anywhere(FAMILIES.keys() - BIASED, "only projections with a bias"), "also_in": BIASED}
        yield Option(tuner, "of no consequence", {}, stored=stored, **(only if tuner == "biases" else {}))
        if "init_weights" in {field.name for field in dataclasses.fields(kind)} and tuner in STARTS:
            start = {} if tuner != "biases" else only
            yield Option(tuner, "another start", {"init_weights": False}, **start)
    yield Option("IA3", "another start", {"init_ia3_weights": False})
    yield Option("AdaLoRA", "another start", {"init_lora_weights": False})
    yield Option("AdaLoRA", "budget", {}, stored=BUDGET)
    yield Option("RandLoRA", "another seed", {"projection_prng_key": 7})
    yield Option("OFT", "old version", {}, "before PEFT 0.18", stored={"peft_version": "0.17.1"})


STARTS = ("LoHa", "OFT", "VeRA", "HRA", "RandLoRA", "DeLoRA", "biases", "tokens")
"""Tuners whose start is not among the options above."""


def options() -> Iterator[Option]:
    for (tuner, (kind, _)), (name, (fields, in_families)) in itertools.product(TUNERS.items(), COMMON.items()):
        if fields.keys() <= {field.name for field in dataclasses.fields(kind)}:
            outcomes = {} if name == "head" and tuner in THIN else in_families
            yield Option(tuner, name, fields, in_families=outcomes, everywhere=tuner == "IA3" and name == "all")
    yield from of_loras()
    yield from of_one_tuner()
    yield Option("AdaLoRA", "allocated", {}, prepare=ALLOCATED)
    yield Option("AdaLoRA", "layers without a rank", {}, prepare=allocation("0000", "1010", "1111", "0000"))
    yield Option("AdaLoRA", "a kernel without a rank", {}, prepare=allocation("0000", "0000", "1101", "1110"))
    zero = {"lora_alpha": 0}
    yield Option("AdaLoRA", "ranks as scales", zero, unsaved="has one for all", prepare=ALLOCATED)
    yield from of_biases()
    yield from refused()
    yield from of_the_base()
    yield from of_no_consequence()
    for tuner, fields in LATER:
        yield Option(tuner, " ".join(f"{name} {value}" for name, value in fields.items()), fields)
    yield from of_copies()
    yield from of_rows()
    yield from of_other_vocabularies()


OPTIONS = list(options())
SPREAD = 7
"""Every option meets plain Llama, and another family this many options apart."""


def cells() -> Iterator[Cell]:
    for (shift, family), (number, option) in itertools.product(enumerate(FAMILIES), enumerate(OPTIONS)):
        if family == "llama" or option.everywhere or family in option.also_in or (number + shift) % SPREAD == 0:
            yield Cell(family, option)


CELLS = list(cells())
