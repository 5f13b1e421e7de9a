"""The architecture of a LLaMA-family model, as in its `config.json`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from sborax.adapters.core import SboraxError
from sborax.config.documents import shown
from sborax.models.decoder import AbstractDecoder
from sborax.models.families import CAPS, INERT, NEUTRAL, OPTIONAL, UNEQUAL, Z_LOSS, ExpertKeys, Family, family_of

SLIDING = "sliding_attention"
MOST_LAYERS = 1 << 12
MOST_UNEQUAL = 1 << 8
WIDEST = 1 << 23
WIDEST_HEAD = 1 << 16
MOST_EXPERTS = 1 << 14
"""Bounds of the number of layers, of layers of unequal size (traced one by one), of an axis of an array, of a head,
and of the experts of a layer. They are far beyond real models."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: its base, and how its frequencies are scaled.

    - kind: "default", "linear" (arXiv:2306.15595), "llama3" (arXiv:2407.21783; the fields below `factor`) or "longrope"
      (arXiv:2402.13753; the fields below `original_length`).
    - original_length: context length of the pre-training, in tokens.
    - rotated: the share of a head's features that is rotated: the first ones.
    - short_factor, long_factor: what divides each frequency in sequences up to `original_length`, and in longer ones.
    - attention_factor: what multiplies rotated vectors; None for `LlamaConfig.rope_magnitude`.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    rotated: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None

    def features(self, head_dim: int) -> int:
        """How many features of a head are rotated."""
        return int(head_dim * self.rotated)

    def inverse_frequencies(self, head_dim: int) -> Float32[np.ndarray, " half"]:
        """Angle per position of every pair of features: theta^(-2 i / features), scaled. Radians per token."""
        features = self.features(head_dim)
        exponent = np.arange(0, features, 2, dtype=np.float32) / np.float32(features)
        plain = np.float32(1.0) / np.power(np.float64(self.theta), exponent.astype(np.float64)).astype(np.float32)
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / np.float32(self.factor)
        if self.kind == "longrope":
            return plain / np.asarray(self.short_factor, np.float32)
        wavelength = np.float32(2 * math.pi) / plain
        span = np.float32(self.high_freq_factor - self.low_freq_factor)
        smooth = (np.float32(self.original_length) / wavelength - np.float32(self.low_freq_factor)) / span
        slowed = plain / np.float32(self.factor)
        blend = (np.float32(1.0) - smooth) * slowed + smooth * plain
        long_wave = wavelength > self.original_length / self.low_freq_factor
        short_wave = wavelength < self.original_length / self.high_freq_factor
        return np.where(long_wave, slowed, np.where(short_wave, plain, blend)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of experts in place of a dense MLP. Every expert is a gated unit.

    - count: experts of a layer.
    - chosen: experts that each token passes, those of the largest router probabilities.
    - intermediate_size: the inner width of an expert.
    - shared_size: the inner width of a gated unit for every token, weighed by a sigmoid; 0 for none.
    - normalised: the probabilities of the chosen experts are divided by their sum.
    - balance: the share of the load-balancing loss in the loss of a model whose router is trained.
    - z_loss: the share of the router's z-loss (arXiv:2202.08906) there; its authors take 0.001. Key
      `router_z_loss_coef`, which transformers knows in other families; 0 where a file does not have it.
    """

    count: int
    chosen: int
    intermediate_size: int
    shared_size: int = 0
    normalised: bool = False
    balance: float = 0.001
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.count:
            raise SboraxError(f"num_experts_per_tok must lie in 1..{self.count}, got {self.chosen}")
        if self.count > MOST_EXPERTS or max(self.intermediate_size, self.shared_size) > WIDEST:
            raise SboraxError(f"experts: at most {MOST_EXPERTS:,} of width {WIDEST:,}")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of a LLaMA-family decoder. The names are those of Hugging Face's `config.json`.

    - attention_bias: q, k, v and o have biases. In some families q, k and v always have them: see `qkv_bias`.
    - sliding_window: how many tokens back a layer sees, where `layer_types` says so. Without `layer_types`, it bounds
      the length of sequences, whose attention is then plainly causal; None for no bound. In some families every layer
      has the window: see `windows`.
    - layer_types: "full_attention" or "sliding_attention" for every layer; empty for plainly causal attention.
    - rope_local_base_freq: the base of the rotary embedding in layers with windows; None for that of the others.
    - query_pre_attn_scalar: scores are divided by its square root; None for that of head_dim.
    - attn_logit_softcapping, final_logit_softcapping: scores and logits x become cap tanh(x / cap); None for no cap.
    - model_type: a row of `families.FAMILIES`.
    - experts: the mixture of experts in every layer; None for dense MLPs.
    - layer_sizes: (attention heads, key-value heads, intermediate size) of every layer; empty if all are alike.
    - eos_token_id: every id that ends a text.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope = Rope()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    experts: Experts | None = None
    layer_sizes: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        family_of(self.model_type)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            _check_tokens(key, getattr(self, key), self.vocab_size)
        self._check_bounds()
        if (self.experts is None) != (self.family.experts is None):
            raise SboraxError(f"experts: {self.model_type} {'has none' if self.experts else 'needs config.Experts'}")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise SboraxError(f"layer_types: {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        if self.layer_sizes and self.layer_types:
            raise SboraxError("layer_sizes: layers of unequal size cannot have windows (layer_types)")
        if self.layer_sizes and self.experts:
            raise SboraxError("layer_sizes: layers of unequal size cannot have experts")
        if self.layer_sizes and len(self.layer_sizes) != self.num_hidden_layers:
            raise SboraxError(f"layer_sizes: {len(self.layer_sizes)} entries for {self.num_hidden_layers} layers")
        for layer in range(len(self.layer_sizes)):
            self.of_layer(layer)
        if self.num_attention_heads % self.num_key_value_heads:
            raise SboraxError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.rope.features(self.head_dim) % 2:
            name = "head_dim" if self.rope.rotated == 1 else "the share of head_dim that is rotated"
            raise SboraxError(f"{name} must be even for rotary embeddings, got {self.rope.features(self.head_dim)}")

    def _check_bounds(self) -> None:
        bounds = {"vocab_size": WIDEST, "hidden_size": WIDEST, "intermediate_size": WIDEST, "head_dim": WIDEST_HEAD}
        bounds |= {"num_attention_heads": WIDEST // max(1, self.head_dim), "num_hidden_layers": MOST_LAYERS}
        for key, most in bounds.items():
            if getattr(self, key) > most:
                raise SboraxError(f"{key} must be at most {most:,}, got {getattr(self, key):,}")
        if len(self.layer_sizes) > MOST_UNEQUAL:
            raise SboraxError(f"layer_sizes: {len(self.layer_sizes):,} entries are more than {MOST_UNEQUAL:,}")

    @property
    def family(self) -> Family:
        """How the model differs from LLaMA."""
        return family_of(self.model_type)

    @property
    def decoder(self) -> type[AbstractDecoder] | None:
        """The class of the family's module; None for `Llama`."""
        return self.family.decoder

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.attention_bias or self.family.qkv_bias

    @property
    def embedding_scale(self) -> float | None:
        """The factor of the embedding's vectors, if there is one."""
        return math.sqrt(self.hidden_size) if self.family.scaled else None

    @property
    def context(self) -> int:
        """The longest sequence that the model computes here, in tokens.

        That of a model with longrope is the length of its pre-training: longer texts have other frequencies, from their
        first token on.
        """
        longest = self.max_position_embeddings
        if self.rope.kind == "longrope":
            longest = min(longest, self.rope.original_length)
        if self.layer_types or self.family.windowed or self.sliding_window is None:
            return longest
        return min(longest, self.sliding_window)

    @property
    def windows(self) -> tuple[int, ...]:
        """How many tokens back each layer sees; empty if all see all of them."""
        full = self.max_position_embeddings
        kinds = self.layer_types or ((SLIDING,) * self.num_hidden_layers if self.family.windowed else ())
        windows = tuple((self.sliding_window or full) if kind == SLIDING else full for kind in kinds)
        return windows if any(window < self.context for window in windows) else ()

    @property
    def local_rope(self) -> Rope | None:
        """The rotary embedding of layers with windows, if it is not that of the others."""
        return None if self.rope_local_base_freq is None else Rope(self.rope_local_base_freq)

    @property
    def rope_magnitude(self) -> float:
        """What multiplies rotated vectors: sqrt(1 + ln s / ln L), s = context / L, L that of the pre-training.

        It is 1 but for longrope.
        """
        rope = self.rope
        if rope.kind != "longrope":
            return 1.0
        stretch = self.max_position_embeddings / rope.original_length
        if rope.attention_factor is not None or stretch <= 1:
            return rope.attention_factor or 1.0
        return math.sqrt(1 + math.log(stretch) / math.log(rope.original_length))

    def of_layer(self, layer: int) -> "LlamaConfig":
        """The config of a model with all layers like this one."""
        if not self.layer_sizes:
            return self
        heads, kv_heads, width = self.layer_sizes[layer]
        return dataclasses.replace(
            self, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=width, layer_sizes=()
        )

    @staticmethod
    def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> "LlamaConfig":
        """The config from the contents of a `config.json`. `where` names the file in errors.

        Raises SboraxError for a missing or ill-typed field and for anything that this model does not do.
        """
        kind = raw.get("model_type")
        family = family_of(kind, where)
        raw = _flat_rope(raw, where) if "rope_local_base_freq" in family.optional else raw
        for key, allowed in family.keys.items():
            setting = raw.get(key, allowed[0])
            if any(value not in allowed for value in (setting if isinstance(setting, list | tuple) else [setting])):
                raise SboraxError(f"{where}: {key} = {str(setting)[:80]} is not supported, only {allowed[0]}")
        known_keys = {field.name for field in dataclasses.fields(LlamaConfig)} - OPTIONAL | family.optional
        known_keys |= INERT | family.inert | family.keys.keys() | {"rope_theta", "rope_scaling", "rope_parameters"}
        known_keys |= {family.full_every_key} - {""} | ({"partial_rotary_factor"} if family.partial else set())
        known_keys |= {"original_max_position_embeddings"} if "longrope" in family.ropes else set()
        known_keys = known_keys - {"experts"} | (family.experts.keys if family.experts else frozenset())
        unknown = sorted(key for key in raw if key not in known_keys and not key.startswith("_"))
        if unknown:
            raise SboraxError(f"{where}: unknown field {unknown[0]!r}; remove it if it does not change the model")
        read = _Reader({**family.defaults, **raw}, where)
        heads, width = read.integer("num_attention_heads"), read.integer("hidden_size")
        if read.optional_integer("head_dim") is None and width % heads:
            raise SboraxError(f"{where}: hidden_size ({width}) is not a multiple of num_attention_heads ({heads})")
        length, vocabulary = read.integer("max_position_embeddings"), read.integer("vocab_size")
        head_dim = read.optional_integer("head_dim") or width // heads
        # The first LLaMA's files say -1 for no padding token.
        pad = None if raw.get("pad_token_id") == -1 else next(iter(read.tokens("pad_token_id", vocabulary)), None)
        fields: dict[str, Any] = dict(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=read.integer("intermediate_size"),
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.optional_integer("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_position_embeddings=length,
            rms_norm_eps=read.number("rms_norm_eps"),
            rope=_read_rope(read, family, length, head_dim),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            attention_bias="attention_bias" in family.optional and read.flag("attention_bias"),
            mlp_bias="mlp_bias" in family.optional and read.flag("mlp_bias"),
            sliding_window=read.optional_integer("sliding_window") if "sliding_window" in family.optional else None,
            layer_types=_read_types(read, family) if "layer_types" in family.optional else (),
            rope_local_base_freq=(
                read.number("rope_local_base_freq") if "rope_local_base_freq" in family.optional else None
            ),
            query_pre_attn_scalar=(
                read.optional_integer("query_pre_attn_scalar") if "query_pre_attn_scalar" in family.optional else None
            ),
            **{key: read.optional_number(key) for key in sorted(CAPS & family.optional)},
            model_type=str(kind),
            bos_token_id=next(iter(read.tokens("bos_token_id", vocabulary)), None),
            eos_token_id=read.tokens("eos_token_id", vocabulary),
            pad_token_id=pad,
            layer_sizes=_read_sizes(raw, where),
        )
        try:
            return LlamaConfig(**fields, experts=_read_experts(read, family.experts))
        except SboraxError as error:
            raise SboraxError(f"{where}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` for `from_hf`, and for transformers if all layers are alike."""
        names = {field.name for field in dataclasses.fields(self)} - OPTIONAL - {"rope"} | self.family.optional
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        raw["eos_token_id"] = (
            list(self.eos_token_id) if len(self.eos_token_id) > 1 else next(iter(self.eos_token_id), None)
        )
        del raw["experts"]
        raw |= _written_experts(self.experts, self.family.experts)
        raw |= {"hidden_act": self.family.activations[0], "rope_theta": self.rope.theta}
        if self.layer_sizes:
            raw["layer_sizes"] = [list(sizes) for sizes in self.layer_sizes]
        else:
            del raw["layer_sizes"]
            raw["architectures"] = [self.family.causal_lm]
        return raw | _written_rope(self.rope, self.family)


def ends(raw: Mapping[str, Any], where: str, vocabulary: int) -> tuple[int, ...]:
    """Every id that ends a text, from a `config.json` or `generation_config.json`. `where` names the file in errors.

    Raises SboraxError for anything that is no id in a vocabulary of this size.
    """
    return _Reader(raw, where).tokens("eos_token_id", vocabulary)


def _check_tokens(key: str, tokens: int | Sequence[int] | None, vocabulary: int) -> None:
    """Raise SboraxError for an id outside the vocabulary. As an index it would mean another token."""
    for token in [] if tokens is None else [tokens] if isinstance(tokens, int) else tokens:
        if not 0 <= token < vocabulary:
            raise SboraxError(f"{key}: {token} is no token of a vocabulary of {vocabulary:,}; correct it")


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Typed access to the fields of one config file."""

    raw: Mapping[str, Any]
    where: str

    def _require(self, key: str) -> Any:
        if self.raw.get(key) is None:
            raise SboraxError(f"{self.where}: field {key!r} is missing")
        return self.raw[key]

    def integer(self, key: str) -> int:
        value = self._require(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise SboraxError(f"{self.where}: {key} must be a positive whole number below 2**31, got {shown(value)}")
        return value

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        if key not in self.raw:
            return default
        return None if self.raw[key] is None else self.integer(key)

    def number(self, key: str) -> float:
        value = self._require(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1e-30 < value < 1e30:
            raise SboraxError(f"{self.where}: {key} must be a positive number, got {shown(value)}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.raw.get(key) is None else self.number(key)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        value = self._require(key)
        if not isinstance(value, list | tuple) or len(value) != count:
            raise SboraxError(f"{self.where}: {key} must be a list of {count} numbers, got {shown(value)}")
        return tuple(_Reader({key: number}, self.where).number(key) for number in value)

    def share(self, key: str) -> float:
        value = self._require(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e30:
            raise SboraxError(f"{self.where}: {key} must be a number of at least 0, got {shown(value)}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise SboraxError(f"{self.where}: {key} must be true or false, got {shown(value)}")
        return value

    def tokens(self, key: str, vocabulary: int) -> tuple[int, ...]:
        """The ids of a field that is null, one id or a list of ids, in a vocabulary of this size."""
        value = self.raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int and abs(number) < 2**31 for number in ids):
            raise SboraxError(f"{self.where}: {key} must be the number of a token, got {shown(value)}")
        try:
            _check_tokens(key, ids, vocabulary)
        except SboraxError as error:
            raise SboraxError(f"{self.where}: {error}") from None
        return tuple(ids)


def _read_types(read: _Reader, family: Family) -> tuple[str, ...]:
    """The kind of attention of every layer. Its values have been checked."""
    types, layers = read.raw.get("layer_types"), read.integer("num_hidden_layers")
    if types is not None and not isinstance(types, list | tuple):
        raise SboraxError(f"{read.where}: layer_types must be a list, got {shown(types)}")
    period = read.optional_integer(family.full_every_key, family.full_every) or family.full_every
    default = [SLIDING if (layer + 1) % period else "full_attention" for layer in range(min(layers, MOST_LAYERS))]
    return tuple(types or default)


def _read_experts(read: _Reader, keys: ExpertKeys | None) -> Experts | None:
    if keys is None:
        return None
    count = next((key for key in keys.count if key in read.raw), keys.count[0])
    return Experts(
        count=read.integer(count),
        chosen=read.integer("num_experts_per_tok"),
        intermediate_size=read.integer(keys.intermediate_size),
        shared_size=read.integer(keys.shared) if keys.shared else 0,
        normalised=read.flag("norm_topk_prob") if keys.normalised is None else keys.normalised,
        balance=read.share("router_aux_loss_coef"),
        z_loss=read.share(Z_LOSS) if Z_LOSS in read.raw else 0.0,
    )


def _written_experts(experts: Experts | None, keys: ExpertKeys | None) -> dict[str, Any]:
    if experts is None or keys is None:
        return {}
    raw = {
        keys.count[0]: experts.count,
        "num_experts_per_tok": experts.chosen,
        keys.intermediate_size: experts.intermediate_size,
        "router_aux_loss_coef": experts.balance,
    }
    raw |= {keys.shared: experts.shared_size} if keys.shared else {}
    raw |= {Z_LOSS: experts.z_loss} if experts.z_loss else {}
    return raw if keys.normalised is not None else raw | {"norm_topk_prob": experts.normalised}


def _read_sizes(raw: Mapping[str, Any], where: str) -> tuple[tuple[int, int, int], ...]:
    layers = raw.get("layer_sizes", [])
    if raw["model_type"].startswith(UNEQUAL) != bool(layers):
        raise SboraxError(f"{where}: layer_sizes and a model_type that begins with {UNEQUAL!r} go together")
    valid = isinstance(layers, list) and all(
        isinstance(sizes, list) and len(sizes) == 3 and all(type(size) is int and 0 < size < 2**31 for size in sizes)
        for sizes in layers
    )
    if not valid:
        raise SboraxError(f"{where}: layer_sizes must list [heads, key-value heads, intermediate size] of every layer")
    return tuple((heads, kv_heads, width) for heads, kv_heads, width in layers)


def _flat_rope(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The config with the rotary embeddings of the two kinds of layers in the form before transformers 5.

    Since then `rope_parameters` holds an object for each kind of layer.
    """
    nested = raw.get("rope_parameters")
    if nested is None:
        return raw
    kinds = ("full_attention", SLIDING)
    if not isinstance(nested, dict) or nested.keys() - kinds:
        raise SboraxError(f"{where}: rope_parameters must have an object for {kinds[0]} and {kinds[1]}")
    full, local = (nested.get(kind) or {} for kind in kinds)
    if not isinstance(full, dict) or not isinstance(local, dict):
        raise SboraxError(f"{where}: rope_parameters must have an object for {kinds[0]} and {kinds[1]}")
    kind = local.get("rope_type", local.get("type", "default"))
    if kind != "default":
        raise SboraxError(f"{where}: {SLIDING}: rope type {shown(kind)} is not supported, only default")
    flat = {key: value for key, value in raw.items() if key not in ("rope_parameters", "rope_scaling")}
    flat["rope_scaling"] = {**full, **(raw.get("rope_scaling") or {})}
    return flat | ({"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {})


FREQUENCY_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""The fields that each kind of rotary embedding must have."""
LONGROPE_NAMES = ("su", "yarn")
"""Earlier names of longrope in the families that have it."""


def _read_rope(top: _Reader, family: Family, length: int, head_dim: int) -> Rope:
    """The rotary embedding, in the form of transformers before version 5 (`rope_theta`, `rope_scaling`) or since.

    top: the fields of the config.
    """
    raw, where = top.raw, top.where
    scaling_config = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling_config, dict):
        raise SboraxError(f"{where}: rope scaling must be an object, got {shown(scaling_config)}")
    scaling = dict(scaling_config)
    scaling.setdefault("rope_theta", raw.get("rope_theta") or 10_000.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    read = _Reader(scaling, f"{where}, rope scaling")
    kind = "longrope" if kind in LONGROPE_NAMES and "longrope" in family.ropes else kind
    if not isinstance(kind, str) or kind not in family.ropes:
        raise SboraxError(f"{where}: rope type {shown(kind)} is not supported; known: {', '.join(family.ropes)}")
    allowed = {"rope_theta", "original_max_position_embeddings", "partial_rotary_factor", *FREQUENCY_KEYS[kind]}
    allowed |= {"factor", "attention_factor"} if kind == "longrope" else set()
    # A plain rope may have the fields of a scaling that is switched off.
    unknown = sorted(scaling.keys() - allowed) if kind != "default" else []
    if unknown:
        raise SboraxError(f"{where}: rope scaling has an unknown field {unknown[0]!r}")
    rope = Rope(theta=read.number("rope_theta"), kind=kind)
    if family.partial:
        rope = dataclasses.replace(rope, rotated=_read_rotated(scaling, top))
    elif scaling.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
        raise SboraxError(
            f"{where}: partial_rotary_factor = {scaling['partial_rotary_factor']} is not supported, only 1.0"
        )
    if kind == "default":
        return rope
    if kind == "longrope":
        return _read_longrope(rope, read, top, head_dim)
    rope = dataclasses.replace(rope, factor=read.number("factor"))
    if kind == "linear":
        return rope
    low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
    if not low < high:
        raise SboraxError(f"{where}: rope scaling: low_freq_factor must be below high_freq_factor")
    return dataclasses.replace(
        rope,
        low_freq_factor=low,
        high_freq_factor=high,
        original_length=read.optional_integer("original_max_position_embeddings", length) or length,
    )


def _read_rotated(scaling: Mapping[str, Any], top: _Reader) -> float:
    key = "partial_rotary_factor"
    share = _Reader({key: scaling.get(key, top.raw.get(key, 1.0))}, top.where).number(key)
    if share > 1:
        raise SboraxError(f"{top.where}: {key} must be at most 1, got {share:g}")
    return share


def _read_longrope(rope: Rope, read: _Reader, top: _Reader, head_dim: int) -> Rope:
    """`rope` with the fields of longrope. transformers reads the original length beside these fields, not in them."""
    pairs = rope.features(head_dim) // 2
    original = top.integer("original_max_position_embeddings")
    factors = {key: read.numbers(key, pairs) for key in FREQUENCY_KEYS["longrope"]}
    magnitude, stretch = read.optional_number("attention_factor"), read.optional_number("factor")
    if magnitude is None and stretch is not None:
        magnitude = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return dataclasses.replace(rope, original_length=original, attention_factor=magnitude, **factors)


def _written_rope(rope: Rope, family: Family) -> dict[str, Any]:
    """The fields for `_read_rope`, apart from `rope_theta`."""
    raw: dict[str, Any] = {"partial_rotary_factor": rope.rotated} if family.partial else {}
    if rope.kind == "default":
        return raw
    if rope.kind == "longrope":
        # transformers before version 5 wants `type` here, and no other field than the two lists.
        scaling = {"type": rope.kind, **{key: list(getattr(rope, key)) for key in FREQUENCY_KEYS["longrope"]}}
        scaling |= {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
        return {**raw, "rope_scaling": scaling, "original_max_position_embeddings": rope.original_length}
    scaling = {"rope_type": rope.kind, **{key: getattr(rope, key) for key in FREQUENCY_KEYS[rope.kind]}}
    if rope.kind == "llama3":
        scaling["original_max_position_embeddings"] = rope.original_length
    return {**raw, "rope_scaling": scaling}
