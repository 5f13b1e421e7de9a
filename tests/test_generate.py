"""Text over the cache against transformers, and the ways to draw a token."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from at_hand import STORIES
from tiny_model import write_model

import sborax as sx
from sborax.cli.chat import AnswerPrinter
from sborax.cli.quickstart import _answers
from sborax.data.template import chat_ends
from sborax.evaluate.scorer import Scorer
from sborax.evaluate.written import Written
from sborax.models import generate, load_model
from sborax.models.beam import beam_search
from sborax.models.by_row import generate_by_row
from sborax.models.generate import STRIDE, Choice, _decode, choose, narrowed
from sborax.models.tokenizer import finished, text_of, until

pytestmark = pytest.mark.usefixtures("strict")
TEXTS = ("Once upon a time", "The little dog went to the park because he wanted to", "One day, Lily saw a big red")
NEW = 64


@pytest.fixture(scope="module")
def model(llama):
    return load_model(llama)


@pytest.fixture(scope="module")
def prompts(model):
    return [model.tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def greedy(model, prompts):
    # What is traced under another promotion rule is compiled again.
    with jax.numpy_dtype_promotion("strict"):
        return generate(model, model.params, None, prompts, NEW)


@pytest.fixture(scope="module")
def texts(model, greedy):
    texts = model.tokenizer.batch_decode(greedy, skip_special_tokens=True)
    assert all(len(text) >= NEW and len(set(text)) > 9 for text in texts)
    return texts


def test_greedy_text_equals_transformers(llama, model, prompts, greedy):
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert len({len(prompt) for prompt in prompts}) == 3
    for prompt, new in zip(prompts, greedy, strict=True):
        ids = torch.tensor([prompt])
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        assert new == theirs[0, len(prompt) :].tolist()
        assert len(new) == NEW
    if llama in STORIES:
        assert "a little girl named Lily" in model.tokenizer.decode(greedy[0])


def test_the_side_of_the_padding_does_not_matter(model, prompts, greedy):
    assert generate(model, model.params, None, prompts, NEW, padding="right") == greedy


def test_each_row_ends_at_its_own_end_token(model, prompts, greedy):
    first, last = greedy[0][4], greedy[1][-1]
    cut = generate(model, model.params, None, prompts, NEW, eos=[first, last])
    for row, full in zip(cut, greedy, strict=True):
        ends = [place for place, token in enumerate(full) if token in (first, last)]
        assert row == full[: ends[0] + 1 if ends else NEW]
    assert len({len(row) for row in cut}) > 1
    assert generate(model, model.params, None, prompts[:1], 1) == [greedy[0][:1]]


def test_text_also_ends_at_the_end_token_of_the_tokenizer(model, prompts, greedy):
    """Training appends that token, and the config may name others, or none."""
    of_config, of_tokenizer = greedy[1][7], greedy[0][4]
    words = copy.deepcopy(model.tokenizer)
    words.eos_token = words.convert_ids_to_tokens(of_tokenizer)
    config = dataclasses.replace(model.config, eos_token_id=(of_config,))
    other = dataclasses.replace(model, config=config, tokenizer=words)
    ends = other.end_tokens
    assert ends == (of_config, of_tokenizer)
    assert dataclasses.replace(other, tokenizer=None).end_tokens == (of_config,)
    expected = generate(model, model.params, None, prompts, NEW, eos=ends)
    assert expected == generate(other, other.params, None, prompts, NEW) != greedy
    assert expected == generate_by_row(other, [other.params], [None], prompts, [0] * 3, NEW)
    assert expected == Scorer.of(other, other.params).write(prompts, NEW)
    assert expected == Scorer.of(model, model.params).write(prompts, NEW, eos=ends)
    beams = beam_search(model, model.params, None, prompts, NEW, 2, eos=ends)
    assert beams == beam_search(other, other.params, None, prompts, NEW, 2)
    assert beams == Scorer.of(model, model.params).write(prompts, NEW, beams=2, eos=ends)


@pytest.fixture
def chatty(tmp_path):
    """A model with a chat template, and what it writes after "Well" up to its end mark, which no config names."""
    model = load_model(write_model(tmp_path / "model", tie_word_embeddings=False))
    words = copy.deepcopy(model.tokenizer)
    (text,) = generate(model, model.params, None, [words("Well")["input_ids"]], 8, eos=[])
    end = 2
    mark = words.convert_ids_to_tokens(text[end])
    words.add_tokens([mark])
    words.chat_template = (
        "{% for turn in messages %}{{ turn.content }}"
        f"{{% if turn.role == 'assistant' %}}{mark}{{% endif %}}{{% endfor %}}"
    )
    assert text[end] not in (*text[:end], *model.config.eos_token_id) and chat_ends(words)[-1] == text[end]
    return dataclasses.replace(model, tokenizer=words), text[: end + 1]


@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_in_a_chat_ends_where_its_turn_does(chatty, beams):
    model, greedy = chatty
    record = {"instruction": "Well", "output": "", "answer": ""}
    task = Written(
        name="talk", data="", about="", template="chat", new_tokens=8, beams=beams, extract=str, right=lambda *_: True
    )
    (item,) = task.measure([record], Scorer.of(model, model.params), 0).items
    prompt = [model.tokenizer("Well")["input_ids"]]
    ends = [*model.end_tokens, greedy[-1]]
    if beams > 1:
        (text,) = beam_search(model, model.params, None, prompt, 8, 2, eos=ends)
        assert [text] != beam_search(model, model.params, None, prompt, 8, 2)
        assert item["text"] == text_of(model.tokenizer, text)
        return
    assert item["text"] == text_of(model.tokenizer, greedy)
    (answer,) = _answers(model, model.params, None, "chat", [record])
    assert answer == " ".join(item["text"].split())
    # A prompt without the template goes on.
    plain = dataclasses.replace(task, template="{instruction}").measure([record], Scorer.of(model, model.params), 0)
    assert plain.items[0]["text"].startswith(item["text"]) and plain.items[0]["text"] != item["text"]


def test_adapted_text_equals_merged_text(model, prompts, greedy):
    params, adapters = sx.attach(jax.random.key(0), model.params, [("q_proj|up_proj", sx.LoRA(rank=2, alpha=4.0))])
    train, frozen = sx.split(adapters)
    rng = np.random.default_rng(0)
    train = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.1, leaf.dtype), train)
    adapters = sx.combine(train, frozen)
    text = generate(model, params, adapters, prompts, NEW)
    assert text != greedy
    assert text == generate(model, jax.jit(sx.merge)(params, adapters), None, prompts, NEW)


def test_sampling_repeats_by_key_and_narrows_with_temperature(model, prompts, greedy):
    def sample(seed, temperature):
        return generate(
            model, model.params, None, prompts, NEW, key=jax.random.key(seed), temperature=temperature, top_k=20
        )

    assert sample(0, 1.0) == sample(0, 1.0) != sample(1, 1.0)
    assert sample(0, 1e-4) == greedy


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (4, 0.6)])
def test_tokens_are_drawn_as_transformers_would(top_k, top_p):
    logits = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32) * 2
    scores = torch.tensor(logits) / 1.5
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(torch.zeros(2, 1), scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(torch.zeros(2, 1), scores)
    want = torch.softmax(scores, -1).numpy()
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(
        jax.vmap(lambda key: choose(jnp.asarray(logits), Choice(False, top_k, top_p), jnp.float32(1.5), key))
    )
    tokens = np.asarray(draw(keys))
    got = np.stack([np.bincount(tokens[:, row], minlength=9) / len(keys) for row in range(2)])
    assert ((got > 0) == (want > 0)).all()
    np.testing.assert_allclose(got, want, atol=0.03)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.3), (0, 0.95), (40, 0.8), (7, 0.05)])
def test_what_may_be_drawn_is_what_transformers_leaves(top_k, top_p):
    """Every logit after temperature, top-k and top-p, as transformers' processors have it."""
    logits = np.random.default_rng(1).standard_normal((6, 200)).astype(np.float32) * 3
    want = transformers.TemperatureLogitsWarper(0.7)(torch.zeros(6, 1), torch.tensor(logits))
    if top_k:
        want = transformers.TopKLogitsWarper(top_k)(torch.zeros(6, 1), want)
    if top_p < 1:
        want = transformers.TopPLogitsWarper(top_p)(torch.zeros(6, 1), want)
    got = narrowed(jnp.asarray(logits), Choice(False, top_k, top_p), jnp.float32(0.7))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    assert top_p < 1 or top_k or np.isfinite(got).all()


