"""Log-likelihoods against transformers, whatever shape, adapter, weight or mesh they go through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sborax_models import make
from tiny_model import tokenizer
from tokenizers.processors import TemplateProcessing

import sborax as sx
from sborax.adapters.core import AbstractWeight, is_weight
from sborax.cli.chat import encode
from sborax.evaluate import Pair, Scorer
from sborax.evaluate.scorer import scorers
from sborax.evaluate.shapes import batches, padded
from sborax.models import load_model
from sborax.train.base import quantise_base

pytestmark = pytest.mark.usefixtures("strict")
SIZES = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    return make("llama", place, **SIZES), place


@pytest.fixture(scope="module")
def model(torch_model):
    return dataclasses.replace(load_model(torch_model[1]), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def questions():
    """Prompts of many lengths with two to four continuations each, one of a single token."""
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(2, 258, rng.integers(low, high + 1)).tolist()

    groups = []
    for options in (2, 4, 3, 2, 4):
        prompt = ids(1, 40)
        groups.append([Pair(prompt, ids(1, 6)) for _ in range(options)])
    return [*groups, [Pair([5, 6, 7], [8]), Pair([5, 6, 7], [9])]]


def theirs(reference, pair):
    """ln p of a continuation, and whether greedy text would be it, from the torch model's logits."""
    ids = torch.tensor([[*pair.prompt, *pair.continuation]])
    with torch.no_grad():
        logits = reference(ids).logits[0, len(pair.prompt) - 1 : -1]
    targets = ids[0, len(pair.prompt) :]
    logprobs = torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])
    return float(logprobs.sum()), bool((logits.argmax(-1) == targets).all())


def flat(questions):
    return [pair for options in questions for pair in options]


def numbers(scores):
    return np.array([score.logprob for row in scores for score in row])


@pytest.fixture(scope="module")
def alone(model, questions):
    with jax.numpy_dtype_promotion("strict"):
        return Scorer.of(model, model.params, budget=256).continuations(flat(questions))


def test_continuations_equal_transformers(torch_model, questions, alone):
    want = [theirs(torch_model[0], pair) for pair in flat(questions)]
    np.testing.assert_allclose([score.logprob for score in alone], [value for value, _ in want], rtol=1e-5, atol=1e-4)
    assert [score.greedy for score in alone] == [greedy for _, greedy in want]
    assert [score.tokens for score in alone] == [len(pair.continuation) for pair in flat(questions)]


def test_greedy_text_is_greedy(torch_model, model):
    scorer = Scorer.of(model, model.params, budget=256)
    prompts = [[3, 4, 5], [17] * 20]
    rows = scorer.write(prompts, 4)
    assert all(score.greedy for score in scorer.continuations([Pair(p, w) for p, w in zip(prompts, rows, strict=True)]))
    ids = torch.tensor([prompts[0]])
    reference = torch_model[0].generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert rows[0] == reference[0, 3:].tolist()


def test_a_prompt_that_is_shared_is_read_once(model, questions, alone):
    scores = Scorer.of(model, model.params, budget=512).options(questions)
    np.testing.assert_allclose(numbers(scores), [score.logprob for score in alone], rtol=1e-5, atol=1e-4)
    assert [score.greedy for row in scores for score in row] == [score.greedy for score in alone]
    apart = [
        [Pair([1, *pair.prompt[1:]], pair.continuation) if i else pair for i, pair in enumerate(q)] for q in questions
    ]
    mixed = Scorer.of(model, model.params, budget=512).options([*questions[:2], *apart[2:]])
    assert [len(row) for row in mixed] == [len(row) for row in questions]
    np.testing.assert_allclose(numbers(mixed[:2]), numbers(scores[:2]), rtol=1e-5, atol=1e-4)


def adapted(model, method):
    params, adapters = sx.attach(jax.random.key(0), model.params, [("q_proj|up_proj|down_proj", method)])
    train, frozen = sx.split(adapters)
    rng = np.random.default_rng(0)
    train = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.standard_normal(leaf.shape) * 0.1, leaf.dtype), train)
    return params, sx.combine(train, frozen)


def test_an_adapter_scores_as_what_it_merges_to(model, questions, alone):
    params, adapters = adapted(model, sx.LoRA(rank=4))
    scores = Scorer.of(model, params, adapters, budget=512).options(questions)
    merged = Scorer.of(model, sx.merge(params, adapters), budget=512).options(questions)
    np.testing.assert_allclose(numbers(scores), numbers(merged), rtol=1e-4, atol=1e-3)
    assert np.abs(numbers(scores) - [score.logprob for score in alone]).max() > 0.1


