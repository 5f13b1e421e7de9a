"""Experts with a capacity: what is dropped, what is sent, and results where nothing is dropped."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import assert_close, largest, normal
from cases import IN, METHODS
from nightly import nightly_unless
from test_expert_axis import CHOSEN, COUNT, SPARSE, TOKENS, a_mixture, by_expert, compiled_layers, routed
from test_expert_axis import with_gradients as gradients_of
from tiny_model import WIDE, write_data, write_model

import sborax as sx
from sborax.layout.mesh import make_mesh
from sborax.models.config import Experts
from sborax.models.decoder import expert_rows
from sborax.models.language_model import decoder_of
from sborax.models.mixture import Mixture, assigned, capacity_rows, mixed
from sborax.plans.hlo import collective_bytes
from sborax.train.loop import train

AMPLE, SMALL = 4.0, 0.5


def limited(capacity, squares=False):
    """`mixed` with a capacity, as a function of a mixture's arguments."""

    def form(x, weights, numbers, projections):
        return mixed(x, weights, numbers, sx.Context(), projections, Mixture(jax.nn.silu, squares, capacity))

    return form


def outputs(capacity):
    return lambda *arguments: limited(capacity)(*arguments)[0]


def kept_choices(numbers, room, counted=None):
    """Which choices experts take, one after the other."""
    taken, kept = np.zeros(COUNT, int), np.zeros(numbers.shape, bool)
    for token, choice in np.ndindex(*numbers.shape):
        expert = numbers[token, choice]
        if counted is None or counted[token]:
            kept[token, choice] = taken[expert] < room
            taken[expert] += 1
    return kept


# What is dropped


