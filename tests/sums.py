"""Sums that jaxlib computes wrongly on a CPU unless sborax has set a flag, and what a process makes of them.

As a script: `sums.py STATEMENT`, which imports sborax, prints the flags, the errors of sums, and warnings, as JSON.
"""

import json
import os
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 33_000
"""XLA takes another way above 32,768."""


def difference(got, want) -> float:
    """The largest, over the largest value that is right."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


def error_of_sums() -> float:
    """Of the squared lengths of rows after a product, compiled."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3, 3)).astype(np.float32)
    rows = rng.normal(size=(ROWS, 3)).astype(np.float32)
    got = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    return difference(got, ((rows.astype(np.float64) @ matrix.T.astype(np.float64)) ** 2).sum(1))


def errors_of_gradients(method) -> list[float]:
    """Of a loss that weighs rows by their lengths after a product, and of its gradients: float32 against float64."""
    import sborax as sx

    rng = np.random.default_rng(0)
    x, weight, matrix = (rng.normal(size=(size, 3)) for size in (ROWS, 3, 3))
    _, adapters = sx.attach(jax.random.key(0), {"dense": {"kernel": jnp.asarray(weight, jnp.float32)}}, [("", method)])
    train, frozen = sx.split(adapters)
    train = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), train)

    def loss(train, frozen, x, weight, matrix):
        y = sx.linear(x, weight, sx.combine(train, frozen)["dense"]["kernel"])
        lengths = jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(y)
        return jnp.mean(jnp.sum(y**2, axis=1) / (1 + jax.lax.stop_gradient(lengths)))

    def of(kind):
        def cast(leaf):
            return jnp.asarray(leaf, kind if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)

        arguments = jax.tree.map(cast, (train, frozen, x, weight.astype(np.float32), matrix))
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(*arguments))

    with jax.enable_x64(True):
        return [difference(*pair) for pair in zip(of(jnp.float32), of(jnp.float64), strict=True)]


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(sys.argv[1])
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    answer = {"flags": os.environ.get("XLA_FLAGS"), "error": error_of_sums(), "warnings": messages}
    if sys.argv[2:] == ["gradients"]:
        import sborax as sx

        answer["gradients"] = errors_of_gradients(sx.LoRA(rank=2))
    print(json.dumps(answer))
