"""Weights read straight into the shards of a mesh, and adapters begun there."""

import chex
import jax
import numpy as np
import pytest
from nightly import nightly_unless
from tiny_model import write_model

import sborax as sx
from sborax.layout.sharding import Layout, put
from sborax.models import load_model
from sborax.models.shards import Shards
from sborax.records.adapter import fingerprint
from sborax.train.base import adapt

RULES = [
    ("q_proj", sx.PiSSA(rank=4)),
    ("k_proj", sx.LoRA(rank=4)),
    ("o_proj", sx.DoRA(rank=4)),
    ("up_proj", sx.SBoRA(rank=8)),
    ("down_proj", sx.Bone(rank=8)),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=256, head_dim=32, num_key_value_heads=4
    )


def rewrites(path):
    return "q_proj" in path


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}, {"data": 8}], ids=str)
def test_a_model_read_into_shards_is_that_of_one_device(place, sizes, quant):
    layout = Layout.of(sizes, 8)
    alone = load_model(place, quant=quant, keep=rewrites).params
    cut = load_model(place, quant=quant, keep=rewrites, shardings=layout.of_params).params
    chex.assert_trees_all_equal(jax.device_get(cut), jax.device_get(alone))
    kernel = cut["layers"]["mlp"]["down_proj"]["kernel"]
    matrix = kernel if quant is None else kernel.codes
    assert matrix.addressable_shards[0].data.size * (1 if "data" in sizes else 8) == matrix.size
    assert fingerprint(cut) == fingerprint(alone)


@pytest.mark.parametrize("quant", nightly_unless(["nf4"], [None, "nf4"]))
def test_adapters_begun_on_a_mesh_have_the_bits_of_one_device(place, quant):
    layout = Layout.of({"fsdp": 2, "tensor": 4}, 8)
    key = jax.random.key(0)
    alone = load_model(place, quant=quant, keep=rewrites).params
    want = adapt(key, alone, sx.plan(alone, RULES), quant)
    with layout.context():
        cut = load_model(place, quant=quant, keep=rewrites, shardings=layout.of_params).params
        got = adapt(key, cut, sx.plan(cut, RULES), quant)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))


class Half(jax.sharding.Sharding):
    """A sharding of which this process has the first half of the devices."""

    def __init__(self, sharding):
        self.sharding = sharding

    def addressable_devices_indices_map(self, shape):
        indices = self.sharding.addressable_devices_indices_map(shape)
        return dict(list(indices.items())[: len(indices) // 2])


class Recorded:
    """A tensor that knows what was read of it."""

    def __init__(self, values):
        self.values, self.read = values, np.zeros(values.shape, bool)

    def __getitem__(self, region):
        self.read[region] = True
        return self.values[region]


def test_a_host_reads_what_its_devices_hold():
    mesh = Layout.of({"fsdp": 4, "tensor": 2}, 8).mesh
    tensors = [Recorded(np.random.default_rng(layer).standard_normal((32, 16), np.float32)) for layer in range(3)]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    shards = Shards.of((3, 32, 16), np.float32, Half(sharding))
    for layer, tensor in enumerate(tensors):
        for region, part in shards.slots((layer,)):
            part[...] = tensor[region]
    for layer, tensor in enumerate(tensors):
        np.testing.assert_array_equal(tensor.read, np.arange(32)[:, None].repeat(16, 1) < 16)
        for (_, rows, columns), part in shards.parts.items():
            np.testing.assert_array_equal(part[layer], tensor.values[slice(*rows), slice(*columns)])
    assert sum(part.nbytes for part in shards.parts.values()) == 3 * 16 * 16 * 4


def test_slices_need_slices():
    with pytest.raises(sx.SboraxError, match="slices 2 x fsdp 4 does not fit the slices or hosts"):
        Layout.of({"slices": 2, "fsdp": 4}, 8)


def test_what_every_process_has_is_dealt_out():
    layout = Layout.of({"data": 4, "fsdp": 2}, 8)
    batch = {"tokens": np.arange(16, dtype=np.int32).reshape(1, 8, 2)}
    laid = layout.batch(batch)["tokens"]
    np.testing.assert_array_equal(laid, batch["tokens"])
    assert laid.addressable_shards[3].data.shape == (1, 1, 2)
    assert layout.rows(8) == frozenset(range(8))
    assert put(np.float32(2), laid.sharding.update(spec=jax.sharding.PartitionSpec())).shape == ()
