"""Starts from the inputs of the weights, EVA's and CorDA's, against PEFT's own code on the same model and data."""

import copy

import jax
import numpy as np
import peft
import pytest
import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft_training import with_answers, with_tokenizer
from torch_pair import ALL, DEPTH, logits, reloaded, shaken, torch_logits

import sborax as sx
from sborax.adapters.compose import ByLayer
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.tree import nodes
from sborax.models.names import hf_module

pytestmark = [
    pytest.mark.usefixtures("strict"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage:UserWarning"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("pair"))


def batches(rows: int = 4, length: int = 24, number: int = 3):
    """Batches with padding on the right, and answers in the second half of every row."""
    draw = np.random.default_rng(3)
    result = []
    for _ in range(number):
        lengths = draw.integers(length // 2, length + 1, rows)
        segments = (np.arange(length)[None, :] < lengths[:, None]).astype(np.int32)
        counts = (segments > 0) & (np.arange(length)[None, :] >= length // 4)
        result.append({"tokens": draw.integers(3, 250, (rows, length)), "segments": segments, "counts": counts})
    return result


def exact_svd(matrix, q, niter):
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :q].float(), s[:q].float(), vt[:q].T.float()


def layers_of(adapters):
    """(Hugging Face's name of the module, the adapter, its number of ranks) of every adapted layer."""
    for path, node in nodes(adapters).items():
        parts = node.method.children(node) if isinstance(node.method, ByLayer) else [(node, tuple(range(DEPTH)))]
        for child, layers in parts:
            for layer in layers:
                rank = child.method.rank
                adapter = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer]), child)
                yield hf_module(path, layer), adapter, rank[layer] if isinstance(rank, tuple) else rank


@pytest.mark.parametrize(
    ("method", "eva", "targets"),
    [
        (sx.EVA(rank=4, alpha=6.0), EvaConfig(), ALL),
        # Some weights get no adapter.
        (sx.EVA(rank=2, alpha=6.0, rho=4.0, tau=0.95), EvaConfig(rho=4.0, tau=0.95), ALL),
        (sx.EVA(rank=3, alpha=6.0, rho=1.5, adjust=False), EvaConfig(rho=1.5, adjust_scaling_factors=False), ALL),
        (sx.EVA(rank=4, rho=1.0), EvaConfig(rho=1.0), ALL),
        # PEFT divides in place, once for each module that shares the inputs. These share none.
        (sx.EVA(rank=4, whiten=True), EvaConfig(whiten=True), ["q_proj", "o_proj", "down_proj"]),
    ],
    ids=["default", "dropped", "unadjusted", "equal-ranks", "whitened"],
)
def test_eva_equals_peft(pair, method, eva, targets, monkeypatch):
    # PEFT's is randomised, from a seed of torch's.
    monkeypatch.setattr(torch, "svd_lowrank", exact_svd)
    alpha = method.rank if method.alpha is None else method.alpha
    config = LoraConfig(
        r=method.rank, lora_alpha=alpha, init_lora_weights="eva", eva_config=eva, target_modules=targets
    )
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config)
    peft.initialize_lora_eva_weights(model, [with_answers(batch) for batch in batches()], show_progress_bar=False)
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    rules = [("|".join(targets), method)]
    _, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules, sx.input_hints(pair.ours, rules, batches()))
    ours = {name: (node, rank) for name, node, rank in layers_of(adapters)}
    assert {name: rank for name, (_, rank) in ours.items()} == {name: m.r["default"] for name, m in theirs.items()}
    assert sx.count(adapters) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, (node, rank) in ours.items():
        module = theirs[name]
        np.testing.assert_allclose(node.frozen["scale"], module.scaling["default"], rtol=1e-6)
        a = module.lora_A["default"].weight.detach().numpy().T
        # Whitened directions have singular values close to each other, between which rounding turns them: 1.2e-4 here
        # on one kind of CPU.
        accuracy = 1e-3 if method.whiten else 1e-4
        np.testing.assert_allclose(node.train["a"][:, :rank], a, rtol=0, atol=accuracy * np.abs(a).max())
        assert not node.train["a"][:, rank:].any() and not node.train["b"].any()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_equals_peft(pair, mode):
    settings = CordaConfig(corda_method=mode, verbose=False)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="corda", corda_config=settings, target_modules=ALL)
    model = copy.deepcopy(pair.torch)

    def run() -> None:
        # One sample at a time: PEFT takes the covariance of a matrix of tokens.
        for batch in batches():
            for tokens, real in zip(batch["tokens"], batch["segments"] > 0, strict=True):
                model(torch.tensor(tokens[real][None], dtype=torch.long))

    preprocess_corda(model, config, run)
    model = peft.get_peft_model(model, config)
    rules = [("proj", sx.CorDA(rank=4, alpha=6.0, mode=mode))]
    hints = sx.input_hints(pair.ours, rules, batches())
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules, hints)
    for path, node in nodes(adapters).items():
        for layer in range(DEPTH):
            module = model.base_model.model.get_submodule(hf_module(path, layer))
            a, b = (half["default"].weight.detach().numpy().T for half in (module.lora_A, module.lora_B))
            kernel = np.asarray(flatten(params)[path][layer])
            ours = np.asarray(node.train["a"][layer] @ node.train["b"][layer])
            residual = module.base_layer.weight.detach().numpy().T
            np.testing.assert_allclose(ours, a @ b, rtol=0, atol=1e-4)
            np.testing.assert_allclose(kernel, residual, rtol=0, atol=1e-4)
            # What no sign changes: how the two factors share the product.
            for got, want in ((np.asarray(node.train["a"][layer]), a), (np.asarray(node.train["b"][layer]).T, b.T)):
                np.testing.assert_allclose(got @ got.T, want @ want.T, rtol=0, atol=1e-3 * np.abs(want @ want.T).max())


