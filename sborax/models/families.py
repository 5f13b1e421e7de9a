"""The families of decoders: one table says how each differs from LLaMA."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from sborax.adapters.core import SboraxError
from sborax.config.classes import instances, load_plugins
from sborax.models.decoder import AbstractDecoder

UNEQUAL = "sborax_"
"""Prefix of the `model_type` of a decoder whose layers differ in size, so that transformers refuses it by name."""

OFF = (False, None)
INERT = frozenset(
    """
    architectures auto_map chunk_size_feed_forward dtype id2label initializer_range is_decoder is_llama_config label2id
    max_sequence_length name_or_path output_attentions output_hidden_states pretraining_tp return_dict tokenizer_class
    torch_dtype transformers_version transformers.js_config unk_token_id use_cache
    """.split()
)
"""Keys of `config.json` that change no model's function. Keys that begin with an underscore change none either."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, 0, None),
    "partial_rotary_factor": (1.0, 1, None),
    "quantization_config": (None,),
    "rope_interleaved": OFF,
    "is_encoder_decoder": OFF,
    "add_cross_attention": OFF,
    "layer_types": ("full_attention", None),
}
"""Keys with their supported values. Other values ask for something that no family does here, also within a list."""

CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
OPTIONAL = CAPS | {
    *("attention_bias", "mlp_bias", "sliding_window", "layer_types", "query_pre_attn_scalar", "rope_local_base_freq")
}
"""Fields of a config that not every family has."""

Z_LOSS = "router_z_loss_coef"
"""The key of the share of a router's z-loss. It may be in the config of every family with experts."""


@dataclasses.dataclass(frozen=True)
class ExpertKeys:
    """Where the files of a family with sparse layers say what `config.Experts` holds.

    - count: keys of the number of experts: the first that a file has counts, and the first is written.
    - intermediate_size: the key of an expert's inner width.
    - shared: the key of the inner width of the expert that all tokens pass; None if there is none.
    - normalised: weights of the chosen experts always add up to 1; None if key `norm_topk_prob` says so.
    """

    count: tuple[str, ...] = ("num_experts",)
    intermediate_size: str = "moe_intermediate_size"
    shared: str | None = None
    normalised: bool | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Every key that is read."""
        named = {*self.count, self.intermediate_size, "num_experts_per_tok", "router_aux_loss_coef", Z_LOSS}
        named |= {self.shared} if self.shared else set()
        return frozenset(named if self.normalised is not None else named | {"norm_topk_prob"})


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of a family differ from LLaMA, and how their files say so.

    A subclass of your own, with defaults for the fields and a `model_type`, adds a family to those of the table.

    - causal_lm: the class that transformers builds.
    - optional: the fields in `OPTIONAL` that its `config.json` has; the others are false.
    - qkv_bias: q, k and v have biases, whatever `attention_bias` says; o has none.
    - qk_norm: an RMSNorm on q and k before they are rotated: "head", on each head; "projection", on all heads together.
    - centred: norms multiply by 1 + weight.
    - scaled: vectors of the embedding are multiplied by sqrt(hidden_size); those of a tied head are not.
    - activations: of the gated unit: the one that is computed, then other names that mean it.
    - defaults: transformers' values of keys that a file leaves out.
    - neutral, inert: further entries of `NEUTRAL` and `INERT` for this family.
    - gguf: llama.cpp's name of the architecture; None if GGUF files are not read.
    - interleaved: GGUF files rotate neighbouring features together.
    - sandwich: norms on the outputs of attention and of the MLP, too.
    - full_every: of how many layers one sees all tokens, if `layer_types` is left out; the others have a window.
    - full_every_key: the key of that number; empty if files cannot say it.
    - windowed: every layer has the window `sliding_window`.
    - ropes: the kinds of rotary embeddings that its files may name.
    - partial: files may say the share of a head's features that is rotated (`partial_rotary_factor`).
    - fused: modules of its files that hold several projections, output after output, and the names of these.
    - experts: the MLPs are mixtures of experts, and the keys that say how large; None for dense ones.
    - files: names of tensors in files of safetensors, by path of our leaf, where they are not those of LLaMA.
    - decoder: the class of the module; None for `Llama`, which reads the fields above.
    """

    model_type: ClassVar[str] = ""
    causal_lm: str
    optional: frozenset[str] = frozenset()
    qkv_bias: bool = False
    qk_norm: Literal["", "head", "projection"] = ""
    centred: bool = False
    scaled: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    gguf: str | None = None
    interleaved: bool = False
    sandwich: bool = False
    full_every: int = 1
    full_every_key: str = ""
    windowed: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "llama3")
    partial: bool = False
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    experts: ExpertKeys | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decoder: type[AbstractDecoder] | None = None

    @property
    def keys(self) -> Mapping[str, tuple[Any, ...]]:
        """Every key that is supported with some values alone, with these values."""
        keys = {"hidden_act": self.activations, **NEUTRAL, **self.neutral}
        return {key: values for key, values in keys.items() if key != "partial_rotary_factor" or not self.partial}


