"""Lily: who shares what, tokens that depend on no other, and PEFT's mean over a batch."""

import json
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from bare_kernels import normal
from safetensors.numpy import load_file, save_file
from tiny_model import write_data, write_model
from torch_pair import TOKENS, build, logits, reloaded, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft, save_peft
from sborax.models.generate import generate
from sborax.train.loop import train

pytestmark = [
    pytest.mark.usefixtures("strict"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

DEPTH = 5
METHOD = sx.Lily(rank=2, stride=2, experts=3)
UP = jnp.asarray(normal(0, DEPTH, 8, 6))


def linked(params, *rules):
    """The adapters and their linked form, every trained leaf moved."""
    _, adapters = sx.attach(jax.random.key(0), params, rules)
    adapters = shaken(adapters)
    return nodes(adapters), nodes(sx.link(adapters))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("lily"))


def test_neighbours_share_a_and_a_kind_shares_its_experts():
    adapters, of_layers = linked({"layers": {"up": {"kernel": UP}, "gate": {"kernel": UP}}}, (".*", METHOD))
    assert [path for path in adapters if path.startswith("bank/")] == ["bank/lily/layers/gate", "bank/lily/layers/up"]
    bank, node = adapters["bank/lily/layers/up"], of_layers["layers/up/kernel"]
    assert bank.train["a"].shape == (3, 8, 2) and bank.train["b"].shape == (6, 6)
    chex.assert_trees_all_equal(node.train["a"], bank.train["a"][np.array([0, 0, 1, 1, 2])])
    chex.assert_trees_all_equal(node.train["b"], jnp.broadcast_to(bank.train["b"], (DEPTH, 6, 6)))
    assert not np.array_equal(bank.train["a"], adapters["bank/lily/layers/gate"].train["a"])


def test_only_adapted_layers_count_as_neighbours():
    adapters, of_layers = linked({"layers": {"up": {"kernel": UP}}}, sx.Rule("up", METHOD, layers=(1, 3, 4)))
    a, copies = adapters["bank/lily/layers/up"].train["a"], of_layers["layers/up/kernel"].train["0"]["a"]
    assert len(a) == 2
    chex.assert_trees_all_equal(copies[np.array([1, 3, 4])], a[np.array([0, 0, 1])])


def test_numbered_layers_share_as_stacked_ones_do():
    stacked = linked({"layers": {"up": {"kernel": UP}}}, ("up", METHOD))[1]["layers/up/kernel"]
    flat = {"layers": {str(i): {"up": {"kernel": UP[i]}} for i in range(DEPTH)}}
    _, adapters = sx.attach(jax.random.key(0), flat, [("up", METHOD)])
    assert sx.count(adapters) == DEPTH * 2 * 3 + 2 * (3 * 8 + 3 * 6)
    singles = nodes(sx.link(adapters))
    _, reference = sx.attach(jax.random.key(0), {"layers": {"up": {"kernel": UP}}}, [("up", METHOD)])
    reference = nodes(sx.link(reference))["layers/up/kernel"]
    for i in range(DEPTH):
        chex.assert_trees_all_equal(singles[f"layers/{i}/up/kernel"].train["a"], reference.train["a"][i])
    assert stacked.train.keys() == reference.train.keys() == {"a", "b", "router"}


def test_adapters_of_some_layers_do_not_read_the_entries_of_others():
    params = {"layers": {str(layer): {"q": {"kernel": jnp.ones((16, 24))}} for layer in range(4)}}
    _, adapters = sx.attach(jax.random.key(0), params, [("q", sx.Lily(rank=2))])
    some = {**adapters, "layers": {layer: adapters["layers"][layer] for layer in ("2", "3")}}
    with pytest.raises(sx.SboraxError, match="a has 4 entries for 2 layers; keep the adapters of all its layers"):
        sx.link(some)


def test_rules_agree_about_the_experts_of_a_kind():
    params = {"layers": {"up": {"kernel": UP}, "gate": {"kernel": UP}}}
    second = sx.Lily(rank=3, stride=2, experts=3)
    sx.plan(params, [("up", METHOD), ("gate", second)])
    with pytest.raises(sx.SboraxError, match="Lily has one bank/lily/layers/up for all kernels of a kind; give all"):
        sx.plan(params, [sx.Rule("up", METHOD, layers=(0,)), ("up", second)])


def test_tokens_depend_on_no_other_and_by_batch_on_all():
    """A batch of one token is the same in both."""
    x = jnp.asarray(normal(1, 7, 8))
    outputs = {}
    for routing in ("token", "batch"):
        method = sx.Lily(rank=2, experts=3, routing=routing)
        node = linked({"up": {"kernel": UP[0]}}, ("up", method))[1]["up/kernel"]
        alone = jnp.concatenate([sx.linear(row[None], UP[0], node) for row in x])
        outputs[routing] = sx.linear(x, UP[0], node), alone
    chex.assert_trees_all_close(*outputs["token"], outputs["batch"][1], rtol=1e-5, atol=1e-5)
    assert np.abs(outputs["batch"][0] - outputs["batch"][1]).max() > 1e-3


def test_peft_ties_layers_of_one_target(pair, tmp_path):
    theirs = with_peft(pair, peft.LilyConfig(r=3, stride_A=2, target_modules=["k_proj", "v_proj"]))
    theirs.save_pretrained(tmp_path)
    params, adapters = load_peft(tmp_path, pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), torch_logits(theirs), rtol=0, atol=1e-4)
    assert {path: node.train["a"].shape[0] for path, node in nodes(adapters).items() if path.startswith("bank/")} == {
        f"bank/lily/layers/self_attn/{name}": 1 for name in ("k_proj", "v_proj")
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1" in name and "k_proj.lily_A" in name)
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "adapter_model.safetensors")
    # Nor does PEFT share what the config names in full, as "all-linear" does.
    _, apart = load_peft(tmp_path, pair.ours)
    assert not [path for path in nodes(apart) if path.startswith("bank/")]
    a = nodes(apart)["layers/self_attn/k_proj/kernel"].train["a"]
    np.testing.assert_allclose(a[1], a[0] + 1, rtol=1e-5)
    place = tmp_path / "written"
    save_peft(place, pair.ours, params, apart)
    chex.assert_trees_all_equal(nodes(load_peft(place, pair.ours)[1]), nodes(apart))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch_logits(reloaded(pair, place))
    np.testing.assert_allclose(logits(pair.ours, params, apart), expected, rtol=0, atol=1e-4)


