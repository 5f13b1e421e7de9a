"""Several adapters of one base in one batch: every row is what its adapter alone makes of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import INVOCATION, METHODS, hint_for
from etils import epath
from nightly import nightly_unless

import sborax as sx
from sborax.adapters.paths import kernels, stack_axes
from sborax.adapters.routing import routed_parts
from sborax.adapters.rows import by_row, together
from sborax.adapters.tree import nodes
from sborax.cli.main import main
from sborax.evaluate.scorer import Pair, Scorer, scorers
from sborax.models import generate, load_model
from sborax.models.by_row import generate_by_row
from sborax.sweep.grid import Sweep
from sborax.sweep.run import sweep
from sborax.train.experiment import save_experiment
from tests.questions import QUESTIONS, instruction
from tests.test_sweep import an_experiment, quiet
from tests.tiny_model import write_data, write_model

NEW = 12
TARGET = "mlp/down_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a kernel of the sizes that the table of methods is written for."""
    place = tmp_path_factory.mktemp("rows")
    write_model(place / "model", hidden_size=96, intermediate_size=128, tie_word_embeddings=False)
    write_data(place / "data.jsonl")
    return place


@pytest.fixture(scope="module")
def model(place):
    return load_model(place / "model")


def trained(model, method, seed, pattern=TARGET, size=0.3):
    """Adapters whose trained leaves have moved at random."""
    hints = {
        path.removesuffix("/kernel"): hint_for(method, np.ones(leaf.shape), stack_axes(path, leaf.ndim))
        for path, leaf in kernels(model.params).items()
        if method.needs
    }
    params, adapters = sx.attach(jax.random.key(seed), model.params, [(pattern, method)], hints)
    train, frozen = sx.split(adapters)
    leaves, structure = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    values = [leaf + size * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return params, sx.combine(jax.tree.unflatten(structure, values), frozen)


SHARING = [case for case in METHODS if not (case.method.rewrites_base or case.method.linked or case.method.adapts_bias)]
SHARING = [case for case in SHARING if not routed_parts(case.method)]
FIRST = [case for case in SHARING if case.name == "LoRA"]


@pytest.mark.parametrize("case", nightly_unless(FIRST, SHARING), ids=lambda case: case.name)
def test_logits_are_those_of_each_alone(model, case):
    params, adapters = zip(*(trained(model, case.method, seed) for seed in range(3)), strict=True)
    assert together(params, adapters) == ([[0], [1], [2]] if case.method.token_mean else [[0, 1, 2]])
    tokens = jax.random.randint(jax.random.key(5), (6, 9), 2, model.config.vocab_size).at[:, 2].set(INVOCATION[0])
    logits = jax.jit(lambda tree: model.apply(params[0], tree, tokens))(by_row(adapters))
    alone = jax.jit(lambda tree, rows: model.apply(params[0], tree, rows))
    for number, tree in enumerate(adapters):
        rows = slice(2 * number, 2 * number + 2)
        want = alone(tree, tokens[rows])
        np.testing.assert_allclose(logits[rows], want, rtol=1e-5, atol=1e-5)
        assert np.abs(want - alone(adapters[number - 1], tokens[rows])).max() > 1e-4


def test_adapters_that_are_not_alike_stay_by_themselves(model):
    base, thin = trained(model, sx.LoRA(rank=2), 0)
    vector, mean = trained(model, sx.IA3(), 1), trained(model, sx.Lily(rank=2, routing="batch"), 1)
    pairs = [
        (base, thin),
        trained(model, sx.LoRA(rank=4), 1),
        (base, None),
        (base, thin),
        vector,
        vector,
        mean,
        mean,
        (base, {"lm_head": {"kernel": nodes(thin)[f"layers/{TARGET}/kernel"]}}),
        (jax.tree.map(lambda leaf: leaf + 0, base), thin),
        (base, {"layers": {"mlp": {"up_proj": thin["layers"]["mlp"]["down_proj"]}}}),
        (base, None),
    ]
    params, adapters = zip(*pairs, strict=True)
    assert together(params, adapters) == [[0, 3], *([number] for number in range(1, len(pairs)) if number != 3)]
    with pytest.raises(sx.SboraxError, match="these adapters differ in method or shape"):
        by_row(adapters[:2])
    stack = by_row([adapters[0], adapters[3]])
    with pytest.raises(sx.SboraxError, match="27 tokens cannot be shared out among 2 adapters"):
        model.apply(model.params, stack, jnp.ones((3, 9), jnp.int32))
    with pytest.raises(sx.SboraxError, match="ByRow cannot be merged: each of several adapters"):
        sx.merge(model.params, stack)


TWO = (sx.LoRA(rank=2), sx.LoRA(rank=2)), [1, 0]
MIXED = (sx.LoRA(rank=2), sx.LoRA(rank=2), sx.Bone(rank=4), None, sx.PiSSA(rank=2)), [2, 1, 0, 1, 3, 4]


@pytest.mark.parametrize("case", nightly_unless([TWO], [TWO, MIXED]), ids=lambda case: f"{len(case[0])}")
def test_text_is_that_of_each_alone(model, case):
    """Rows choose among adapters of several methods, and the base, in any order."""
    methods, choice = case
    params, adapters = zip(
        *(
            (model.params, None) if method is None else trained(model, method, seed, size=3.0)
            for seed, method in enumerate(methods)
        ),
        strict=True,
    )
    prompts = [model.tokenizer(f"{number} plus{' 1' * number}?")["input_ids"] for number in range(len(choice))]
    texts = generate_by_row(model, params, adapters, prompts, choice, NEW)
    for prompt, number, text in zip(prompts, choice, texts, strict=True):
        assert [text] == generate(model, params[number], adapters[number], [prompt], NEW)
    assert len({tuple(text) for text in texts}) == len(texts)
    with pytest.raises(sx.SboraxError, match="choice: every prompt needs the number of an adapter, 0 to"):
        generate_by_row(model, params, adapters, prompts, [len(methods)] * len(prompts), NEW)


@pytest.mark.nightly
def test_drawn_text_is_that_of_each_alone(model):
    params, adapters = zip(*(trained(model, sx.LoRA(rank=2), seed) for seed in (0, 1)), strict=True)
    prompts, options = [[5, 6, 7], [8, 9]], {"temperature": 2.0, "key": jax.random.key(1)}
    texts = generate_by_row(model, params, adapters, prompts, [0, 1], NEW, **options)
    for number in (0, 1):
        assert [texts[number]] == generate(model, params[number], adapters[number], [prompts[number]], NEW, **options)


@pytest.mark.nightly
def test_scores_are_those_of_each_alone(model):
    methods = (sx.SBoRA(rank=4), sx.SBoRA(rank=4), sx.LoRA(rank=2), sx.SBoRA(rank=4))
    params, adapters = zip(
        *(trained(model, method, seed, size=3.0) for seed, method in enumerate(methods)), strict=True
    )
    sharing = scorers(model, params, adapters)
    assert [scorer.mates is not None for scorer in sharing] == [True, True, False, True]
    ids = [model.tokenizer(text)["input_ids"] for text in ("what is it", "a", "3 plus 3 is")]
    pairs = [Pair(prompt, ids[number - 1]) for number, prompt in enumerate(ids)]
    questions = [[Pair(ids[0], ids[1]), Pair(ids[0], ids[2])], [Pair(ids[2], ids[0]), Pair(ids[2], ids[1])]]
    for number, scorer in enumerate(sharing):
        alone = Scorer.of(model, params[number], adapters[number])
        for theirs, expected in (
            (scorer.continuations(pairs), alone.continuations(pairs)),
            *zip(scorer.options(questions), alone.options(questions), strict=True),
        ):
            np.testing.assert_allclose(
                [score.logprob for score in theirs], [score.logprob for score in expected], rtol=1e-5
            )
            assert [score[1:] for score in theirs] == [score[1:] for score in expected]
        assert scorer.write(ids, NEW) == alone.write(ids, NEW)
        assert scorer.write(ids, NEW, beams=2) == alone.write(ids, NEW, beams=2)
        texts = [source.write(ids, NEW, temperature=2.0, seed=3) for source in (scorer, alone)]
        assert texts[0] == texts[1]


def test_texts_with_other_end_tokens_are_others(model):
    """What one asks for with end tokens is no answer to what another asks for with none."""
    params, adapters = zip(*(trained(model, sx.LoRA(rank=2), seed, size=3.0) for seed in (0, 1)), strict=True)
    sharing, prompts = scorers(model, params, adapters), [[5, 6, 7], [8, 9]]
    assert all(scorer.mates is not None for scorer in sharing)
    alone = [Scorer.of(model, *pair) for pair in zip(params, adapters, strict=True)]
    for number in (0, 1):
        whole = alone[number].write(prompts, NEW, eos=[])
        ends = [row[2] for row in whole]
        assert sharing[number].write(prompts, NEW, eos=[]) == whole
        assert sharing[number].write(prompts, NEW, eos=ends) == alone[number].write(prompts, NEW, eos=ends) != whole


# From the command line


@pytest.fixture(scope="module")
def swept(place):
    """A sweep of two methods, and a file of questions."""
    places = str(place / "model"), str(place / "data.jsonl")
    methods = (sx.LoRA(rank=2), sx.SBoRA(rank=4))
    experiment = an_experiment(places, rules=[(TARGET, sx.LoRA(rank=2))], steps=2)
    grid = {"rules.0.method": methods, "optimizer.lr": (1e-2, 1.0)}
    sweep(Sweep(experiment, grid), place / "four", echo=quiet)
    (place / "questions.json").write_text(json.dumps([instruction(*question) for question in QUESTIONS[:2]]))
    return place / "four", [member.name for member in Sweep(experiment, grid).members()]


def prints(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


@pytest.mark.nightly
def test_commands_take_a_sweep(swept, capsys):
    """The texts of each run are those that it writes alone, and so are its scores."""
    out, names = swept
    words = ["--prompt", "1 plus 1?", "--prompt", "2", "--max-new-tokens", "6"]
    output = prints(capsys, "generate", out, *words)
    alone = "".join(f"{name}:\n{prints(capsys, 'generate', out / name, *words)}" for name in names)
    shared = f"in one batch: {', '.join(names[:2])}\nin one batch: {', '.join(names[2:])}\n"
    assert output == shared + alone
    assert prints(capsys, "generate", out / names[3], out / names[0], *words).splitlines()[:3] == [
        f"alone: {names[3]}",
        f"alone: {names[0]}",
        f"{names[3]}:",
    ]
    tasks = ["--tasks", "arc_easy", "--data", f"arc_easy={out.parent / 'questions.json'}"]
    prints(capsys, "eval", out, *tasks, "--out", out.parent / "scores")
    for name in names:
        prints(capsys, "eval", out / name, *tasks, "--out", out.parent / "alone" / name)
        scores = [
            [json.loads(line) for line in (out.parent / folder / name / "arc_easy.jsonl").read_text().splitlines()]
            for folder in ("scores", "alone")
        ]
        for record, expected in zip(*scores, strict=True):
            np.testing.assert_allclose(record.pop("logprobs"), expected.pop("logprobs"), rtol=1e-5)
            assert record == expected


def fails(capsys, *words):
    assert main([str(word) for word in words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_mistakes_are_one_line(place, capsys, tmp_path):
    model = place / "model"
    assert f"{model}: is given twice" in fails(capsys, "generate", model, model, "--prompt", "x")
    slashed = fails(capsys, "generate", model, f"{place}/./model/", "--prompt", "x")
    assert f"{place}/./model/: is given twice" in slashed
    assert "--chat: is for one target" in fails(capsys, "generate", model, "a", "--chat")
    assert "--adapter: is for one target" in fails(capsys, "generate", model, "a", "--prompt", "x", "--adapter", "p")
    assert "--mesh: is for one target" in fails(capsys, "eval", model, "a", "--tasks", "boolq", "--mesh", "data=2")
    assert "--include: is for one target" in fails(capsys, "eval", model, "a", "--tasks", "boolq", "--include", "b")
    assert f"{model}: not a run" in fails(capsys, "generate", model, "a", "--prompt", "x")
    (tmp_path / "sweep.json").write_text('{"members": [{"name": "a"}]}')
    assert "none of its members has ended" in fails(capsys, "generate", tmp_path, "--prompt", "x")
    for name, precision in (("a", "float32"), ("b", "bfloat16")):
        (tmp_path / name / "adapter").mkdir(parents=True)
        experiment = an_experiment((str(model), str(place / "data.jsonl")), precision=precision)
        save_experiment(experiment, epath.Path(tmp_path / name))
        (tmp_path / name / "adapter" / "plan.json").write_text("{}")
    error = fails(capsys, "eval", tmp_path / "a", tmp_path / "b", "--tasks", "arc_easy", "--data", f"arc_easy={place}")
    assert (
        f"{tmp_path / 'b'}: precision is bfloat16, that of {tmp_path / 'a'} is float32; give runs of one base" in error
    )
