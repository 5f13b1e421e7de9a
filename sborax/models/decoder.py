"""The interface of a decoder and of its config. `Llama` and `LlamaConfig` implement it."""

import abc
import math
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sborax.adapters import core


@runtime_checkable
class DecoderConfig(Protocol):
    """The parts of a decoder's config that the package reads. Hashable, because programs are compiled for it.

    The names are those of Hugging Face's `config.json`, except for:

    - context: the longest sequence of the model, in tokens.
    - eos_token_id: every id that ends a text.
    - decoder: the class of the module; None for `Llama`.
    - to_hf: the contents of a `config.json`.
    """

    @property
    def model_type(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def tie_word_embeddings(self) -> bool: ...

    @property
    def context(self) -> int: ...

    @property
    def eos_token_id(self) -> tuple[int, ...]: ...

    @property
    def decoder(self) -> "type[AbstractDecoder] | None": ...

    def to_hf(self) -> dict[str, Any]: ...


def plain_scores(config: DecoderConfig) -> bool:
    """Whether attention has neither windows nor caps of its scores."""
    return not (getattr(config, "windows", ()) or getattr(config, "attn_logit_softcapping", None))


def _experts(config: DecoderConfig) -> Any:
    """The mixture of experts of a config; None for one without, which need not have the field."""
    return getattr(config, "experts", None)


def count_experts(config: DecoderConfig) -> int:
    """The experts of a layer; 0 for a config without experts."""
    experts = _experts(config)
    return 0 if experts is None else experts.count


def active_share(config: DecoderConfig) -> float:
    """The share of a layer's experts that a token passes; 1 for a config without experts."""
    experts = _experts(config)
    return 1.0 if experts is None else experts.chosen / experts.count


def z_share(config: DecoderConfig) -> float:
    """The share of the router's z-loss in the loss of a run that trains the router; 0 without experts."""
    experts = _experts(config)
    return 0.0 if experts is None else experts.z_loss


def balance_share(config: DecoderConfig) -> float:
    """The share of the imbalance of experts' load in the loss of a run that trains the router; 0 without experts."""
    experts = _experts(config)
    return 0.0 if experts is None else experts.balance


def check_capacity(config: DecoderConfig, capacity: int | float | None) -> None:
    """Raise SboraxError for a capacity of experts that is not positive, or that a model without experts is given."""
    if capacity is None:
        return
    if not 0 < capacity < math.inf:
        raise core.SboraxError(f"expert_capacity must be positive, got {capacity}")
    if _experts(config) is None:
        raise core.SboraxError(f"expert_capacity: {config.model_type} has no experts; leave it at None")


def active_width(config: DecoderConfig, shares: int = 1, capacity: float | None = None) -> int | float:
    """The inner width of the gated units that a token passes in one layer.

    - shares: how many devices the experts are divided among. Each has room for the largest load: its experts may be
      chosen by the tokens of all of these devices. The width is that of this room, per token of a device.
    - capacity: of experts, which bounds the room; None without one.
    """
    experts = _experts(config)
    if experts is None:
        return config.intermediate_size
    return expert_rows(config, shares, capacity) * experts.intermediate_size + experts.shared_size


def expert_rows(config: DecoderConfig, shares: int = 1, capacity: float | None = None) -> int | float:
    """The rows of experts that a device has room for, for each of its tokens; 0 without experts. See `active_width`.

    With a capacity these are capacity x chosen on any mesh, and at most all experts: as many as a device sends.
    """
    experts = _experts(config)
    if experts is None:
        return 0
    if capacity is not None:
        return min(capacity * experts.chosen, experts.count)
    return shares * min(experts.chosen, experts.count // shares)


class AbstractDecoder(nn.Module, abc.ABC):
    """A decoder in Flax Linen.

    Its projections are `layers.Linear`, through which adapters reach them. Its params hold the table of the embedding
    at `embed_tokens/embedding`, the layers below `layers` and, unless the config ties it, the head at `lm_head/kernel`.

    - config: a `DecoderConfig`.
    - dtype: of params and activations.
    - remat: values that are kept for the backward pass, see `llama.kept_names`.
    - scan: whether the params of the layers are stacked; otherwise each layer has a number (`layers/0`).
    - keep: whether `hidden` returns keys and values.
    - attention: the back end, see `sborax.models.backends`.
    - expert_capacity: the rows that each expert takes of a device's tokens, as a multiple of those at balanced load.
        None drops no token. See `mixture.Mixture.limited`.
    """

    adapts_tables: ClassVar[bool] = False
    """Whether `hidden` and `head` read the adapters of `sborax.adapters.tables`, as `layers.Embed` and
    `layers.TiedHead` do. By default False: such adapters are refused."""

    config: Any
    dtype: Any = jnp.dtype(jnp.float32)
    remat: str = "none"
    scan: bool = True
    keep: bool = False
    attention: str = "xla"
    expert_capacity: float | None = None

    @property
    def plain_head(self) -> bool:
        """Whether logits are hidden states times the head's kernel, and nothing else.

        Then a loss need not hold the logits of all tokens at once. By default False: losses call `head`.
        """
        return False

    @abc.abstractmethod
    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        ctx: core.Context = core.Context(),
        past: tuple[Any, Int[Array, "batch slots"]] | None = None,
    ) -> tuple[Float[Array, "batch seq d"], Any]:
        """The normed hidden states, and with `keep` the keys and values of `tokens`.

        Keys and values are a pytree of arrays (layers, batch, seq, heads, head_dim).

        - segment_ids: tokens see earlier tokens of their own segment; 0 is padding. By default all is one segment.
        - positions: rotary positions, in tokens; by default counted from the start of each segment.
        - past: keys and values of earlier tokens, and their segments.

        Raises SboraxError for more tokens than the model's context.
        """

    @abc.abstractmethod
    def head(
        self, hidden: Float[Array, "batch seq d"], ctx: core.Context = core.Context()
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of normed hidden states, float32."""

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        ctx: core.Context = core.Context(),
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of every position, float32. See `hidden`."""
        return self.head(self.hidden(tokens, segment_ids, positions, ctx)[0], ctx)
