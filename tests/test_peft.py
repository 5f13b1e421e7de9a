"""PEFT's adapters here and ours in PEFT: the same function, the same arrays, the same training steps."""

import copy
import dataclasses
import json
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from peft_configs import KINDS, LORA, TWO
from safetensors.numpy import load_file, save_file
from torch_pair import TOKENS, build, logits, reloaded, shake, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft, save_peft
from sborax.models.load import load_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:(PiSSA|OLoRA) changes the base weights:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
)
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(kind, pair, tmp_path):
    """PEFT's saved adapter gives PEFT's logits here; written by us it gives them in PEFT again."""
    theirs = with_peft(pair, copy.deepcopy(KINDS[kind]))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(pair.torch)).max() > 0.1

    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)

    export = save_peft(tmp_path / "ours", pair.ours, params, adapters)
    assert export.errors == {}
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, **CLOSE)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_head_that_gave_up_its_start(init, pair, tmp_path):
    """PEFT's file has the head's residual, which is not to be taken for a base; another model's is refused."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": init}
    theirs = with_peft(pair, peft.LoraConfig(**config))
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in stored
    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), torch_logits(theirs), **CLOSE)
    save_peft(tmp_path / "ours", pair.ours, params, adapters)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), torch_logits(theirs), **CLOSE)

    stored["base_model.model.lm_head.base_layer.weight"] *= 1.5
    save_file(stored, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(sx.SboraxError, match=r"lm_head\.base_layer\.weight is not what .* the adapter was trained on"):
        load_peft(tmp_path / "theirs", pair.ours)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_by_peft(init, pair, tmp_path):
    """PEFT's own conversion to LoRA of rank 2r loads, and so does its adapter on the residual base it saved."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(pair.torch), peft.LoraConfig(**LORA, init_lora_weights=init))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    shake(theirs)
    theirs.eval()
    expected = torch_logits(theirs)
    theirs.save_pretrained(tmp_path / "plain")
    residual = copy.deepcopy(theirs).unload()
    residual.save_pretrained(tmp_path / "residual")
    params, adapters = load_peft(tmp_path / "plain", load_model(tmp_path / "residual"))
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)

    theirs.peft_config["default"].init_lora_weights = init
    theirs.save_pretrained(tmp_path / "double", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    params, adapters = load_peft(tmp_path / "double", pair.ours)
    assert {node.train["a"].shape[-1] for node in nodes(adapters).values()} == {8}
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)


@pytest.mark.parametrize(("init", "method"), [("pissa", sx.PiSSA(4, alpha=6.0)), ("olora", sx.OLoRA(4, alpha=6.0))])
def test_initial_arrays(init, method, pair):
    """Factors (up to the sign of a component), their product and the residual base, array by array."""
    theirs = peft.get_peft_model(copy.deepcopy(pair.torch), peft.LoraConfig(**LORA, init_lora_weights=init))
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("(q|v)_proj", method)])
    for name in TWO:
        node = adapters["layers"]["self_attn"][name]["kernel"]
        for layer in range(2):
            module = theirs.base_model.model.model.layers[layer].self_attn.get_submodule(name)
            a = module.lora_A["default"].weight.detach().numpy().T
            b = module.lora_B["default"].weight.detach().numpy().T
            ours_a, ours_b = np.asarray(node.train["a"][layer]), np.asarray(node.train["b"][layer])
            sign = np.sign((a * ours_a).sum(axis=0))
            np.testing.assert_allclose(ours_a * sign, a, rtol=0, atol=2e-5)
            np.testing.assert_allclose(ours_b * sign[:, None], b, rtol=0, atol=2e-5)
            np.testing.assert_allclose(ours_a @ ours_b, a @ b, rtol=0, atol=1e-5)
            residual = params["layers"]["self_attn"][name]["kernel"][layer]
            np.testing.assert_allclose(residual, module.base_layer.weight.detach().numpy().T, rtol=0, atol=1e-5)


