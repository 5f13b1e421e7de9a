"""Bare kernels of `cases.py`'s size, adapters of its rows on them, and ways to run and compare these."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FEW, FIRST, IN, LAYERS, METHODS, OUT, TOKENS, context_for, hint_for
from nightly import nightly_unless

import sborax as sx
from sborax.adapters.bank import link
from sborax.adapters.core import AbstractFactored, AbstractMethod, Adapter
from sborax.adapters.paths import kernels
from sborax.adapters.tree import nodes, over_stack, stack_of
from sborax.models.nf4 import quantise

SETTINGS = [
    pytest.param("float32", False, False, id="f32-flat"),
    pytest.param("float32", True, False, id="f32-stacked"),
    pytest.param("bfloat16", False, False, id="bf16-flat"),
    pytest.param("bfloat16", True, False, id="bf16-stacked"),
    pytest.param("float32", False, True, id="nf4-flat"),
    pytest.param("float32", True, True, id="nf4-stacked"),
]
by_case = pytest.mark.parametrize("case", nightly_unless(FIRST, METHODS), ids=lambda case: case.name)
by_few = pytest.mark.parametrize("case", nightly_unless(FEW, METHODS), ids=lambda case: case.name)
"""Rows that have every declaration both ways; the nightly run takes all."""


def normal(seed: int, *shape: int) -> np.ndarray:
    """Drawn on the host: a draw on the device would be one more program to compile for every shape."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def base(dtype: str = "float32", stacked: bool = True, quantised: bool = False):
    weight = np.float32(0.3) * normal(1, LAYERS, IN, OUT)
    weight = jnp.asarray(weight if stacked else weight[0], dtype)
    return quantise(weight) if quantised else weight


def biases(dtype: str, stacked: bool):
    return jnp.asarray(normal(7, *((LAYERS,) if stacked else ()), OUT), dtype)


@functools.cache
def inputs(dtype: str = "float32"):
    # An array also where the first call is inside a trace: the cache must hold no tracer.
    with jax.ensure_compile_time_eval():
        return jnp.asarray(normal(2, TOKENS, IN), dtype)


def hints(method: AbstractMethod, stacked: bool):
    if not method.needs:
        return None
    grad = jnp.asarray(normal(9, *(LAYERS, IN, OUT) if stacked else (IN, OUT)))
    return {"layers/proj": hint_for(method, grad, int(stacked))}


@functools.cache
def fitted(
    method: AbstractMethod,
    dtype: str = "float32",
    stacked: bool = True,
    quantised: bool = False,
    biased: bool = False,
):
    """(weight after attach, adapter)"""
    name = "layers" if stacked else "layers/0"
    bias = {"bias": biases(dtype, stacked)} if biased else {}
    params = {name: {"proj": {"kernel": base(dtype, stacked, quantised), **bias}}}
    if not stacked:
        params = {"layers": {"0": params[name]}}
    params, adapters = sx.attach(jax.random.key(0), params, [("proj", method)], hints(method, stacked))
    node = standalone(adapters)
    (weight,) = kernels(params).values()
    return weight, node


def standalone(adapters) -> Adapter:
    """The adapter of the only kernel, with a copy of its own of what a model shares."""
    (node,) = link(nodes(adapters)).values()
    return node


def trained(node: Adapter, seed: int = 3) -> Adapter:
    """The same adapter with every trained leaf moved at random: zero starts hide mistakes. Padding stays zero.

    Masks, which are ones at the start, have zeros in a third of their entries.
    """
    leaves, treedef = jax.tree.flatten(node.train)
    values = [
        jnp.asarray(np.asarray(leaf) + np.float32(0.2) * normal(seed + 100 * i, *leaf.shape) * live)
        for i, (leaf, live) in enumerate(zip(leaves, jax.tree.leaves(padding(node)), strict=True))
    ]
    frozen = {
        name: leaf * (normal(seed, *leaf.shape) > -0.4).astype(np.float32) if name in masks(node.method) else leaf
        for name, leaf in node.frozen.items()
    }
    return Adapter(jax.tree.unflatten(treedef, values), frozen, node.method, node.in_axes)


def masks(method: AbstractMethod) -> set[str]:
    """The names of the frozen leaves that mask a trained one."""
    return set(method.masks.values()) if isinstance(method, AbstractFactored) else set()


def padding(node: Adapter):
    """1 for leaf entries in use, 0 for columns that only pad a stack to its largest rank."""
    ranks = node.method.rank
    if not isinstance(ranks, tuple):
        return jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), node.train)
    live = (np.arange(max(ranks)) < np.asarray(ranks)[:, None]).astype(np.float32)

    def mask_of(names, leaf):
        mask = np.ones(leaf.shape, np.float32)
        for axis, name in enumerate(names):
            if name == "rank":
                shape = [1] * leaf.ndim
                shape[0], shape[axis + 1] = live.shape
                mask = mask * live.reshape(shape)
        return mask

    return {name: mask_of(node.method.axes[name], leaf) for name, leaf in node.train.items()}


def linear(x, weight, node, key=None, bias=None):
    """The projection of `x`, on all of whose tokens an adapter acts."""
    return sx.linear(x, weight, node, context_for([node.method], x, key), bias)


@jax.jit
def forward(x, weight, node):
    """The projection of every layer of the stack, (*stack, tokens, out)."""
    return over_stack(lambda w, n: linear(x, w, n), stack_of(node))(weight, node)


@jax.jit
def merged(weight, node):
    return over_stack(lambda w, n: n.method.merge(w, n), stack_of(node))(weight, node)


projected = jax.jit(linear)


def tolerance(dtype: str) -> float:
    return 3e-2 if dtype == "bfloat16" else 2e-5


def host(array) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


def largest(array) -> float:
    return float(np.abs(host(array)).max())


def assert_close(a, b, tol: float):
    chex.assert_trees_all_close(host(a), host(b), atol=tol * (largest(b) or 1.0), rtol=0)


def lapack_batches(program) -> tuple[list[str], int]:
    """The LAPACK calls of a lowered program that get more than one matrix, and the number of all of them."""
    calls = re.findall(r"@(lapack_\w+).*?num_batch_dims = \"(\d+)\"", program.as_text())
    return [name for name, axes in calls if axes != "0"], len(calls)
