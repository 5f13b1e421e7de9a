"""The LLaMA decoder in Flax Linen, with the options of the families in `families.FAMILIES`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sborax.adapters import core
from sborax.adapters.constraints import check_axis_types
from sborax.adapters.core import HIDDEN
from sborax.models.backends import ATTENDED, attend
from sborax.models.config import SLIDING, LlamaConfig, Rope
from sborax.models.decoder import AbstractDecoder
from sborax.models.layers import ACTIVATIONS, Embed, GatedUnit, Linear, RMSNorm, TiedHead, adapter_of, rotate, routed
from sborax.models.memory import handed_on
from sborax.models.sharding import over_rows
from sborax.models.sparse import SparseMLP

Cache = tuple[Float[Array, "*layers batch _ kv_heads head_dim"], Float[Array, "*layers batch _ kv_heads head_dim"]]
"""Keys (rotated) and values."""

OFFLOAD = "offload:"
SAVEABLE = ("qkv", ATTENDED, "mixed", "gate_up", HIDDEN)
"""Intermediate values that `remat` may keep, by name: projections before rotation, attention's output before `o_proj`,
the residual stream after attention, both halves of the gated unit, and the thin value inside an adapter."""


class Reach(NamedTuple):
    """How far each layer sees. In a stack of layers, each leaf has an axis of layers.

    - window: how many tokens back a layer sees; None if all see all tokens.
    - local: whether a layer has the second of the model's rotary embeddings; None if there is a single one.
    """

    window: Int[Array, "*layers"] | None
    local: Bool[Array, "*layers"] | None


def norm_of(config: LlamaConfig, dtype: Any, name: str | None = None) -> RMSNorm:
    """The norm of the config's family."""
    return RMSNorm(config.rms_norm_eps, dtype, config.family.centred, name=name)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: LlamaConfig
    dtype: Any
    attention: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d"],
        rope: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]],
        segments: Any,
        past: Cache | None,
        ctx: core.Context,
        window: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "batch seq d"], Cache]:
        """Attention over the past and `x`, at most `window` tokens back, and the keys and values of `x`."""
        cfg = self.config

        def project(name: str, heads: int) -> Float[Array, "batch seq heads head_dim"]:
            flat = Linear(heads * cfg.head_dim, cfg.qkv_bias, self.dtype, name=name)(x, ctx)
            return checkpoint_name(flat, "qkv").reshape(*x.shape[:2], heads, cfg.head_dim)

        def rotated(name: str, heads: int) -> Float[Array, "batch seq heads head_dim"]:
            plain = project(f"{name}_proj", heads)
            if cfg.family.qk_norm:
                together = cfg.family.qk_norm == "projection"
                normed = plain.reshape(*x.shape[:2], -1) if together else plain
                plain = norm_of(cfg, self.dtype, f"{name}_norm")(normed).reshape(plain.shape)
            return rotate(plain, *rope)

        query, key = rotated("q", cfg.num_attention_heads), rotated("k", cfg.num_key_value_heads)
        value = project("v_proj", cfg.num_key_value_heads)
        new = (key, value)
        if past is not None:
            key, value = (jnp.concatenate(pair, axis=1) for pair in zip(past, new, strict=True))
        if cfg.query_pre_attn_scalar is not None:
            # Back ends divide by the square root of head_dim.
            query = query * jnp.asarray((cfg.head_dim / cfg.query_pre_attn_scalar) ** 0.5, query.dtype)
        cap = cfg.attn_logit_softcapping
        attended = attend(self.attention, query, key, value, *segments, window=window, cap=cap).reshape(
            *x.shape[:2], -1
        )
        return Linear(cfg.hidden_size, cfg.attention_bias, self.dtype, name="o_proj")(attended, ctx), new


def mlp_of(config: LlamaConfig, dtype: Any, capacity: float | None = None) -> GatedUnit | SparseMLP:
    """The feed-forward part of a layer, dense or a mixture of experts of this capacity."""
    activation = ACTIVATIONS[config.family.activations[0]]
    if config.experts is None:
        return GatedUnit(config.intermediate_size, activation, config.mlp_bias, dtype, name="mlp")
    return SparseMLP(config.experts, activation, dtype, capacity, name="mlp")


