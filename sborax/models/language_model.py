"""A model with its params, config and tokenizer, and the ways to call it."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sborax.adapters import core
from sborax.adapters.bank import AbstractBank
from sborax.adapters.invocation import invocations_of
from sborax.adapters.leaves import flatten
from sborax.adapters.paths import STACKED_UNDER, adaptable
from sborax.adapters.paths import kernels as kernels_of
from sborax.adapters.routing import ROUTER, layer_of
from sborax.adapters.tree import nodes
from sborax.models.decoder import AbstractDecoder, DecoderConfig, check_capacity
from sborax.models.llama import Llama
from sborax.models.memory import linked, run, values_at
from sborax.models.sparse import load_of

Params = dict[str, Any]


def decoder_of(
    config: DecoderConfig,
    dtype: Any = "float32",
    remat: str = "none",
    scan: bool = True,
    attention: str = "xla",
    expert_capacity: int | float | None = None,
) -> AbstractDecoder:
    """The module of a config: `Llama`, unless the config names another class. See `AbstractDecoder` for the fields.

    Raises SboraxError for an `expert_capacity` that is not positive, or of a model without experts.
    """
    check_capacity(config, expert_capacity)
    kind = cast(type[AbstractDecoder], config.decoder or Llama)
    capacity = None if expert_capacity is None else float(expert_capacity)
    return kind(config, jnp.dtype(dtype), remat, scan, attention=attention, expert_capacity=capacity)


def abstract(config: DecoderConfig, dtype: Any = "float32", *, scan: bool = True) -> Params:
    """The param tree as shapes and dtypes, from the config alone."""
    return _shapes(decoder_of(config, dtype, scan=scan))


def _shapes(module: AbstractDecoder) -> Params:
    """The param tree of a module, traced once for all callers. Each call makes new dicts."""
    return jax.tree.map(lambda leaf: leaf, _traced(module))  # pyright: ignore[reportArgumentType]


@functools.cache
def _traced(module: AbstractDecoder) -> Params:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]


@functools.cache
def projections(module: AbstractDecoder) -> frozenset[str]:
    """Every path at which the model reads an adapter: weights, and a router in each layer."""
    params = _shapes(module)
    kernels = list(adaptable(params) if module.adapts_tables else kernels_of(params))
    layers = {layer_of(path, STACKED_UNDER) for path in kernels if path.startswith(f"{STACKED_UNDER}/")}
    return frozenset([*kernels, *(f"{layer}/{ROUTER}" for layer in layers)])


_COLLECTIONS = {
    "inputs": "observations",
    "rows": "rows",
    "remembered": "remembered",
    "balance": "routing",
    "load": "routing",
}
"""Flax's collection for each field of `Collected`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Collected:
    """Values from inside a forward pass. Fields that were not asked for are empty.

    - inputs: ||X_j|| of every input feature j of every projection below the head, by path of its kernel.
    - rows: the inputs themselves, (batch, seq, in), of every projection below the head except those of experts, by path
      of its kernel. They are large, so let a jitted function return only those that are needed.
    - remembered: norms of what each projection remembers for the next layer (`adapters.depth`), by path of its kernel.
      The axes of a token's values are flattened. Empty for adapters that remember nothing.
    - balance: mean over the layers of their routers' losses; 0 without routers.
    - load: how the routers of experts spread the tokens of the batch, padding left out; see `models.sparse.Load`.
    """

    # Any: a pytree node also holds arrays with other axes in front.
    inputs: Any
    rows: Any
    remembered: Any
    balance: Any
    load: Any


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A Linen module with its params, config and tokenizer."""

    module: AbstractDecoder
    params: Params
    config: DecoderConfig
    tokenizer: Any

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text: those of the config, and the tokenizer's, which training appends to a text."""
        end = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*self.config.eos_token_id, *([] if end is None else [end])]))

    def apply(
        self,
        params: Params,
        adapters: Params | None,
        tokens: Int[Array, "batch seq"],
        *,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
        ctx: core.Context = core.Context(),
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of every position, float32.

        - segment_ids: tokens see earlier tokens of their own segment; 0 is padding. By default all is one segment.
        - positions: rotary positions; by default counted from the start of each segment.
        - dropout_key: without one the call is deterministic.
        - ctx: models with routers need its `prompt`.

        Raises SboraxError for an adapter that the model never reads and for tokens beyond the context.
        """
        return self._call("__call__", params, adapters, dropout_key, tokens, segment_ids, positions, ctx)

    def hidden(
        self,
        params: Params,
        adapters: Params | None,
        tokens: Int[Array, "batch seq"],
        *,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
        ctx: core.Context = core.Context(),
    ) -> Float[Array, "batch seq d"]:
        """The normed hidden states from which `apply` makes logits."""
        return self._call("hidden", params, adapters, dropout_key, tokens, segment_ids, positions, ctx)[0]

    def collect(
        self,
        params: Params,
        adapters: Params | None,
        tokens: Int[Array, "batch seq"],
        what: Collection[str],
        *,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
        ctx: core.Context = core.Context(),
    ) -> tuple[Float[Array, "batch seq d"], Collected]:
        """`hidden`, and values from inside the same forward pass.

        Norms are over all tokens of the batch but padding, before an adapter's dropout. They have no gradient.

        - what: the fields of `Collected` to fill.
        - ctx: `balance` needs its `prompt`, of one segment a row.
        """
        if not {"balance"}.issuperset(what):
            mask = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
            ctx = dataclasses.replace(ctx, mask=mask)
        inputs, mutable = (tokens, segment_ids, positions, ctx), [_COLLECTIONS[name] for name in what]
        out = self._call("hidden", params, adapters, dropout_key, *inputs, mutable=mutable)
        # Flax returns collections only if some are mutable.
        (hidden, _), collections = out if mutable else (out, {})
        routing = flatten(collections.get(_COLLECTIONS["balance"], {}))
        losses = [leaf.reshape(-1) for path, leaf in routing.items() if path.endswith("/loss")]
        return hidden, Collected(
            inputs=flatten(collections.get(_COLLECTIONS["inputs"], {})),
            rows=flatten(collections.get(_COLLECTIONS["rows"], {})),
            remembered=values_at(collections.get(_COLLECTIONS["remembered"], {}), nodes(adapters or {})),
            balance=jnp.mean(jnp.concatenate(losses)) if losses else jnp.float32(0),
            load=load_of(routing),
        )

    def head(
        self,
        params: Params,
        adapters: Params | None,
        hidden: Float[Array, "batch seq d"],
        *,
        dropout_key: Key[Array, ""] | None = None,
        ctx: core.Context = core.Context(),
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of `hidden`, float32.

        - ctx: an adapter of the head that acts from some tokens on needs its `invocations`: there is no text here.
        """
        return self._call("head", params, adapters, dropout_key, hidden, ctx)

    def dropless(self) -> "LanguageModel":
        """The same model without a capacity of experts."""
        return dataclasses.replace(self, module=self.module.clone(expert_capacity=None))

    def check_adapters(self, adapters: Params | None) -> None:
        """Raise SboraxError for an adapter at a path without a projection, and for tokens that the model lacks."""
        # Flax makes modules hashable.
        paths = projections(self._plain())  # pyright: ignore[reportArgumentType]
        for path, node in flatten(adapters or {}, is_leaf=core.is_adapter).items():
            is_bank = core.is_adapter(node) and isinstance(node.method, AbstractBank)
            if path not in paths and not is_bank:
                raise core.SboraxError(f"adapter {path!r}: the model has no such projection, so it would be ignored")
        for invocation in invocations_of(nodes(adapters or {})):
            if max(invocation) >= self.config.vocab_size:
                raise core.SboraxError(
                    f"an adapter acts from the tokens {invocation} on, and the vocabulary ends at "
                    f"{self.config.vocab_size - 1}; give ids of this model's tokenizer"
                )

    def abstract(self) -> Params:
        """The param tree as shapes and dtypes."""
        return _shapes(self._plain())

    def _plain(self) -> AbstractDecoder:
        """The module without options that its params do not depend on. Not every device can trace these."""
        return self.module.clone(remat="none", keep=False, attention="xla", expert_capacity=None)

    def _call(
        self, method: str, params: Params, adapters: Params | None, dropout_key: Any, *inputs: Any, **options: Any
    ) -> Any:
        self.check_adapters(adapters)
        variables = {"params": params, "adapters": adapters or {}}
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        if method == "head":
            return self.module.apply(linked(variables), *inputs, rngs=rngs, method=method)
        return run(self.module, variables, *inputs, rngs=rngs, method=method, **options)