def test_initial_statistics(pair):
    """LoRA's a has PEFT's range and spread, b is zero, DoRA's m is PEFT's."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(pair.torch), peft.LoraConfig(**LORA | {"r": 16}, use_dora=True))
    module = theirs.base_model.model.model.layers[1].self_attn.q_proj
    _, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", sx.DoRA(16, alpha=6.0))])
    node = adapters["layers"]["self_attn"]["q_proj"]["kernel"]
    a, bound = module.lora_A["default"].weight.detach().numpy(), 1 / math.sqrt(32)
    for leaf in (a, np.asarray(node.train["a"])):
        assert 0.98 * bound < np.abs(leaf).max() <= bound
        assert abs(leaf.std() / (bound / math.sqrt(3)) - 1) < 0.1
    assert not node.train["b"].any() and not module.lora_B["default"].weight.any()
    magnitude = module.lora_magnitude_vector["default"].weight.detach().numpy()
    np.testing.assert_allclose(node.train["m"][1], magnitude, rtol=1e-6)
    assert float(node.frozen["scale"][1]) == module.scaling["default"]


def _torch_steps(model, optimizer):
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    losses = []
    for _ in range(2):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "MISS", "MISS-bat"])
def test_two_training_steps(kind, pair, tmp_path):
    """Loss and every adapter tensor after two steps of SGD, and of AdamW, as torch has them."""
    theirs = with_peft(pair, copy.deepcopy(KINDS[kind] if kind != "LoRA" else peft.LoraConfig(**LORA)))
    theirs.save_pretrained(tmp_path / "start")
    params, adapters = load_peft(tmp_path / "start", pair.ours)
    train, frozen = sx.split(adapters)

    def loss(train):
        scores = pair.ours.apply(params, sx.combine(train, frozen), jnp.asarray(TOKENS))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.asarray(TOKENS[:, 1:])).mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    state = copy.deepcopy(theirs.state_dict())
    # With a smaller eps AdamW turns the rounding of a gradient near zero into a step of its own.
    adamw = {"weight_decay": 0.1, "eps": 1e-3}
    for name, torch_rule, rule in [
        ("sgd", lambda leaves: torch.optim.SGD(leaves, 0.1), optax.sgd(0.1)),
        ("adamw", lambda leaves: torch.optim.AdamW(leaves, 0.01, **adamw), optax.adamw(0.01, **adamw)),
    ]:
        theirs.load_state_dict(state)
        theirs.zero_grad()
        expected = _torch_steps(theirs, torch_rule([leaf for leaf in theirs.parameters() if leaf.requires_grad]))
        tuned, moments, losses = train, rule.init(train), []
        update = jax.jit(rule.update)
        for _ in range(2):
            value, grads = gradient(tuned)
            updates, moments = update(grads, moments, tuned)
            tuned = optax.apply_updates(tuned, updates)
            losses.append(float(value))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        save_peft(tmp_path / name, pair.ours, params, sx.combine(tuned, frozen))
        stored, initial = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in (name, "start"))
        final = peft.get_peft_model_state_dict(theirs)
        assert set(stored) == set(final)
        for key, tensor in stored.items():
            assert np.abs(tensor - initial[key]).max() > 1e-4, key
            np.testing.assert_allclose(tensor, final[key].numpy(), rtol=0, atol=2e-5, err_msg=f"{name} {key}")


def test_exact_as_plain_lora(pair, tmp_path):
    """Every method with thin factors is the same function in PEFT, all of them in one adapter."""
    rules = [
        ("q_proj", sx.SBoRA(6, variant="FA")),
        ("k_proj", sx.SBoRA(5, variant="FB")),
        ("v_proj", sx.Bone(5, grouping="contiguous")),
        ("o_proj", sx.add(sx.LoRA(3, alpha=2.0), sx.SBoRA(4), sx.PiSSA(2))),
        ("gate_proj", sx.scale(sx.add(sx.PiSSA(3), sx.LoRA(2)), 0.5)),
        ("up_proj", sx.OLoRA(4, alpha=6.0)),
        ("down_proj", sx.PiSSA(4, alpha=6.0)),
        ("lm_head", sx.LoRA(2)),
    ]
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
    adapters = shaken(adapters)
    export = save_peft(tmp_path, pair.ours, params, adapters)
    assert export.errors == {} and export.peft_type == "LORA"
    expected = logits(pair.ours, params, adapters)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path)), expected, **CLOSE)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {"q_proj": 6, "k_proj": 5, "v_proj": 5, "o_proj": 11, "up_proj": 8, "down_proj": 8, "lm_head": 2}
    pattern = {key.rpartition(".")[2]: value for key, value in config["rank_pattern"].items()}
    assert {name: pattern.get(name, config["r"]) for name in ranks} == ranks


def test_layers_of_one_stack(pair, tmp_path):
    """Ragged ranks, different methods and layers left out survive the way to PEFT and back."""
    rules = [
        ("q_proj", sx.LoRA((2, 5), alpha=6.0)),
        sx.Rule("v_proj", sx.LoRA(3), layers=(0,)),
        sx.Rule("v_proj", sx.PiSSA(2), layers=(1,)),
        sx.Rule("o_proj", sx.SBoRA(4), layers=(1,)),
    ]
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
    adapters = shaken(adapters)
    q = adapters["layers"]["self_attn"]["q_proj"]["kernel"]
    live = np.arange(5) < np.array([[2], [5]])
    q.train["a"], q.train["b"] = q.train["a"] * live[:, None, :], q.train["b"] * live[:, :, None]
    expected = logits(pair.ours, params, adapters)
    save_peft(tmp_path, pair.ours, params, adapters)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path)), expected, **CLOSE)
    second = load_peft(tmp_path, pair.ours)[1]["layers"]["self_attn"]
    assert second["q_proj"]["kernel"].method.rank == (2, 5)
    chex.assert_trees_all_equal(second["q_proj"]["kernel"].train, q.train)
    assert second["o_proj"]["kernel"].method.layers == ((1,),)


def test_truncated(pair, tmp_path):
    """Without thin factors: the best LoRA of the given rank, its error known; exact at full rank."""
    rules = [("q_proj", sx.DoRA(4)), ("v_proj", sx.chain(sx.PiSSA(3), sx.DoRA(3))), ("o_proj", sx.Bone(4))]
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
    adapters = shaken(adapters)
    expected = logits(pair.ours, params, adapters)
    export = save_peft(tmp_path / "full", pair.ours, params, adapters, as_="lora", rank=32)
    assert max(export.errors.values()) < 1e-6 and len(export.errors) == 4
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "full")), expected, **CLOSE)

    export = save_peft(tmp_path / "thin", pair.ours, params, adapters, as_="lora", base="a/b", facts={"Data": "none"})
    merged = sx.merge(params, adapters)
    stored = load_file(tmp_path / "thin" / "adapter_model.safetensors")
    for module, error in export.errors.items():
        layer, name = int(module.split(".")[2]), module.split(".")[-1]
        change = (
            merged["layers"]["self_attn"][name]["kernel"][layer]
            - pair.ours.params["layers"]["self_attn"][name]["kernel"][layer]
        )
        pair_of = [stored[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA"]
        assert pair_of[0].shape[1] == (4 if name == "q_proj" else 3)
        residual = np.asarray(change).T - pair_of[0] @ pair_of[1]
        np.testing.assert_allclose(np.linalg.norm(residual) / np.linalg.norm(change), error, rtol=1e-3)
        assert 0.01 < error < 1
    text = (tmp_path / "thin" / "README.md").read_text()
    assert f"{max(export.errors.values()):.3g} at most" in text and "Data: none" in text and "'a/b'" in text


def test_sbora_changes_rank_rows(pair, tmp_path):
    """The merge touches exactly `rank` rows, bit for bit, negative zeros included, and PEFT merges to the same rows."""
    kernel = np.array(pair.ours.params["layers"]["self_attn"]["q_proj"]["kernel"])
    kernel[:, ::3, ::2] = -0.0
    attention = {**pair.ours.params["layers"]["self_attn"], "q_proj": {"kernel": jnp.asarray(kernel)}}
    base = {**pair.ours.params, "layers": {**pair.ours.params["layers"], "self_attn": attention}}
    model = dataclasses.replace(pair.ours, params=base)
    params, adapters = sx.attach(jax.random.key(3), base, [("q_proj", sx.SBoRA(6, alpha=3.0))])
    adapters = shaken(adapters)
    merged = sx.merge(params, adapters)
    merged_kernel = np.asarray(merged["layers"]["self_attn"]["q_proj"]["kernel"])
    rows = (merged_kernel.view(np.uint32) != kernel.view(np.uint32)).any(axis=2)
    idx = np.asarray(adapters["layers"]["self_attn"]["q_proj"]["kernel"].frozen["idx"])
    for layer in range(2):
        assert rows[layer].nonzero()[0].tolist() == idx[layer].tolist() and len(idx[layer]) == 6
    merged["layers"]["self_attn"]["q_proj"]["kernel"] = base["layers"]["self_attn"]["q_proj"]["kernel"]
    chex.assert_trees_all_equal(merged, base)

    theirs = copy.deepcopy(pair.torch)
    for layer in range(2):
        theirs.model.layers[layer].self_attn.q_proj.weight.data = torch.tensor(kernel[layer].T.copy())
    save_peft(tmp_path, model, params, adapters)
    theirs = reloaded(pair._replace(torch=theirs), tmp_path)
    np.testing.assert_allclose(torch_logits(theirs), logits(pair.ours, params, adapters), **CLOSE)
    dense = theirs.merge_and_unload()
    for layer in range(2):
        weight = dense.model.layers[layer].self_attn.q_proj.weight.detach().numpy().T
        np.testing.assert_allclose(weight, merged_kernel[layer], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["MISS", "MISS-bat"])
def test_old_bone_directory(kind, pair, tmp_path):
    """A BONE directory is its MISS successor under old names; three axes mean Bat whatever its config says."""
    with_peft(pair, copy.deepcopy(KINDS[kind])).save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    renamed = {name.replace("miss_block", "bone_block"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "old" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("mini_r", "miss_dropout")}
    config |= {"peft_type": "BONE", "init_weights": True}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    new, old = load_peft(tmp_path / "new", pair.ours)[1], load_peft(tmp_path / "old", pair.ours)[1]
    assert new["layers"]["self_attn"]["q_proj"]["kernel"].train["d"].any()
    chex.assert_trees_all_equal(new, old)


def test_trained_base_leaves(pair, tmp_path):
    """Norms and a head trained beside the adapter travel as modules_to_save."""
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", sx.LoRA(2))])
    adapters = shaken(adapters)
    rng = np.random.default_rng(5)
    scale = np.array(params["layers"]["input_layernorm"]["scale"])
    scale[1] += 0.1 * rng.standard_normal(32).astype(np.float32)
    head = params["lm_head"]["kernel"] + 0.1 * rng.standard_normal((32, 64)).astype(np.float32)
    layers = {**params["layers"], "input_layernorm": {"scale": jnp.asarray(scale)}}
    params = {**params, "layers": layers, "lm_head": {"kernel": head}}
    save_peft(tmp_path, pair.ours, params, adapters)
    expected = logits(pair.ours, params, adapters)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path).eval()
    np.testing.assert_allclose(torch_logits(theirs), expected, **CLOSE)
    chex.assert_trees_all_equal(load_peft(tmp_path, pair.ours), (params, adapters))


def test_unrolled_model(pair, tmp_path):
    """A model whose layers are not stacked reads and writes the same file."""
    with_peft(pair, copy.deepcopy(KINDS["patterns"])).save_pretrained(tmp_path / "theirs")
    flat = load_model(pair.path, scan=False)
    params, adapters = load_peft(tmp_path / "theirs", flat)
    assert set(nodes(adapters)) == {f"layers/{i}/self_attn/{name}/kernel" for i in range(2) for name in TWO}
    save_peft(tmp_path / "ours", flat, params, adapters)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    chex.assert_trees_all_equal(ours, theirs)
