"""Adapters that act from their invocation tokens on, beside PEFT's aLoRA and beside the base before these tokens."""

import copy
import dataclasses
import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from cases import METHODS, hint_for
from etils import epath
from test_contract_model import CONFIG
from torch_pair import DEPTH, VOCAB, build, shaken, with_peft

import sborax as sx
from sborax.adapters.compose import with_fields
from sborax.adapters.core import AbstractAdditive
from sborax.adapters.invocation import find, invoked_parts
from sborax.adapters.paths import kernels, stack_axes
from sborax.adapters.tree import nodes
from sborax.evaluate.likelihood import score_options, score_rows
from sborax.interop.peft import load_peft, save_peft
from sborax.models.beam import beam_search
from sborax.models.language_model import LanguageModel, decoder_of
from sborax.models.memory import run
from sborax.sweep.run import sweep
from sborax.train.begin import begin
from sborax.train.loop import train
from sborax.train.outputs import Outputs
from sborax.train.read import silent
from tests.tiny_model import tokenizer, write_data, write_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLOSE = {"rtol": 0, "atol": 1e-4}
TOKENS = (5, 9)
"""The invocation."""
WITHOUT, TWICE, ONCE = [3, 9, 5, 7, 1, 2], [4, 5, 9, 8, 6, 5, 9, 5, 1, 2], [5, 9, 3]
TEXTS = [WITHOUT, TWICE, ONCE]
FIRST = [len(WITHOUT), 5, 0]
"""Where the adapter begins to act in each text."""
NEW = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base"))


def config(**fields):
    plain = {"r": 4, "lora_alpha": 24, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**plain, alora_invocation_tokens=list(TOKENS), **fields)


@pytest.fixture(scope="module")
def theirs(pair):
    return with_peft(pair, config())


@pytest.fixture(scope="module")
def ours(pair, theirs, tmp_path_factory):
    """PEFT's adapter, read from its file."""
    place = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(place)
    params, adapters = load_peft(place, pair.ours)
    assert all(map(operator.is_, jax.tree.leaves(params), jax.tree.leaves(pair.ours.params)))
    return adapters


@pytest.fixture(scope="module")
def everywhere(ours):
    """The same LoRA, acting on all tokens."""
    return jax.tree.map(
        lambda node: sx.Adapter(node.train["part"], node.frozen["part"], node.method.part),
        ours,
        is_leaf=lambda node: isinstance(node, sx.Adapter),
    )


def padded(texts, side="right"):
    """Tokens and segments."""
    tokens, segments = np.zeros((2, len(texts), max(map(len, texts))), np.int32)
    for row, text in enumerate(texts):
        start = tokens.shape[1] - len(text) if side == "left" else 0
        tokens[row, start : start + len(text)], segments[row, start : start + len(text)] = text, 1
    return jnp.asarray(tokens), jnp.asarray(segments)


@pytest.fixture(scope="module")
def logits_of(pair):
    """Logits of a padded batch, compiled once for each shape."""
    return jax.jit(
        lambda adapters, tokens, segments: pair.ours.apply(pair.ours.params, adapters, tokens, segment_ids=segments)
    )


# Where an adapter acts


def reference(tokens, segments, invocation):
    """`find` for one row, token by token."""
    mask, start = np.zeros(len(tokens), bool), 0
    for stop in range(1, len(tokens) + 1):
        if stop < len(tokens) and segments[stop] == segments[start]:
            continue
        text = tuple(tokens[start:stop])
        places = [i for i in range(len(text)) if text[i : i + len(invocation)] == invocation]
        if segments[start] and places:
            mask[start + places[-1] : stop] = True
        start = stop
    return mask


