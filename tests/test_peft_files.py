"""What PEFT's files may ask for: its matching rules, and one clear error for everything that cannot be read."""

import json
import re
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.numpy import load_file, save_file

import sborax as sx
from sborax.interop.peft import load_peft, save_peft
from sborax.interop.peft_targets import naming, pattern_for, targeted, value_for
from sborax.models.config import LlamaConfig
from sborax.models.language_model import LanguageModel, abstract
from sborax.models.llama import Llama

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LINEAR = [
    f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
LINEAR.append("lm_head")


def in_peft(config, modules):
    """PEFT's own answer, from the function that its tuners call."""
    fields = {"exclude_modules": None, "modules_to_save": None, "target_parameters": None, **config}
    return [module for module in modules if check_target_module_exists(SimpleNamespace(**fields), module)]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj", "self_attn.v_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1, 11]},
        {"target_modules": ["up_proj"], "layers_to_transform": 3, "layers_pattern": "layers"},
        {"target_modules": ["up_proj"], "layers_to_transform": [3], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["up_proj"], "layers_to_transform": [], "exclude_modules": ["layers.1.mlp.up_proj"]},
        {"target_modules": r".*\.(1|2)\..*_proj", "exclude_modules": r".*v_proj"},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    ],
)
def test_targets_are_those_of_peft(config):
    expected = in_peft(config, LINEAR)
    assert expected and targeted(config, LINEAR) == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(LINEAR), st.integers(1, 3), min_size=1))
def test_any_set_of_modules_and_values_can_be_named(values):
    """The config we write means the same to PEFT and to our reader."""
    config = naming(list(values), LINEAR)
    assert set(in_peft(config, LINEAR)) == set(values) == set(targeted(config, LINEAR))
    default, exceptions = pattern_for(values)
    for module, value in values.items():
        assert exceptions.get(get_pattern_key(exceptions.keys(), module), default) == value
        assert value_for({"rank_pattern": exceptions}, "rank_pattern", module, default) == value


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(16, 8, 12, 2, 2, 1, 4, 32, 1e-5)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract(config))
    return LanguageModel(Llama(config), params, config, None)