def test_stop_strings_end_each_row(llama, model, prompts, texts):
    """Rows of one batch end at different stop strings, where transformers ends each; one that has none goes on."""
    stop = [texts[0][9:14], texts[1][20:24]]
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama)
    lengths = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt])
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
            stop_strings=stop, tokenizer=model.tokenizer,
        )  # fmt: skip
        ended = model.tokenizer.decode(theirs[0, len(prompt) :], skip_special_tokens=True)
        assert until(text, stop) == until(ended, stop)
        lengths.append((len(until(text, stop)), len(text)))
    assert len({cut for cut, _ in lengths}) == 3 and any(cut < full for cut, full in lengths), lengths
    assert until("a, b. c", ["c", ", ", "."]) == "a" and until("abc", []) == until("abc", [""]) == "abc"
    assert finished(model.tokenizer, [""])(prompts) == [False] * 3


def test_texts_are_looked_at_while_they_are_written(model, prompts, greedy):
    """The look says which are finished; all end once each is, at the stride after the last or at its end token."""
    sizes = []

    def look(at):
        def finished(texts):
            sizes.append([len(text) for text in texts])
            return [len(text) >= enough for text, enough in zip(texts, at, strict=True)]

        return finished

    cut = generate(model, model.params, None, prompts, NEW, finished=look((1, 2 * STRIDE + 1, STRIDE)))
    assert cut == [row[: 3 * STRIDE] for row in greedy] and sizes == [[n * STRIDE] * 3 for n in (1, 2, 3)]
    assert generate(model, model.params, None, prompts, NEW, finished=look((NEW + 1,) * 3)) == greedy
    end = greedy[0][4]
    ended = generate(model, model.params, None, prompts, NEW, eos=[end])
    assert generate(model, model.params, None, prompts[:1], NEW, eos=[end], finished=look((NEW,))) == ended[:1]
    sizes.clear()
    odd = STRIDE + 3
    assert generate(model, model.params, None, prompts, odd, finished=look((odd,) * 3)) == [row[:odd] for row in greedy]
    assert sizes == [[STRIDE] * 3, [odd] * 3]