def test_places_are_those_of_a_search_text_by_text():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (64, 17)).astype(np.int32)
    segments = np.sort(rng.integers(0, 4, (64, 17)), axis=1).astype(np.int32)
    # Padding on the right, on both sides, and between texts.
    segments[:16] = segments[:16, ::-1]
    segments[16:32, 9:11] = 0
    invocations = [(1,), (0, 0), (1, 2), (2, 0, 1), (1,) * 18]
    masks = jax.jit(find, static_argnums=2)(jnp.asarray(tokens), jnp.asarray(segments), tuple(invocations))
    for invocation in invocations:
        mask = np.stack([reference(*row, invocation) for row in zip(tokens.tolist(), segments, strict=True)])
        np.testing.assert_array_equal(masks[invocation], mask)
        assert mask.any() == (len(invocation) < 18)


def test_an_adapter_acts_from_the_last_invocation_on(logits_of, ours):
    tokens, segments = padded(TEXTS)
    base, logits = logits_of(None, tokens, segments), logits_of(ours, tokens, segments)
    for row, (text, first) in enumerate(zip(TEXTS, FIRST, strict=True)):
        np.testing.assert_array_equal(logits[row, :first], base[row, :first])
        assert (np.abs(logits[row, first : len(text)] - base[row, first : len(text)]).max(axis=-1) > 1e-3).all()


def test_keys_and_values_before_the_invocation_are_the_bases_own(pair, ours):
    """Bit for bit: one cache serves the base and all such adapters."""
    module, params = pair.ours.module.clone(keep=True), pair.ours.params
    tokens, segments = padded(TEXTS)
    masks = find(tokens, segments, [TOKENS])

    @jax.jit
    def cache(adapters):
        variables = {"params": params, "adapters": adapters}
        ctx = sx.Context(invocations=masks)
        return module.apply(variables, tokens, segments, None, ctx, method="hidden")[1]

    for base, adapted in zip(cache({}), cache(ours), strict=True):
        assert base.shape[:3] == (DEPTH, *tokens.shape)
        for row, (text, first) in enumerate(zip(TEXTS, FIRST, strict=True)):
            np.testing.assert_array_equal(base[:, row, :first], adapted[:, row, :first])
            assert first == len(text) or not np.array_equal(base[1, row, first:], adapted[1, row, first:])


@pytest.mark.parametrize("side", ["right", pytest.param("left", marks=pytest.mark.nightly)])
def test_logits_of_a_padded_batch_are_those_of_peft(side, logits_of, theirs, ours):
    tokens, segments = padded(TEXTS, side)
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    with torch.no_grad():
        arrays = (torch.tensor(np.asarray(array, np.int64)) for array in (tokens, segments, positions))
        names = ("input_ids", "attention_mask", "position_ids")
        expected = theirs(**dict(zip(names, arrays, strict=True))).logits.numpy()
    logits, real = logits_of(ours, tokens, segments), np.asarray(segments, bool)
    np.testing.assert_allclose(logits[real], expected[real], **CLOSE)


def test_packed_texts_are_each_alone(logits_of, ours):
    row = np.zeros((3, 24), np.int32)
    packed = row.copy(), row.copy()
    for place, (number, token) in enumerate((number, token) for number, text in enumerate(TEXTS) for token in text):
        packed[0][0, place], packed[1][0, place] = token, number + 1
    logits, start = logits_of(ours, *map(jnp.asarray, packed))[0], 0
    apart = [np.pad(array, ((0, 0), (0, 24 - array.shape[1]))) for array in padded(TEXTS)]
    alone = logits_of(ours, *map(jnp.asarray, apart))
    for text, single in zip(TEXTS, alone, strict=True):
        np.testing.assert_allclose(logits[start : start + len(text)], single[: len(text)], **CLOSE)
        start += len(text)


# Of a method that takes means over the batch, a text is not what it is alone.
ADDITIVE = [
    case
    for case in METHODS
    if isinstance(case.method, AbstractAdditive)
    and not (case.method.rewrites_base or case.method.token_mean or invoked_parts(case.method))
]