_QWEN = {"use_sliding_window": OFF, "use_mrope": OFF, "mlp_bias": OFF}
# A window that `use_sliding_window` switches off.
_WINDOW = frozenset({"sliding_window", "max_window_layers"})

# The shares of the router's losses are read; transformers returns the losses themselves if `output_router_logits`.
_LOGITS = frozenset({"output_router_logits"})
_AUXILIARY = {"router_aux_loss_coef": 0.001}
_QWEN_EXPERTS = {"intermediate_size": 5632, **_AUXILIARY}
_SPARSE_EVERYWHERE = {"decoder_sparse_step": (1,), "mlp_only_layers": (None,)}
_SPARSE = "model.layers.{layer}.block_sparse_moe"

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        optional=frozenset({"attention_bias", "mlp_bias"}),
        inert=frozenset({"sliding_window"}),
        gguf="llama",
        interleaved=True,
    ),
    # Its GGUF files are of architecture llama.
    "mistral": Family(
        "MistralForCausalLM",
        optional=frozenset({"sliding_window"}),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        neutral={"attention_bias": OFF, "mlp_bias": OFF},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        neutral=_QWEN,
        # transformers has these biases whatever a file says.
        inert=_WINDOW | {"attention_bias"},
        gguf="qwen2",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        optional=frozenset({"attention_bias"}),
        qk_norm="head",
        defaults={"head_dim": 128},
        neutral=_QWEN,
        inert=_WINDOW,
        gguf="qwen3",
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        optional=frozenset({"attention_bias"}),
        centred=True,
        scaled=True,
        # Its first files say gelu and mean the approximation by tanh that it was trained with.
        activations=("gelu_pytorch_tanh", "gelu"),
        defaults={
            "head_dim": 256,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        neutral={"hidden_activation": ("gelu_pytorch_tanh", None), "use_bidirectional_attention": OFF, "mlp_bias": OFF},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        optional=CAPS | {"attention_bias", "sliding_window", "layer_types", "query_pre_attn_scalar"},
        centred=True,
        scaled=True,
        activations=("gelu_pytorch_tanh",),
        defaults={
            "head_dim": 256,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        neutral={
            "hidden_activation": ("gelu_pytorch_tanh", None),
            "use_bidirectional_attention": OFF,
            "mlp_bias": OFF,
            "layer_types": ("full_attention", "sliding_attention", None),
        },
        inert=frozenset({"cache_implementation"}),
        sandwich=True,
        full_every=2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        optional=frozenset({"final_logit_softcapping", "attention_bias", "sliding_window", "layer_types"})
        | {"query_pre_attn_scalar", "rope_local_base_freq"},
        qk_norm="head",
        centred=True,
        scaled=True,
        activations=("gelu_pytorch_tanh",),
        defaults={
            "head_dim": 256,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        neutral={
            "hidden_activation": ("gelu_pytorch_tanh", None),
            "use_bidirectional_attention": OFF,
            "mlp_bias": OFF,
            "layer_types": ("full_attention", "sliding_attention", None),
            # transformers has the field and does not use it.
            "attn_logit_softcapping": (None,),
        },
        inert=frozenset({"cache_implementation"}),
        sandwich=True,
        full_every=6,
        full_every_key="sliding_window_pattern",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        optional=frozenset({"sliding_window"}),
        defaults={
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "eos_token_id": 32000,
            "bos_token_id": 1,
        },
        neutral={
            "attention_bias": OFF,
            "mlp_bias": OFF,
            "lm_head_bias": OFF,
            "embd_pdrop": (0.0, 0, None),
            "resid_pdrop": (0.0, 0, None),
            # Options of the code in Phi-4-mini's directory.
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
        },
        windowed=True,
        ropes=("default", "longrope"),
        partial=True,
        fused={"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        optional=frozenset({"sliding_window"}),
        defaults={"num_key_value_heads": 8, "rope_theta": 1_000_000.0, "num_local_experts": 8, "num_experts_per_tok": 2}
        | _AUXILIARY,
        neutral={"attention_bias": OFF, "mlp_bias": OFF, "router_jitter_noise": (0.0, 0)},
        inert=_LOGITS,
        experts=ExpertKeys(("num_local_experts", "num_experts"), "intermediate_size", normalised=True),
        files={
            "layers/mlp/router/weight": f"{_SPARSE}.gate.weight",
            **{
                f"layers/mlp/experts/{name}_proj/kernel": f"{_SPARSE}.experts.{{expert}}.{short}.weight"
                for name, short in {"gate": "w1", "down": "w2", "up": "w3"}.items()
            },
        },
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        optional=frozenset({"attention_bias"}),
        qk_norm="projection",
        defaults={"num_experts": 64, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.01},
        neutral={"clip_qkv": (None,), "mlp_bias": OFF},
        inert=_LOGITS,
        experts=ExpertKeys(("num_experts", "num_local_experts"), "intermediate_size"),
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        qkv_bias=True,
        defaults=_QWEN_EXPERTS
        | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}
        | {"shared_expert_intermediate_size": 5632},
        neutral=_QWEN | _SPARSE_EVERYWHERE | {"qkv_bias": (True,)},
        inert=_WINDOW | _LOGITS | {"attention_bias"},
        experts=ExpertKeys(shared="shared_expert_intermediate_size"),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        optional=frozenset({"attention_bias"}),
        qk_norm="head",
        defaults=_QWEN_EXPERTS | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        neutral=_QWEN | _SPARSE_EVERYWHERE,
        inert=_WINDOW | _LOGITS,
        # transformers writes the first and, since version 5, means the second.
        experts=ExpertKeys(("num_local_experts", "num_experts")),
    ),
}
"""`model_type` -> its family."""

UNSUPPORTED: Mapping[str, str] = {
    "gemma3": "it also reads images; save its text part as gemma3_text, as docs/models.md shows",
}
"""`model_type` -> what to do instead, where there is something."""


def family_of(model_type: Any, where: str = "config") -> Family:
    """The row of a `model_type`, with the prefix `UNEQUAL` or without it. `where` names the file in errors.

    Raises SboraxError for one that is not in the table.
    """
    name = str(model_type).removeprefix(UNEQUAL)
    family = FAMILIES.get(name) or _of_class(name) or (load_plugins() and _of_class(name)) or None
    if family is None:
        hint = UNSUPPORTED.get(name, f"known: {', '.join(FAMILIES)}")
        raise SboraxError(f"{where}: model_type {model_type!r} is not supported; {hint}")
    return family


def _of_class(model_type: str) -> Family | None:
    """The family that a class of the user defines."""
    return next((family for family in instances(Family) if family.model_type == model_type), None)
