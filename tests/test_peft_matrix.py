"""Every cell of `peft_matrix` is PEFT's function here and again in PEFT, or is refused in one line.

`pytest -m nightly tests/test_peft_matrix.py` runs all of them; an ordinary run takes a spread twelfth.
"""

import copy
import dataclasses
import json
import warnings

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from peft_matrix import CELLS, FAMILIES
from torch_pair import Pair, logits, torch_logits

import sborax as sx
from sborax.adapters.core import AbstractWeight
from sborax.adapters.leaves import flatten, replace_leaves
from sborax.interop.peft import load_peft, save_peft
from sborax.interop.peft_layout import layout_of
from sborax.models.load import load_model
from sborax.models.replication import replicate_layers
from sborax.models.vocabulary import resize_vocabulary

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def built(family, directory) -> Pair:
    """A random torch model, its norms and biases too, and the same here; for NF4 torch has what the codes stand for."""
    kind, fields = FAMILIES[family]
    torch.manual_seed(0)
    if kind == "gemma":
        fields = {"tie_word_embeddings": True, **fields}
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    perturb(model, 0.2, lambda name, parameter: parameter.ndim == 1)
    model.save_pretrained(directory)
    ours = load_model(directory, quant="nf4" if family == "nf4" else None)
    layout = layout_of(ours.params)
    for name, (path, layer, _) in layout.slots.items():
        if isinstance(layout.leaves[path], AbstractWeight):
            dense = np.asarray(layout.kernel(path, layer).dense(), np.float32).T
            model.get_parameter(name).data = torch.from_numpy(dense.copy())
    return Pair(model, ours, directory)


def perturb(model, size, predicate) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if predicate(name, parameter):
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """The models of a family, made once."""
    pairs = {}

    def get(family) -> Pair:
        if family not in pairs:
            pairs[family] = built(family, tmp_path_factory.mktemp(family))
        return pairs[family]

    return get


def base_of(pair, option, seed=0):
    """The torch model as PEFT gets it. Some families list their layers' kinds, which PEFT does not copy with these.

    seed: of the vectors of new tokens.
    """
    model, ranges = copy.deepcopy(pair.torch), copied_in(option)
    if option.vocabulary is not None:
        torch.manual_seed(seed)
        model.resize_token_embeddings(option.vocabulary)
    kinds = getattr(model.config, "layer_types", None)
    if ranges is not None and kinds:
        model.config.layer_types = [kinds[layer] for start, end in ranges for layer in range(start, end)]
    return model


def saved_by_peft(pair, option, directory) -> None:
    """PEFT's adapter, every trained tensor moved from its start."""
    base = base_of(pair, option)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base, option.config)
    perturb(theirs, 0.1, lambda name, parameter: parameter.requires_grad)
    if option.prepare is not None:
        option.prepare(theirs)
    theirs.save_pretrained(directory, save_embedding_layers=option.vocabulary is not None or "auto")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **option.stored}))


def copied_in(option):
    """The ranges of layers of which PEFT makes the model that it adapts; None for the base itself."""
    return getattr(option.config, "layer_replication", None)


def resized(model, base, size):
    """`model` with the vectors of a torch base that was resized: of adapted modules alone, PEFT stores no other one."""
    tables = {"embed_tokens/embedding": base.get_input_embeddings(), "lm_head/kernel": base.get_output_embeddings()}
    larger = resize_vocabulary(model, size)
    weights = {path: jnp.asarray(table.weight.detach().numpy()) for path, table in tables.items()}
    new = {path: weight if "embed" in path else weight.T for path, weight in weights.items()}
    params = replace_leaves(larger.params, {path: new[path] for path in new.keys() & flatten(larger.params).keys()})
    return dataclasses.replace(larger, params=params)


def in_peft(pair, option, directory) -> np.ndarray:
    """New vectors of the base are others than those of `saved_by_peft`: the file has these."""
    return torch_logits(peft.PeftModel.from_pretrained(base_of(pair, option, 2), directory).eval())


def refusal(message, run) -> None:
    with pytest.raises(sx.SboraxError) as caught:
        run()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def outcome_as_declared(cell, pair_of, directory) -> None:
    """Logits agree to 1e-4, or to 1e-5 of the largest where that is more: an adapter may make them large."""
    pair, option = pair_of(cell.family), cell.option
    with warnings.catch_warnings():
        # PEFT's advice and deprecations; each kind has its own.
        warnings.simplefilter("ignore")
        ranges = copied_in(option)
        ours, layers = pair.ours, option.vocabulary is not None
        ours = ours if option.vocabulary is None else resized(ours, base_of(pair, option, 2), option.vocabulary)
        ours = ours if ranges is None else replicate_layers(ours, ranges)
        saved_by_peft(pair, option, directory / "theirs")
        if cell.refused is not None:
            return refusal(cell.refused, lambda: load_peft(directory / "theirs", ours))
        expected = in_peft(pair, option, directory / "theirs")
        close = {"rtol": 0, "atol": max(1e-4, 1e-5 * float(np.abs(expected).max()))}
        unadapted = torch_logits(base_of(pair, option) if ranges is None else pair.torch)
        assert np.abs(expected - unadapted).max() > 100 * close["atol"]
        params, adapters = load_peft(directory / "theirs", ours)
        np.testing.assert_allclose(logits(ours, params, adapters), expected, **close)
        if option.unsaved is not None:
            return refusal(option.unsaved, lambda: save_peft(directory / "ours", ours, params, adapters))
        options = {"layer_replication": ranges, "save_embedding_layers": layers}
        save_peft(directory / "ours", ours, params, adapters, **options)
        np.testing.assert_allclose(in_peft(pair, option, directory / "ours"), expected, **close)


@pytest.mark.nightly
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_cell(cell, pair_of, tmp_path):
    outcome_as_declared(cell, pair_of, tmp_path)


@pytest.mark.parametrize("cell", CELLS[::12], ids=str)
def test_a_twelfth(cell, pair_of, tmp_path):
    outcome_as_declared(cell, pair_of, tmp_path)
