"""Beam search finds what transformers finds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sborax_models import make

import sborax as sx
from sborax.models import load_model
from sborax.models.beam import beam_search

pytestmark = pytest.mark.usefixtures("strict")
NEW = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    return make("llama", place, num_hidden_layers=2), load_model(place)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 96, length).tolist() for length in (3, 20, 9, 1, 14, 7)]


def theirs(reference, prompt, beams, eos):
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False, max_new_tokens=NEW,
        eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    new = out[0, len(prompt) :].tolist()
    ends = [place for place, token in enumerate(new) if token in eos]
    return new[: ends[0] + 1] if ends else new


@pytest.mark.parametrize(("beams", "eos"), [(4, [5, 17, 40, 61, 80, 90]), (4, [33]), (2, [17, 5])])
def test_texts_equal_transformers(models, prompts, beams, eos):
    reference, model = models
    texts = beam_search(model, model.params, None, prompts, NEW, beams, eos=eos)
    assert texts == [theirs(reference, prompt, beams, eos) for prompt in prompts]


def test_a_router_decides_for_each_row(models, prompts):
    model = dataclasses.replace(models[1])
    params, adapters = sx.attach(jax.random.key(0), model.params, [("self_attn|mlp", sx.MiLoRA(rank=2, top_k=2))])
    train, frozen = sx.split(adapters)
    rng = np.random.default_rng(0)
    train = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), train)
    tuned = sx.combine(train, frozen)
    together = beam_search(model, params, tuned, prompts[:3], NEW, 4, eos=[33])
    assert together == [beam_search(model, params, tuned, [prompt], NEW, 4, eos=[33])[0] for prompt in prompts[:3]]
    assert together != beam_search(model, params, None, prompts[:3], NEW, 4, eos=[33])


def test_one_beam_is_no_search(models):
    with pytest.raises(sx.SboraxError, match="2 beams or more, got 1"):
        beam_search(models[1], models[1].params, None, [[3]], NEW, 1)
