"""Places of trained entries that follow from a seed."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sborax.adapters.core import Fitted, SboraxError

DENSE = 128
"""Entries are applied as a dense matrix if it is at most this many times as large as their number.

Moving one entry of a row takes at least as long as this many entries of a product.
"""
LARGEST_SEED = (1 << 32) - 1
LONG = LARGEST_SEED // 20
"""From so many entries on, PyTorch draws in another way, which is not reproduced here."""


def seeded_places(seed: int, count: int, shape: tuple[int, int]) -> Int[np.ndarray, "2 count"]:
    """Distinct random places of an (in, out) weight: a column and a row for each.

    Place k is entry k of `torch.randperm(in * out)` after `torch.manual_seed(seed)`, over the (out, in) weight. PEFT's
    files hold the seed alone. NumPy guarantees that `RandomState` never changes, and it is seeded as PyTorch's
    generator is.

    Args:
    - seed: in 0..LARGEST_SEED.
    - count: how many places.
    - shape: (in, out).
    """
    fan_in, fan_out = shape
    size = fan_in * fan_out
    draws = np.random.RandomState(seed).randint(0, 1 << 32, count, np.uint32).tolist()
    places, swaps = np.empty(count, np.int64), {}
    # The first steps of a shuffle of all entries, of which only those that have moved are kept.
    for k, draw in enumerate(draws):
        partner = k + draw % (size - k)
        places[k] = swaps.get(partner, partner)
        swaps[partner] = swaps.get(k, k)
    return np.stack([places // fan_in, places % fan_in]).astype(np.int32)


def check_places(seed: int, count: int, shape: tuple[int, int]) -> None:
    """Raise `SboraxError` unless `seeded_places` has so many places to draw."""
    if not 0 <= seed <= LARGEST_SEED:
        raise SboraxError(f"seed must lie in 0..{LARGEST_SEED}, got {seed}")
    if shape[0] * shape[1] >= LONG:
        raise SboraxError(f"the weight has {shape[0] * shape[1]} entries; places are drawn for fewer than {LONG}")
    if not 1 <= count <= shape[0] * shape[1]:
        raise SboraxError(f"coefficients must lie in 1..{shape[0] * shape[1]} (entries of the weight), got {count}")


def start_at_places(seed: int, count: int, shape: tuple[int, ...], alpha: float) -> Fitted:
    """Leaves of an adapter with `count` entries c = 0 at `seeded_places` idx of an (in, out) weight, and its scale."""
    places = seeded_places(seed, count, (shape[0], shape[1]))
    return Fitted({"c": jnp.zeros(count)}, {"idx": jnp.asarray(places), "scale": jnp.float32(alpha)})


def times_sparse(
    x: Float[Array, "tokens in"],
    rows: Int[Array, " count"],
    columns: Int[Array, " count"],
    entries: Float[Array, " count"],
    width: int,
) -> Float[Array, "tokens width"]:
    """x S, where S is zero but for the sums of `entries` at (rows, columns)."""
    if x.shape[1] * width <= DENSE * entries.shape[0]:
        sparse = jnp.zeros((x.shape[1], width), x.dtype).at[rows, columns].add(entries)
        return jnp.matmul(x, sparse, precision="highest")
    return jnp.zeros((x.shape[0], width), x.dtype).at[:, columns].add(x[:, rows] * entries[None, :])
