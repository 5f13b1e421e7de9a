"""Plans of runs with a procedure: the bytes that a run holds, and what training refuses, in the same words."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from cases import DENSE, PROCEDURES
from etils import epath
from nightly import nightly_unless
from tiny_model import WIDE, write_data, write_model

import sborax as sx
from sborax.adapters.core import SboraxError
from sborax.adapters.paths import plan
from sborax.adapters.tree import combine
from sborax.cli import main
from sborax.models import load_config
from sborax.models.language_model import LanguageModel, abstract
from sborax.plans.ahead import argument_bytes, outline
from sborax.procedures import Boundary
from sborax.train.experiment import save_experiment
from sborax.train.hints import promised
from sborax.train.loop import train
from sborax.train.prepare import prepare

ALL = "self_attn|mlp"
SMALL = dataclasses.replace(
    WIDE, hidden_size=192, intermediate_size=192, num_attention_heads=6, num_key_value_heads=6, num_hidden_layers=2
)
"""Every kernel is 192 x 192, which every row of `cases` fits, so that little is traced more than once."""


def an_experiment(rules, procedure, **changes):
    return sx.Experiment("x", sx.Data("x", max_length=8), rules, steps=7, procedure=procedure, **changes)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("precision", "quant"),
    [
        ("bfloat16", "nf4"),
        *(
            pytest.param(*pair, marks=pytest.mark.nightly)
            for pair in [("float32", None), ("float32", "nf4"), ("bfloat16", None)]
        ),
    ],
)
@pytest.mark.parametrize("name", PROCEDURES)
def test_planned_bytes_are_those_of_a_run(name, precision, quant):
    procedure, method = PROCEDURES[name]
    if quant and hasattr(procedure, "requantise"):
        procedure = dataclasses.replace(procedure, requantise=True)
    experiment = an_experiment([(ALL, method)], procedure, precision=precision, quant=quant)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract(SMALL, precision))
    try:
        planned = outline(experiment, SMALL)
    except sx.SboraxError as error:
        # A procedure may need gradients of the base, which has none in 4 bits.
        assert quant and "a quantised weight has no gradient" in str(error)
        experiment = dataclasses.replace(experiment, quant=None)
        planned = outline(experiment, SMALL)
    prepared = prepare(experiment, LanguageModel(planned.model.module, params, SMALL, None), 7)
    parts = prepared.adapt(params)
    state = prepared.start(parts)
    sizes = argument_bytes(planned)
    del sizes["batch"]
    assert sizes == {
        "base": nbytes(parts.base),
        "trained": nbytes(state.train),
        "indices, scales": nbytes(parts.frozen),
        "optimizer": nbytes((state.opt, state.step)),
    }


def refusal(act):
    """What `act` returns, and the line with which it refuses."""
    try:
        return act(), None
    except SboraxError as error:
        assert "\n" not in str(error)
        return None, str(error)


PAIRS = [(name, case, f"{name}-{case.name}") for name in PROCEDURES for case in DENSE]


@functools.cache
def plain(method):
    """The run of a method without a procedure, as shapes."""
    return outline(an_experiment([(ALL, method)], None), SMALL)


@pytest.mark.parametrize(
    "number", nightly_unless(range(0, len(PAIRS), 17), range(len(PAIRS))), ids=lambda number: PAIRS[number][2]
)
def test_a_plan_refuses_what_training_refuses_and_what_it_takes_can_be_done(number):
    name, case, _ = PAIRS[number]
    procedure = PROCEDURES[name][0]
    experiment = an_experiment([(ALL, case.method)], procedure)
    bare = plain(case.method)
    active = prepare(experiment, LanguageModel(bare.model.module, abstract(SMALL), SMALL, None), 7).procedure
    assert active is not None
    parts, problem = refusal(lambda: jax.eval_shape(active.start, bare.parts))
    planned, message = refusal(lambda: outline(experiment, SMALL))
    assert message == problem and (message is None or message.startswith(type(procedure).__name__))
    if planned is None:
        return
    assert jax.tree.structure(planned.parts) == jax.tree.structure(parts)
    state, plan_parts = planned.state, planned.parts
    paths = {site.path: jnp.zeros((*site.stack, site.shape[0])) for site in planned.plan.sites}

    def after_a_step(state, plan_parts, norms):
        """What is due after a step, without the model's part in it."""
        watch, where = (
            active.watch(),
            {"frozen": plan_parts.frozen, "base": plan_parts.base, "norms": norms, "base_grads": plan_parts.base},
        )
        _, opt = watch.update(state.train, watch.init(state.train), state.train, **where)
        boundary = Boundary(combine(state.train["adapters"], plan_parts.frozen), plan_parts.base, opt)
        return procedure.settle(procedure.apply(jax.random.key(0), 4, active.run, boundary))

    final = jax.eval_shape(after_a_step, state, plan_parts, paths)
    initial = combine(state.train["adapters"], plan_parts.frozen)
    assert jax.tree.structure(final.adapters) == jax.tree.structure(initial)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (final.adapters, final.base)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), (initial, plan_parts.base)
    )


