"""Where leaves of adapters lie: a trained leaf, and what the optimiser keeps for it, in as many parts as divide it."""

import dataclasses
import functools
import math

import jax
import pytest
from cases import DENSE
from nightly import nightly_unless
from published import ALL, PUBLISHED
from tiny_model import WIDE

import sborax as sx
from sborax.adapters.core import AbstractKernelless
from sborax.adapters.tree import nodes
from sborax.layout.mesh import abstract_mesh
from sborax.models import LlamaConfig
from sborax.plans.ahead import device_bytes, on_mesh, outline

MESHES = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}]
CONFIG = dataclasses.replace(WIDE, hidden_size=384, intermediate_size=768, head_dim=48)
"""Of sides that every method's blocks divide."""
PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def planned(rules, config):
    return outline(sx.Experiment("x", sx.Data("x", max_length=32), rules, steps=1, batch_size=256), config)


@functools.cache
def steps_of_all_methods():
    """One step for every seven methods, each on another projection."""
    groups = [DENSE[begin : begin + 7] for begin in range(0, len(DENSE), 7)]
    rules = [[(name, case.method) for name, case in zip(PROJECTIONS, group, strict=False)] for group in groups]
    return [planned(tuple(group), CONFIG) for group in rules]


def twos(size):
    """The largest power of two that divides `size`."""
    return size & -size


@pytest.mark.parametrize("sizes", nightly_unless([MESHES[1]], MESHES), ids=str)
def test_trained_leaves_lie_in_as_many_parts_as_divide_them(sizes):
    devices, cut, total = sizes.get("fsdp", 1) * sizes.get("tensor", 1), 0, 0
    for step in steps_of_all_methods():
        laid = on_mesh(step, abstract_mesh(sizes))
        for node in nodes(laid.parts.adapters).values():
            for leaf in [] if isinstance(node.method, AbstractKernelless) else jax.tree.leaves(node.train):
                # The first axis is that of layers.
                parts = min(devices, math.prod(map(twos, leaf.shape[1:])))
                assert leaf.size == parts * math.prod(leaf.sharding.shard_shape(leaf.shape)), leaf
                cut, total = cut + (parts == devices), total + 1
        trained, moments = device_bytes(laid.state.train), device_bytes(laid.state.opt)
        assert 2 * trained <= moments < 2 * trained + 100
    assert total > cut > 0.8 * total > 60


LARGE = {
    "LoRA": sx.LoRA(rank=16),
    "SBoRA-FA": sx.SBoRA(rank=64),
    "SBoRA-FB": sx.SBoRA(rank=64, variant="FB"),
    "Bone": sx.Bone(rank=48),
    "Bat": sx.Bat(rank=64),
    "DoRA": sx.DoRA(rank=16),
    "VeRA": sx.VeRA(rank=256),
    "C3A": sx.C3A(block=128),
    "OFT": sx.OFT(block=32),
    "SHiRA": sx.SHiRA(rank=16),
    "GraLoRA": sx.GraLoRA(rank=16),
    "RandLoRA": sx.RandLoRA(rank=64),
    "LoKr": sx.LoKr(rank=16),
}
"""Of LLaMA-3.1-70B; the blocks of some are fewer than 256 chips."""


@pytest.mark.parametrize("name", nightly_unless(["SBoRA-FA", "Bat"], LARGE))
@pytest.mark.parametrize("sizes", [{"fsdp": 256}, {"fsdp": 64, "tensor": 4}, {"fsdp": 32, "tensor": 8}], ids=str)
def test_a_pod_holds_what_is_trained_once(name, sizes):
    config = LlamaConfig.from_hf(PUBLISHED["LLaMA-3.1-70B"])
    step = step_of_seventy_billion(name, config)
    laid = on_mesh(step, abstract_mesh(sizes))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((step.state.train, step.state.opt)))
    assert device_bytes((laid.state.train, laid.state.opt)) <= 1.3 * total / 256


@functools.cache
def step_of_seventy_billion(name, config):
    return planned(((ALL, LARGE[name]),), config)
