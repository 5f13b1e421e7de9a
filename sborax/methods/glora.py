"""GLoRA: generalized LoRA, arXiv:2306.07967."""

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
    Rank,
    Weight,
    cast,
    check_rank,
    dense,
    live,
    matmul,
    width,
)
from sborax.methods.glora_forms import AXES, GROUP_B, check_forms, numbers, zeros
from sborax.methods.lowrank import kaiming_uniform


@dataclasses.dataclass(frozen=True)
class GLoRA(AbstractMethod):
    """y = x (W + W * A + B) + bias + bias * D + E + c W, * entry by entry: W and its bias are scaled and shifted.

    rank: width of the factors that "lora" stands for (PEFT: 8), an int or a `RankPolicy`.
    weight: form of A and B (PEFT: "lora"): "lora", products of factors of this width; "vector", a number for each
        output; "constant", one number.
    coupling: form of c, the paper's C; c W is added to the bias (PEFT: "lora"): "lora", a product of factors
        (in, rank) and (rank, 1); "vector", a number for each input; "none", c = 0.
    bias: form of D and E (PEFT: "constant"): "vector", "constant", or "none", D = E = 0.

    c, D and E exist only where the projection has a bias, as in PEFT: never in LLaMA, and in Qwen2 for q, k and v. The
    paper searches for forms by layer: give layers their own rules. For "lora" the step forms W * A, of up to W's rank.

    The first factors of A and B are uniform in +-1/sqrt(in), the second factor of c is uniform in +-1, and all else is
    zero. Identity at init. Exact merge.
    Trained parameters: 2 rank (in + out), 2 out or 2; where there is a bias also rank (in + 1) or in, and 2 out or 2.
    """

    paper = "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, arXiv:2306.07967"
    group_b = GROUP_B
    sends = "gradients of single numbers in parts"
    ragged = True
    scales_weight = True

    rank: Rank = 8
    weight: Literal["lora", "vector", "constant"] = "lora"
    coupling: Literal["lora", "vector", "none"] = "lora"
    bias: Literal["vector", "constant", "none"] = "constant"

    @property
    def axes(self) -> Axes:
        return AXES

    @property
    def materialises(self) -> str:
        return "the update multiplies the weight entry by entry, without a thin form" if self.weight == "lora" else ""

    @property
    def adapts_bias(self) -> bool:
        return {self.coupling, self.bias} != {"none"}

    @property
    def summed(self) -> int:
        return width(self.rank) if self.weight == "lora" else 1

    def check(self, shape: tuple[int, int]) -> None:
        check_forms(weight=self.weight, coupling=self.coupling, bias=self.bias)
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        of_gain, of_shift, of_coupling = jax.random.split(key, 3)
        train: Leaves = {}
        if self.weight == "lora":
            for factor, partner, draw in (("gain_a", "gain_b", of_gain), ("a", "b", of_shift)):
                train[factor] = kaiming_uniform(draw, fan_in, self.rank, hint)
                train[partner] = jnp.zeros((width(self.rank), fan_out))
        else:
            train |= zeros("gain", "shift", self.weight, fan_out)
        if not hint.bias:
            return Fitted(train, {})
        train |= zeros("bias_gain", "bias_shift", self.bias, fan_out)
        if self.coupling == "vector":
            train["c"] = jnp.zeros(fan_in)
        elif self.coupling == "lora":
            train["c_a"], mask = jnp.zeros((fan_in, width(self.rank))), live(self.rank, hint)[1]
            train["c_b"] = jax.random.uniform(of_coupling, mask.shape, minval=-1.0) * mask
        return Fitted(train, {})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        train, y = adapter.train, matmul(x, weight)
        if self.weight != "lora":
            gain, shift = numbers(train, "gain"), numbers(train, "shift")
            return y + y * cast(gain, y) + jnp.sum(x, axis=1, keepdims=True) * cast(shift, x)

        # The product is recomputed in the backward pass: saving one per layer would be a second model.
        @jax.checkpoint
        def update(x: Array, a: Array, b: Array) -> Array:
            return x @ (cast(dense(weight), x) * (cast(a, x) @ cast(b, x)))

        return y + update(x, train["gain_a"], train["gain_b"]) + (x @ cast(train["a"], x)) @ cast(train["b"], x)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        train, wide = adapter.train, dense(weight).astype(jnp.float32)
        if self.weight != "lora":
            return wide + wide * numbers(train, "gain") + numbers(train, "shift")
        gain = jnp.matmul(train["gain_a"], train["gain_b"], precision="highest")
        return wide + wide * gain + jnp.matmul(train["a"], train["b"], precision="highest")

    def merge_bias(self, bias: Float[Array, " out"], weight: Weight, adapter: Adapter) -> Float[Array, " out"]:
        train, merged = adapter.train, bias.astype(jnp.float32)
        if "bias_gain" in train or "bias_gain_constant" in train:
            merged = merged + merged * numbers(train, "bias_gain")[0] + numbers(train, "bias_shift")[0]
        if "c" in train or "c_a" in train:
            c = train["c"] if "c" in train else train["c_a"] @ train["c_b"]
            merged = merged + matmul(c[None, :], weight)[0]
        return merged
