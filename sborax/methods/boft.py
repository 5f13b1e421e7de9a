"""BOFT: orthogonal fine-tuning by butterfly factors, arXiv:2311.06243."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractMethod,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    cast,
    dense,
    dropout_leaf,
    hyper,
    in_float32,
    matmul,
)
from sborax.methods.rotation import cayley


@dataclasses.dataclass(frozen=True)
class BOFT(AbstractMethod):
    """y = m * ((x R) W), R = R_k ... R_1: every factor rotates blocks of inputs, and factors mix ever farther ones.

    The blocks of factor i are rotated by (I - Q)(I + Q)^-1, Q = (D - D^T) / 2 with D (block, block). R_1 rotates
    neighbours. A block of R_i takes half its inputs from each half of a group of 2^(i-1) blocks.

    block: size of a block, which must divide in (PEFT: 4).
    factors: how many factors (PEFT: 1). Above 1, block must be even, and block * 2^(factors-1) must divide in.
    block_dropout: in every call in training, this share of the blocks of one random factor rotates nothing, rounded
        down to whole blocks (PEFT: `boft_dropout`, 0). Nothing is rescaled, since a rotation keeps lengths.

    D = 0 and m (out,) = 1 at init: identity. Exact merge m * (R W). x is rotated, never W. PEFT silently
    uses one factor where its CUDA extension cannot be compiled; files from there are those of factors=1.
    Trained parameters: factors in block + out.
    """

    paper = "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv:2311.06243"
    sends = "the rotations of all blocks, and x, for blocks are cut in another way than tokens"
    rank = 1

    block: int = 4
    factors: int = 1
    block_dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {"d": (None, "in", None, None), "m": ("out",), "block_dropout": (), "dropped": ()}

    def check(self, shape: tuple[int, int]) -> None:
        if not 1 <= self.factors <= shape[0]:
            raise SboraxError(f"factors must lie in 1..{shape[0]} (the inputs), got {self.factors}")
        widest = self.block * 2 ** (self.factors - 1)
        if self.block < 2 or shape[0] % widest or (self.factors > 1 and self.block % 2):
            even = "be even and " if self.factors > 1 else ""
            raise SboraxError(
                f"block must {even}be at least 2, and block * 2^(factors - 1) must divide {shape[0]} rows; got block "
                f"{self.block} and factors {self.factors}"
            )

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        blocks = fan_in // self.block
        rate = dropout_leaf(self.block_dropout, "block_dropout")
        # Counted here, in float64 as in PEFT: of 100 blocks, a rate of 0.29 drops 28, and in float32 it would drop 29.
        dropped = {"dropped": jnp.int32(int(self.block_dropout * blocks))} if rate else {}
        d = jnp.zeros((self.factors, blocks, self.block, self.block))
        return Fitted({"d": d, "m": jnp.ones(fan_out)}, {**rate, **dropped})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        r = cast(_without_blocks(self._rotations(adapter), adapter, ctx), x)
        for i in reversed(range(self.factors)):
            x = self._rotate(x, r[i], i)
        return in_float32(lambda y: y * cast(adapter.train["m"], y)[None, :], matmul(x, weight))

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        r = self._rotations(adapter).swapaxes(-1, -2)
        rotated = dense(weight).astype(jnp.float32).T
        with jax.default_matmul_precision("highest"):
            for i in range(self.factors):
                rotated = self._rotate(rotated, r[i], i)
        return rotated.T * adapter.train["m"][None, :]

    def _rotations(self, adapter: Adapter) -> Float[Array, "factors blocks block block"]:
        d = adapter.train["d"]
        skew = 0.5 * (d - d.swapaxes(-1, -2))
        return cayley(skew.reshape(-1, self.block, self.block), None).reshape(d.shape)

    def _rotate(
        self, x: Float[Array, "rows in"], r: Float[Array, "blocks block block"], factor: int
    ) -> Float[Array, "rows in"]:
        """Blocks of `x` times those of `r`, where halves of a block lie 2^factor halves apart."""
        rows, fan_in = x.shape
        blocks, distance = fan_in // self.block, 2**factor
        halves = (rows, blocks // distance, 2, distance, self.block // 2)
        if factor:
            x = x.reshape(halves).swapaxes(2, 3)
        rotated = jnp.einsum("tnk,nkc->tnc", x.reshape(rows, blocks, self.block), r)
        if factor:
            rotated = rotated.reshape(rows, blocks // distance, distance, 2, self.block // 2).swapaxes(2, 3)
        return rotated.reshape(rows, fan_in)


def _without_blocks(
    r: Float[Array, "factors blocks block block"], adapter: Adapter, ctx: Context
) -> Float[Array, "factors blocks block block"]:
    """`r` with the identity for `dropped` blocks of one factor, if the context has a key; both are drawn."""
    if ctx.key is None or "dropped" not in adapter.frozen:
        return r
    of_factor, of_blocks = jax.random.split(ctx.key)
    factor = jax.random.randint(of_factor, (), 0, r.shape[0])
    dropped = jax.random.permutation(of_blocks, r.shape[1]) < adapter.frozen["dropped"]
    mask = (jnp.arange(r.shape[0]) == factor)[:, None] & dropped[None, :]
    return jnp.where(mask[:, :, None, None], jnp.eye(r.shape[-1])[None, None], r)