@pytest.mark.nightly
@pytest.mark.parametrize("case", ADDITIVE, ids=lambda case: case.name)
def test_any_additive_method_is_itself_after_the_tokens_and_the_base_before(case):
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    model = LanguageModel(decoder_of(config), {}, config, None)
    params = model.module.init(jax.random.key(1), jnp.ones((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, params)
    hints = {
        path.removesuffix("/kernel"): hint_for(case.method, np.ones(leaf.shape), stack_axes(path, leaf.ndim))
        for path, leaf in kernels(params).items()
        if case.method.needs
    }
    tokens = jnp.asarray([[7, 3, 5, 2, 9, 4], [6, 3, 5, 2, 9, 4]], jnp.int32)

    def logits(method):
        adapters = {}
        if method is not None:
            adapters = shaken(sx.attach(jax.random.key(3), params, [("mlp/(gate|up)_proj", method)], hints)[1])
        ctx = sx.Context(prompt=jnp.ones(tokens.shape, jnp.int32))
        return jax.jit(lambda: model.apply(params, adapters, tokens, ctx=ctx))()

    base, everywhere, later = map(logits, (None, case.method, sx.Activated(case.method, (7,))))
    assert np.abs(everywhere - base).max(axis=(1, 2)).min() > 1e-4
    np.testing.assert_allclose(later[0], everywhere[0], **CLOSE)
    np.testing.assert_allclose(later[1], base[1], **CLOSE)


@pytest.mark.nightly
def test_adapters_of_two_invocations_are_added(pair, logits_of):
    """In a text with the tokens of one of them, that one acts alone."""
    part = sx.LoRA(rank=4, alpha=24.0)
    first, second = (
        shaken(sx.attach(jax.random.key(seed), pair.ours.params, [("q_proj", sx.Activated(part, tokens))])[1])
        for seed, tokens in enumerate([TOKENS, (8,)])
    )
    tokens, segments = padded([*TEXTS, [1, 8, 2]])
    total = logits_of(sx.add(first, second), tokens, segments)
    np.testing.assert_allclose(total[2], logits_of(first, tokens, segments)[2], **CLOSE)
    np.testing.assert_allclose(total[3], logits_of(second, tokens, segments)[3], **CLOSE)
    half = logits_of(sx.scale(second, 0.5), tokens, segments)
    assert np.abs(half[3, 1:3] - total[3, 1:3]).max() > 1e-3
    np.testing.assert_array_equal(half[0], logits_of(None, tokens, segments)[0])


# Generation


def greedy(model, prompt):
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        eos_token_id=[],
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def prompts(pair, everywhere):
    """Prompts with a token, of which one makes the adapter write it again, and one whose base writes it."""
    write = [*([token, 7] for token in range(2, VOCAB))]
    texts = sx.generate(pair.ours, pair.ours.params, everywhere, write, NEW, eos=[])
    token, prompt = next((row[0], row) for row, text in zip(write, texts, strict=True) if row[0] in text[:-1])
    starts = [[start, 7] for start in range(2, VOCAB) if start != token]
    texts = sx.generate(pair.ours, pair.ours.params, None, starts, NEW, eos=[])
    without = next((row for row, text in zip(starts, texts, strict=True) if token in text[:-1]), None)
    assert without is not None
    return token, [prompt, without, [3, 8, 11, token, 4, 2], [11, token, 3, token, 9]]


def with_tokens(adapters, tokens):
    """The same adapters with another invocation."""
    return jax.tree.map(
        lambda node: dataclasses.replace(node, method=sx.Activated(node.method.part, tokens)),
        adapters,
        is_leaf=lambda node: isinstance(node, sx.Adapter),
    )


def test_greedy_text_is_that_of_peft(pair, theirs, ours, prompts):
    """Also where the adapter, or the base in a text without them, writes the tokens again."""
    token, rows = prompts
    settings = theirs.peft_config["default"]
    adapters = with_tokens(ours, (token,))
    texts = sx.generate(pair.ours, pair.ours.params, adapters, rows, NEW, eos=[])
    settings.alora_invocation_tokens, initial = [token], settings.alora_invocation_tokens
    expected = [greedy(theirs, prompt) for prompt in rows]
    settings.alora_invocation_tokens = initial
    assert texts == expected
    base = sx.generate(pair.ours, pair.ours.params, None, rows, NEW, eos=[])
    assert token in texts[0] and token in texts[1] and texts[1] == base[1]
    assert all(texts[row] != base[row] for row in (0, 2, 3))
    assert texts == sx.generate(pair.ours, pair.ours.params, adapters, rows, NEW, eos=[], padding="right")


@pytest.mark.nightly
def test_beams_share_the_invocation_of_their_prompt(pair, ours, everywhere, prompts):
    token, rows = prompts
    search = lambda adapters: beam_search(pair.ours, pair.ours.params, adapters, rows[:2], NEW, 3, eos=[])  # noqa: E731
    texts = search(with_tokens(ours, (token,)))
    assert texts[0] == search(everywhere)[0] and texts[1] == search(None)[1]
    assert texts[0] != search(None)[0] and texts[1] != search(everywhere)[1]


@pytest.fixture(scope="module")
def headed(pair):
    """An adapter of the head, too."""
    rules = [("q_proj|lm_head", sx.Activated(sx.LoRA(rank=4, alpha=24.0), TOKENS))]
    return shaken(sx.attach(jax.random.key(0), pair.ours.params, rules)[1])


@pytest.mark.nightly
def test_text_of_an_adapted_head_is_that_without_a_cache(pair, headed):
    texts = sx.generate(pair.ours, pair.ours.params, headed, TEXTS, 4, eos=[])
    tokens, segments = padded([prompt + text for prompt, text in zip(TEXTS, texts, strict=True)])
    acts = np.arange(tokens.shape[1])[None] >= np.where(np.array(FIRST) < list(map(len, TEXTS)), FIRST, 99)[:, None]
    ctx = sx.Context(invocations={TOKENS: jnp.asarray(acts)})
    logits = jax.jit(lambda: pair.ours.apply(pair.ours.params, headed, tokens, segment_ids=segments, ctx=ctx))()
    for prompt, text, row in zip(TEXTS, texts, logits, strict=True):
        assert text == np.argmax(row[len(prompt) - 1 :][:4], axis=-1).tolist()


@pytest.mark.nightly
def test_scores_are_those_of_logits(pair, headed):
    """Of rows, and of options that share a prompt; an answer that holds the tokens invokes nothing."""
    model, variables = pair.ours, {"params": pair.ours.params, "adapters": headed}
    answers = [[2, *TOKENS, 4], [11, 12, 13, 14]]
    rows, _ = padded([prompt + answer[:-1] for prompt in TEXTS for answer in answers])
    lengths = jnp.asarray([len(prompt) for prompt in TEXTS], jnp.int32)
    targets, counts = jnp.asarray([answers] * 3, jnp.int32), jnp.full((3, 2), 4, jnp.int32)
    of_rows = (jnp.repeat(lengths, 2), targets.reshape(6, 4), counts.reshape(6))
    scores, _ = score_rows(model.module, variables, rows, *of_rows)
    together, _ = score_options(model.module, variables, padded(TEXTS)[0], lengths, targets, counts)
    firsts = np.repeat(np.where(np.array(FIRST) < np.asarray(lengths), FIRST, 99), 2)
    ctx = sx.Context(invocations={TOKENS: jnp.asarray(np.arange(rows.shape[1])[None] >= firsts[:, None])})
    logits = jax.jit(lambda: model.apply(model.params, headed, rows, ctx=ctx))()
    places = np.repeat(np.asarray(lengths), 2)[:, None] - 1 + np.arange(4)[None]
    chances = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits, axis=-1)), places[:, :, None], axis=1)
    expected = np.take_along_axis(chances, np.asarray(of_rows[1])[:, :, None], axis=2).sum(axis=(1, 2))
    np.testing.assert_allclose(scores, expected, **CLOSE)
    np.testing.assert_allclose(together.reshape(6), expected, **CLOSE)


