"""One dataclass for each optimiser: the steps it makes, its config, and runs with it; `Optimizer` picks one by name."""

import dataclasses
import json
import shutil
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import WIDE, write_data, write_model

import sborax as sx
from sborax.config.codec import decode, encode, override
from sborax.plans.ahead import argument_bytes, outline
from sborax.sweep.run import sweep
from sborax.train.loop import train
from sborax.train.optimizer import make_optimizer, schedule
from sborax.train.optimizers import OPTIMIZERS, decayed

BETAS = (0.8, 0.95)
RATE = {"lr": 1e-2, "schedule": "cosine", "warmup": 2, "final": 0.1, "b_ratio": 4.0}
CASES = {
    "adamw": (
        {"betas": BETAS, "eps": 1e-5, "decay": 0.1},
        sx.AdamW(**RATE, betas=BETAS, eps=1e-5, decay=0.1),
        lambda lr: optax.adamw(lr, 0.8, 0.95, 1e-5, weight_decay=0.1, mask=decayed),
    ),
    "adam": (
        {"betas": BETAS},
        sx.Adam(**RATE, betas=BETAS),
        lambda lr: optax.adam(lr, 0.8, 0.95, 1e-8),
    ),
    "sgd": ({"betas": BETAS}, sx.SGD(**RATE, momentum=0.8), lambda lr: optax.sgd(lr, momentum=0.8)),
    "lion": (
        {"betas": BETAS, "decay": 0.1},
        sx.Lion(**RATE, betas=BETAS, decay=0.1),
        lambda lr: optax.lion(lr, 0.8, 0.95, weight_decay=0.1, mask=decayed),
    ),
    "adafactor": ({}, sx.Adafactor(**RATE), optax.adafactor),
    "lora_rite": (
        {"betas": BETAS, "decay": 0.1},
        sx.LoRARITE(**RATE, betas=BETAS, decay=0.1),
        lambda lr: sx.lora_rite(lr, 0.8, 0.95, 1e-6, 0.1, 1.0, mask=decayed),
    ),
    "lora_fa": (
        {"betas": BETAS, "decay": 0.1},
        sx.LoRAFA(**RATE, betas=BETAS, decay=0.1),
        lambda lr: sx.lora_fa(lr, 0.8, 0.95, 1e-6, 0.1),
    ),
}
"""By name: its fields of `Optimizer`, the same as a dataclass, and the optax transformation."""

by_name = pytest.mark.parametrize("name", CASES)


def quiet(_):
    """Says nothing."""


@pytest.mark.parametrize("b_ratio", [1.0, 4.0])
def test_balanced_factors_have_the_product_of_those_that_are_not(b_ratio):
    """Balancing comes after everything that scales a step, also after LoRA+'s ratio."""
    key = jax.random.key(0)
    adapters = sx.attach(key, {"p": {"kernel": jax.random.normal(key, (6, 5))}}, [("p", sx.LoRA(rank=2))])[1]
    # From b = 0 both norms would be those of rounding.
    train = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), sx.split(adapters)[0])
    products = []
    for balance in (False, True):
        rule = sx.LoRARITE(lr=1e-2, schedule="constant", warmup=0, b_ratio=b_ratio, balance=balance)
        tx, trained = make_optimizer(rule, 4), train
        state = tx.init(trained)
        for step in range(4):
            grads = jax.tree.map(
                lambda leaf, step=step: jnp.cos(jnp.arange(leaf.size) + step).reshape(leaf.shape), train
            )
            updates, state = tx.update(grads, state, trained)
            trained = optax.apply_updates(trained, updates)
        factors = trained["p"]["kernel"].train
        norms = [jnp.linalg.norm(factors[name]) for name in "ab"]
        assert (abs(norms[0] / norms[1] - 1) < 1e-3) == balance
        products.append(factors["a"] @ factors["b"])
    # Without LoRA+'s ratio, LoRA-RITE's steps depend on a and b through their product alone.
    np.testing.assert_allclose(*products, rtol=0.01, atol=0.005 if b_ratio == 1.0 else 0.05)


