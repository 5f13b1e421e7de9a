"""Experts with a capacity: what is dropped, what is sent, and results where nothing is dropped."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import assert_close, largest
from cases import IN, METHODS
from nightly import nightly_unless
from test_expert_axis import CHOSEN, COUNT, SPARSE, TOKENS, a_mixture, by_expert, compiled_layers, context, routed
from test_expert_axis import with_gradients as gradients_of
from test_fit import SPARSE as MODELS
from test_fit import run as pod_run
from tiny_model import WIDE, write_data, write_model

import sborax as sx
from sborax.layout.mesh import abstract_mesh, make_mesh
from sborax.models.config import Experts, LlamaConfig
from sborax.models.decoder import expert_rows
from sborax.models.language_model import decoder_of
from sborax.models.mixture import Mixture, assigned, capacity_rows, mixed
from sborax.plans.ahead import on_mesh, outline
from sborax.plans.estimate import temporary_bytes
from sborax.plans.fit import link_bytes
from sborax.plans.hlo import collective_bytes
from sborax.train.loop import train

AMPLE, SMALL = 4.0, 0.5


def limited(capacity, squares=False):
    """`mixed` with a capacity, as a function of a mixture's arguments."""

    def form(x, weights, numbers, projections):
        return mixed(x, weights, numbers, context(x, projections), projections, Mixture(jax.nn.silu, squares, capacity))

    return form


def outputs(capacity):
    return lambda *arguments: limited(capacity)(*arguments)[0]


def kept_choices(numbers, room, counted=None):
    """Which choices experts take, one after the other."""
    load, mask = np.zeros(COUNT, int), np.zeros(numbers.shape, bool)
    for token, choice in np.ndindex(*numbers.shape):
        expert = numbers[token, choice]
        if counted is None or counted[token]:
            mask[token, choice] = load[expert] < room
            load[expert] += 1
    return mask


# What is dropped


@pytest.mark.parametrize("room", [1, 3, TOKENS])
def test_choices_beyond_the_room_of_an_expert_are_dropped(room):
    numbers = np.asarray(routed()[2])
    counted = np.arange(TOKENS) % 5 != 1
    for mask in (None, counted):
        mask_array = None if mask is None else jnp.asarray(mask)
        place, choice = map(np.asarray, assigned(jnp.asarray(numbers), COUNT, room, mask_array))
        survivors = kept_choices(numbers, room, mask).reshape(-1)
        np.testing.assert_array_equal(place < COUNT * room, survivors)
        np.testing.assert_array_equal(place[survivors] // room, numbers.reshape(-1)[survivors])
        # Each of the two is the other's inverse.
        np.testing.assert_array_equal(choice[place[survivors]], np.flatnonzero(survivors))
        assert (choice < numbers.size).sum() == survivors.sum()


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [(None, 16), ({"expert": 8}, 16), ({"expert": 2, "fsdp": 2}, 16), ({"expert": 4}, 3)],
    ids=str,
)
def test_the_sum_is_over_the_choices_that_are_kept(sizes, tokens, strict):
    """Each device drops by its own tokens, which are consecutive; devices that do not divide them have the same."""
    arguments, projections = [leaf[:tokens] for leaf in routed()], a_mixture()
    devices = math.gcd(math.prod((sizes or {}).values()), tokens)
    parts = np.asarray(arguments[2]).reshape(devices, -1, CHOSEN)
    survivors = np.concatenate([kept_choices(part, capacity_rows(SMALL, len(part), CHOSEN, COUNT)) for part in parts])

    def summed(x, weights, numbers, projections):
        return by_expert(x, jnp.where(survivors, weights, 0), numbers, projections)

    expected = gradients_of(summed, projections, tokens)
    with jax.set_mesh(make_mesh(sizes or {"data": 1})):
        got = gradients_of(outputs(SMALL), projections, tokens)
        dropped = jax.jit(limited(SMALL))(*arguments, projections)[2]
    assert int(dropped) == (~survivors).sum() > 0
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(mine, theirs, 1e-5)


# Where nothing is dropped

QUICK = ["LoRA nf4", "Bat"]
CASES = {
    f"{case.name}{' nf4' * quantised}": (case.method, quantised)
    for case in METHODS
    if not (case.method.linked or case.method.token_mean)
    for quantised in (False, True)
}


