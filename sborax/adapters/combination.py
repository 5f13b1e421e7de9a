"""Ways to make one change of a weight from several: task arithmetic, pruning by magnitude, TIES, DARE."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from sborax.adapters.linalg import svd
from sborax.errors import SboraxError

KINDS = (
    "cat",
    "linear",
    "svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
)
"""What `Combination` takes, by the names of PEFT."""
SIGNS = ("total", "frequency")
SVD = "_svd"


def task_arithmetic(
    tensors: Float[Array, "parts rows columns"], weights: Float[Array, " parts"]
) -> Float[Array, "rows columns"]:
    """sum_i w_i t_i (arXiv:2212.04089)."""
    return (weights[:, None, None] * tensors).sum(axis=0)


def magnitude_prune(
    tensors: Float[Array, "parts rows columns"], weights: Float[Array, " parts"], density: float
) -> Float[Array, "rows columns"]:
    """sum_i w_i t_i, where each t_i keeps only its share `density` of entries, those of largest magnitude."""
    return task_arithmetic(_largest(tensors, density), weights)


def ties(
    tensors: Float[Array, "parts rows columns"],
    weights: Float[Array, " parts"],
    density: float,
    majority_sign_method: str,
) -> Float[Array, "rows columns"]:
    """TIES (arXiv:2306.01708): prunes by magnitude, then means w_i t_i over the entries with the majority's sign.

    - majority_sign_method: "total", the sign of the sum of the pruned tensors, or "frequency", that of most of them.
    """
    return _disjoint_mean(_largest(tensors, density), weights, majority_sign_method)


def dare_linear(
    key: Key[Array, ""],
    tensors: Float[Array, "parts rows columns"],
    weights: Float[Array, " parts"],
    density: float,
) -> Float[Array, "rows columns"]:
    """DARE (arXiv:2311.03099): sum_i w_i t_i m_i / density, where m_i keeps each entry with probability `density`."""
    return task_arithmetic(_dropped(key, tensors, density), weights)


def dare_ties(
    key: Key[Array, ""],
    tensors: Float[Array, "parts rows columns"],
    weights: Float[Array, " parts"],
    density: float,
    majority_sign_method: str,
) -> Float[Array, "rows columns"]:
    """TIES with the random pruning of `dare_linear` in place of that by magnitude."""
    return _disjoint_mean(_dropped(key, tensors, density), weights, majority_sign_method)


@dataclasses.dataclass(frozen=True)
class Combination:
    """How `merge_weighted` and `weighted_lora` combine the changes of a kernel, by the names of PEFT.

    Kinds whose name ends in "svd" combine the changes D_i = W_i - W themselves, whatever the methods:

    - "svd": sum_i w_i D_i (`task_arithmetic`).
    - "magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd": the function of that name, of D_i.

    "cat" (default) is "svd" without truncation. The others combine the factors a_i and b_i of LoRA separately, each
    with the weight sqrt|w_i s_i|, so that their product mixes one adapter's a with another's b:

    - "linear" (`task_arithmetic`), "magnitude_prune", "ties", "dare_linear", "dare_ties": the function of that name.

    Args:
    - kind: one of the above.
    - density: the share of entries that pruning keeps, in (0, 1]. For kinds that prune, and no others.
    - majority_sign_method: whose sign TIES takes, "total" (default, as PEFT) or "frequency".
    - rank: how many singular vectors of the combined change to keep, for kinds in "svd". Default None: all of them in
      `merge_weighted`; in `weighted_lora`, as many as the largest rank of the adapters, as PEFT.

    A kernel without an adapter in one of the parts counts as a change of zero, which has no part in a TIES mean. PEFT
    takes "linear" for a single adapter whatever is asked; here a single one is pruned, too. PEFT's `svd_clamp` is left
    out, because its result depends on the signs that a solver gives to singular vectors.

    Raises SboraxError for an unknown kind, and for options that are missing or have no meaning.
    """

    kind: str = "cat"
    density: float | None = None
    majority_sign_method: str = "total"
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SboraxError(f"combination must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.majority_sign_method not in SIGNS:
            raise SboraxError(f"majority_sign_method must be 'total' or 'frequency', got {self.majority_sign_method!r}")
        if self._function in ("cat", "linear", "svd"):
            if self.density is not None:
                raise SboraxError(f"{self.kind!r} prunes nothing; leave density out")
        elif self.density is None or not 0.0 < self.density <= 1.0:
            raise SboraxError(f"{self.kind!r} needs a density in (0, 1], got {self.density}")
        if self.rank is not None and (self.rank < 1 or not self.of_changes or self.kind == "cat"):
            raise SboraxError(f"rank must be 1 or more, and is for kinds in 'svd'; got {self.rank} for {self.kind!r}")

    @property
    def _function(self) -> str:
        return self.kind.removesuffix(SVD)

    @property
    def of_changes(self) -> bool:
        """Whether changes of weights are combined, and not factors."""
        return self.kind in ("cat", "svd") or self.kind.endswith(SVD)

    @property
    def described(self) -> str:
        """The kind and the options that it reads, as in `ties_svd, density 0.2`."""
        density = "" if self.density is None else f", density {self.density:g}"
        sign = f", sign by {self.majority_sign_method}" if self._function in ("ties", "dare_ties") else ""
        return f"{self.kind}{density}{sign}" + ("" if self.rank is None else f", rank {self.rank}")

    @property
    def draws(self) -> bool:
        """Whether it needs a random key."""
        return self._function in ("dare_linear", "dare_ties")

    def combine(
        self,
        key: Key[Array, ""],
        tensors: Float[Array, "parts rows columns"],
        weights: Float[Array, " parts"],
    ) -> Float[Array, "rows columns"]:
        """One matrix from several: changes of one kernel, or factors of one side."""
        if self.density is None:
            return task_arithmetic(tensors, weights)
        match self._function:
            case "magnitude_prune":
                return magnitude_prune(tensors, weights, self.density)
            case "ties":
                return ties(tensors, weights, self.density, self.majority_sign_method)
            case "dare_linear":
                return dare_linear(key, tensors, weights, self.density)
            case _:
                return dare_ties(key, tensors, weights, self.density, self.majority_sign_method)


def leading_factors(
    change: Float[Array, "in out"], rank: int
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
    """The best `a b` of a given rank for a change: a = U_r, b = S_r V_r^T."""
    u, s, vt = svd(change)
    return u[:, :rank], s[:rank, None] * vt[:rank]


def _largest(tensors: Float[Array, "parts rows columns"], density: float) -> Float[Array, "parts rows columns"]:
    """The int(density size) entries of largest magnitude of each part; zero elsewhere."""
    parts, size = tensors.shape[0], math.prod(tensors.shape[1:])
    flat = tensors.reshape(parts, size)
    _, indices = jax.lax.top_k(jnp.abs(flat), int(density * size))
    mask = jax.vmap(lambda places: jnp.zeros(size, bool).at[places].set(True))(indices)
    return jnp.where(mask, flat, jnp.zeros_like(flat)).reshape(tensors.shape)


def _dropped(
    key: Key[Array, ""], tensors: Float[Array, "parts rows columns"], density: float
) -> Float[Array, "parts rows columns"]:
    """Entries of each part kept with probability `density`, and divided by it; zero elsewhere."""
    if density == 1.0:
        return tensors
    keys = jax.random.split(key, tensors.shape[0])
    mask = jnp.stack([jax.random.bernoulli(keys[i], density, tensors.shape[1:]) for i in range(tensors.shape[0])])
    return jnp.where(mask, tensors / jnp.float32(density), jnp.zeros_like(tensors))


def _majority(tensors: Float[Array, "parts rows columns"], method: str) -> Bool[Array, "parts rows columns"]:
    """Where each part has the majority's sign, which is + where positive and negative are in balance."""
    signs = jnp.sign(tensors)
    votes = (tensors if method == "total" else signs).sum(axis=0)
    return signs == jnp.where(votes >= 0, jnp.ones_like(votes), -jnp.ones_like(votes))[None]


def _disjoint_mean(
    tensors: Float[Array, "parts rows columns"], weights: Float[Array, " parts"], method: str
) -> Float[Array, "rows columns"]:
    """w_i t_i, summed over the parts with the majority's sign and divided by their number."""
    agreeing = _majority(tensors, method).astype(tensors.dtype)
    return task_arithmetic(tensors * agreeing, weights) / jnp.maximum(agreeing.sum(axis=0), jnp.ones((1, 1)))