@pytest.fixture
def good(tmp_path):
    """A LoRA directory for q_proj of both layers, written without us."""
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = np.full((2, 8), 0.5, np.float32)
        tensors[f"{name}.lora_B.weight"] = np.full((8, 2), 0.25, np.float16)
    save_file(tensors, tmp_path / TENSORS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    return tmp_path


def test_minimal_directory(good, model):
    """Absent fields have PEFT's defaults, half precision widens, fields of no consequence are let be."""
    config = json.loads((good / CONFIG).read_text())
    (good / CONFIG).write_text(json.dumps({**config, "peft_version": "9", "some_new_switch": False, "lora_bias": None}))
    params, adapters = load_peft(good, model)
    node = adapters["layers"]["self_attn"]["q_proj"]["kernel"]
    assert params is not None and float(node.frozen["scale"][0]) == 1.5
    np.testing.assert_array_equal(node.train["a"], np.full((2, 8, 2), 0.5))
    np.testing.assert_array_equal(node.train["b"], np.full((2, 2, 8), 0.25))
    assert node.train["b"].dtype == jnp.float32


def test_qalora_that_peft_ignored_is_lora(good, model):
    """PEFT pools on GPTQ bases alone; elsewhere it writes the field and trains a plain LoRA."""
    config = json.loads((good / CONFIG).read_text())
    (good / CONFIG).write_text(json.dumps({**config, "use_qalora": True, "qalora_group_size": 4}))
    node = load_peft(good, model)[1]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert type(node.method) is sx.LoRA and float(node.frozen["scale"][0]) == 1.5


WRONG = {
    "peft_type": ({"peft_type": "SOME"}, "'SOME' is not supported; known: "),
    "unread peft_type": ({"peft_type": "XLORA"}, "'XLORA' is not supported: it mixes several adapters"),
    "no type": ({"peft_type": None}, "is not supported"),
    "bias": ({"bias": "some"}, "option bias=some"),
    "lora_bias": ({"lora_bias": True}, "option lora_bias=True is not supported for model.layers.0.self_attn.q_proj"),
    "unknown": ({"some_new_switch": 3}, "option some_new_switch=3"),
    "kasa": ({"kasa_config": {"beta": 1}}, "lora_diag"),
    "blocks of both": (
        {"use_bdlora": {"target_modules_bd_a": ["q_"], "target_modules_bd_b": ["attn"]}},
        "q_proj is among target_modules_bd_a and among target_modules_bd_b",
    ),
    "blocks of neither": ({"use_bdlora": {"nblocks": 2}}, "q_proj is in neither list, and match_strict is set"),
    "odd blocks": ({"use_bdlora": {"target_modules_bd_b": "q_proj"}}, "expected a list of names"),
    "half a block": ({"use_bdlora": {"target_modules_bd_b": ["q"], "nblocks": 0.5}}, "nblocks must be a whole"),
    "three blocks": ({"use_bdlora": {"target_modules_bd_b": ["q"], "nblocks": 3}}, "blocks must divide the rank 2"),
    "odd direction": ({"velora_config": {"init_type": "some"}}, "init_type of velora_config must be among"),
    "no groups": ({"velora_config": {"num_groups": 0}}, "num_groups must be a whole number"),
    "no direction": ({"velora_config": {}}, "lora_velora_embed"),
    "redrawn": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "corda": ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
    "both": ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora=True"),
    "truthy": ({"use_dora": 1}, "use_dora=1"),
    "rank 0": ({"r": 0}, "r must be"),
    "rank true": ({"r": True}, "r must be"),
    "rank huge": ({"r": 10**30}, "r must be"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha must be"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha must be"),
    "dropout": ({"lora_dropout": 2.0}, "dropout must lie"),
    "no targets": ({"target_modules": None}, "target_modules is empty"),
    "other targets": ({"target_modules": ["c_attn"]}, "matches no module"),
    "odd targets": ({"target_modules": [3]}, "expected a list of names"),
    "pattern": ({"rank_pattern": {"q_proj": 3}}, "has shape (2, 8), config and model say (3, 8)"),
    "odd pattern": ({"rank_pattern": ["q_proj"]}, "expected an object"),
    "bad regex": ({"target_modules": "(q_proj"}, "not a regular expression"),
    "endless regex": ({"target_modules": "(.*.*)*x"}, "too complex"),
    "many stars": ({"alpha_pattern": {".*" * 20 + "x": 2}}, "too complex"),
    "alternatives": ({"target_modules": "(a|a)" * 30}, "too complex"),
    "fewer": ({"target_modules": ["q_proj", "v_proj"]}, "4 tensors are missing"),
    "more": ({"layers_to_transform": [0]}, "2 tensors in"),
    "odd layers": ({"layers_to_transform": ["a"]}, "layer numbers"),
    "no such module": ({"modules_to_save": ["classifier"]}, "no module 'classifier'"),
    "saved": ({"modules_to_save": ["norm"]}, "are missing"),
    "miss": ({"peft_type": "MISS", "lora_alpha": None}, "miss_block"),
    "bat": ({"peft_type": "MISS", "lora_alpha": None, "init_weights": "bat", "r": 3}, "must divide both sides"),
    "mini": ({"peft_type": "MISS", "lora_alpha": None, "init_weights": "mini", "mini_r": 3}, "mini_rank must divide"),
    "beyond": ({"peft_type": "MISS", "lora_alpha": None, "r": 9}, "rank must lie in 1..8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_config(case, good, model):
    changes, message = WRONG[case]
    (good / CONFIG).write_text(json.dumps({**json.loads((good / CONFIG).read_text()), **changes}))
    with pytest.raises(sx.SboraxError, match=re.escape(message)) as caught:
        load_peft(good, model)
    assert str(caught.value).startswith(f"{good}: ") and "\n" not in str(caught.value)


def test_tied_head(good, model):
    tied = LlamaConfig(16, 8, 12, 2, 2, 1, 4, 32, 1e-5, tie_word_embeddings=True)
    params = {name: leaf for name, leaf in model.params.items() if name != "lm_head"}
    model = LanguageModel(Llama(tied), params, tied, None)
    config = json.loads((good / CONFIG).read_text())
    (good / CONFIG).write_text(json.dumps({**config, "modules_to_save": ["embed_tokens"]}))
    with pytest.raises(sx.SboraxError, match="tied"):
        load_peft(good, model)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not JSON"), (b"[]", "not a JSON object"), (b"\xff\xfe", "not JSON"), (b"[" * 99999, "not JSON")],
)
def test_broken_config(content, message, good, model):
    (good / CONFIG).write_bytes(content)
    with pytest.raises(sx.SboraxError, match=message):
        load_peft(good, model)


def test_broken_files(good, model):
    content = (good / TENSORS).read_bytes()
    (good / TENSORS).write_bytes(content[:-8])
    with pytest.raises(sx.SboraxError, match="not a readable safetensors file"):
        load_peft(good, model)
    (good / TENSORS).write_bytes(content)
    tensors = load_file(good / TENSORS)
    save_file({name: tensor.astype(np.int32) for name, tensor in tensors.items()}, good / TENSORS)
    with pytest.raises(sx.SboraxError, match="dtype I32"):
        load_peft(good, model)
    (good / TENSORS).rename(good / "adapter_model.bin")
    with pytest.raises(sx.SboraxError, match="pickled weights are not read"):
        load_peft(good, model)
    (good / CONFIG).unlink()
    with pytest.raises(sx.SboraxError, match="adapter_config.json is missing"):
        load_peft(good, model)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([".*", "q_proj", "(a", "mini", "pissa"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
FIELDS = """peft_type r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern bias
    modules_to_save rank_pattern alpha_pattern use_dora use_rslora init_lora_weights init_weights mini_r""".split()


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["LORA", "MISS", "BONE"]),
    changes=st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1),
    noise=st.binary(),
)
def test_random_configs(kind, changes, noise, good, model):
    """Whatever a config says, the answer is a `SboraxError`: the tensors here fit no config at all."""
    save_file({"weight": np.zeros((1, 7), np.float32)}, good / TENSORS)
    files = sorted(good.iterdir())
    (good / CONFIG).write_text(json.dumps({"peft_type": kind, "target_modules": ["q_proj"], **changes}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `re`, about sets in a pattern
        with pytest.raises(sx.SboraxError):
            load_peft(good, model)
    (good / TENSORS).write_bytes(noise)
    with pytest.raises(sx.SboraxError):
        load_peft(good, model)
    assert sorted(good.iterdir()) == files


def test_refused_exports(tmp_path, model):
    def refused(rules, message, params=None, **options):
        base, adapters = sx.attach(jax.random.key(0), model.params, rules)
        with pytest.raises(sx.SboraxError, match=re.escape(message)):
            save_peft(tmp_path / "out", model, params or base, adapters, **options)
        assert not (tmp_path / "out").exists()

    refused([("q_proj", sx.LoRA(2)), ("v_proj", sx.Bone(2))], "use as_='lora'")
    refused([("q_proj", sx.LoRA(2)), ("v_proj", sx.DoRA(2))], "use as_='lora'")
    refused([("q_proj", sx.Bone(2)), ("v_proj", sx.Bone(4))], "use as_='lora'")
    refused([("q_proj", sx.LoRA(2)), ("v_proj", sx.LoRA(2, dropout=0.1))], "use as_='lora'")
    refused([("q_proj", sx.chain(sx.PiSSA(2), sx.DoRA(2)))], "use as_='lora'")
    refused([("q_proj", sx.LoRA(2))], "as_ must be", as_="merged")
    tuned = jax.tree.map(lambda leaf: leaf + 1.0, model.params)
    refused([("q_proj", sx.LoRA(2))], "both its base and an adapter", params=tuned)
    with pytest.raises(sx.SboraxError, match="nothing to save: no adapters"):
        save_peft(tmp_path / "out", model, model.params, {})
