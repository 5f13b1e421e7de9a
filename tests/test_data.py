"""From files to batches: what is read, what counts, what is dropped, and in which order."""

import csv
import json
import os
import threading

import datasets
import numpy as np
import pytest
from at_hand import ALPACA
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.packing import both, useful
from sborax import Data, SboraxError
from sborax.data import samples
from sborax.data.batches import arrange, in_order, pack, shuffled
from sborax.data.samples import Sample, load_samples
from sborax.data.source import find, read
from sborax.data.stream import stream
from sborax.data.template import prompt_of, render
from sborax.models.gguf import open_gguf
from sborax.models.tokenizer import tokens_of
from tests.tiny_model import tokenizer

END = 1
PLAIN = {"template": "{q}?", "answer": "{a}"}


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def write(tmp_path, records, name="data.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def answer(sample, words):
    return words.decode(sample.tokens[sample.counts].tolist())


def test_sources_agree(tmp_path):
    records = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(3)]
    write(tmp_path, records, "x.jsonl")
    (tmp_path / "x.json").write_text(json.dumps(records))
    write(tmp_path, records, "lines.json")
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(records)
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.json", "lines.json", "x.csv", "x.parquet"):
        rows = read(str(tmp_path / name))
        assert [dict(rows[i]) for i in range(len(rows))] == records, name


def test_names_under_sborax_data_and_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("SBORAX_DATA", str(tmp_path))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", [{"a": 1}], "train.jsonl")
    write(tmp_path / "set", [{"a": 2}], "test.jsonl")
    assert read("set")[0] == {"a": 1}
    assert read("set", "test")[0] == {"a": 2}
    assert read("set/test.jsonl")[0] == {"a": 2}
    with pytest.raises(SboraxError, match="no file is named like split 'dev'; name one: test.jsonl, train.jsonl"):
        read("set", "dev")
    # Several directories, the first before the others.
    (tmp_path / "more" / "set").mkdir(parents=True)
    (tmp_path / "more" / "other").mkdir()
    write(tmp_path / "more" / "set", [{"a": 3}], "train.jsonl")
    write(tmp_path / "more" / "other", [{"a": 4}], "train.jsonl")
    monkeypatch.setenv("SBORAX_DATA", os.pathsep.join((str(tmp_path), str(tmp_path / "more"))))
    assert (read("set")[0], read("other")[0]) == ({"a": 1}, {"a": 4})