def test_stop_strings_end_what_a_scorer_writes(model, prompts, greedy, texts):
    stop = [text[5] for text in texts]
    rows = Scorer.of(model, model.params).write(prompts, NEW, stop=stop)
    for new, full, text in zip(rows, greedy, texts, strict=True):
        assert new == full[: len(new)] and len(new) < NEW
        assert until(model.tokenizer.decode(new, skip_special_tokens=True), stop) == until(text, stop)


@pytest.mark.parametrize("stops", ["none", "two", "long", "not there"])
def test_an_answer_is_shown_as_it_grows(model, greedy, texts, stops, capsys):
    """No letter is printed that is not in the answer, none is left out, and most are there before the end."""
    two, long = (texts[0][9:14], texts[1][20:24]), texts[0][11:30]
    stop = {"none": (), "two": two, "long": (long,), "not there": ("\n\n",)}[stops]
    for tokens in greedy:
        answer = until(model.tokenizer.decode(tokens, skip_special_tokens=True), stop)
        printer = AnswerPrinter(model.tokenizer, stop)
        for size in range(1, len(tokens) + 1):
            text = model.tokenizer.decode(tokens[:size], skip_special_tokens=True)
            assert printer([tokens[:size]]) == [any(mark in text for mark in stop)]
        printed = capsys.readouterr().out
        assert len(printed) == printer.length and printed + answer[printer.length :] == answer
        assert (
            len(answer) - len(printed) <= max(map(len, stop), default=0) + max(map(len, answer.split()), default=0) + 1
        )


def test_prompts_of_similar_length_share_a_compilation(model, prompts, greedy):
    assert generate(model, model.params, None, prompts, NEW) == greedy
    compiled = _decode._cache_size()
    second = generate(model, model.params, None, [prompt[:-1] for prompt in prompts], NEW)
    assert second != greedy and _decode._cache_size() == compiled > 0


ERRORS = {
    "empty": ({"prompts": [[1], []]}, "at least one token"),
    "vocabulary": ({"prompts": [[1, 512]]}, "outside the vocabulary of"),
    "context": ({"prompts": [[1] * 500]}, "500 tokens and 64 new ones do not fit the context of 512"),
    "key": ({"temperature": 0.5}, "give a key"),
    "temperature": ({"temperature": float("nan")}, "got nan, 0 and 1.0"),
    "top_p": ({"top_p": 0.0}, "got 0.0, 0 and 0.0"),
    "padding": ({"padding": "middle"}, "left or right"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_calls_that_are_refused(model, name):
    options, message = ERRORS[name]
    with pytest.raises(sx.SboraxError, match=message):
        generate(model, model.params, None, **({"prompts": [[1, 2]], "max_new_tokens": NEW} | options))
