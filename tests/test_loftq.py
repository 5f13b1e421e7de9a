"""LoftQ against PEFT's code with bitsandbytes' NF4 on the CPU, and in a run; MiCA's and the orthogonal start."""

import copy
import functools
import json

import bitsandbytes
import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig
from peft.utils.loftq_utils import loftq_init
from tiny_model import write_data, write_model
from torch_pair import ALL, DEPTH, build, logits, reloaded, shaken, torch_logits

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.models.load import load_model
from sborax.models.names import hf_module
from sborax.models.nf4 import quantise
from sborax.records.adapter import load_adapter
from sborax.train.base import adapt
from sborax.train.loop import train

pytestmark = [
    pytest.mark.usefixtures("strict"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

WEIGHT = np.random.default_rng(0).standard_normal((128, 96)).astype(np.float32) / 8


@pytest.fixture
def on_cpu(monkeypatch):
    """PEFT quantises on a GPU, with scales in float32. Here on the CPU, with scales that are quantised as in QLoRA."""
    move = torch.Tensor.to

    def to(self, *args, **kwargs):
        kwargs |= {"device": "cpu"} if "device" in kwargs else {}
        return move(self, *("cpu" if arg == "cuda" else arg for arg in args), **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    plain = bitsandbytes.nn.Params4bit

    def nested(data, compress_statistics, **options):
        tensor = plain(data, compress_statistics=True, **options)
        monkeypatch.setattr(plain, "to", lambda self, device: self._quantize("cpu"))
        return tensor

    monkeypatch.setattr(bitsandbytes.nn, "Params4bit", nested)


def adapted(method, weight=WEIGHT):
    """The dense value of the quantised base, and the adapter, of a run in 4 bits."""
    params = {"layers": {"proj": {"kernel": jnp.asarray(weight)[None]}}}
    params, adapters = adapt(jax.random.key(0), params, sx.plan(params, [("proj", method)]), "nf4")
    node = jax.tree.map(lambda leaf: np.asarray(leaf[0]), adapters["layers"]["proj"]["kernel"])
    return np.asarray(params["layers"]["proj"]["kernel"].dense()[0]), node


@pytest.mark.parametrize("alpha", [None, 9.0])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_equals_peft(on_cpu, iterations, alpha):
    weight = torch.tensor(WEIGHT.T.copy())
    quantised, lora_a, lora_b = loftq_init(weight, num_bits=4, reduced_rank=6, num_iter=iterations)
    base, node = adapted(sx.LoftQ(rank=6, alpha=alpha, iterations=iterations))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    close(base, quantised.numpy().T)
    close(node.train["a"] @ node.train["b"], (lora_b @ lora_a).numpy().T)
    close(node.train["a"] @ node.train["a"].T, (lora_a.T @ lora_a).numpy())
    assert node.frozen["scale"] == (1.0 if alpha is None else 1.5)


def test_less_is_lost_than_without_it():
    """At every scale, if the factors are divided; more iterations lose less, down to a floor."""
    lost = [np.linalg.norm(quantise(jnp.asarray(WEIGHT)).dense() - WEIGHT)]
    for iterations in (1, 5):
        for alpha in (None, 24.0):
            base, node = adapted(sx.LoftQ(rank=6, alpha=alpha, iterations=iterations, divide=True))
            merged = base + node.frozen["scale"] * node.train["a"] @ node.train["b"]
            lost.append(np.linalg.norm(merged - WEIGHT))
    plain, single, scaled, five, _ = lost
    assert five < single < 0.93 * plain
    np.testing.assert_allclose(scaled, single, rtol=1e-4)


def test_a_run_in_4_bits(tmp_path):
    model = str(write_model(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16))
    data = sx.Data(
        str(write_data(tmp_path / "data.jsonl")), template="{instruction}", answer=" {output}", max_length=32
    )
    settings = {"data": data, "rules": [("proj", sx.LoftQ(rank=4, iterations=2))], "steps": 2, "batch_size": 2}
    with pytest.raises(sx.SboraxError, match=r'LoftQ starts from what the base loses in 4 bits; set quant="nf4"'):
        sx.Experiment(model, **settings)
    with jax.numpy_dtype_promotion("standard"):
        summary = train(sx.Experiment(model, quant="nf4", **settings), tmp_path / "run", echo=lambda _: None)
    assert summary.finished
    base, adapters = load_adapter(tmp_path / "run" / "adapter", load_model(model).params)
    assert all((np.asarray(node.train["b"]) != 0).any() for node in nodes(adapters).values())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pair"))


def attached(pair, method):
    return sx.attach(jax.random.key(0), pair.ours.params, [("proj", method)])


def test_mica_equals_peft(pair, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="mica", target_modules=ALL, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config)
    params, adapters = attached(pair, sx.MiCA(rank=4, alpha=6.0))
    for path, node in nodes(adapters).items():
        for layer in range(DEPTH):
            module = model.base_model.model.get_submodule(hf_module(path, layer))
            a, b = (half["default"].weight.detach().numpy().T for half in (module.lora_A, module.lora_B))
            ours = np.asarray(node.frozen["b"][layer])
            np.testing.assert_allclose(ours.T @ ours, b.T @ b, rtol=0, atol=1e-5)
            assert not a.any() and not np.asarray(node.train["a"][layer]).any()
    assert sx.count(adapters) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    tuned = shaken(adapters)
    sx.save_peft(tmp_path, pair.ours, params, tuned)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == "mica"
    theirs, want = reloaded(pair, tmp_path), logits(pair.ours, params, tuned)
    np.testing.assert_allclose(torch_logits(theirs), want, rtol=0, atol=2e-4)
    _, second = sx.load_peft(tmp_path, pair.ours)
    chex.assert_trees_all_close(second, tuned, rtol=1e-6)


def test_the_orthogonal_start_is_peft_s(pair):
    """Its random numbers aside: the size of the factors, that both have half their rank, and that a b = 0."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, init_lora_weights="orthogonal", target_modules=ALL)
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config)
    theirs, ours = [], []
    for path, node in nodes(attached(pair, sx.LoRA(rank=16, init_a="orthogonal"))[1]).items():
        for layer in range(DEPTH):
            module = model.base_model.model.get_submodule(hf_module(path, layer))
            theirs.append([half["default"].weight.detach().numpy().T for half in (module.lora_A, module.lora_B)])
            ours.append([np.asarray(node.train[name][layer]) for name in "ab"])
    for a, b in theirs + ours:
        assert np.abs(a @ b).max() < 1e-6
        assert [np.linalg.matrix_rank(half, tol=1e-4) for half in (a, b)] == [8, 8]
    for side in (0, 1):
        sizes = [
            np.sqrt(np.mean(np.concatenate([pair[side].ravel() for pair in pairs]) ** 2)) for pairs in (theirs, ours)
        ]
        np.testing.assert_allclose(sizes, np.sqrt(0.5) / 10, rtol=0.05)
    with pytest.raises(sx.SboraxError, match="rank must be even, got 3"):
        attached(pair, sx.LoRA(rank=3, init_a="orthogonal"))


def test_the_orthogonal_start_of_layers_of_different_ranks(pair):
    """Each layer is as if it had its rank alone."""
    rules = [("q_proj", sx.LoRA(rank=sx.LinearRanks(2, 6), init_a="orthogonal"))]
    _, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
    ragged = nodes(adapters)["layers/self_attn/q_proj/kernel"].train
    for layer, rank in enumerate((2, 6)):
        _, alone = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", sx.LoRA(rank=rank, init_a="orthogonal"))])
        reference = nodes(alone)["layers/self_attn/q_proj/kernel"].train
        np.testing.assert_allclose(ragged["a"][layer][:, :rank], reference["a"][layer], rtol=0, atol=1e-6)
        np.testing.assert_allclose(ragged["b"][layer][:rank], reference["b"][layer], rtol=0, atol=1e-6)
        assert not ragged["a"][layer][:, rank:].any() and not ragged["b"][layer][rank:].any()
