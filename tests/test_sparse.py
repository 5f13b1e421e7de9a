"""Models with experts: rules for some of them, what trains, what is counted, and runs."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import write_data, write_model

import sborax as sx
from sborax.adapters.core import dense, is_weight
from sborax.adapters.grouped import grouped_linear
from sborax.adapters.grouped_matmul import Sizes
from sborax.adapters.tree import nodes
from sborax.config import codec
from sborax.layout.state import flatten, selected
from sborax.models import load_model
from sborax.models.config import Experts
from sborax.models.nf4 import quantise
from sborax.records.adapter import load_adapter
from sborax.train.loop import train

pytestmark = pytest.mark.usefixtures("strict")

EXPERTS = Experts(count=6, chosen=2, intermediate_size=64, shared_size=64, z_loss=0.002)
SHAPE = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sparse") / "model", model_type="qwen2_moe", experts=EXPERTS, **SHAPE)


@pytest.fixture(scope="module")
def model(place):
    return load_model(place)


def test_a_rule_may_name_experts(model):
    rules = [sx.Rule("experts/up_proj", sx.LoRA(rank=2), layers=(1,), experts=(0, -1))]
    _, adapters = sx.attach(jax.random.key(0), model.params, rules)
    ((path, node),) = nodes(adapters).items()
    assert path == "layers/mlp/experts/up_proj/kernel" and sx.count(adapters) == 2 * 2 * (64 + 64)
    assert np.flatnonzero(node.frozen["branch"].reshape(-1)).tolist() == [6, 11]
    assert codec.decode(sx.Rule, codec.encode(rules[0])) == rules[0]


def test_a_rule_that_names_experts_leaves_other_kernels_alone(model):
    rules = [sx.Rule("mlp", sx.LoRA(rank=2), experts=slice(0, 3)), ("shared_expert", sx.Bone(rank=4))]
    sites = {site.path: site for site in sx.plan(model.params, rules).sites}
    assert {type(site.method).__name__ for path, site in sites.items() if "shared" in path} == {"Bone"}
    with pytest.raises(sx.SboraxError, match="rule 'self_attn' matches no kernel"):
        sx.plan(model.params, [sx.Rule("self_attn", sx.LoRA(), experts=(0,))])


def test_ranks_may_differ_by_expert(model):
    kernel = model.params["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
    flat = kernel.at[1, 4, :, 3:].set(0)
    params = {"layers": {"mlp": {"experts": {"up_proj": {"kernel": flat}}}}}
    (site,) = sx.plan(params, [("experts/up", sx.LoRA(rank=sx.SingularMass(0.9)))]).sites
    ranks = site.method.rank
    assert isinstance(ranks, tuple) and site.stack == (2, 6) and len(ranks) == 12
    assert ranks[6 + 4] <= 3 < min(ranks[:6])


def test_the_router_is_trained_where_it_is_named(model):
    paths = list(flatten(model.params))
    assert selected(paths, False, ("router",)) == ["layers/mlp/router/weight"]
    assert not any(path.endswith("router/kernel") for path in paths)


def test_an_expert_without_rows_changes_nothing():
    weight = jnp.ones((3, 64, 8))
    x = jnp.ones((4, 64))
    params, adapters = sx.attach(jax.random.key(0), {"experts": {"up": {"kernel": weight}}}, [("up", sx.LoRA(rank=2))])
    (node,) = nodes(adapters).values()
    (kernel,) = jax.tree.leaves(params)

    def loss(train):
        return grouped_linear(x, kernel, Sizes(jnp.asarray([4, 0, 0])), dataclasses.replace(node, train=train)).sum()

    grads = jax.jit(jax.grad(loss))(node.train)
    assert np.asarray(grads["b"][0]).any() and not np.asarray(grads["b"][1:]).any()


def test_experts_are_quantised_as_they_are_read(place, model):
    packed = load_model(place, quant="nf4").params
    paths = [path for path, leaf in flatten(packed).items() if is_weight(leaf)]
    assert {path.split("/")[-2] for path in paths} >= {"gate_proj", "up_proj", "down_proj", "q_proj"}
    assert not any("router" in path or "shared_expert_gate" in path for path in paths)
    for path in paths:
        expected = jax.tree.map(np.asarray, dense(quantise(flatten(model.params)[path])))
        chex.assert_trees_all_equal(np.asarray(dense(flatten(packed)[path])), expected)


def test_a_run_on_experts(place, tmp_path):
    """Losses fall, the router moves, and the adapter that was written is the one that was trained."""
    data = sx.Data(str(write_data(tmp_path / "data.jsonl")), max_length=128, template="{instruction}\n")
    rules = [("experts", sx.LoRA(rank=2)), ("self_attn", sx.Bone(rank=4))]
    experiment = sx.Experiment(str(place), data, rules, steps=8, batch_size=4, train_also=("router",))
    with jax.numpy_dtype_promotion("standard"):
        summary = train(experiment, tmp_path / "run")
        params, adapters = load_adapter(tmp_path / "run" / "adapter", load_model(place).params)
    assert summary.first_loss and summary.last_loss and summary.last_loss < summary.first_loss
    trained = nodes(adapters)["layers/mlp/experts/up_proj/kernel"].train["b"]
    assert trained.shape == (2, 6, 2, 64) and np.asarray(trained).any(axis=(2, 3)).sum() >= 6
    start = load_model(place).params["layers"]["mlp"]["router"]["weight"]
    assert (params["layers"]["mlp"]["router"]["weight"] != start).any()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Two experts of six for each token: the loss is twice its share at equal load, and hardly more at the start.
    assert math.isclose(lines[0]["balance_loss"], 2 * EXPERTS.balance, rel_tol=0.1)
    # Logits near zero, whose exponentials add up to six.
    assert math.isclose(lines[0]["z_loss"], math.log(6) ** 2 * EXPERTS.z_loss, rel_tol=0.1)