@pytest.mark.parametrize(
    "name, split, is_read",
    [
        ("data.jsonl", "test", True),
        ("Train.jsonl", "train", True),
        ("train_10k.jsonl", "train", True),
        ("valid.jsonl", "validation", True),
        ("validation.jsonl", "valid", True),
        ("train.jsonl", "validation", False),
        ("test.jsonl", "dev", False),
        ("Test_set.csv", "train", False),
        ("dev.tsv", "train", False),
        ("evaluation.json", "train", False),
    ],
)
def test_the_only_file_of_a_folder_is_no_other_split(tmp_path, name, split, is_read):
    (tmp_path / name).write_text('{"q": 1}')
    if is_read:
        assert find(str(tmp_path), split) == tmp_path / name
        return
    with pytest.raises(SboraxError, match=f"no file is named like split '{split}'; name one: {name}$"):
        read(str(tmp_path), split)


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("x.jsonl", '{"q": 1}\n\n{"q": 2\n', "x.jsonl: line 3 is not JSON"),
        ("x.jsonl", '{"q": 1}\n[1]\n', "line 2 is not an object"),
        ("x.json", "[1, 2", "line 1 is not JSON"),
        ("x.json", "[1, 2]", "entry 0 is not an object"),
        ("x.jsonl", "", "the data set is empty"),
        ("x.json", "[]", "the data set is empty"),
        ("x.csv", "", "the data set is empty"),
        ("x.xyz", "1", "unknown kind of data"),
    ],
)
def test_unreadable_data(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(SboraxError, match=problem) as caught:
        read(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_data(tmp_path):
    with pytest.raises(SboraxError, match="no such data file"):
        read(str(tmp_path / "absent.jsonl"))


def test_only_the_answer_and_its_end_count(tmp_path, words):
    name = write(tmp_path, [{"q": "why", "a": "because"}])
    (sample,), report = load_samples(Data(name, **PLAIN), words, END, 512)
    assert words.decode(sample.tokens.tolist()) == "why?because<|im_end|>"
    assert answer(sample, words) == "because<|im_end|>"
    (full,), _ = load_samples(Data(name, loss_on="all", **PLAIN), words, END, 512)
    assert full.counts.all()
    assert (report.records, report.samples, report.too_long) == (1, 1, 0)


def test_alpaca_with_and_without_input(tmp_path, words):
    records = [{"instruction": "Add.", "input": context, "output": "Done"} for context in ("", "1 and 2")]
    name = write(tmp_path, records)
    samples, _ = load_samples(Data(name, max_length=400), words, END, 512)
    texts = [words.decode(sample.tokens.tolist()) for sample in samples]
    assert "### Input" not in texts[0] and "### Input:\n1 and 2\n\n### Response:\nDone" in texts[1]
    assert [answer(sample, words) for sample in samples] == ["Done<|im_end|>"] * 2
    assert texts[0].startswith(prompt_of("alpaca", records[0], words))


def test_llm_adapters_to_the_letter(words):
    """Trailing blanks and margins as they stand in the authors' finetune.py and commonsense_evaluate.py."""
    plain = {"instruction": "Add.", "input": "", "output": "Done", "answer": "Done"}
    first = "Below is an instruction that describes a task"
    write_it = "Write a response that appropriately completes the request."
    margin = " " * 16
    trained = "".join(piece.text for piece in render("llm_adapters", "", plain, words).pieces)
    assert trained == (
        f"{first}. {write_it}  \n\n{margin}### Instruction:\n{margin}Add.\n{margin}\n"
        f"{margin}### Response:\n{margin}Done"
    )
    assert prompt_of("llm_adapters", plain, words) == (
        f"{first}. {write_it} \n\n{margin}### Instruction:\n{margin}Add.\n\n{margin}### Response:\n{margin}"
    )
    record = plain | {"input": "1 and 2"}
    paired = f"{first}, paired with an input that provides further context. {write_it}"
    prompt, answer = render("llm_adapters", "", record, words).pieces
    assert (answer.text, answer.answer, prompt.answer) == ("Done", True, False)
    assert prompt.text == (
        f"{paired} \n\n{margin}### Instruction:\n{margin}Add.\n{margin}\n"
        f"{margin}### Input:\n{margin}1 and 2\n{margin}\n{margin}### Response:\n{margin}"
    )
    assert prompt_of("llm_adapters", record, words) == (
        f"{paired}\n\n{margin}### Instruction:\n{margin}Add.\n\n"
        f"{margin}### Input:\n{margin}1 and 2\n\n{margin}### Response:\n{margin}"
    )


def test_chat_counts_every_assistant_turn(tmp_path, words):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long")]
    name = write(tmp_path, [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    (sample,), _ = load_samples(Data(name, template="chat"), words, END, 512)
    assert answer(sample, words) == "hello<|im_end|>so long<|im_end|>"
    messages = [{"role": "user", "content": "hi"}]
    assert prompt_of("chat", {"messages": messages}, words) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "data, problem",
    [
        ({"template": "{question}"}, "line 1: there is no column 'question'; the columns are q, a"),
        ({"template": "alpaca"}, "no column 'instruction'"),
        ({"template": "alpacca"}, "'alpacca' is not one of alpaca, llm_adapters, chat, text"),
        ({"template": "{q"}, "not a format string"),
        ({"template": "chat"}, "a chat needs column 'messages'"),
        ({"max_length": 400}, "more than the model's context of 128"),
        ({"max_length": 8}, "no sample is left of 1: 1 are longer than data.max_length = 8"),
    ],
)
def test_unusable_data(tmp_path, words, data, problem):
    name = write(tmp_path, [{"q": "question", "a": "answer"}])
    with pytest.raises(SboraxError, match=problem):
        load_samples(Data(name, **({**PLAIN, "max_length": 64} | data)), words, END, 128)


def test_long_samples_are_dropped_cut_or_split_and_always_counted(tmp_path, words):
    records = [{"q": "a", "a": "b" * length} for length in (3, 30, 4)]
    name = write(tmp_path, records)

    def load(overlong):
        return load_samples(Data(name, max_length=10, overlong=overlong, **PLAIN), words, END, 128)

    short, report = load("drop")
    assert [len(sample.tokens) for sample in short] == [6, 7] and report.too_long == 1
    assert "2 samples of 3 records, 1 too long (dropped)" in str(report)
    cut, report = load("truncate")
    assert [len(sample.tokens) for sample in cut] == [6, 10, 7] and report.too_long == 1
    windows, report = load("split")
    assert report.too_long == 1
    # 33 tokens: each but the first is the target of exactly one window.
    parts = windows[1:-1]
    assert all(len(part.tokens) <= 10 for part in parts)
    joined = np.concatenate([parts[0].tokens[:1], *(part.tokens[1:] for part in parts)])
    assert words.decode(joined.tolist()) == "a?" + "b" * 30 + "<|im_end|>"


def test_samples_without_an_answer_are_dropped_and_counted(tmp_path, words):
    name = write(tmp_path, [{"q": "a", "a": ""}, {"q": "a", "a": None}, {"q": "a", "a": "b"}])
    samples, report = load_samples(Data(name, **PLAIN), words, END, 512)
    assert len(samples) == 1 and report.without_answer == 2


@pytest.mark.parametrize(
    "pair", [("instruction", "output"), ("prompt", "completion"), ("question", "answer")], ids="-".join
)
def test_null_is_the_empty_text_in_a_chat(tmp_path, words, pair):
    name = write(tmp_path, [dict(zip(pair, cells, strict=True)) for cells in (("a", None), (None, "b"), ("a", ""))])
    (sample,), report = load_samples(Data(name, template="chat"), words, END, 512)
    text = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert words.decode(sample.tokens.tolist()) == text and answer(sample, words) == "b<|im_end|>"
    assert report.without_answer == 2
    record = dict(zip(pair, ("a", None), strict=True))
    assert prompt_of("chat", record, words) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_an_empty_turn_of_the_assistant_is_no_answer(tmp_path, words):
    def turns(*answers):
        return {"messages": [turn for text in answers for turn in (
            {"role": "user", "content": "a"}, {"role": "assistant", "content": text, "tool_calls": None})]}  # fmt: skip

    name = write(tmp_path, [turns(""), turns("", "b"), turns("", "")])
    (sample,), report = load_samples(Data(name, template="chat"), words, END, 512)
    assert answer(sample, words) == "b<|im_end|>" and report.without_answer == 2
    everything, report = load_samples(Data(name, template="chat", loss_on="all"), words, END, 512)
    assert all(sample.counts.all() for sample in everything) and report.samples == 3
    with pytest.raises(SboraxError, match="the first message is the assistant's"):
        render("chat", "", {"messages": turns("")["messages"][1:]}, words)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "trimmed"])
def merging(request):
    """A tokenizer that makes one token of a space and a b, or of two line breaks.

    Some leave white space out of a token's offsets (`trimmed`).
    """
    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġb", "ĊĊ"]
    bare = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, [("Ġ", "b"), ("Ċ", "Ċ")]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    if request.param:
        bare.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|end|>")


ADVICE = " (move the space from the end of the template to the beginning of answer)"


@pytest.mark.parametrize(
    ("options", "answers", "joined", "advice"),
    [
        ({"template": "{q}: ", "answer": "{a}"}, ["b", "c", "b c"], 2, ADVICE),
        ({"template": "{q}: ", "answer": "{a}", "max_length": 4, "overlong": "split"}, ["b", "c", "b c c"], 2, ADVICE),
        ({"template": "{q}: ", "answer": "{a}", "max_length": 5}, ["b", "c", "b c c c"], 1, ADVICE),
        ({"template": "{q}: ", "answer": "{a}", "loss_on": "all"}, ["b"], 0, None),
        ({"template": "{q}:", "answer": " {a}"}, ["b", "c", "b c"], 0, None),
        ({"template": "alpaca"}, ["b", "\n"], 1, ""),
        ({"template": "text"}, ["b"], 0, None),
    ],
)  # fmt: skip
def test_tokens_that_span_prompt_and_answer_are_counted(tmp_path, merging, options, answers, joined, advice):
    """After the prompt alone a model would begin with another token than it learnt."""
    records = [{"q": "q", "a": text, "instruction": "q", "output": text, "text": text} for text in answers]
    data = Data(write(tmp_path, records), **options)
    samples, report = load_samples(data, merging, 0, 512)
    assert report.joined == joined
    tail = [] if advice is None else [f"{joined} with a token that spans prompt and answer{advice}"]
    assert str(report).split(", ")[2:] == tail
    if options == {"template": "{q}: ", "answer": "{a}"}:
        prompt = merging(prompt_of(data.template, records[0], merging))["input_ids"]
        assert samples[0].tokens[: len(prompt)].tolist() != prompt
        assert samples[1].tokens[: len(prompt)].tolist() == prompt


def some_samples(lengths):
    rng = np.random.default_rng(0)
    # Ids that look like padding: masks come from lengths alone.
    return [Sample(rng.integers(0, 3, n).astype(np.int32), rng.integers(0, 2, n).astype(bool)) for n in lengths]


@pytest.mark.parametrize("packing", [False, True])
def test_batches_hold_every_token_once(packing):
    samples = some_samples([5, 9, 3, 12, 7, 2, 11])
    rows = arrange(samples, Data("x", max_length=12, packing=packing))
    batches = in_order(rows, 2)
    tokens = np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in batches])
    counted = np.concatenate([batch["targets"][batch["counts"]] for batch in batches])
    order = [number for row in rows.rows for number in row]
    np.testing.assert_array_equal(tokens, np.concatenate([samples[i].tokens[:-1] for i in order]))
    np.testing.assert_array_equal(
        counted, np.concatenate([samples[i].tokens[1:][samples[i].counts[1:]] for i in order])
    )
    for batch in batches:
        assert batch["tokens"].shape[1] in rows.buckets
        assert not batch["counts"][batch["segments"] == 0].any()


