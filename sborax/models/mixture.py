"""The weighted sum of the experts of each token, on one device and on a mesh.

The devices along the mesh axis for experts each hold some of the experts of every layer. Without a capacity, `mixed`
drops no token and is the same sum on any mesh, whatever the load of the experts. With a capacity, an expert takes a
bounded number of the rows of each device, and choices beyond it are dropped.
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
from jaxtyping import Array, Float, Int, Shaped

from sborax.adapters.constraints import AXES, EXPERT, SHARED, compiled_axes, dividing, mesh_axes
from sborax.adapters.core import Context
from sborax.adapters.grouped import grouped_linear
from sborax.adapters.grouped_matmul import Sizes, expert_of_row
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
Mixed = tuple[Float[Array, "tokens d"], Squares, Float[Array, ""] | None]
"""The sums of tokens, squares, and how many choices were dropped; None without a capacity."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The form of a mixture.

    - activation: that of the gated units.
    - observed: whether sums of squares of inputs are wanted.
    - capacity: the rows that an expert takes of a device's tokens, as a multiple of those at balanced load; None for
        all of them.
    """

    activation: Activation
    observed: bool
    capacity: float | None = None

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
        order, place = order[:most], jnp.argsort(order)
        per_row = ctx.take(order // chosen)
        present = jnp.arange(most) < jnp.sum(sizes.rows)

        def only_here(rows: Float[Array, "rows _"]) -> Float[Array, "rows _"]:
            return jnp.where(present[:, None], rows, jnp.zeros((), rows.dtype)) if elsewhere else rows

        outputs, squares = self.units(only_here(_by_row(x, order, place)), sizes, per_row, projections, only_here)
        by_choice = _by_choice(outputs, order, place).reshape(tokens, chosen, -1)
        return jnp.einsum("tkd,tk->td", by_choice, weights), squares

    def limited(
        self,
        x: Float[Array, "tokens d"],
        weights: Float[Array, "tokens chosen"],
        numbers: Int[Array, "tokens chosen"],
        ctx: Context,
        projections: Projections,
        exchange: "Exchange | None" = None,
    ) -> Mixed:
        """sum_e p_e down_e(f(gate_e(x)) * up_e(x)) over those experts of a token that take it.

        Each expert takes at most C = ceil(capacity x tokens x chosen / experts) rows of the tokens. Tokens are
        taken in order, as in Switch (arXiv:2101.03961). So whether one is dropped depends only on earlier tokens, like
        everything else in a causal model. GShard (arXiv:2006.16668) takes the first choices of all tokens before any
        second one. Weights p_e stay those of the router, and a token that all its experts drop gets zeros. Padding
        takes no place. On a mesh an expert has C places for each device's tokens, so what is dropped depends on which
        device holds a token. Where nothing is dropped, results are those of one device.

        Every expert computes C rows; rows without a token are zeros.

        - exchange: how rows come to the device of their expert and back; None if `projections` are all experts.
        """
        (tokens, chosen), count = numbers.shape, projections["gate_proj"].kernel.shape[0]
        exchange = exchange or Exchange(1)
        experts = count * exchange.shares
        assert self.capacity is not None
        room = capacity_rows(self.capacity, tokens, chosen, experts)
        place, choice = assigned(numbers, experts, room, ctx.mask)
        token = choice // chosen

        def dispatched(leaf: Shaped[Array, "tokens ..."]) -> Shaped[Array, "rows ..."]:
            rows = leaf.at[token].get(mode="fill", fill_value=0)
            rows = exchange.there(rows.reshape(experts, room, *leaf.shape[1:]))
            return rows.reshape(-1, *leaf.shape[1:])

        # Squares are sums over rows with a token; nothing else reads the mask.
        mask = jnp.ones(tokens, jnp.int32) if self.observed else None
        per_row, rows = dataclasses.replace(ctx, mask=mask).map(dispatched), dispatched(x)
        sizes = Sizes(jnp.full(count, rows.shape[0] // count, jnp.int32))
        outputs, squares = self.units(rows, sizes, per_row, projections)
        back = exchange.back(outputs.reshape(count, -1, outputs.shape[-1]))
        by_choice = back.reshape(experts * room, -1).at[place].get(mode="fill", fill_value=0)
        total = tokens * chosen if ctx.mask is None else chosen * jnp.sum(ctx.mask != 0, dtype=jnp.int32)
        dropped = (total - jnp.sum(place < experts * room, dtype=jnp.int32)).astype(jnp.float32)
        return jnp.einsum("tkd,tk->td", by_choice.reshape(tokens, chosen, -1), weights), squares, dropped

    def units(
        self,
        rows: Float[Array, "rows d"],
        sizes: Sizes,
        ctx: Context,
        projections: Projections,
        only: Activation = lambda rows: rows,
    ) -> tuple[Float[Array, "rows d"], Squares]:
        """down_e(f(gate_e(x)) * up_e(x)) of rows that are sorted by expert.

        - ctx: with one entry a row.
        - only: sets rows that belong to no expert to zero.
        """
        gate, up = (
            checkpoint_name(projections[name](rows, sizes, ctx), "gate_up") for name in ("gate_proj", "up_proj")
        )
        inner = only(self.activation(gate) * up)
        outputs = only(projections["down_proj"](inner, sizes, ctx))
        inputs = {"gate_proj": rows, "up_proj": rows, "down_proj": inner} if self.observed else {}
        return outputs, {name: _squares(leaf, sizes, ctx.mask) for name, leaf in inputs.items()}

    def on_mesh(
        self,
        x: Float[Array, "tokens d"],
        weights: Float[Array, "tokens chosen"],
        numbers: Int[Array, "tokens chosen"],
        ctx: Context,
        projections: Projections,
    ) -> Mixed:
        """`here` over all experts on the current mesh, or `limited` if there is a capacity.

        Along "expert", where each device holds a different share of the experts:

        1. The tokens, and which experts they chose, are gathered.
        2. Each device computes the rows of its own experts.
        3. The outputs are summed, and each device is left with those of its tokens (a reduce-scatter).

        Along all other axes, tensor included, each device has different tokens. The kernels of its experts are
        gathered in the form they are stored in, and again for the backward pass. The gradients of trained kernels are
        reduce-scattered. So a row is multiplied on one device, with a kernel that is whole: any method applies, and no
        device waits for another one inside a loop whose length depends on data.

        With n devices along "expert", t tokens on each, d features and k experts a token, a device receives
        2 (n - 1) t d entries a layer in the forward pass, and as many in the backward pass. Two all-to-alls that send
        every token to each device with one of its experts would be at most 2 min(k, n - 1) t d, on average
        2 (n - 1) (1 - (1 - 1/n)^k) t d at equal load of independent choices. For k = 8 and n = 8 this is a third less,
        for k = 2 and n = 8 three quarters less; but either buffers would have the size of the largest load, or tokens
        would be dropped.

        A capacity f drops them. Instead of steps 1 and 3, two all-to-alls send the C rows of each expert to its device
        and back: a device receives 2 (n - 1) / n f k t d entries, which is less where f k < n, and has room for f k t
        rows, not n t min(k, experts / n). Each device fills the places from its own tokens, so which choices are
        dropped depends on the mesh. Results are those of one device where nothing is dropped.
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
        ) -> Mixed:
            share = device[0] // axes.get(SHARED, 1) % shares if shares > 1 else None
            gathered = {name: _on_device(leaf, specs[name], device[0]) for name, leaf in projections.items()}
            dropped = None
            if self.capacity is not None:
                y, squares, dropped = self.limited(*tokens, gathered, Exchange(shares, None if sent else share))
            elif sent:
                tokens = jax.tree.map(functools.partial(_gathered, axis=0, name=EXPERT), tokens)
                y, squares = self.here(*tokens, gathered, shares, share)
                y = jax.lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True)
            else:
                y, squares = self.here(*tokens, gathered, shares, share)
            if shares > 1 and not sent:
                y = jax.lax.psum(y, EXPERT)
            return y, jax.lax.psum(squares, summed), jax.lax.psum(dropped, over)

        rows = PartitionSpec(over)
        mapped = jax.shard_map(
            # Without this a scanned layer that recomputes nothing would keep what it gathered. Where all is recomputed,
            # the compiler merges what is gathered twice.
            jax.checkpoint(device, policy=_but_gathered, prevent_cse=False),
            in_specs=(PartitionSpec(tuple(manual)), rows, specs),
            out_specs=(rows, PartitionSpec(cut), PartitionSpec()),
            axis_names=set(manual),
            check_vma=False,
        )
        devices = jnp.arange(math.prod(axes[name] for name in manual), dtype=jnp.int32)
        return mapped(devices, (x, weights, numbers, ctx), projections)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How rows come to the device of their expert, and their outputs back.

    - shares: how many parts the experts are divided into.
    - share: the number of the part on this device, where all devices along "expert" have the same tokens; None where
        each has its own, which are sent.
    """

    shares: int
    share: Int[Array, ""] | None = None

    def there(self, rows: Shaped[Array, "experts room ..."]) -> Shaped[Array, "here places ..."]:
        """The rows of this device's experts, those of the first device first."""
        if self.shares == 1:
            return rows
        if self.share is None:
            return jax.lax.all_to_all(rows, EXPERT, split_axis=0, concat_axis=1, tiled=True)
        count = rows.shape[0] // self.shares
        return jax.lax.dynamic_slice_in_dim(rows, self.share * count, count)

    def back(self, outputs: Float[Array, "here places d"]) -> Float[Array, "experts room d"]:
        """The outputs of this device's rows. Without sending, those of experts elsewhere are zero."""
        if self.shares == 1:
            return outputs
        if self.share is None:
            return jax.lax.all_to_all(outputs, EXPERT, split_axis=1, concat_axis=0, tiled=True)
        count = outputs.shape[0]
        zeros = jnp.zeros((count * self.shares, *outputs.shape[1:]), outputs.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, outputs, self.share * count, 0)