# Training


def test_the_loss_of_an_adapted_head_is_that_of_logits(pair, headed):
    tokens, segments = padded(TEXTS)
    batch = {"tokens": tokens, "segments": segments, "targets": jnp.roll(tokens, -1, axis=1), "counts": segments > 0}

    def of_logits(train, frozen):
        logits = pair.ours.apply(pair.ours.params, sx.combine(train, frozen), tokens, segment_ids=segments)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(jnp.where(segments > 0, losses, 0.0))

    def outputs(train, frozen):
        adapters = sx.combine(train, frozen)
        hidden = pair.ours.hidden(pair.ours.params, adapters, tokens, segment_ids=segments)
        return Outputs(hidden, batch, pair.ours, pair.ours.params, adapters)

    train_half, frozen = sx.split(headed)
    expected, slopes = jax.jit(jax.value_and_grad(of_logits))(train_half, frozen)
    got, grads = jax.jit(jax.value_and_grad(lambda *halves: outputs(*halves).cross_entropy()))(train_half, frozen)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, slopes)


@pytest.mark.nightly
def test_other_losses_of_an_adapted_head_are_those_of_logits(pair, logits_of, headed):
    tokens, segments = padded(TEXTS)
    batch = {"tokens": tokens, "segments": segments, "targets": jnp.roll(tokens, -1, axis=1), "counts": segments > 0}
    expected = -optax.softmax_cross_entropy_with_integer_labels(logits_of(headed, tokens, segments), batch["targets"])

    @jax.jit
    def losses():
        hidden = pair.ours.hidden(pair.ours.params, headed, tokens, segment_ids=segments)
        outputs = Outputs(hidden, batch, pair.ours, pair.ours.params, headed)
        return *outputs.cross_entropies(), outputs.log_probs()

    total, terms, chances = losses()
    real = np.asarray(segments, bool)
    np.testing.assert_allclose(total, -np.sum(expected, where=real), rtol=1e-5)
    np.testing.assert_allclose(terms[real], -expected[real], **CLOSE)
    np.testing.assert_allclose(chances[real], expected[real], **CLOSE)


