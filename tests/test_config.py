"""Configs to JSON and back, and dotted changes."""

import dataclasses
import json
import math
import typing

import pytest
from cases import PROCEDURES

import sborax as sx
from sborax.adapters.combination import Combination
from sborax.config.codec import decode, encode, override
from sborax.train.optimizers import OPTIMIZERS

EXPERIMENT = sx.Experiment(
    model="some/model",
    data=sx.Data("some-data", max_length=64, buckets=(32, 64)),
    rules=(
        ("q_proj", sx.LoRA(rank=4, alpha=8.0, rslora=True)),
        sx.Rule("k_proj", sx.chain(sx.PiSSA(rank=4), sx.DoRA()), layers=slice(1, None)),
        sx.Rule("v_proj", sx.add(sx.LoRA(rank=(1, 2)), sx.scale(sx.SBoRA(rank=3, variant="FB"), 0.5)), layers=(0, 2)),
        sx.Rule("o_proj", None),
    ),
    optimizer=sx.Optimizer(lr=1e-4, betas=(0.9, 0.95), clip=None),
    epochs=1.5,
    train_also=("norm", "embed_tokens"),
    eval=sx.Eval(data=sx.Data("held-out"), every=10),
)


def test_round_trip_through_json_is_exact():
    assert decode(sx.Experiment, json.loads(json.dumps(encode(EXPERIMENT)))) == EXPERIMENT


def test_every_method_round_trips():
    for kind in (sx.LoRA, sx.SBoRA, sx.Bone, sx.Bat, sx.DoRA, sx.PiSSA, sx.OLoRA):
        rule = sx.Rule("x", kind())
        assert decode(sx.Rule, json.loads(json.dumps(encode(rule)))) == rule


@pytest.mark.parametrize(
    "change, read",
    [
        ("optimizer.lr=1e-5", lambda e: e.optimizer.lr == 1e-5),
        ("optimizer.lr=1", lambda e: e.optimizer.lr == 1.0 and type(e.optimizer.lr) is float),
        ("optimizer.clip=0.5", lambda e: e.optimizer.clip == 0.5),
        ("rules.0.method.rank=8", lambda e: e.rules[0].method.rank == 8 and e.rules[0].method.alpha == 8.0),
        ("rules=[['mlp', {'type': 'LoRA'}]]", lambda e: e.rules == (sx.Rule("mlp", sx.LoRA()),)),
        ("rules.0.method=lora", lambda e: e.rules[0].method == sx.LoRA()),
        ("rules.0.method=DoRA", lambda e: e.rules[0].method == sx.DoRA()),
        ('rules.0.method={"type": "SBoRA", "rank": 2}', lambda e: e.rules[0].method == sx.SBoRA(rank=2)),
        ("rules.1.method.first.rank=2", lambda e: e.rules[1].method.first.rank == 2),
        ("rules.2.layers=[1, 2]", lambda e: e.rules[2].layers == (1, 2)),
        ("rules.2.layers=(1,)", lambda e: e.rules[2].layers == (1,)),
        ('rules.2.layers={"slice": [0, 4, 2]}', lambda e: e.rules[2].layers == slice(0, 4, 2)),
        ("rules.2.layers=null", lambda e: e.rules[2].layers is None),
        ("data.name=2024", lambda e: e.data.name == "2024"),
        ("model=a/b-c.gguf", lambda e: e.model == "a/b-c.gguf"),
        ("data.loss_on=all", lambda e: e.data.loss_on == "all"),
        ("data.packing=true", lambda e: e.data.packing is True),
        ("data.packing=False", lambda e: e.data.packing is False),
        ("train_also=['norm']", lambda e: e.train_also == ("norm",)),
        ("quant=nf4", lambda e: e.quant == "nf4"),
        ("eval.data=None", lambda e: e.eval.data is None),
    ],
)
def test_changes(change, read):
    assert read(override(EXPERIMENT, [change]))