def test_packed_rows_keep_samples_apart():
    samples = some_samples([5, 4, 6])
    (batch,) = in_order(arrange(samples, Data("x", max_length=12, packing=True)), 1)
    np.testing.assert_array_equal(batch["segments"][0], [1] * 4 + [2] * 3 + [3] * 5)


def test_packing_fills_rows():
    lengths = np.random.default_rng(0).integers(1, 60, 500).tolist()
    rows = pack(lengths, 64)
    assert sorted(number for row in rows for number in row) == list(range(500))
    loads = [sum(lengths[number] for number in row) for row in rows]
    assert max(loads) <= 64 and sum(loads) / (64 * len(rows)) > 0.9


def test_row_lengths_are_few():
    rows = arrange(some_samples(range(2, 200)), Data("x", max_length=256))
    assert rows.buckets == (64, 112, 160, 208) or len(rows.buckets) <= 4
    with pytest.raises(SboraxError, match="data.buckets: the longest row has 198 tokens, the largest bucket only 64"):
        arrange(some_samples(range(2, 200)), Data("x", max_length=256, buckets=(32, 64)))


def test_order_is_a_function_of_seed_and_step():
    rows = arrange(some_samples([4] * 10), Data("x", max_length=16))
    first, second, third = (shuffled(rows, 2, 2, seed) for seed in (0, 0, 1))
    places = [[first.order[i] for i in range(start, start + 10)] for start in (0, 10)]
    assert sorted(places[0]) == sorted(places[1]) == list(range(10)) and places[0] != places[1]
    for step in (7, 3):
        for name, array in first[step].items():
            np.testing.assert_array_equal(array, second[step][name])
    assert [third.order[i] for i in range(10)] != places[0]
    assert first[0]["tokens"].shape == (2, 2, rows.buckets[0])
    assert first.steps(1.0) == 3 and first.position(3) == (1, 2)


