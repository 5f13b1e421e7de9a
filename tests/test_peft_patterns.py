"""What may differ by module in a PEFT adapter: the patterns that PEFT itself honours, ranks allocated by AdaLoRA."""

import copy
import dataclasses
import json
import re

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch_pair import TOKENS, build, logits, reloaded, shake, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft, save_peft
from sborax.interop.peft_table import TABLE

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
allocating = pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors is a no-op:UserWarning",
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",
    "ignore:Adapter 'default'. .* LoRA tensor.* have invalid shape:peft.utils.warning.PeftWarning",
)
CLOSE = {"rtol": 0, "atol": 1e-4}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TWO = ["q_proj", "down_proj"]
EXCEPTIONS = {"rank_pattern": 4, "alpha_pattern": 5, "block_size_pattern": 16, "n_frequency_pattern": 16}
PATTERNED = {
    "LORA": {"r": 2},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2, "decompose_factor": 2},
    "HIRA": {"r": 2},
    "DELORA": {"r": 2},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 8},
    "WAVEFT": {"n_frequency": 8},
    "OSF": {"effective_rank": 8},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base"))


def class_of(kind):
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]


def exceptions_of(kind):
    return [field.name for field in dataclasses.fields(class_of(kind)) if field.name in EXCEPTIONS]


def test_every_kind_with_a_pattern_is_here():
    """AdaLoRA's rank_pattern is another thing, and it has no use for the other one."""
    assert {row.peft_type for row in TABLE if exceptions_of(row.peft_type)} == {*PATTERNED, "ADALORA"}


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind in PATTERNED for field in exceptions_of(kind)], ids=str
)
def test_patterns_are_those_that_peft_honours(kind, field, pair):
    """A pattern that changes nothing in the model that PEFT makes is none of the row's."""

    def outcome(**fields):
        torch.manual_seed(0)
        config = class_of(kind)(target_modules=["q_proj"], **PATTERNED[kind], **fields)
        model = peft.get_peft_model(copy.deepcopy(pair.torch), config)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
        return shapes, getattr(layer, "scaling", None)

    honoured = outcome() != outcome(**{field: {"q_proj": EXCEPTIONS[field]}})
    rows = [row for row in TABLE if row.peft_type == kind]
    assert all((field in row.patterns.values()) == honoured for row in rows)


def test_a_pattern_that_peft_ignores_is_ignored(pair, tmp_path):
    config = peft.HiraConfig(r=2, target_modules=TWO, rank_pattern={"down_proj": 4})
    theirs = with_peft(pair, config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(pair.torch)).max() > 0.01
    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)
    save_peft(tmp_path / "ours", pair.ours, params, adapters)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, **CLOSE)


def test_a_pattern_that_peft_ignores_is_not_written(pair, tmp_path):
    rules = [("q_proj", sx.HiRA(2)), ("down_proj", sx.HiRA(4))]
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
    with pytest.raises(sx.SboraxError, match="r is . for most modules and . for .*: HIRA has one for all"):
        save_peft(tmp_path / "no", pair.ours, params, adapters)
    assert not (tmp_path / "no").exists()


def test_ranks_of_an_earlier_export(pair, tmp_path):
    """Directories of ours that have HiRA's ranks in a pattern, and tensors to match, are read as they were written."""
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", sx.HiRA(4))])
    adapters = shaken(adapters)
    save_peft(tmp_path, pair.ours, params, adapters)
    file, config = tmp_path / TENSORS, json.loads((tmp_path / CONFIG).read_text())
    tensors = load_file(file)
    second = "base_model.model.model.layers.1.self_attn.q_proj"
    for name, cut in ((f"{second}.hira_A", np.s_[:2]), (f"{second}.hira_B", np.s_[:, :2])):
        tensors[name] = np.ascontiguousarray(tensors[name][cut])
    save_file(tensors, file)
    (tmp_path / CONFIG).write_text(json.dumps({**config, "rank_pattern": {"model.layers.1.self_attn.q_proj": 2}}))
    node = load_peft(tmp_path, pair.ours)[1]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert node.method.rank == (4, 2)
    np.testing.assert_array_equal(node.train["a"][1, :, :2], tensors[f"{second}.hira_A"].T)


@pytest.mark.parametrize(
    "key", ["q_proj", "model.layers.0.self_attn.q_proj", "^model.layers.0.self_attn.q_proj", "q|k"]
)
def test_blocks_by_the_keys_that_peft_matches(key, pair, tmp_path):
    """C3A reads its keys in a way of its own."""
    theirs = with_peft(pair, peft.C3AConfig(block_size=8, target_modules=["q_proj"], block_size_pattern={key: 16}))
    theirs.save_pretrained(tmp_path)
    np.testing.assert_allclose(logits(pair.ours, *load_peft(tmp_path, pair.ours)), torch_logits(theirs), **CLOSE)


def adalora(pair, directory, allocation, **fields):
    """PEFT's AdaLoRA with ranks allocated by hand, as `{module: flags}`, saved and loaded again."""
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TWO, **fields)
    theirs = with_peft(pair, config)
    for name, parameter in theirs.named_parameters():
        if "lora_E" in name:
            parameter.data *= 20.0
    theirs.peft_config["default"].rank_pattern = {
        f"model.layers.{module}.lora_E.default": [flag == "1" for flag in flags] for module, flags in allocation.items()
    }
    theirs.save_pretrained(directory)
    return peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), directory).eval()