@by_name
def test_a_name_picks_the_dataclass(name):
    fields, rule, _ = CASES[name]
    front = sx.Optimizer(name=name, **RATE, **fields)
    assert front.rule == rule and type(rule) is OPTIMIZERS[name]
    assert front.halves() is rule.halves()
    assert front.without_rate() == rule.without_rate() == dataclasses.replace(rule, lr=0.5).without_rate()
    assert front.label() == f"{name} at 0.01 (cosine)" and rule.label() == f"{type(rule).__name__} at 0.01 (cosine)"
    steps = np.arange(10, dtype=np.int32)
    np.testing.assert_array_equal(schedule(front, 10)(steps), schedule(rule, 10)(steps))


def test_every_name_has_a_dataclass():
    assert typing.get_args(typing.get_type_hints(sx.Optimizer)["name"]) == tuple(OPTIMIZERS) == tuple(CASES)


@by_name
def test_steps_are_those_of_optax(name):
    """Bit for bit: of the dataclass, of `Optimizer`, and of the chain written out."""
    fields, rule, transformation = CASES[name]
    params = {"layers": {"p": {"kernel": jnp.ones((2, 6, 5))}}}
    _, adapters = sx.attach(jax.random.key(0), params, [("p", sx.LoRA(rank=3, alpha=6.0))])
    trained, frozen = rule.halves()(adapters)
    start = {"adapters": jax.tree.map(lambda leaf: leaf + 0.3, trained), "base": {"norm/scale": jnp.ones(3)}}
    clip = [] if name == "lora_rite" else [optax.clip_by_global_norm(1.0)]
    chain = optax.chain(*clip, transformation(rule.rate(10)), sx.lora_plus(4.0))

    def descend(tx):
        train, state = start, tx.init(start)
        update = jax.jit(tx.update)
        for _ in range(4):
            grads = jax.tree.map(lambda leaf: jnp.sin(7.0 * leaf), train)
            updates, state = update(grads, state, train, frozen=frozen)
            train = optax.apply_updates(train, updates)
        return train, state

    expected = descend(optax.with_extra_args_support(chain))
    for optimizer in (rule, sx.Optimizer(name=name, **RATE, **fields)):
        chex.assert_trees_all_equal(descend(optax.with_extra_args_support(make_optimizer(optimizer, 10))), expected)
    assert not np.array_equal(expected[0]["adapters"]["layers"]["p"]["kernel"].train["b"],
                              start["adapters"]["layers"]["p"]["kernel"].train["b"])  # fmt: skip