def test_batches_made_ahead_are_those_of_their_steps():
    rows = arrange(some_samples(range(2, 30)), Data("x", max_length=32, packing=True))
    batches = shuffled(rows, 3, 2, 0)
    with stream(batches.__getitem__, 5, 45) as queue:
        for step, batch in enumerate(queue, start=5):
            for name, array in batches[step].items():
                np.testing.assert_array_equal(batch[name], array)
    assert step == 44


def test_a_batch_that_cannot_be_made_stops_its_step_and_no_earlier_one():
    def make(step):
        if step == 3:
            raise SboraxError("sample 7 cannot be read")
        return {"tokens": np.full(1, step)}

    with stream(make, 0, 9) as queue:
        assert [next(queue)["tokens"][0] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(SboraxError, match="^sample 7 cannot be read$"):
            next(queue)
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=10)
            assert not thread.is_alive()


ALPACA_LENGTHS = (
    *(47, 55, 61, 64, 68, 72, 74, 77, 80, 83, 87, 91, 95, 101, 108, 117, 124, 133, 144, 152, 160, 169, 177, 188, 203),
    *(217, 229, 240, 255, 276, 294, 305, 322, 338, 355, 368, 390, 405, 424, 453, 511),
)
"""Quantiles, 1/40 apart, of the lengths of 974 Alpaca samples (LLaMA-Factory's alpaca_en_demo), SmolLM2's tokenizer."""