class Block(nn.Module):
    """One decoder layer with the signature of `nn.scan`: carry, shared inputs, input of the layer -> carry, output."""

    config: LlamaConfig
    dtype: Any
    keep: bool
    attention: str
    capacity: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d"],
        rope: Any,
        segments: Any,
        ctx: core.Context,
        past: Cache | None,
        reach: Reach = Reach(None, None),
    ) -> tuple[Float[Array, "batch seq d"], Cache | None]:
        """The layer's output, and its keys and values if `keep`."""
        if reach.local is not None:
            rope = tuple(jnp.where(reach.local, local, full) for full, local in rope)
        cfg, norm = self.config, functools.partial(norm_of, self.config, self.dtype)
        ctx = routed(self, x, ctx)
        attend_to = Attention(cfg, self.dtype, self.attention, name="self_attn")
        mixed, cache = attend_to(norm("input_layernorm")(x), rope, segments, past, ctx, reach.window)
        if cfg.family.sandwich:
            mixed = norm("post_attention_layernorm")(mixed)
        x = over_rows(checkpoint_name(x + mixed, "mixed"))
        norm_name = "pre_feedforward_layernorm" if cfg.family.sandwich else "post_attention_layernorm"
        fed = mlp_of(cfg, self.dtype, self.capacity)(norm(norm_name)(x), ctx)
        if cfg.family.sandwich:
            fed = norm("post_feedforward_layernorm")(fed)
        return over_rows(x + fed), cache if self.keep else None


class Unrolled(nn.Module):
    """Blocks "0", "1", ... in a Python loop: faster to run and slower to compile than the scanned stack."""

    block: Any
    config: LlamaConfig
    dtype: Any
    keep: bool
    attention: str
    capacity: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d"],
        rope: Any,
        segments: Any,
        ctx: core.Context,
        past: Any,
        reach: Reach = Reach(None, None),
    ) -> tuple[Float[Array, "batch seq d"], Any]:
        """What the scanned stack returns. The cache of layers of unequal size is a tuple of stacks of one layer."""
        caches = []
        for layer in range(self.config.num_hidden_layers):
            if self.config.layer_sizes and past is not None:
                layer_past = jax.tree.map(lambda leaf: leaf[0], past[layer])
            else:
                layer_past = jax.tree.map(lambda leaf, i=layer: leaf[i], past)
            options = (self.dtype, self.keep, self.attention, self.capacity)
            block = self.block(self.config.of_layer(layer), *options, name=str(layer))
            x, cache = block(x, rope, segments, ctx, layer_past, jax.tree.map(lambda leaf, i=layer: leaf[i], reach))
            caches.append(cache)
            if self.has_variable("memory", str(layer + 1)):
                self._hand_on(layer)
        if self.config.layer_sizes and self.keep:
            return x, tuple(jax.tree.map(lambda leaf: leaf[None], cache) for cache in caches)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)

    def _hand_on(self, layer: int) -> None:
        """Hand the memory of the projections of `layer` to those of the next layer that continue their chain."""
        source, target = (self.get_variable("memory", str(number), {}) for number in (layer, layer + 1))
        adapters = [self.get_variable("adapters", str(number), {}) for number in (layer, layer + 1)]
        self.put_variable("memory", str(layer + 1), handed_on(source, target, *adapters))


def kept_names(remat: str) -> tuple[str, ...] | None:
    """Names of the values of a layer that are kept for the backward pass; None if nothing is recomputed.

    - remat: "none" recomputes nothing, "full" everything, "cheap" everything but the results of matmuls: norms,
      rotations, softmax and the gated unit. Or names in `SAVEABLE` to keep, separated by commas. A name after
      "offload:" is kept in the host's memory instead of the device's; on a CPU the two are one.

    Raises SboraxError for a name that is not in `SAVEABLE`.
    """
    presets = {"none": None, "full": (), "cheap": SAVEABLE}
    if remat in presets:
        return presets[remat]
    names = tuple(remat.split(","))
    if not {name.removeprefix(OFFLOAD) for name in names} <= set(SAVEABLE):
        raise core.SboraxError(
            f"remat = {remat!r}: use none, cheap, full, or a comma-separated list of {', '.join(SAVEABLE)}, "
            f"each optionally with {OFFLOAD} in front"
        )
    return names


def rematerialised(remat: str, scan: bool) -> Any:
    """`Block`, whose backward pass recomputes all but the values that `remat` keeps."""
    names = kept_names(remat)
    if names is None:
        return Block
    offloaded = [name.removeprefix(OFFLOAD) for name in names if name.startswith(OFFLOAD)]
    policies = jax.checkpoint_policies
    if offloaded:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[name for name in names if not name.startswith(OFFLOAD)],
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*names)
    # Inside a scan the loop itself keeps XLA from merging the two computations.
    return nn.remat(Block, policy=policy, prevent_cse=not scan)