ALLOCATED = {
    "ragged": {"0.self_attn.q_proj": "0111", "1.self_attn.q_proj": "1010", "0.mlp.down_proj": "1111"},
    "a layer without": {"0.self_attn.q_proj": "0000", "1.self_attn.q_proj": "1001", "1.mlp.down_proj": "0100"},
    "a kernel without": {"0.self_attn.q_proj": "0000", "1.self_attn.q_proj": "0000"},
    "one for all": {f"{i}.{name}": "0110" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")},
}


@allocating
@pytest.mark.parametrize("alpha", [6, 2.5])
@pytest.mark.parametrize("kind", ALLOCATED)
def test_allocated_ranks(kind, alpha, pair, tmp_path):
    """Modules with fewer ranks, or with none, are the same here, and in PEFT again."""
    expected = torch_logits(adalora(pair, tmp_path / "theirs", ALLOCATED[kind], lora_alpha=alpha))
    assert np.abs(expected - torch_logits(pair.torch)).max() > 0.01
    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)
    report = save_peft(tmp_path / "ours", pair.ours, params, adapters)
    assert report.peft_type == "ADALORA" and report.errors == {}
    second = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(second), expected, **CLOSE)
    np.testing.assert_allclose(logits(pair.ours, *load_peft(tmp_path / "ours", pair.ours)), expected, **CLOSE)


@allocating
def test_an_adapter_without_any_rank(pair, tmp_path):
    allocation = {f"{i}.{name}": "0000" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")}
    expected = torch_logits(adalora(pair, tmp_path, allocation))
    params, adapters = load_peft(tmp_path, pair.ours)
    assert nodes(adapters) == {}
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)


@allocating
@pytest.mark.parametrize("allocation", [{}, ALLOCATED["ragged"]], ids=["all", "ragged"])
def test_an_alpha_of_zero_is_the_rank(allocation, pair, tmp_path):
    expected = torch_logits(adalora(pair, tmp_path, allocation, lora_alpha=0))
    params, adapters = load_peft(tmp_path, pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)


@allocating
def test_a_real_allocation(pair, tmp_path):
    """What PEFT's allocator leaves after some steps of training."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(init_r=4, target_r=1, total_step=6, tfinal=1, lora_alpha=6, target_modules=TWO)
    theirs = peft.get_peft_model(copy.deepcopy(pair.torch), config)
    shake(theirs)
    rule = torch.optim.SGD([leaf for leaf in theirs.parameters() if leaf.requires_grad], 0.1)
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    for step in range(7):
        theirs(tokens, labels=tokens).loss.backward()
        rule.step()
        theirs.base_model.update_and_allocate(step)
        rule.zero_grad()
    theirs.save_pretrained(tmp_path)
    ranks = {sum(flags) for flags in theirs.peft_config["default"].rank_pattern.values()}
    assert len(ranks) > 1
    expected = torch_logits(peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path).eval())
    np.testing.assert_allclose(logits(pair.ours, *load_peft(tmp_path, pair.ours)), expected, **CLOSE)


@pytest.mark.parametrize(
    ("method", "scale", "message"),
    [(sx.AdaLoRA((2, 4), alpha=6.0), 1.0, "lora_alpha is"), (sx.AdaLoRA(2, alpha=1.0), 0.0, "lora_alpha is 0")],
)
def test_scales_that_adalora_cannot_say(method, scale, message, pair, tmp_path):
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", method)])
    for node in nodes(adapters).values():
        node.frozen["scale"] = scale * node.frozen["scale"]
    with pytest.raises(sx.SboraxError, match=f"{message}.*use as_='lora'"):
        save_peft(tmp_path, pair.ours, params, adapters)


FLAGS = {
    "short": ([True], "rank_pattern: 1 flags for model.layers.0.self_attn.q_proj, but init_r is 4"),
    "numbers": ([1, 0, 1, 1], "rank_pattern: expected a list of booleans"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_are_none(case, pair, tmp_path):
    adalora(pair, tmp_path, {})
    config = json.loads((tmp_path / CONFIG).read_text())
    pattern = {"model.layers.0.self_attn.q_proj.lora_E": FLAGS[case][0]}
    (tmp_path / CONFIG).write_text(json.dumps({**config, "rank_pattern": pattern}))
    with pytest.raises(sx.SboraxError, match=re.escape(FLAGS[case][1])):
        load_peft(tmp_path, pair.ours)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.peft_type}-{row.method.__name__}")
def test_fields_of_another_type(row, pair, tmp_path):
    """Switches and numbers that are neither are refused by name, before anything is made of them."""
    save_file({"weight": np.zeros(1, np.float32)}, tmp_path / TENSORS)
    identity = {field: values[0] for field, values in row.known_by.items()}
    for name, default in row.defaults.items():
        if default is None:
            values = [[8], True]
        else:
            values = ["8", "false", None, [8], *([0, 1] if isinstance(default, bool) else [True])]
        for value in values:
            config = {"peft_type": row.peft_type, "target_modules": ["q_proj"], **identity, name: value}
            (tmp_path / CONFIG).write_text(json.dumps(config))
            with pytest.raises(sx.SboraxError, match=f"{name} must be"):
                load_peft(tmp_path, pair.ours)