@jax.custom_vjp
def _by_row(
    x: Float[Array, "tokens d"], order: Int[Array, " rows"], place: Int[Array, " choices"]
) -> Float[Array, "rows d"]:
    """The token of each row. Its backward pass gathers gradients, since scatter-add has no fixed order on a GPU.

    - order: the choice of each row.
    - place: the row of each choice.
    """
    return x[order // (place.size // x.shape[0])]


def _by_row_forward(x: Array, order: Array, place: Array) -> tuple[Array, Any]:
    return _by_row(x, order, place), (order, place, x.shape[0])


def _by_row_backward(saved: Any, g: Array) -> tuple[Array, None, None]:
    order, place, tokens = saved
    return jnp.sum(_by_choice(g, order, place).reshape(tokens, -1, g.shape[-1]), axis=1), None, None


_by_row.defvjp(_by_row_forward, _by_row_backward)


@jax.custom_vjp
def _by_choice(
    rows: Float[Array, "rows d"], order: Int[Array, " rows"], place: Int[Array, " choices"]
) -> Float[Array, "choices d"]:
    """The row of each choice, zeros where it has none. See `_by_row` for the arguments."""
    if rows.shape[0] == place.size:
        return rows[place]
    return rows.at[place].get(mode="fill", fill_value=0)


def _by_choice_forward(rows: Array, order: Array, place: Array) -> tuple[Array, Array]:
    return _by_choice(rows, order, place), order


def _by_choice_backward(order: Array, g: Array) -> tuple[Array, None, None]:
    return g[order], None, None


_by_choice.defvjp(_by_choice_forward, _by_choice_backward)


def capacity_rows(capacity: float, tokens: int, chosen: int, experts: int) -> int:
    """C = ceil(capacity x tokens x chosen / experts), and at most `tokens`, since a token passes an expert once."""
    return min(tokens, math.ceil(capacity * tokens * chosen / experts))


def assigned(
    numbers: Int[Array, "tokens chosen"], experts: int, room: int, mask: Array | None = None
) -> tuple[Int[Array, " choices"], Int[Array, " places"]]:
    """The place of each choice, and the choice of each place, if each expert has `room` places.

    Expert e has the places e room, ..., (e + 1) room - 1, and choices take them in the order of tokens. The place
    of a dropped choice is the number of places, and the choice of an empty place the number of choices.

    - mask: (tokens,), zero at padding, which takes no place.
    """
    choices, number = numbers.size, numbers.reshape(-1)
    if mask is not None:
        number = jnp.where(jnp.repeat(mask != 0, numbers.shape[1]), number, experts)
    order = jnp.argsort(number, stable=True)
    sizes = jnp.bincount(number, length=experts).astype(jnp.int32)
    # Choices of padding are sorted last, and are as if their expert was full.
    first = (jnp.cumsum(sizes) - sizes).at[number[order]].get(mode="fill", fill_value=-room)
    positions = jnp.arange(choices, dtype=jnp.int32)
    slot = jnp.zeros(choices, jnp.int32).at[order].set(positions - first, unique_indices=True)
    place = jnp.where(slot < room, number * room + slot, experts * room)
    return place, jnp.full(experts * room, choices, jnp.int32).at[place].set(positions, mode="drop")


def mixed(
    x: Float[Array, "tokens d"],
    weights: Float[Array, "tokens chosen"],
    numbers: Int[Array, "tokens chosen"],
    ctx: Context,
    projections: Projections,
    form: Mixture,
) -> Mixed:
    """sum_e p_e down_e(f(gate_e(x)) * up_e(x)) over the experts e that the router chose for a token.

    With a capacity, over those that take the token; see `Mixture.limited`.

    Args:
    - x: the tokens.
    - weights, numbers: p_e and e of each token.
    - ctx: with one entry a token.
    - projections: of all experts, by name.
    - form: the activation, whether squares are wanted, which are empty otherwise, and the capacity.
    """
    if math.prod(compiled_axes().values()) > 1:
        return form.on_mesh(x, weights, numbers, ctx, projections)
    if form.capacity is not None:
        return form.limited(x, weights, numbers, ctx, projections)
    return *form.here(x, weights, numbers, ctx, projections), None


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


def _on_device(projection: Projection, specs: Projection, device: Int[Array, ""]) -> Projection:
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