REFUSED = {
    "a start that rewrites": (sx.COLA(every=2), [(ALL, sx.PiSSA(rank=2))], "rewrites the base at every start"),
    "some projections": (sx.LoRAPrune(), [("q_proj|v_proj", sx.LoRA(rank=2))], "all seven projections must be"),
    "one projection": (sx.LoRAPrune(), [("up_proj", sx.LoRA(rank=2))], "all seven projections must be"),
    "the head too": (sx.LoRAPrune(), [("up_proj|lm_head", sx.LoRA(rank=2))], "all seven projections must be"),
    "another method": (sx.AdaLoRABudget(), [(ALL, sx.LoRA(rank=2))], "has LoRA; use AdaLoRA for all"),
    "frozen factors": (sx.LoRAPrune(), [(ALL, sx.VeRA(rank=2))], "and VeRA makes others; use LoRA, or metric="),
    "a chain": (sx.LoRAPrune(), [(ALL, sx.chain(sx.PiSSA(rank=2), sx.DoRA()))], "and Chain makes others"),
    "a weight that is rewritten": (
        sx.LoRAPrune(metric="grad"),
        [(ALL, sx.DoRA(rank=2))],
        "DoRA does not add to the weight",
    ),
    "routed": (sx.LoRAPrune(), [(ALL, sx.MiLoRA(rank=2))], "MiLoRA does not merge layer by layer; use LoRA"),
    "one frozen factor": (sx.XGBLoRA(), [(ALL, sx.OrthogonalAdaptation(rank=2))], "trains no pair a, b; use LoRA"),
    "noise": (
        sx.XGBLoRA(),
        [(ALL, sx.MonteCLoRA(rank=1))],
        "MonteCLoRA draws noise that is added to a, which would train",
    ),
    "a full budget": (
        sx.AdaLoRABudget(target=8),
        [("mlp", sx.AdaLoRA(rank=8)), ("self_attn", sx.AdaLoRA(rank=4))],
        "target=8 would prune nothing, since the weights begin with a rank of 5.71429 on average",
    ),
    "layers of its own": (
        sx.XGBLoRA(),
        [sx.Rule(ALL, sx.LoRA(rank=1), layers=(0,))],
        "draws the layers itself; leave layers= out",
    ),
    "never due": (sx.PRILoRAPruning(every=9), [(ALL, sx.PRILoRA(rank=2))], "every=9 would prune nothing in a run of 7"),
    **{
        f"some layers, {type(procedure).__name__}": (
            procedure,
            [sx.Rule(ALL, method, layers=(0,))],
            "rules with layers= leave some of its layers out",
        )
        for procedure, method in (
            (sx.LoRAPrune(), sx.LoRA(rank=2)),
            (sx.AdaLoRABudget(target=2), sx.AdaLoRA(rank=4)),
        )
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_plan_refuses(name):
    procedure, rules, problem = REFUSED[name]
    config = dataclasses.replace(SMALL, tie_word_embeddings=False)
    message = refusal(lambda: outline(an_experiment(rules, procedure), config))[1]
    assert message is not None and message.startswith(type(procedure).__name__) and problem in message


def test_a_budget_counts_the_ranks_that_are_in_use():
    """Padding is none: 2 and 4 are 3 on average."""
    rules = [(ALL, sx.AdaLoRA(rank=sx.LinearRanks(2, 4)))]
    assert refusal(lambda: outline(an_experiment(rules, sx.AdaLoRABudget(target=2)), SMALL))[1] is None
    assert (
        "a rank of 3 on average" in refusal(lambda: outline(an_experiment(rules, sx.AdaLoRABudget(target=3)), SMALL))[1]
    )


def test_a_run_in_epochs_is_planned_without_its_data():
    procedure = sx.AdaLoRABudget(target=2, warmup=100, cooldown=100)
    epochs = dataclasses.replace(an_experiment([(ALL, sx.AdaLoRA(rank=4))], procedure), steps=None, epochs=1)
    assert outline(epochs, SMALL).parts.count == 2 * 7 * 4 * (192 + 192 + 1)


@pytest.mark.parametrize("name", ["a start that rewrites", "some projections", "frozen factors"])
def test_plan_and_train_refuse_with_the_same_line(name, tmp_path, capsys):
    procedure, rules, problem = REFUSED[name]
    data = sx.Data(
        str(write_data(tmp_path / "data.jsonl")), template="{instruction}", answer=" {output}", max_length=32
    )
    experiment = dataclasses.replace(
        an_experiment(rules, procedure), model=str(write_model(tmp_path / "model")), data=data
    )
    with pytest.raises(SboraxError, match=problem) as caught:
        train(experiment, tmp_path / "run", echo=lambda _: None)
    save_experiment(experiment, epath.Path(tmp_path))
    assert main(["plan", str(tmp_path / "config.json")]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert plan(abstract(load_config(experiment.model)), rules, hints=promised({})).sites