def test_routed_adapters_are_weighed_by_the_prompt_alone(model, questions):
    params, adapters = sx.attach(jax.random.key(0), model.params, [("self_attn|mlp", sx.MiLoRA(rank=2, top_k=2))])
    train, frozen = sx.split(adapters)
    rng = np.random.default_rng(0)
    train = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.standard_normal(leaf.shape) * 0.2, leaf.dtype), train)
    scorer = Scorer.of(model, params, sx.combine(train, frozen), budget=256)
    assert scorer.routed
    (scores,) = scorer.options([questions[1]])
    for score, pair in zip(scores[:2], questions[1][:2], strict=True):
        tokens = jnp.array([[*pair.prompt, *pair.continuation]], jnp.int32)
        ctx = sx.Context(prompt=(jnp.arange(tokens.shape[1]) < len(pair.prompt))[None].astype(jnp.int32))
        logits = model.apply(params, sx.combine(train, frozen), tokens, ctx=ctx)[0, len(pair.prompt) - 1 : -1]
        targets = tokens[0, len(pair.prompt) :]
        terms = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
        np.testing.assert_allclose(score.logprob, float(terms.sum()), rtol=1e-5, atol=1e-4)


MEANS = {
    "layers": [("q_proj|up_proj|down_proj", sx.Lily(rank=4, experts=3, routing="batch"))],
    "a layer": [sx.Rule("q_proj", sx.Lily(rank=4, routing="batch"), layers=(0,)), ("up_proj", sx.LoRA(rank=2))],
}