def test_changes_are_checked_together():
    changed = override(EXPERIMENT, ["steps=20", "epochs=None"])
    assert (changed.steps, changed.epochs) == (20, None)
    with pytest.raises(sx.SboraxError, match="give steps or epochs"):
        override(EXPERIMENT, ["steps=20"])


@pytest.mark.parametrize(
    "change, words",
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key; known: .*lr"),
        ("optimzer.lr=1", "optimzer: unknown key; did you mean optimizer"),
        ("data.max_len=1", "data.max_len: unknown key; did you mean max_length"),
        ("rules.0.method.rnk=1", "rules.0.method.rnk: unknown key; did you mean rank"),
        ("rules.9.method.rank=1", "rules.9: rules has 4 entries"),
        ("rules.0.method.rank=1.5", "rules.0.method.rank: must be a whole number"),
        ("rules.0.method=LoRAX", "rules.0.method: there is no 'LoRAX'; did you mean LoRA"),
        ("rules.0.pattern=(", "rules.0: rule .* is not a regular expression"),
        ("batch_size=two", "batch_size: must be a whole number"),
        ("batch_size=True", "batch_size: must be a whole number"),
        ("batch_size=0", "batch_size must be at least 1"),
        ("train_tokens=7", r"train_tokens: must be a list such as \[8\] or an object, got 7"),
        ("train_tokens=[1.5]", "train_tokens.0: must be a whole number"),
        ("train_tokens={'lm_head': 3}", "train_tokens.lm_head: must be a list"),
        ("train_tokens={'head': [3]}", "train_tokens: there are vectors of embed_tokens and lm_head, not of 'head'"),
        ("data.packing=1", "data.packing: must be true or false"),
        ("data.loss_on=questions", "data.loss_on: must be one of 'answer', 'all'"),
        ("optimizer.betas=[0.9]", "optimizer.betas: needs 2 entries, got 1"),
        ("eval.data.name.x=1", "eval.data.name"),
        ("steps", "write key=value"),
        ("mesh={'data': 1.5}", "mesh.data: must be a whole number"),
        ("mesh={'model': 2}", "mesh: no axis 'model'; there are data, fsdp, expert, tensor"),
        ("mesh={'data': 0}", "mesh: data must be at least 1"),
        ("rules.0.method=lorax", "there is no 'lorax'; did you mean .*LoRA"),
        (
            "rules.0.method={'type': 'Activated', 'part': 'DoRA', 'tokens': [3]}",
            "rules.0.method.part: DoRA cannot be used here; this takes an AbstractAdditive, such as .*LoRA",
        ),
        ("loss={'type': 'KaSALoss', 'gamma': -1}", "loss: gamma must be at least 0, got -1"),
        ("loss={'type': 'MonteCLoRALoss', 'kl_weight': -1}", "loss: kl_weight must be at least 0, got -1"),
        ("loss={'type': 'MonteCLoRALoss', 'prior': 0}", "loss: prior must be above 0, got 0"),
        ("quant=int8", 'quant: must be "nf4" or null, got'),
        ("rules.0.method.rank=abc", r"rank: must be a whole number or one of LinearRanks.* or a list such as \[8\]"),
        ("eval.data=x", r'eval.data: must be an object with keys of Data, such as {"name": ...} or null, got'),
        ("log=tensorboard", r'log: must be a list such as \["tensorboard"\], got'),
        ("mesh=8", 'mesh: must be an object such as {"name": 8} or null'),
        ("optimizer=adamax", "optimizer: must be one of Adafactor, Adam, AdamW, .*, Optimizer, SGD.*, got"),
        ("procedure=chain", "procedure: there is no .chain.; did you mean"),
        ("attention=flash", "attention: must be one of 'auto', 'xla', 'cudnn', 'splash'"),
        ("log=['mlflow']", "log.0: must be one of 'tensorboard', 'wandb'"),
        ("optimizer.eps=0", "eps must be above 0"),
        ("optimizer.clip=0", "clip must be above 0"),
        ("data.max_length=2", "max_length must be at least 3, got 2: attention over a single token"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(change, words):
    with pytest.raises(sx.SboraxError, match=words) as caught:
        override(EXPERIMENT, [change])
    assert "\n" not in str(caught.value)


OPTIONS = [
    *(kind() for kind in OPTIMIZERS.values()),
    *{type(procedure): procedure for procedure, _ in PROCEDURES.values()}.values(),
    *(sx.KaSALoss(), sx.MonteCLoRALoss(), Combination("ties", 0.5)),
    *(sx.SingularMass(0.5, 4), sx.LinearRanks(1, 2), sx.ShuffledRanks(sx.LinearRanks(1, 2))),
    *(EXPERIMENT.optimizer, EXPERIMENT.data, sx.Eval(), sx.Save(), EXPERIMENT),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: type(options).__name__)
def test_numbers_that_mean_nothing_are_refused(options):
    """None of these options may be negative, infinite or NaN, alone or in a pair."""
    for field in dataclasses.fields(options):
        kinds = typing.get_args(field.type | None)
        bad = [math.nan, math.inf, -1.0]
        wrong = bad if float in kinds else [-1] if int in kinds else []
        for value in [(number, number) for number in bad] if tuple[float, float] in kinds else wrong:
            with pytest.raises(sx.SboraxError) as caught:
                dataclasses.replace(options, **{field.name: value})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sgd", "lion", "adafactor"])
def test_an_eps_without_a_use_is_an_error(name):
    with pytest.raises(sx.SboraxError, match=f"{name} takes no eps"):
        sx.Optimizer(name=name, eps=1e-6)


@pytest.mark.parametrize("procedure", [sx.AdaLoRABudget(target=2), sx.PRILoRAPruning(), sx.LoRAPrune()])
def test_lora_fa_is_refused_beside_procedures_that_read_a(procedure):
    rules = [("q_proj", sx.LoRA(rank=4))]
    with pytest.raises(sx.SboraxError, match="holds factors fixed whose gradients"):
        sx.Experiment("m", sx.Data("d"), rules, sx.Optimizer(name="lora_fa"), steps=9, procedure=procedure)


def test_an_optimiser_without_a_type_is_ours():
    """As files of before have it."""
    raw = encode(EXPERIMENT)
    assert raw["optimizer"].pop("type") == "Optimizer"
    assert decode(sx.Experiment, raw) == EXPERIMENT


def test_a_class_that_a_file_would_not_tell_apart_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Mine(sx.Data):
        extra: int = 1

    with pytest.raises(sx.SboraxError, match="a config cannot hold test_config:Mine: Data is not to be extended"):
        encode(dataclasses.replace(EXPERIMENT, data=Mine("d")))


def test_nothing_to_train_is_an_error():
    with pytest.raises(sx.SboraxError, match="nothing to train"):
        sx.Experiment(model="m", data=sx.Data("d"), steps=1)


def test_experiments_from_files(tmp_path):
    source = tmp_path / "tiny.py"
    source.write_text(
        "import sborax as sx\n\n\ndef experiment():\n"
        "    return sx.Experiment(model='m', data=sx.Data('d'), rules=(('mlp', sx.LoRA()),), steps=3)\n"
    )
    built = sx.load_experiment(str(source), ["steps=7"])
    assert built.steps == 7
    (tmp_path / "config.json").write_text(json.dumps(encode(built)))
    assert sx.load_experiment(str(tmp_path)) == sx.load_experiment(str(tmp_path / "config.json")) == built


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("absent.py", None, "no such experiment"),
        ("a.py", "x = 1\n", "needs a function"),
        ("a.py", "def experiment():\n    return 1\n", "returned a int"),
        ("a.py", "def experiment(:\n", "SyntaxError"),
        ("a.py", "import sborax as sx\n\ndef experiment():\n    return sx.Experimnt()\n", "AttributeError"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"model": "m"}', "data: missing"),
    ],
)
def test_broken_experiment_files(tmp_path, name, text, words):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(sx.SboraxError, match=words) as caught:
        sx.load_experiment(str(file))
    assert "\n" not in str(caught.value) and name in str(caught.value)