@pytest.mark.parametrize("room", [1, 3, TOKENS])
def test_choices_beyond_the_room_of_an_expert_are_dropped(room):
    numbers = np.asarray(routed()[2])
    counted = np.arange(TOKENS) % 5 != 1
    for mask in (None, counted):
        mask_array = None if mask is None else jnp.asarray(mask)
        place, choice = map(np.asarray, assigned(jnp.asarray(numbers), COUNT, room, mask_array))
        kept = kept_choices(numbers, room, mask).reshape(-1)
        np.testing.assert_array_equal(place < COUNT * room, kept)
        np.testing.assert_array_equal(place[kept] // room, numbers.reshape(-1)[kept])
        # Each of the two is the other's inverse.
        np.testing.assert_array_equal(choice[place[kept]], np.flatnonzero(kept))
        assert (choice < numbers.size).sum() == kept.sum()


@pytest.mark.parametrize("sizes", [None, {"expert": 8}, {"expert": 2, "fsdp": 2}, {"data": 2}], ids=str)
def test_the_sum_is_over_the_choices_that_are_kept(sizes, strict):
    """Each device drops by its own tokens, which are consecutive."""
    x, weights, numbers = routed()
    projections = a_mixture(sx.LoRA(rank=4))
    devices = math.prod((sizes or {}).values())
    here = TOKENS // devices
    room = capacity_rows(SMALL, here, CHOSEN, COUNT)
    kept = np.concatenate([kept_choices(part, room) for part in np.asarray(numbers).reshape(devices, here, CHOSEN)])
    assert not kept.all()
    wanted = by_expert(x, jnp.where(kept, weights, 0), numbers, projections)
    with jax.set_mesh(make_mesh(sizes or {"data": 1})):
        y, _, dropped = jax.jit(limited(SMALL))(x, weights, numbers, projections)
    assert_close(y, wanted, 1e-5)
    assert int(dropped) == (~kept).sum()


def test_devices_with_the_same_tokens_drop_as_one_device():
    """As when tokens are too few to be cut."""
    x, weights, numbers = (leaf[:3] for leaf in routed())
    projections = a_mixture(sx.LoRA(rank=4))
    kept = kept_choices(np.asarray(numbers), 1)
    with jax.set_mesh(make_mesh({"expert": 4})):
        y, _, dropped = jax.jit(limited(SMALL))(x, weights, numbers, projections)
    assert_close(y, by_expert(x, jnp.where(kept, weights, 0), numbers, projections), 1e-5)
    assert int(dropped) == (~kept).sum()


# Where nothing is dropped

QUICK = ["LoRA nf4", "Bat"]
CASES = {
    f"{case.name}{' nf4' * quantised}": (case.method, quantised)
    for case in METHODS
    if not case.method.linked
    for quantised in (False, True)
}


@pytest.mark.parametrize("name", nightly_unless(QUICK, CASES))
def test_an_ample_capacity_changes_nothing(name, strict):
    method, quantised = CASES[name]
    projections = a_mixture(method, quantised)
    wanted = gradients_of(by_expert, projections)
    for sizes in (None, {"expert": 8}):
        with jax.set_mesh(make_mesh(sizes or {"data": 1})):
            got = gradients_of(outputs(AMPLE), projections)
        for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert largest(theirs) > 0
            assert_close(mine, theirs, 1e-5)


def test_squares_of_inputs_are_over_the_rows_that_are_kept(strict):
    x, weights, numbers = routed()
    projections = a_mixture()
    _, wanted, _ = mixed(x, weights, numbers, sx.Context(), projections, Mixture(jax.nn.silu, True))
    with jax.set_mesh(make_mesh({"expert": 8})):
        _, squares, dropped = jax.jit(limited(AMPLE, True))(x, weights, numbers, projections)
    assert dropped == 0
    for name, sums in wanted.items():
        assert_close(squares[name], sums, 1e-5)


# What is sent


def test_rows_are_sent_and_come_back_by_all_to_all():
    """Rows and outputs, and their slopes, each once a layer, and tokens are not gathered."""
    tokens, layers, sizes = 256, 3, {"data": 2, "expert": 4}
    program, _ = compiled_layers(sizes, False, tokens=tokens, form=outputs(1.25))
    sent = collective_bytes(program.as_text())
    places = COUNT * capacity_rows(1.25, tokens // 8, CHOSEN, COUNT)
    assert sent["all-to-all"] == layers * 4 * places * IN * 4
    assert sent.keys() <= {"all-to-all", "all-reduce"}


# Runs


def test_a_run_says_what_it_dropped(tmp_path):
    place = write_model(
        tmp_path / "model",
        model_type="qwen2_moe",
        experts=Experts(count=6, chosen=2, intermediate_size=64, shared_size=64),
        hidden_size=64,
        head_dim=16,
        num_hidden_layers=1,
    )
    data = sx.Data(str(write_data(tmp_path / "data.jsonl")), max_length=128, template="{instruction}\n")
    experiment = sx.Experiment(str(place), data, [("experts", sx.LoRA(rank=2))], steps=2, batch_size=2, accumulate=2)
    shares, losses = {}, {}
    for capacity in (None, 3, 0.25):
        run, lines = tmp_path / str(capacity), []
        train(dataclasses.replace(experiment, expert_capacity=capacity), run, echo=lines.append)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        shares[capacity] = [line.get("dropped") for line in steps]
        losses[capacity] = [line["loss"] for line in steps]
        assert any("experts dropped" in line for line in lines) == (capacity == 0.25)
    assert shares[None] == [None, None] and shares[3] == [0, 0]
    np.testing.assert_allclose(losses[3], losses[None], rtol=1e-5)
    # At most a quarter of the choices at balanced load of all tokens, padding included, are kept.
    assert all(0.2 < share < 1 for share in shares[0.25])
    assert losses[0.25] != losses[None]


def test_padding_takes_no_place_and_counts_for_nothing():
    """A row is padding but for its last token, which comes first of all that count and is not dropped."""
    model = sx.models.LanguageModel(decoder_of(SPARSE, expert_capacity=0.5), {}, SPARSE, None)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), model.abstract())
    tokens = jnp.asarray(rng.integers(0, SPARSE.vocab_size, (2, 16)), jnp.int32)
    segments = jnp.ones((2, 16), jnp.int32).at[0, :15].set(0)
    hidden, collected = model.collect(params, None, tokens, ["load"], segment_ids=segments)
    full, _ = model.dropless().collect(params, None, tokens, ["load"], segment_ids=segments)
    # 17 tokens count, and an expert takes 4 of their choices.
    assert collected.load.tokens == 17
    over = np.maximum(np.asarray(collected.load.chosen) - 4, 0).sum()
    assert over > 0 and collected.load.dropped == over
    chex.assert_trees_all_close(model.hidden(params, None, tokens, segment_ids=segments), hidden)
    assert_close(hidden[0, 15:], full[0, 15:], 1e-5)


def test_a_capacity_that_is_refused():
    with pytest.raises(sx.SboraxError, match="^expert_capacity: llama has no experts; leave it at None$"):
        decoder_of(WIDE, expert_capacity=1.25)
    with pytest.raises(sx.SboraxError, match="^expert_capacity must be positive, got 0$"):
        sx.Experiment("model", sx.Data("data.jsonl"), [("q_proj", sx.LoRA())], steps=1, expert_capacity=0)


def test_the_room_of_a_device():
    assert [expert_rows(SPARSE, shares) for shares in (1, 4, 8)] == [2, 8, 8]
    assert [expert_rows(SPARSE, shares, 1.25) for shares in (1, 4, 8)] == [2.5, 2.5, 2.5]
    assert expert_rows(SPARSE, 8, 100.0) == COUNT