def test_what_peft_would_tie_is_written_if_it_is_one(pair, tmp_path):
    """Named in full, modules are targets of their own in PEFT, and an expression is one target for all shapes."""
    rules = [
        sx.Rule("k_proj", sx.Lily(rank=2, routing="batch"), layers=(0,)),
        ("v_proj", sx.Lily(rank=2, routing="batch")),
    ]
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
    adapters = shaken(adapters)
    save_peft(tmp_path, pair.ours, params, adapters)
    expected = logits(pair.ours, params, adapters)
    output = logits(pair.ours, *load_peft(tmp_path, pair.ours))
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)
    with pytest.raises(sx.SboraxError, match="PEFT has no Lily with these options, nor a merged form of it"):
        save_peft(tmp_path, pair.ours, *sx.attach(jax.random.key(0), pair.ours.params, [("k_proj", METHOD)]))


def test_a_text_of_one_token_is_that_of_peft(pair, tmp_path):
    theirs = with_peft(pair, peft.LilyConfig(r=3, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    params, adapters = load_peft(tmp_path, pair.ours)
    rules = [("q_proj", sx.Lily(rank=3))]
    _, ours = sx.attach(jax.random.key(0), pair.ours.params, rules)
    source = nodes(adapters)
    for path, node in nodes(ours).items():
        node.train.update(source[path].train)
    token = jnp.asarray(TOKENS[:1, :1])
    chex.assert_trees_all_close(
        pair.ours.apply(params, ours, token), pair.ours.apply(params, adapters, token), rtol=0, atol=1e-5
    )


def test_experts_act_on_no_mean_of_theirs():
    params = {"layers": {"experts": {"kernel": jnp.asarray(normal(4, 2, 3, 8, 6))}}}
    sx.plan(params, [("experts", METHOD)])
    with pytest.raises(sx.SboraxError, match="layers/experts/kernel: Lily takes means over tokens, of which each"):
        sx.plan(params, [("experts", sx.Lily(rank=2, routing="batch"))])


def test_a_head_takes_no_mean():
    """In training it is called with some of the tokens at a time."""
    params = {"lm_head": {"kernel": jnp.asarray(normal(4, 8, 6))}, "layers": {"q": {"kernel": jnp.ones((2, 8, 8))}}}
    sx.plan(params, [("lm_head", METHOD)])
    for method in (sx.Lily(rank=2, routing="batch"), sx.scale(sx.Lily(rank=2, routing="batch"), 0.5)):
        sx.plan(params, [("q", method)])
        with pytest.raises(sx.SboraxError, match="lm_head/kernel: .* takes means over tokens, of which the head"):
            sx.plan(params, [("lm_head", method)])


def test_a_file_with_a_mean_on_the_head_is_refused(pair, tmp_path):
    theirs = with_peft(pair, peft.LilyConfig(r=3, target_modules=["lm_head"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(sx.SboraxError, match="lm_head/kernel: .* takes means over tokens, of which the head"):
        load_peft(tmp_path, pair.ours)


def test_padding_is_no_part_of_a_mean(pair):
    """The text alone, and the text with padding on either side."""
    method = sx.Lily(rank=2, routing="batch")
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("self_attn", method)])
    adapters, text = shaken(adapters), TOKENS[:1]
    alone = jax.jit(pair.ours.apply)(params, adapters, jnp.asarray(text))
    for prefix, suffix in ((3, 0), (0, 4)):
        tokens, segments = (
            jnp.asarray(np.pad(array, ((0, 0), (prefix, suffix)))) for array in (text, np.ones_like(text))
        )
        padded = jax.jit(pair.ours.apply)(params, adapters, tokens, segment_ids=segments)
        np.testing.assert_allclose(padded[:, prefix : prefix + text.shape[1]], alone, rtol=0, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("routing", ["token", "batch"])
def test_a_run_begins_with_experts_of_zero(routing, tmp_path):
    """In the first step the routers have no gradient, and the experts have."""
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    data = sx.Data(str(tmp_path / "data.jsonl"), template="{instruction}", answer=" {output}", max_length=32)
    rules = [("self_attn|mlp", sx.Lily(rank=4, stride=2, routing=routing))]
    with jax.numpy_dtype_promotion("standard"):
        experiment = sx.Experiment(str(tmp_path / "model"), data, rules, optimizer=sx.Optimizer(lr=1e-2), steps=6)
        train(experiment, tmp_path / "run", echo=lambda _: None)
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.nightly
def test_text_over_a_cache_is_that_of_whole_passes(pair):
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("self_attn|mlp", METHOD)])
    adapters, prompt = shaken(adapters), TOKENS[0, :4].tolist()
    (text,) = generate(pair.ours, params, adapters, [prompt], 4)
    tokens = list(prompt)
    for _ in range(len(text)):
        last = jax.jit(pair.ours.apply)(params, adapters, jnp.asarray([tokens], jnp.int32))[0, -1]
        tokens.append(int(np.argmax(last)))
    assert list(text) == tokens[4:]
