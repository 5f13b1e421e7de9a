"""The weighted sum of the experts of each token, on one device and on a mesh.

A mesh has an axis for experts: each of its devices has some of the experts of every layer. `mixed` is the same sum on
any mesh, whatever the load of the experts, since no token is dropped.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sborax.adapters.constraints import AXES, EXPERT, SHARED, compiled_axes, dividing, mesh_axes
from sborax.adapters.core import Context
from sborax.adapters.grouped import Sizes, expert_of_row, grouped_linear
from sborax.adapters.routing import GATE
from sborax.models.sharding import expert_specs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A projection of all experts of a layer.

    - kernel: (experts, in, out).
    - adapter: its adapter, whose leaves have one stack axis, of experts; None without one.
    - key: a dropout key, or None.
    - path: of the module.
    """

    # Any: a pytree node also holds specs.
    kernel: Any
    adapter: Any
    key: Any
    path: str = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "rows in"], sizes: Sizes, ctx: Context) -> Float[Array, "rows out"]:
        """The adapted projection of rows that are sorted by expert."""
        ctx = dataclasses.replace(ctx, key=self.key).at(self.path, GATE)
        return grouped_linear(x, self.kernel, sizes, self.adapter, ctx)


Projections = Mapping[str, Projection]
"""gate_proj, up_proj and down_proj, by name."""
Squares = dict[str, Float[Array, "experts in"]]
"""Sums of squares of the input features of each projection over the rows of each expert."""
Activation = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The form of a mixture.

    - activation: that of the gated units.
    - observed: whether sums of squares of inputs are wanted.
    """

    activation: Activation
    observed: bool

    def here(
        self,
        x: Float[Array, "tokens d"],
        weights: Float[Array, "tokens chosen"],
        numbers: Int[Array, "tokens chosen"],
        ctx: Context,
        projections: Projections,
        shares: int = 1,
        share: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "tokens d"], Squares]:
        """sum_e p_e down_e(f(gate_e(x)) * up_e(x)) over those experts of a token that are on this device.

        Rows are sorted by expert. Those of experts elsewhere come last and are not multiplied.

        - shares, share: how many parts all experts are divided into, and the number of the part in `projections`; None
            if there are no others.
        """
        (tokens, chosen), count = numbers.shape, projections["gate_proj"].kernel.shape[0]
        number, elsewhere = numbers.reshape(-1), share is not None
        if share is not None:
            number = number - share * count
            number = jnp.where((number >= 0) & (number < count), number, count)
        order = jnp.argsort(number, stable=True)
        # A token passes an expert once.
        most = tokens * min(chosen, count)
        room = max(1, shares * min(chosen, count) // chosen)
        sizes = Sizes(jnp.bincount(number, length=count).astype(jnp.int32), room)
        token = order[:most] // chosen
        per_row = ctx.take(token)
        present = jnp.arange(most) < jnp.sum(sizes.rows)

        def only_here(rows: Float[Array, "rows _"]) -> Float[Array, "rows _"]:
            return jnp.where(present[:, None], rows, jnp.zeros((), rows.dtype)) if elsewhere else rows

        rows = only_here(x[token])
        gate, up = (
            checkpoint_name(projections[name](rows, sizes, per_row), "gate_up") for name in ("gate_proj", "up_proj")
        )
        inner = only_here(self.activation(gate) * up)
        outputs = only_here(projections["down_proj"](inner, sizes, per_row))
        inputs = {"gate_proj": rows, "up_proj": rows, "down_proj": inner} if self.observed else {}
        squares = {name: _squares(leaf, sizes, per_row.mask) for name, leaf in inputs.items()}
        place = jnp.argsort(order)
        by_choice = outputs.at[place].get(mode="fill", fill_value=0) if elsewhere else outputs[place]
        return jnp.einsum("tkd,tk->td", by_choice.reshape(tokens, chosen, -1), weights), squares

    def on_mesh(
        self,
        x: Float[Array, "tokens d"],
        weights: Float[Array, "tokens chosen"],
        numbers: Int[Array, "tokens chosen"],
        ctx: Context,
        projections: Projections,
    ) -> tuple[Float[Array, "tokens d"], Squares]:
        """`here` of all experts, on the current mesh.

        Along "expert", which has another share of the experts on each device:

        1. The tokens, and which experts they chose, are gathered.
        2. Each device computes the rows of its own experts.
        3. The outputs are summed, and each device is left with those of its tokens (a reduce-scatter).

        Along all other axes each device has other tokens, also along tensor, and the kernels of its experts are
        gathered as they are stored, and again for the backward pass. The gradients of trained kernels are
        reduce-scattered. So a row is multiplied on one device, with a kernel that is whole: any method applies, and no
        device waits for another one inside a loop whose length depends on data.

        With n devices along "expert", t tokens on each, d features and k experts a token, a device receives
        2 (n - 1) t d entries a layer in the forward pass, and as many in the backward pass. Two all-to-alls that send
        every token to each device with one of its experts would be at most 2 min(k, n - 1) t d, on average
        2 (n - 1) (1 - (1 - 1/n)^k) t d at equal load of independent choices. For k = 8 and n = 8 this is a third less,
        for k = 2 and n = 8 three quarters less; but either buffers would have the size of the largest load, or tokens
        would be dropped.
        """
        axes = compiled_axes()
        manual = [name for name in AXES if name in axes]
        count = projections["gate_proj"].kernel.shape[0]
        shares = axes.get(EXPERT, 1)
        # On a mesh of the user's, whose sizes nothing has checked, all devices have all experts.
        shares = shares if count % shares == 0 else 1
        over = dividing(x.shape[0], manual)
        cut = EXPERT if shares > 1 else None
        specs = {name: _specs(name, leaf, cut) for name, leaf in projections.items()}
        sent = EXPERT in over and shares > 1
        summed = tuple(name for name in over if name != EXPERT or shares == 1)

        def device(
            device: Int[Array, " 1"], tokens: tuple[Array, Array, Array, Context], projections: Projections
        ) -> tuple[Array, Squares]:
            if sent:
                tokens = jax.tree.map(functools.partial(_gathered, axis=0, name=EXPERT), tokens)
            whole = {name: _whole(leaf, specs[name], device[0]) for name, leaf in projections.items()}
            share = device[0] // axes.get(SHARED, 1) % shares if shares > 1 else None
            y, squares = self.here(*tokens, whole, shares, share)
            if sent:
                y = jax.lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True)
            elif shares > 1:
                y = jax.lax.psum(y, EXPERT)
            return y, jax.lax.psum(squares, summed)

        rows = PartitionSpec(over)
        mapped = jax.shard_map(
            # Without this a scanned layer that recomputes nothing would keep what it gathered. Where all is recomputed,
            # the compiler merges what is gathered twice.
            jax.checkpoint(device, policy=_but_gathered, prevent_cse=False),
            in_specs=(PartitionSpec(tuple(manual)), rows, specs),
            out_specs=(rows, PartitionSpec(cut)),
            axis_names=set(manual),
            check_vma=False,
        )
        devices = jnp.arange(math.prod(axes[name] for name in manual), dtype=jnp.int32)
        return mapped(devices, (x, weights, numbers, ctx), projections)


def mixed(
    x: Float[Array, "tokens d"],
    weights: Float[Array, "tokens chosen"],
    numbers: Int[Array, "tokens chosen"],
    ctx: Context,
    projections: Projections,
    form: Mixture,
) -> tuple[Float[Array, "tokens d"], Squares]:
    """sum_e p_e down_e(f(gate_e(x)) * up_e(x)) over the experts e that the router chose for a token.

    Args:
    - x: the tokens.
    - weights, numbers: p_e and e of each token.
    - ctx: with one entry a token.
    - projections: of all experts, by name.
    - form: the activation, and whether squares are wanted, which are empty otherwise.
    """
    axes = compiled_axes()
    form_of = form.on_mesh if math.prod(axes.values()) > 1 else form.here
    return form_of(x, weights, numbers, ctx, projections)


def _squares(x: Float[Array, "rows in"], sizes: Sizes, mask: Array | None = None) -> Float[Array, "experts in"]:
    """Sums of squares of each input feature over the rows of each expert, float32, without a gradient.

    mask: (rows,), zero at padding.
    """
    wide = jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))
    if mask is not None:
        wide = jnp.where((mask != 0)[:, None], wide, 0.0)
    experts = expert_of_row(sizes, x.shape[0])
    return jax.ops.segment_sum(wide, experts, sizes.experts, indices_are_sorted=True)


def _specs(name: str, projection: Projection, cut: str | None) -> Projection:
    """How the leaves of a projection are handed to a device: kernels as they lie, adapters with their experts."""
    adapter, key = jax.tree.map(lambda _: PartitionSpec(cut), projection.adapter), None
    if projection.key is not None:
        key = PartitionSpec()
    return Projection(expert_specs(name, projection.kernel, cut), adapter, key, projection.path)


def _whole(projection: Projection, specs: Projection, device: Int[Array, ""]) -> Projection:
    """A projection on a device: the kernels of its experts, and a dropout key that differs between devices."""

    def gathered_leaf(leaf: Array, spec: PartitionSpec) -> Array:
        for axis, entry in enumerate(spec):
            if axis > 0 and entry:
                leaf = _gathered(leaf, axis, mesh_axes(entry))
        return leaf

    kernel = jax.tree.map(gathered_leaf, projection.kernel, specs.kernel)
    key = None if projection.key is None else jax.random.fold_in(projection.key, device)
    return dataclasses.replace(projection, kernel=kernel, key=key)


def _gathered(leaf: Array, axis: int, name: str | tuple[str, ...]) -> Array:
    return jax.lax.all_gather(leaf, name, axis=axis, tiled=True)


def _but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: all values are kept but those that another device can send again."""
    return primitive is not jax.lax.all_gather_p
