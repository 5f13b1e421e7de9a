"""Modules that are stored whole beside an adapter: embeddings, heads and norms, tied or not, here and in PEFT."""

import json

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file
from torch_pair import build, logits, reloaded, shaken, torch_logits, with_peft

import sborax as sx
from sborax.interop.peft import load_peft, save_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)
CLOSE = {"rtol": 0, "atol": 1e-4}
TWO = ["q_proj", "v_proj"]
HEAD, EMBEDDING = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return build(tmp_path_factory.mktemp("untied"))


def both_ways(pair, config, folder):
    """PEFT's adapter computes the same here, and again in PEFT when written by us; our (params, adapters)."""
    theirs = with_peft(pair, config)
    theirs.save_pretrained(folder / "theirs")
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(pair.torch)).max() > 0.1
    params, adapters = load_peft(folder / "theirs", pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)
    save_peft(folder / "ours", pair.ours, params, adapters)
    np.testing.assert_allclose(torch_logits(reloaded(pair, folder / "ours")), expected, **CLOSE)
    return params, adapters


@pytest.mark.parametrize("names", [["embed_tokens"], ["embed_tokens", "lm_head", "norm"]])
@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.MissConfig])
def test_embeddings_and_heads_of_their_own(kind, names, untied, tmp_path):
    params, _ = both_ways(untied, kind(r=4, target_modules=TWO, modules_to_save=names), tmp_path)
    changes = jax.tree.map(lambda a, b: bool((a != b).any()), params, untied.ours.params)
    assert {name for name in ("embed_tokens", "lm_head", "norm") if all(jax.tree.leaves(changes[name]))} == set(names)


@pytest.mark.parametrize("dora", [False, True])
def test_an_embedding_with_its_head(dora, tied, tmp_path):
    """PEFT keeps the head tied where the config says so, and its file has the same tensor for both."""
    config = peft.LoraConfig(
        r=4, target_modules=TWO, modules_to_save=["embed_tokens", "norm"], ensure_weight_tying=True, use_dora=dora
    )
    params, adapters = both_ways(tied, config, tmp_path)
    assert "lm_head" not in params
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert set(theirs) == set(ours) and HEAD in ours
    np.testing.assert_array_equal(ours[HEAD], ours[EMBEDDING])
    # The same merged, where there is nothing to tie.
    merged = sx.merge(params, adapters)
    np.testing.assert_allclose(logits(tied.ours, merged, None), logits(tied.ours, params, adapters), **CLOSE)


def test_a_tied_head_that_is_not_said_to_be(tied, tmp_path):
    with_peft(tied, peft.LoraConfig(r=2, target_modules=TWO, modules_to_save=["embed_tokens"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(sx.SboraxError, match="to which the head is tied here; without ensure_weight_tying"):
        load_peft(tmp_path, tied.ours)


def test_a_head_that_differs_from_its_embedding(tied, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=TWO, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with_peft(tied, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: tensors[HEAD] + 1.0}, file)
    with pytest.raises(sx.SboraxError, match=r"lm_head\.weight differs from the embedding"):
        load_peft(tmp_path, tied.ours)
    save_file({name: tensor for name, tensor in tensors.items() if name != HEAD}, file)
    assert (load_peft(tmp_path, tied.ours)[0]["embed_tokens"]["embedding"] == tensors[EMBEDDING]).all()


def test_a_kind_that_cannot_tie(tied, tmp_path):
    params, adapters = sx.attach(jax.random.key(0), tied.ours.params, [("q_proj", sx.Bone(4))])
    embedding = params["embed_tokens"]["embedding"] * 1.5
    params, adapters = {**params, "embed_tokens": {"embedding": embedding}}, shaken(adapters)
    with pytest.raises(sx.SboraxError, match=r"embed_tokens\.weight: the head is tied to it, which PEFT's MISS"):
        save_peft(tmp_path / "no", tied.ours, params, adapters)
    assert not (tmp_path / "no").exists()
    save_peft(tmp_path / "lora", tied.ours, params, adapters, as_="lora", rank=32)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.embed_tokens"] and config["ensure_weight_tying"] is True
    theirs = reloaded(tied, tmp_path / "lora")
    np.testing.assert_allclose(torch_logits(theirs), logits(tied.ours, params, adapters), **CLOSE)