def test_losses_of_training_are_those_of_peft(pair, theirs, ours):
    """20 steps of Adam on texts of which one lacks the tokens; nightly 50 with test_peft_curves.py."""
    tokens, segments = padded(TEXTS)
    model, real = copy.deepcopy(theirs).train(), np.asarray(segments, bool)
    labels = np.where(real, np.asarray(tokens), -100)
    ids, mask, targets = (torch.tensor(np.asarray(array, np.int64)) for array in (tokens, segments, labels))
    optimizer = torch.optim.Adam([leaf for leaf in model.parameters() if leaf.requires_grad], lr=1e-2)
    train_half, frozen = sx.split(ours)
    tx = optax.adam(1e-2)
    counts = jnp.asarray(real[:, 1:])

    @jax.jit
    def step(train_half, state):
        def loss(half):
            logits = pair.ours.apply(pair.ours.params, sx.combine(half, frozen), tokens, segment_ids=segments)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
            return jnp.sum(jnp.where(counts, losses, 0.0)) / jnp.sum(counts)

        value, grads = jax.value_and_grad(loss)(train_half)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(train_half, updates), state, value

    state, losses = tx.init(train_half), []
    for _ in range(20):
        theirs_loss = model(input_ids=ids, attention_mask=mask, labels=targets).loss
        optimizer.zero_grad()
        theirs_loss.backward()
        optimizer.step()
        train_half, state, loss = step(train_half, state)
        losses.append((float(loss), theirs_loss.item()))
    mine, expected = np.array(losses).T
    assert expected[-1] < expected[0] - 0.5
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-4)


