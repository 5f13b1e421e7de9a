"""The forms that the terms of GLoRA may have, and their leaves."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sborax.adapters.core import Axes, Leaves, SboraxError

CHOICES = {
    "weight": ("lora", "vector", "constant"),
    "coupling": ("lora", "vector", "none"),
    "bias": ("vector", "constant", "none"),
}
"""The forms of each term."""
VECTORS: Axes = {"gain": ("out",), "shift": ("out",), "bias_gain": ("out",), "bias_shift": ("out",)}
CONSTANTS: Axes = {f"{name}_constant": () for name in VECTORS}
AXES: Axes = {
    **{"gain_a": ("in", "rank"), "gain_b": ("rank", "out"), "a": ("in", "rank"), "b": ("rank", "out")},
    **{"c_a": ("in", "rank"), "c_b": ("rank",), "c": ("in",)},
    **VECTORS,
    **CONSTANTS,
}
"""The axes of the leaves of all forms."""
GROUP_B = frozenset({"a", "b", "shift", "bias_gain", "bias_shift", *CONSTANTS})
"""Those that PEFT's LoRA+ trains faster. It goes by names, and finds "lora_B" in "glora_B"."""


def check_forms(**forms: str) -> None:
    """Raise SboraxError for a form that a term cannot have."""
    for name, form in forms.items():
        if form not in CHOICES[name]:
            raise SboraxError(f"{name} must be {', '.join(map(repr, CHOICES[name]))}, got {form!r}")


def zeros(gain: str, shift: str, form: str, size: int) -> Leaves:
    """Two leaves of zeros: a number for each output, or one number. None of form "none"."""
    if form == "none":
        return {}
    if form == "vector":
        return {gain: jnp.zeros(size), shift: jnp.zeros(size)}
    return {f"{gain}_constant": jnp.float32(0.0), f"{shift}_constant": jnp.float32(0.0)}


def numbers(train: Leaves, name: str) -> Float[Array, "1 n"]:
    """A leaf of either form as a row, of `out` numbers or of one."""
    leaf = train[name] if name in train else train[f"{name}_constant"]
    return leaf.reshape(1, -1)