def padded_with_zeros(tuned, start):
    """As in training, what pads a layer to the largest rank stays zero."""

    def clean(final, initial):
        mask = {name: (leaf["a"] != 0).any(axis=-2).astype("float32") for name, leaf in parts_of(initial.train).items()}
        leaves = {
            name: {"a": leaf["a"] * mask[name][..., None, :], "b": leaf["b"] * mask[name][..., :, None]}
            for name, leaf in parts_of(final.train).items()
        }
        train = leaves[""] if "" in leaves else leaves
        return sx.Adapter(train, final.frozen, final.method, final.in_axes)

    starts = nodes(start)
    return nest({path: clean(node, starts[path]) for path, node in nodes(tuned).items()})


def parts_of(train):
    """The pairs a, b of an adapter, by part."""
    return {"": train} if "a" in train else train


@pytest.mark.parametrize(
    "method", [sx.EVA(rank=2, alpha=6.0, rho=4.0, tau=0.95), sx.CorDA(rank=4)], ids=["EVA", "CorDA"]
)
def test_peft_reads_what_was_trained(pair, method, tmp_path):
    """As plain LoRA, ranks by layer and twice the rank where a part of the base was taken."""
    rules = [("proj", method)]
    hints = sx.input_hints(pair.ours, rules, batches())
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules, hints)
    adapters = padded_with_zeros(shaken(adapters), adapters)
    sx.save_peft(tmp_path, pair.ours, params, adapters)
    want = logits(pair.ours, params, adapters)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path)), want, rtol=0, atol=2e-4)
    weights, read = sx.load_peft(tmp_path, pair.ours)
    np.testing.assert_allclose(logits(pair.ours, weights, read), want, rtol=0, atol=2e-4)


def test_mistakes(pair):
    rules = [("proj", sx.EVA(rank=4))]
    with pytest.raises(sx.SboraxError, match="needs hint 'inputs'"):
        sx.attach(jax.random.key(0), pair.ours.params, rules)
    with pytest.raises(sx.SboraxError, match="at least one batch"):
        sx.input_hints(pair.ours, rules, [])
    (batch, *_) = batches(rows=1, length=4)
    with pytest.raises(sx.SboraxError, match="may get rank 8, but no batch has as many tokens of answers; use"):
        sx.input_hints(pair.ours, rules, [batch])
    for wrong, message in (
        (sx.EVA(rho=0.5), "needs rho"),
        (sx.EVA(mean=0), "needs rho"),
        (sx.EVA(rank=64), "rank must lie in 1..32"),
    ):
        with pytest.raises(sx.SboraxError, match=message):
            sx.plan(pair.ours.params, [("q_proj", wrong)], hints=sx.input_hints(pair.ours, rules, batches()))