def test_a_text_without_the_tokens_trains_nothing(pair, ours):
    model, (tokens, segments) = pair.ours, padded(TEXTS)
    train_half, frozen = sx.split(ours)

    @jax.jit
    def slopes(row):
        def loss(half):
            return jnp.sum(model.apply(model.params, sx.combine(half, frozen), tokens, segment_ids=segments)[row] ** 2)

        return jax.grad(loss)(train_half)

    largest = [max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes(row))) for row in range(3)]
    assert largest[0] == 0.0 < min(largest[1:])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    write_model(place / "model")
    write_data(place / "data.jsonl")
    return place


def an_experiment(place, text, **changes):
    tokens = tuple(tokenizer()(text)["input_ids"])
    data = sx.Data(
        str(place / "data.jsonl"), template="{instruction}", answer=" {output}", max_length=32, buckets=(32,)
    )
    rules = [("q_proj", sx.Activated(sx.LoRA(rank=2), tokens))]
    return sx.Experiment(str(place / "model"), data, rules, **{"steps": 2, "batch_size": 2, **changes})


def begun(place, text):
    """The lines with which a run begins."""
    lines, experiment = [], an_experiment(place, text)
    model = sx.read_model(experiment)
    batches, _ = sx.read_data(experiment, model, silent)
    begin(sx.prepare(experiment, model, 2), model, batches, epath.Path(place / "run"), lines.append)
    return lines


def test_a_run_counts_the_samples_that_have_the_tokens(place):
    (line,) = (line for line in begun(place, "1 plus") if line.startswith("invocation"))
    assert line == "invocation (18, 222, 81, 77, 86, 84): in 3 of 24 samples; the others do not train its adapters"
    assert "invocation (32,): in 24 of 24 samples" in begun(place, "?")
    refusal(r"^no sample of the data has the tokens \(58, .* would not be trained", lambda: begun(place, "Yes"))


@pytest.mark.nightly
def test_a_first_batch_without_the_tokens_ends_no_run(place, tmp_path):
    experiment = dataclasses.replace(an_experiment(place, "17 plus"), steps=3, batch_size=1)
    train(experiment, tmp_path / "run", echo=silent)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["grad_norm"] == 0.0


@pytest.mark.nightly
def test_a_run_on_a_mesh_is_that_on_one_device(place, tmp_path):
    losses = []
    for name, mesh in {"alone": None, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}.items():
        train(an_experiment(place, "1", batch_size=8, mesh=mesh), tmp_path / name, echo=silent)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.nightly
def test_members_of_a_sweep_are_each_alone(place, tmp_path):
    experiment = an_experiment(place, "1", batch_size=8)
    sweep(sx.Sweep(experiment, {"optimizer.lr": [1e-3, 1e-2]}, at_once=2), tmp_path / "sweep", echo=silent)
    for lr in (1e-3, 1e-2):
        train(dataclasses.replace(experiment, optimizer=sx.Optimizer(lr=lr)), tmp_path / str(lr), echo=silent)
    runs = sorted(file.parent for file in tmp_path.rglob("metrics.jsonl"))
    final = [float(json.loads((run / "summary.json").read_text())["last_loss"]) for run in runs]
    assert len(runs) == 4
    np.testing.assert_allclose(sorted(final)[::2], sorted(final)[1::2], rtol=1e-5)


# What is refused


def refusal(message, act):
    with pytest.raises(sx.SboraxError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "tokens", "message"),
    [
        (sx.LoRA(rank=2), (), "tokens must be a tuple of one token id or more"),
        (sx.LoRA(rank=2), (3, -1), "tokens must be a tuple"),
        (sx.LoRA(rank=2), [3], "tokens must be a tuple"),
        (sx.DoRA(rank=2), (3,), "needs an additive method; DoRA rewrites"),
        (sx.PiSSA(rank=2), (3,), "PiSSA takes its start out of the base"),
    ],
)
def test_settings_are_checked(part, tokens, message):
    # The constructor of a test run checks types, which that of a user does not.
    changed = with_fields(sx.Activated(sx.LoRA(rank=2), (3,)), part=part, tokens=tokens)
    refusal(message, changed.__post_init__)