def test_a_field_that_an_optimiser_does_not_have_is_a_type_error():
    for make in (
        lambda: sx.SGD(eps=1e-6),
        lambda: sx.Adam(decay=0.1),
        lambda: sx.Adafactor(betas=BETAS),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sx.Optimizer(name="adam", decay=0.1), "adam takes no decay here; use adamw or lion, or set decay=0"),
        (lambda: sx.Optimizer(name="sgd", eps=1e-6), "sgd takes no eps; set eps to None"),
        (lambda: sx.AdamW(lr=-1.0), "lr must be at least 0"),
        (lambda: sx.AdamW(eps=0.0), "eps must be above 0"),
        (lambda: sx.AdamW(decay=-0.1), "decay must be at least 0"),
        (lambda: sx.Lion(betas=(0.9, 1.0)), r"betas must lie in \[0, 1\), got \[0.9, 1.0\]"),
        (lambda: sx.SGD(momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda: sx.LoRARITE(skip=0.0), "skip must be above 0"),
        (lambda: sx.LoRAFA(b_ratio=0.5), "b_ratio must be at least 1"),
    ],
)
def test_values_out_of_range_are_one_line(make, words):
    with pytest.raises(sx.SboraxError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def an_experiment(places=("some/model", "some-data"), **changes):
    data = sx.Data(places[1], template="{instruction}", answer=" {output}", max_length=32, buckets=(32,))
    settings = {"rules": [("self_attn", sx.LoRA(rank=2))], "steps": 4, "batch_size": 2, "save": sx.Save(every=2)}
    return sx.Experiment(places[0], data, **(settings | changes))


@by_name
def test_configs_come_back_and_can_be_changed(name):
    _, rule, _ = CASES[name]
    experiment = an_experiment(optimizer=rule)
    raw = json.loads(json.dumps(encode(experiment)))
    assert raw["optimizer"]["type"] == type(rule).__name__
    assert decode(sx.Experiment, raw) == experiment
    changed = override(experiment, ["optimizer.lr=1e-4", "optimizer.schedule=constant", "optimizer.b_ratio=2"])
    assert changed.optimizer == dataclasses.replace(rule, lr=1e-4, schedule="constant", b_ratio=2.0)
    with pytest.raises(sx.SboraxError, match="optimizer.name: unknown key"):
        override(experiment, ["optimizer.name=adamw"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("optimizer=lion", sx.Lion()),
        ("optimizer=LoRARITE", sx.LoRARITE()),
        ('optimizer={"type": "SGD", "momentum": 0.5}', sx.SGD(momentum=0.5)),
        ('optimizer={"lr": 1e-2}', sx.Optimizer(lr=1e-2)),
        ("optimizer.name=lora_rite", sx.Optimizer(name="lora_rite")),
    ],
)
def test_an_optimiser_is_chosen_on_the_command_line(change, expected):
    """An object without a type is an `Optimizer`, as in files of before."""
    assert override(an_experiment(), [change]).optimizer == expected


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    return str(write_model(place / "model")), str(write_data(place / "data.jsonl"))


@pytest.mark.nightly
def test_a_run_is_that_of_the_name_and_is_resumed(places, tmp_path):
    experiment = an_experiment(places, optimizer=sx.AdamW(lr=1e-2, decay=0.01))
    for name, optimizer in (("ours", experiment.optimizer), ("named", sx.Optimizer(lr=1e-2, decay=0.01))):
        train(dataclasses.replace(experiment, optimizer=optimizer), tmp_path / name, echo=quiet)
    ours, named = ((tmp_path / name / "adapter" / "adapter.safetensors").read_bytes() for name in ("ours", "named"))
    assert ours == named
    copy = sx.load_experiment(str(tmp_path / "ours"))
    assert copy.optimizer == experiment.optimizer
    shutil.rmtree(tmp_path / "ours" / "adapter")
    shutil.rmtree(tmp_path / "ours" / "checkpoints" / "4")
    assert train(copy, tmp_path / "ours", resume=True, echo=quiet).finished
    assert (tmp_path / "ours" / "adapter" / "adapter.safetensors").read_bytes() == ours
    variant = dataclasses.replace(copy, optimizer=sx.Adam(lr=1e-2))
    with pytest.raises(sx.SboraxError, match="optimizer differs from the run to resume"):
        train(variant, tmp_path / "ours", resume=True, echo=quiet)


@pytest.mark.nightly
def test_members_of_a_sweep_are_those_of_the_name(places, tmp_path):
    grid = {"optimizer.lr": (1e-2, 3e-2), "optimizer.b_ratio": (1.0, 4.0)}
    for name, optimizer in (("ours", sx.AdamW(decay=0.01)), ("named", sx.Optimizer(decay=0.01))):
        sweep(sx.Sweep(an_experiment(places, optimizer=optimizer), grid), tmp_path / name, echo=quiet)
    members = sorted(file.relative_to(tmp_path / "ours") for file in (tmp_path / "ours").rglob("adapter.safetensors"))
    assert len(members) == 4
    for member in members:
        assert (tmp_path / "ours" / member).read_bytes() == (tmp_path / "named" / member).read_bytes()


def test_a_plan_counts_the_state_of_the_optimiser():
    ours, named, bare = (
        argument_bytes(outline(an_experiment(optimizer=optimizer), WIDE))
        for optimizer in (sx.AdamW(), sx.Optimizer(), sx.SGD(momentum=0.0))
    )
    assert ours == named and ours["optimizer"] > 2 * ours["trained"] > bare["optimizer"]