def test_packing_halves_the_rows_of_alpaca():
    lengths = np.quantile(ALPACA_LENGTHS, np.random.default_rng(0).random(974)).astype(int)
    rows = both(some_samples(lengths))
    assert useful(rows["packed"]) > 2 * useful(rows["padded"]) and useful(rows["packed"]) > 0.94 * 512


def write_alpaca(file):
    """999 records in Alpaca's format, 974 of them as long as Alpaca's by SmolLM2's tokenizer, the others longer."""
    lengths = np.rint(np.quantile(ALPACA_LENGTHS, np.linspace(0, 1, 974))).astype(int)
    sizes = np.random.default_rng(0).permutation([*lengths, *[600] * 25])
    pairs = [{"instruction": "Go on.", "input": "", "output": "on" + " and" * (n - PROMPT)} for n in sizes.tolist()]
    file.write_text(json.dumps(pairs))
    return file


PROMPT = 35
"""Tokens of such a record without its repeated word."""


@pytest.mark.nightly
@pytest.mark.parametrize("real", [None, *ALPACA], ids=lambda place: place.name if place else "made up")
def test_packing_halves_the_rows_of_alpaca_records(real, smollm2, tmp_path):
    place = real or write_alpaca(tmp_path / "alpaca.json")
    words = open_gguf(smollm2).tokenizer()
    samples, report = load_samples(Data(str(place)), words, words.eos_token_id, 2048)
    assert str(report) == "974 samples of 999 records, 25 too long (dropped)"
    lengths = [len(sample.tokens) for sample in samples]
    np.testing.assert_allclose(np.quantile(lengths, np.linspace(0, 1, 41)), ALPACA_LENGTHS, atol=0.5)
    rows = both(samples)
    assert useful(rows["packed"]) > 2.4 * useful(rows["padded"])


@pytest.mark.parametrize(
    "overlong, lengths, limit, samples, records",
    [
        ("split", [100], 3, 3, 1),
        ("split", [10, 100, 10], 3, 3, 2),
        ("drop", [100, 10, 100, 10, 10], 2, 2, 4),
        ("drop", [10, 10], 5, 2, 2),
        ("truncate", [100, 10, 10], 2, 2, 2),
    ],
)
def test_limit_is_a_number_of_samples(tmp_path, words, overlong, lengths, limit, samples, records):
    file = write(tmp_path, [{"text": "x" * length} for length in lengths])
    data = Data(file, template="text", max_length=20, overlong=overlong, limit=limit)
    subset, report = load_samples(data, words, END, 128)
    assert (len(subset), report.samples, report.records) == (samples, samples, records)
    everything, _ = load_samples(Data(file, template="text", max_length=20, overlong=overlong), words, END, 128)
    for sample, expected in zip(subset, everything, strict=False):
        np.testing.assert_array_equal(sample.tokens, expected.tokens)


def test_records_in_memory(words):
    data = Data([{"q": "1", "a": "2"}], max_length=64, **PLAIN)
    assert [answer(sample, words) for sample in load_samples(data, words, END, 128)[0]] == ["2<|im_end|>"]
    with pytest.raises(SboraxError, match="give a list of dicts of columns"):
        Data([])
    with pytest.raises(SboraxError, match="data: record 0: there is no column 'q'"):
        load_samples(Data([{"a": "2"}], max_length=64, **PLAIN), words, END, 128)


def test_samples_are_those_of_smaller_groups(tmp_path, words, monkeypatch):
    """How many records are tokenised at once is a matter of memory alone."""
    name = write(tmp_path, [{"q": "q" * i, "a": "a" * (i + 1)} for i in range(9)])
    sizes = []

    def counted(tokenizer, texts, **options):
        sizes.append(len(texts))
        return tokens_of(tokenizer, texts, **options)

    monkeypatch.setattr(samples, "tokens_of", counted)
    at_once, _ = load_samples(Data(name, **PLAIN), words, END, 2048)
    monkeypatch.setattr(samples, "_LETTERS", 12)
    in_groups, _ = load_samples(Data(name, **PLAIN), words, END, 2048)
    assert sizes[0] == 9 == sum(sizes[1:]) and len(sizes) > 4
    for sample, expected in zip(at_once, in_groups, strict=True):
        np.testing.assert_array_equal(sample.tokens, expected.tokens)
        np.testing.assert_array_equal(sample.counts, expected.counts)