def test_a_call_that_does_not_say_where_the_tokens_are_is_refused(pair, ours):
    params, model = pair.ours.params, pair.ours
    tokens, segments = padded(TEXTS)
    node = jax.tree.map(lambda leaf: leaf[0], nodes(ours)["layers/self_attn/q_proj/kernel"])
    refusal("this call does not say where", lambda: sx.linear(jnp.ones((3, 32)), jnp.ones((32, 32)), node))
    variables = {"params": params, "adapters": ours}
    refusal("this call does not say where", lambda: model.module.apply(variables, tokens, segments))
    past = jax.eval_shape(lambda: run(model.module.clone(keep=True), variables, tokens, segments, method="hidden"))[1]
    over = functools.partial(run, model.module, variables, tokens, past=(past, segments), method="hidden")
    refusal("a call over a cache does not see the text before", lambda: jax.eval_shape(over))
    refusal("needs a model that knows it", lambda: sx.apply_linen(model.module, {"params": params}, ours, tokens))
    refusal("cannot be merged: it acts from", lambda: sx.merge(params, ours))
    refusal(
        "the vocabulary ends at 63", lambda: model.apply(params, with_tokens(ours, (64,)), tokens)
    )  # fmt: skip
    refusal(
        "cannot adapt the table of the embedding",
        lambda: sx.plan(params, [("embed_tokens", sx.Activated(sx.LoRA(rank=2), TOKENS))]),
    )


@pytest.mark.nightly
def test_ranks_by_layer_go_to_peft_and_back(pair, logits_of, tmp_path):
    method = sx.Activated(sx.LoRA(rank=sx.LinearRanks(2, 5), alpha=24.0), TOKENS)
    adapters = sx.attach(jax.random.key(0), pair.ours.params, [("(q|down)_proj", method)])[1]
    for node in nodes(adapters).values():
        # Padding stays zero, as in training.
        leaves = node.train["part"]
        live = (np.asarray(leaves["a"]) != 0).any(axis=1)[:, :, None]
        leaves["b"] = jnp.asarray(
            0.05 * live * np.random.default_rng(0).standard_normal(leaves["b"].shape), jnp.float32
        )
    save_peft(tmp_path, pair.ours, pair.ours.params, adapters)
    tokens, segments = padded(TEXTS)
    expected = logits_of(adapters, tokens, segments)
    assert np.abs(expected - logits_of(None, tokens, segments)).max() > 1e-2
    second = load_peft(tmp_path, pair.ours)[1]
    assert sx.count(second) == sx.count(adapters)
    np.testing.assert_allclose(logits_of(second, tokens, segments), expected, **CLOSE)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "expected a list of token ids"),
        ([1.5], "expected a list"),
        ("text", "is not supported: beside a method other than LoRA"),
    ],
)
def test_files_with_other_tokens_are_refused(tokens, message, pair, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alora_invocation_tokens": tokens}))
    refusal(message, lambda: load_peft(tmp_path, pair.ours))


def test_files_of_what_peft_lacks_are_refused(pair, tmp_path):
    params = pair.ours.params

    def saving(rules):
        return lambda: save_peft(tmp_path, pair.ours, params, sx.attach(jax.random.key(0), params, rules)[1])

    refusal("PEFT activates LoRA alone, and not SBoRA", saving([("q_proj", sx.Activated(sx.SBoRA(rank=2), TOKENS))]))
    two = [("q_proj", sx.Activated(sx.LoRA(rank=2), (1,))), ("v_proj", sx.Activated(sx.LoRA(rank=2), (2,)))]
    refusal(r"is \(1,\) for .*q_proj and \(2,\) for .*v_proj: PEFT's .* save them as two adapters$", saving(two))
    mixed = [("q_proj", sx.Activated(sx.LoRA(rank=2), (1,))), ("v_proj", sx.LoRA(rank=2))]
    refusal("PEFT keeps one kind of adapter", saving(mixed))