def with_means(model, rules, seed=0):
    params, adapters = sx.attach(jax.random.key(seed), model.params, rules)
    train, frozen = sx.split(adapters)
    rng = np.random.default_rng(seed)
    train = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.standard_normal(leaf.shape) * 0.5, leaf.dtype), train)
    return params, sx.combine(train, frozen)


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_over_tokens_is_over_one_text(model, questions, name):
    """Scores do not depend on the budget, on other items, or on whether options share a prompt."""
    params, adapters = with_means(model, MEANS[name])
    pairs = flat(questions)
    expected = np.array([Scorer.of(model, params, adapters).continuations([pair])[0].logprob for pair in pairs])
    for pair, logprob in list(zip(pairs, expected, strict=True))[::3]:
        read = jnp.array([[*pair.prompt, *pair.continuation[:-1]]], jnp.int32)
        logits = jax.jit(model.apply)(params, adapters, read)[0, len(pair.prompt) - 1 :]
        terms = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(logits)), pair.continuation]
        np.testing.assert_allclose(logprob, terms.sum(), rtol=1e-5)
    for budget in (16, 4096):
        scorer = Scorer.of(model, params, adapters, budget=budget)
        for got in (
            [score.logprob for score in scorer.continuations(pairs)],
            [score.logprob for score in scorer.continuations(pairs[::-1])][::-1],
            numbers(scorer.options(questions)),
            numbers(scorer.options([[pair] for pair in pairs])),
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_text_with_means_over_tokens_depends_on_its_prompt_alone(model):
    pairs = [with_means(model, MEANS["layers"], seed) for seed in (0, 1)]
    prompts = [[3, 4, 5], [17] * 20, [9], [3, 4, 6]]
    sharing = scorers(model, *zip(*pairs, strict=True))
    for (params, adapters), shared in zip(pairs, sharing, strict=True):
        for beams in (1, 2):
            alone = [Scorer.of(model, params, adapters).write([prompt], 6, beams=beams)[0] for prompt in prompts]
            for scorer in (Scorer.of(model, params, adapters, budget=16), Scorer.of(model, params, adapters), shared):
                assert scorer.write(prompts, 6, beams=beams) == alone
        (score,) = shared.continuations([Pair([3, 4], [5])])
        (expected,) = Scorer.of(model, params, adapters).continuations([Pair([3, 4], [5])])
        np.testing.assert_allclose(score.logprob, expected.logprob, rtol=1e-5)
    assert [scorer.mates for scorer in sharing] == [None, None]


@pytest.mark.nightly
def test_a_mesh_changes_no_mean_over_tokens(model, questions):
    params, adapters = with_means(model, MEANS["layers"])
    on_one = Scorer.of(model, params, adapters)
    scorer = Scorer.of(model, params, adapters, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(
        numbers(scorer.options(questions[:2])), numbers(on_one.options(questions[:2])), rtol=1e-5, atol=1e-4
    )
    prompts = [[3, 4, 5], [9]]
    for beams in (1, 2):
        assert scorer.write(prompts, 3, beams=beams) == on_one.write(prompts, 3, beams=beams)


def test_four_bits_score_as_the_weights_they_stand_for(model, questions, alone):
    quantised = quantise_base(model.params, "nf4")
    dense = jax.tree.map(
        lambda leaf: leaf.dense() if isinstance(leaf, AbstractWeight) else leaf, quantised, is_leaf=is_weight
    )
    scores = Scorer.of(model, quantised, budget=512).options(questions)
    np.testing.assert_allclose(
        numbers(scores), numbers(Scorer.of(model, dense, budget=512).options(questions)), rtol=1e-4, atol=1e-3
    )
    assert np.abs(numbers(scores) - [score.logprob for score in alone]).max() > 1e-2


@pytest.mark.nightly
def test_a_mesh_changes_nothing(model, questions, alone):
    params, adapters = adapted(model, sx.LoRA(rank=4))
    on_one = Scorer.of(model, params, adapters, budget=512).options(questions)
    scorer = Scorer.of(model, params, adapters, mesh={"data": 2, "fsdp": 2, "tensor": 2}, budget=64)
    np.testing.assert_allclose(numbers(scorer.options(questions)), numbers(on_one), rtol=1e-5, atol=1e-4)
    prompts = [[3, 4, 5], [17] * 20, [9]]
    plain = Scorer.of(model, params, adapters)
    for beams in (1, 3):
        assert scorer.write(prompts, 3, beams=beams) == plain.write(prompts, 3, beams=beams)
    never = ["no text has this"]
    assert scorer.write(prompts, 20, stop=never) == plain.write(prompts, 20, stop=never) == plain.write(prompts, 20)


def test_what_does_not_fit_loses_its_beginning(model):
    scorer, prompt = Scorer.of(model, model.params), list(range(2, 102))
    (cut,), (short,) = (scorer.continuations([Pair(p, [7, 8, 9])]) for p in (prompt, prompt[-62:]))
    assert (cut.cut, short.cut) == (38, 0)
    assert cut.logprob == short.logprob
    assert scorer.options([[Pair(prompt, [7, 8, 9]), Pair(prompt, [7])]])[0][0].cut == 38


def test_rows_have_few_shapes_and_all_are_there():
    rng = np.random.default_rng(0)
    lengths = [(int(n), int(t)) for n, t in zip(rng.integers(1, 500, 1000), rng.integers(1, 9, 1000), strict=True)]
    groups = list(batches(lengths, 512, 4096, multiple=3))
    assert sorted(i for batch in groups for i in batch.members) == list(range(1000))
    assert all(max(lengths[i][0] for i in b.members) <= b.width and len(b.members) <= b.rows for b in groups)
    assert all(max(lengths[i][1] for i in b.members) <= b.continuation and b.rows % 3 == 0 for b in groups)
    assert [len(b.members) == b.rows for b in groups[:-1]] == [True] * (len(groups) - 1)
    assert len({(b.rows, b.width, b.continuation) for b in groups}) <= 14
    assert [padded(n, 512) for n in (1, 17, 33, 65, 97, 500, 600)] == [16, 24, 48, 96, 128, 512, 600]


REFUSED = {
    "empty": ([Pair([], [1])], "at least one token"),
    "vocabulary": ([Pair([1], [258])], "outside the vocabulary of 258"),
    "context": ([Pair([1], [2] * 65)], "65 tokens does not fit the context of 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_are_refused(model, name):
    pairs, message = REFUSED[name]
    with pytest.raises(sx.SboraxError, match=message):
        Scorer.of(model, model.params).continuations(pairs)


def test_a_prompt_and_its_continuation_are_tokenised_as_one_text(model):
    scorer = Scorer.of(model, model.params)
    assert scorer.pair("ab ", "c") == Pair(scorer.encode("ab"), scorer.encode("ab c")[2:])
    assert scorer.pair("", "c") == Pair([0], scorer.encode("c"))
    with pytest.raises(sx.SboraxError, match="no token of its own"):
        scorer.pair("ab", "")


def test_nothing_follows_the_token_that_ends_a_text(model):
    """A tokenizer that appends it to every text does not put it between a prompt and its continuation."""
    ending = tokenizer()
    template = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    ending.backend_tokenizer.post_processor = template
    assert ending("ab")["input_ids"][::3] == [0, 1]
    scorer = Scorer.of(dataclasses.replace(model, tokenizer=ending), model.params)
    text = ending("a b", add_special_tokens=False)["input_ids"]
    assert scorer.pair("a", " b") == Pair([0, text[0]], text[1:])
    assert scorer.encode("a b") == encode("a b", None, ending) == [0, *text]
    assert scorer.encode("a b", special=False) == text
    # A text that ends with it by itself keeps it.
    assert scorer.encode("a<|im_end|>") == [0, text[0], 1]
