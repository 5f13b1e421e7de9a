"""PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, arXiv:2410.01870."""

import dataclasses
from typing import Literal

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
    Leaves,
    SboraxError,
    Weight,
    cast,
    check_rank,
    check_repetitions,
    dense,
    hyper,
    matmul,
)
from sborax.methods.lowrank import kaiming_uniform

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class PEANuT(AbstractMethod):
    """y = x W + s (x f(W u)) b: a small network f reads every row of W, u (out, rank), b (rank, out).

    f(z) is act(z) for depth 0. Else z_0 = act(z), z_i = act(z_(i-1) e_(i-1)) through the encoders e (rank, rank), and
    then as many decoders d (rank, rank), each followed by act and the z of its level: z <- act(z d_i) + z_(depth-1-i).

    rank: width of f (PEFT: 32).
    depth: how many encoders, and as many decoders (PEFT: 0).
    activation: "relu" (default, as PEFT), "silu" or "gelu".
    alpha: the scale s (PEFT: 1).

    u ~ U(-1/sqrt(out), 1/sqrt(out)), e and d ~ U(-1/sqrt(rank), 1/sqrt(rank)), as PEFT; b = 0: identity at init. Exact
    merge W + s f(W u) b. The step computes f once for all rows of W, (in, rank), and no change of W's size.
    Trained parameters: 2 rank out + 2 depth rank^2.
    """

    paper = "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, arXiv:2410.01870"
    sends = "W u, rank floats for each row of W, and its gradient"

    rank: int = 32
    depth: int = 0
    activation: Literal["relu", "silu", "gelu"] = "relu"
    alpha: float = hyper(1.0, above=0.0)

    @property
    def axes(self) -> Axes:
        layers = {f"{kind}{i}": (None, None) for kind in "ed" for i in range(self.depth)}
        return {"u": ("out", "rank"), "b": ("rank", "out"), **layers, "scale": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        check_repetitions("depth", self.depth, 0)
        if self.activation not in ACTIVATIONS:
            raise SboraxError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_out = weight.shape[1]
        first, *keys = jax.random.split(key, 1 + 2 * self.depth)
        names = [f"{kind}{i}" for kind in "ed" for i in range(self.depth)]
        train = {name: kaiming_uniform(k, self.rank, self.rank, hint) for name, k in zip(names, keys, strict=True)}
        train |= {"u": kaiming_uniform(first, fan_out, self.rank, hint), "b": jnp.zeros((self.rank, fan_out))}
        return Fitted(train, {"scale": jnp.float32(self.alpha)})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        # Computed again in the backward pass, which would else keep a dense copy of a quantised weight.
        @jax.checkpoint
        def left(train: Leaves) -> Float[Array, "in rank"]:
            return self._network(cast(dense(weight), x), {name: cast(leaf, x) for name, leaf in train.items()})

        hidden = cast(adapter.frozen["scale"], x) * (x @ left(dict(adapter.train)))
        return matmul(x, weight) + hidden @ cast(adapter.train["b"], x)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        wide = dense(weight).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            return wide + adapter.frozen["scale"] * self._network(wide, adapter.train) @ adapter.train["b"]

    def _network(self, weight: Float[Array, "in out"], train: Leaves) -> Float[Array, "in rank"]:
        """f(W u)."""
        act = ACTIVATIONS[self.activation]
        z, levels = act(weight @ train["u"]), []
        for i in range(self.depth):
            levels.append(z)
            z = act(z @ train[f"e{i}"])
        for i, level in enumerate(reversed(levels)):
            z = act(z @ train[f"d{i}"]) + level
        return z
