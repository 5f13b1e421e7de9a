"""The documentation's code does what the documentation says."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

import sborax as sx
from sborax.tree import over_stack

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


@pytest.mark.usefixtures("strict")
def test_the_worked_example_is_a_method():
    (code,) = blocks("adding_a_method.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    space = {"__name__": "worked_example"}
    exec(code, space)
    method = space["Projected"](rank=4)
    params = {"layers": {"proj": {"kernel": jax.random.normal(jax.random.key(0), (3, 16, 24))}}}
    for whole in (method, sx.add(method, sx.scale(method, 0.5))):
        rules = [sx.Rule("proj", whole, layers=(0, 2))]
        _, adapters = sx.attach(jax.random.key(1), params, rules)
        chex.assert_trees_all_equal(sx.merge(params, adapters), params)
        train, frozen = sx.split(adapters)
        node = sx.combine(jax.tree.map(lambda leaf: leaf + 0.1, train), frozen)["layers"]["proj"]["kernel"]
        x = jax.random.normal(jax.random.key(2), (5, 16))
        kernel = params["layers"]["proj"]["kernel"]
        y = over_stack(lambda w, n, x=x: sx.linear(x, w, n), (3,))(kernel, node)
        merged = sx.merge(params, {"layers": {"proj": {"kernel": node}}})["layers"]["proj"]["kernel"]
        chex.assert_trees_all_close(y, jnp.einsum("ti,lio->lto", x, merged), atol=2e-5)
        assert not jnp.array_equal(merged[0], kernel[0])
    assert sx.count(adapters) == 2 * 2 * 4 * 24