@pytest.mark.parametrize("name", nightly_unless(QUICK, CASES))
def test_an_ample_capacity_changes_nothing(name, strict):
    method, quantised = CASES[name]
    projections = a_mixture(method, quantised)
    expected = gradients_of(by_expert, projections)
    for sizes in (None, {"expert": 8}):
        with jax.set_mesh(make_mesh(sizes or {"data": 1})):
            got = gradients_of(outputs(AMPLE), projections)
        compared = got, expected
        if method.batch_gradient:
            # The loop hands every expert all tokens.
            compared = ((y, grads[:2]) for y, grads in compared)
        for mine, theirs in zip(*map(jax.tree.leaves, compared), strict=True):
            # Without a key, leaves of draws alone have no gradient.
            assert largest(theirs) > 0 or method.draws
            assert_close(mine, theirs, 1e-5)


def test_squares_of_inputs_are_over_the_rows_that_are_kept(strict):
    x, weights, numbers = routed()
    projections = a_mixture()
    _, expected, _ = mixed(x, weights, numbers, sx.Context(), projections, Mixture(jax.nn.silu, True))
    with jax.set_mesh(make_mesh({"expert": 8})):
        _, squares, dropped = jax.jit(limited(AMPLE, True))(x, weights, numbers, projections)
    assert dropped == 0
    for name, sums in expected.items():
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


def an_experiment(folder, **changes):
    place = write_model(
        folder / "model",
        model_type="qwen2_moe",
        experts=Experts(count=6, chosen=2, intermediate_size=64, shared_size=64),
        hidden_size=64,
        head_dim=16,
        num_hidden_layers=1,
    )
    data = sx.Data(str(write_data(folder / "data.jsonl")), max_length=128, template="{instruction}\n")
    rules = [("experts", sx.LoRA(rank=2))]
    return sx.Experiment(str(place), data, rules, **{"steps": 2, "accumulate": 2, "batch_size": 4} | changes)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_says_what_it_dropped(tmp_path):
    experiment = an_experiment(tmp_path)
    for capacity, dropping in ((3, False), (0.25, True)):
        run, lines = tmp_path / str(capacity), []
        train(dataclasses.replace(experiment, expert_capacity=capacity), run, echo=lines.append)
        shares = [line["dropped"] for line in lines_of(run)]
        assert any(line.startswith("experts dropped") for line in lines) == dropping
        assert all(0.2 < share < 1 for share in shares) if dropping else shares == [0, 0]


@pytest.mark.nightly
def test_a_run_on_a_mesh_with_an_ample_capacity_is_one_without(tmp_path):
    experiment = an_experiment(tmp_path, steps=4)
    train(experiment, tmp_path / "alone")
    cut = dataclasses.replace(experiment, expert_capacity=3, mesh={"expert": 2, "fsdp": 2, "tensor": 2})
    train(cut, tmp_path / "mesh")
    expected, got = lines_of(tmp_path / "alone"), lines_of(tmp_path / "mesh")
    assert not any("dropped" in line for line in expected) and [line["dropped"] for line in got] == [0] * 4
    np.testing.assert_allclose([line["loss"] for line in got], [line["loss"] for line in expected], rtol=1e-5)


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


# Plans


def test_the_room_of_a_device():
    assert [expert_rows(SPARSE, shares) for shares in (1, 4, 8)] == [2, 8, 8]
    assert [expert_rows(SPARSE, shares, 1.25) for shares in (1, 4, 8)] == [2.5, 2.5, 2.5]
    assert expert_rows(SPARSE, 8, 100.0) == COUNT


def laid_out(config, capacity, sizes):
    devices = math.prod(sizes.values())
    experiment = dataclasses.replace(pod_run(devices, remat="full"), expert_capacity=capacity)
    return on_mesh(outline(experiment, config, device="tpu"), abstract_mesh(sizes))


def test_a_plan_counts_the_room_and_what_is_sent():
    none, ample, small = (laid_out(SPARSE, capacity, {"fsdp": 1, "expert": 8}) for capacity in (None, AMPLE, 1.0))
    # Eight devices and two experts a token: with a capacity of 4 as many rows are sent as are gathered without.
    assert link_bytes(none) == link_bytes(ample) > link_bytes(small)
    assert temporary_bytes(small) < temporary_bytes(none) <= temporary_bytes(ample)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model", "capacity", "temporaries", "received"),
    [
        ("Qwen3-30B-A3B", None, 3.5, 46),
        ("Qwen3-30B-A3B", 1.25, 1.7, 51),
        ("Mixtral-8x7B", None, 3.6, 54),
        ("Mixtral-8x7B", 1.25, 2.2, 38),
    ],
)
def test_the_plans_of_the_documentation(model, capacity, temporaries, received):
    laid = laid_out(LlamaConfig.from_hf(MODELS[model]), capacity, {"fsdp": 32, "expert": 8})
    assert (round(temporary_bytes(laid) / 2**30, 1), round(link_bytes(laid) / 1e9)) == (temporaries, received)
