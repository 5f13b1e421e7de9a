"""A tiny random torch LLaMA and the same weights here, and ways to compare the two."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft.tuners.boft.layer
import peft.tuners.lora.layer
import pytest
import torch
import transformers
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.monteclora import BufferedMontecloraSampler
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.numpy import load_file

import sborax as sx
from sborax.models.language_model import LanguageModel
from sborax.models.load import load_model

VOCAB, DEPTH = 64, 2
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 9)).astype(np.int32)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class BlockDiagonal:
    """In place of BOFT's CUDA extension in PEFT, without which it takes one butterfly factor whatever is asked."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def variant_of(layer: Any, *, config: Any, **options: Any) -> Any:
    """QA-LoRA on torch's own layers, too. PEFT has it on GPTQ's alone, and ignores it on others."""
    return QALoraLinearVariant() if config.use_qalora else LoraLayer.resolve_lora_variant(layer, config=config)


peft.tuners.lora.layer.Linear.resolve_lora_variant = variant_of
peft.tuners.boft.layer.get_fbd_cuda = lambda: True
peft.tuners.boft.layer.FastBlockDiag = BlockDiagonal


class Pair(NamedTuple):
    torch: Any
    ours: LanguageModel
    path: Path


def build(directory: Path, **changes: Any) -> Pair:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        **{"vocab_size": VOCAB, "num_hidden_layers": DEPTH, "tie_word_embeddings": False, **changes},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        # They start as zeros, which nothing can scale.
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return Pair(model, load_model(directory), directory)


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def in_subspaces(factors: list[Any], columns: list[Any], places: list[Any], width: int) -> dict[str, np.ndarray]:
    """Our leaves of PEFT's AdaMSS on one weight: `a`, `b` and `idx`. Subspaces of few outputs are padded with zeros.

    - factors, columns: of each subspace, PEFT's A (rank, r) and B (outputs, rank).
    - places: the outputs of each subspace.
    - width: the largest rank.
    """
    size = sum(map(len, places))
    a = np.zeros((factors[0].shape[1], len(factors), width), np.float32)
    b, idx = np.zeros((width, size), np.float32), np.zeros(size, np.int32)
    for number, (factor, column, place) in enumerate(zip(factors, columns, places, strict=True)):
        a[:, number, : len(factor)], b[: len(factor), place], idx[place] = factor.T, column.T, number
    return {"a": a, "b": b, "idx": idx}


_compiled: dict[int, Any] = {}


def logits(model: LanguageModel, params: Any, adapters: Any) -> np.ndarray:
    run = _compiled.setdefault(id(model), jax.jit(model.apply))
    return np.asarray(run(params, adapters, TOKENS))


def with_peft(pair: Pair, config: Any, seed: int = 1) -> Any:
    """PEFT on a copy of the torch model, every trained tensor moved from its start."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config)
    shake(model, seed)
    return model.eval()


def shake(model: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def reloaded(pair: Pair, directory: Path) -> Any:
    """Our export in PEFT; fails unless the file's tensors are exactly those that PEFT has a place for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type '.*LlamaRMSNorm'", UserWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), directory)
    stored = load_file(directory / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(stored) == set(state)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(tensor, state[name].numpy(), err_msg=name)
    return model.eval()


def shaken(adapters: Any, seed: int = 0) -> Any:
    """Adapters whose trained leaves have moved."""
    train, frozen = sx.split(adapters)
    leaves, treedef = jax.tree.flatten(train)
    rng = np.random.default_rng(seed)
    values = [leaf + 0.05 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return sx.combine(jax.tree.unflatten(treedef, values), frozen)


def equal_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever MonteCLoRA draws normal numbers in training, both libraries draw the same, which vary."""

    def numbers(*shape: int) -> np.ndarray:
        return np.sin(1.7 * np.arange(1, 1 + math.prod(shape), dtype=np.float32)).reshape(shape)

    def draw(sampler: BufferedMontecloraSampler) -> dict[str, torch.Tensor]:
        samples, fan_in, rank = (
            getattr(sampler.model, f"{name}s") for name in ("num_sample", "in_feature", "out_feature")
        )
        squares = np.sum(np.square(numbers(rank, rank)), axis=1)
        z = {"z_mvn": numbers(samples, fan_in, rank), "z_wishart": np.diag(squares), "z_dirichlet": numbers(samples)}
        return {name: torch.from_numpy(array) for name, array in z.items()}

    monkeypatch.setattr(BufferedMontecloraSampler, "get", draw)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.asarray(numbers(*shape), dtype))


def equal_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.rand(n) draws the same n numbers every time, and the draws of jax.random.bernoulli are decided by them.

    Both libraries draw the same permutations, too, and the last of several numbers.
    """

    def uniforms(size: int) -> np.ndarray:
        return np.float32((0.3 + 0.618034 * np.arange(size)) % 1.0)

    def bernoulli(key: Any, p: Any, shape: tuple[int, ...] = ()) -> jax.Array:
        return jnp.asarray(uniforms(math.prod(shape)).reshape(shape)) > 1.0 - p

    def order(size: int) -> np.ndarray:
        return np.argsort(uniforms(size))

    monkeypatch.setattr(torch, "rand", lambda size: torch.from_numpy(uniforms(size)))
    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    monkeypatch.setattr(torch, "randperm", lambda size: torch.from_numpy(order(size)))
    monkeypatch.setattr(jax.random, "permutation", lambda key, size: jnp.asarray(order(size)))
    monkeypatch.setattr(torch, "randint", lambda low, high, shape: torch.full(shape, high - 1))
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.full(shape, high - 1))