def positions_of(
    tokens: Int[Array, "batch seq"], segment_ids: Int[Array, "batch seq"] | None
) -> Int[Array, "batch seq"]:
    """Positions counted from the first token of each run of one segment, so that padding on the left is not counted."""
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return slots
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return slots - jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)


def rotations(
    rope: Rope, positions: Int[Array, "batch seq"], head_dim: int, magnitude: float = 1.0
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """Cosine and sine of the angle of each pair of features at each position, times `magnitude`."""
    frequencies = jnp.asarray(rope.inverse_frequencies(head_dim))
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if magnitude == 1 else (cos * magnitude, sin * magnitude)


class Llama(AbstractDecoder):
    """The decoder. Its params follow the table in `sborax.models.names`. Layers of unequal size are never scanned."""

    config: LlamaConfig
    adapts_tables = True

    @property
    def plain_head(self) -> bool:
        """Whether logits are not capped."""
        return self.config.final_logit_softcapping is None

    def setup(self) -> None:
        """The parts, under the names of their params."""
        cfg = self.config
        self.embed_tokens = Embed(cfg.vocab_size, cfg.hidden_size, self.dtype, cfg.embedding_scale)
        scan = self.scan and not cfg.layer_sizes
        block = rematerialised(self.remat, scan)
        if scan:
            self.layers = nn.scan(
                block,
                variable_axes=dict.fromkeys(("params", "adapters", "observations", "rows", "remembered", "routing"), 0),
                variable_broadcast="bank",
                variable_carry="memory",
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]
                length=cfg.num_hidden_layers,
            )(cfg, self.dtype, self.keep, self.attention, self.expert_capacity)
        else:
            self.layers = Unrolled(block, cfg, self.dtype, self.keep, self.attention, self.expert_capacity)
        self.norm = norm_of(cfg, self.dtype)
        self.lm_head = TiedHead() if cfg.tie_word_embeddings else Linear(cfg.vocab_size, False, self.dtype)

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        ctx: core.Context = core.Context(),
        past: tuple[Any, Int[Array, "batch slots"]] | None = None,
    ) -> tuple[Float[Array, "batch seq d"], Any]:
        """See `AbstractDecoder`. Layers of unequal size have a tuple of keys and values.

        Raises SboraxError for more tokens than the model's context, and inside a mesh of Explicit axes.
        """
        check_axis_types()
        cfg = self.config
        if tokens.shape[1] > cfg.context:
            raise core.SboraxError(
                f"a sequence of {tokens.shape[1]} tokens is longer than the context of {cfg.context}"
            )
        if positions is None:
            positions = positions_of(tokens, segment_ids)
        rope, local = rotations(cfg.rope, positions, cfg.head_dim, cfg.rope_magnitude), cfg.local_rope
        if local is not None:
            rope = tuple(zip(rope, rotations(local, positions, cfg.head_dim), strict=True))
        cache, segments = None, (segment_ids, segment_ids)
        if past is not None:
            cache, earlier = past
            queries = jnp.ones(tokens.shape, earlier.dtype) if segment_ids is None else segment_ids
            segments = (queries, jnp.concatenate([earlier, queries], axis=1))
        reach = Reach(
            jnp.asarray(cfg.windows, jnp.int32) if cfg.windows else None,
            None if local is None else jnp.asarray([kind == SLIDING for kind in cfg.layer_types]),
        )
        if self.expert_capacity is not None and segment_ids is not None and ctx.mask is None:
            # Padding takes no place of an expert.
            ctx = dataclasses.replace(ctx, mask=segment_ids)
        x, caches = self.layers(over_rows(self.embed_tokens(tokens)), rope, segments, ctx, cache, reach)
        return self.norm(x), caches

    def head(
        self, hidden: Float[Array, "batch seq d"], ctx: core.Context = core.Context()
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of normed hidden states, float32."""
        if isinstance(self.lm_head, TiedHead):
            table = self.embed_tokens
            logits = self.lm_head(hidden, table.embedding, adapter_of(table, "embedding"), ctx)
        else:
            logits = self.lm_head(hidden, ctx)
        logits = logits.astype(jnp.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)
