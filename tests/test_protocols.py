"""The papers' protocols: their prompts letter by letter, and what they find in a text."""

import math

import numpy as np
import pytest

from sborax.adapters.core import SboraxError
from sborax.data.template import LLM_ADAPTERS_ASKED, prompt_of
from sborax.evaluate import TASKS, chosen, metamath, nlg
from sborax.evaluate.choice import _macro, f1, mcc, mmlu_prompt
from sborax.evaluate.glue import rows
from sborax.evaluate.instructions import labels, last_number, parse, same_number
from sborax.evaluate.perplexity import paragraphs, windows
from sborax.evaluate.run import draw_indices, overlap
from sborax.evaluate.task import jackknife, mean

KNOWN = {task.name: task for task in TASKS}
ARC = {
    "instruction": "Please choose the correct answer to the question: Which word, Answer1: or not, is a colour?\n\n"
    "Answer1: red Answer2: loud Answer3: flat\n\nAnswer format: answer1/answer2/answer3",
    "input": "", "output": "the correct answer is answer1", "answer": "answer1",
}  # fmt: skip
BOOLQ = {
    "instruction": "Please answer the following question with true or false, question: is snow cold?\n\n"
    "Answer format: true/false",
    "answer": "true",
}
PIQA = {
    "instruction": "Please choose the correct solution to the question: dry hands\n\nSolution1: use a towel \n\n"
    "Solution2: use a lamp: hot \n\nAnswer format: solution1/solution2",
    "answer": "solution2",
}
WINOGRANDE = {
    "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: The cup "
    "held more than the jar as the _ was large.\n\nOption1: cup Option2: jar Answer format: option1/option2",
    "answer": "option1",
}
HELLASWAG = {
    "instruction": "Please choose the correct ending to complete the given sentence: Baking: She opens the oven. She"
    "\n\nEnding1: sings. Ending2: takes out bread. Ending3: leaves. Ending4: eats it.\n\n"
    "Answer format: ending1/ending2/ending3/ending4",
    "answer": "ending2",
}


def test_the_prompt_of_llm_adapters_has_every_blank():
    assert prompt_of(LLM_ADAPTERS_ASKED, {"instruction": "Add 1\nand 2."}, None) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"
        "\n                ### Instruction:\n                Add 1\nand 2.\n\n                ### Response:\n"
        "                "
    )
    for name in ("llm_adapters_boolq", "llm_adapters_gsm8k", "llm_adapters_aqua"):
        assert KNOWN[name].template == LLM_ADAPTERS_ASKED
    assert (KNOWN["llm_adapters_boolq"].new_tokens, KNOWN["llm_adapters_gsm8k"].new_tokens) == (32, 256)


WRITTEN = [
    ("llm_adapters_boolq", "the correct answer is true, not false", "true"),
    ("llm_adapters_boolq", "True", ""),
    ("llm_adapters_piqa", "the correct answer is solution2", "solution2"),
    ("llm_adapters_arc_easy", "answer5 or answer1", "answer5"),
    ("llm_adapters_hellaswag", "ending5 no ending4", "ending4"),
    ("llm_adapters_winogrande", "the correct answer is option1", "option1"),
    ("llm_adapters_openbookqa", "none of these", ""),
    ("llm_adapters_aqua", "the answer is (D)", "D"),
    ("llm_adapters_aqua", "Because 3 > 2, C", "B"),
    ("llm_adapters_gsm8k", "It costs $1,234.50.", 1234.5),
    ("llm_adapters_svamp", "5 - 7 = -2", -2.0),
    ("llm_adapters_mawps", "from 3. to 4.", 4.0),
    ("llm_adapters_addsub", "nothing", None),
]


@pytest.mark.parametrize(("name", "text", "answer"), WRITTEN)
def test_what_llm_adapters_find(name, text, answer):
    assert KNOWN[name].extract(text) == answer


def test_numbers_are_right_within_a_thousandth():
    assert same_number(last_number("8"), {"answer": "8.0"})
    assert same_number(1.834, {"answer": "1.8333333333333335"})
    assert not same_number(1.835, {"answer": "1.8333333333333335"})
    assert not same_number(None, {"answer": "1"})


def test_options_are_read_back_from_instructions():
    assert parse(ARC["instruction"]) == (
        "Which word, Answer1: or not, is a colour?", {"answer1": "red", "answer2": "loud", "answer3": "flat"},
    )  # fmt: skip
    assert parse(PIQA["instruction"])[1] == {"solution1": "use a towel", "solution2": "use a lamp: hot"}
    with pytest.raises(SboraxError, match="not an instruction of LLM-Adapters"):
        parse("What is red?")


def test_options_are_asked_as_the_harness_does():
    questions = {name: KNOWN[name].ask(record) for name, record in {
        "arc_easy": ARC, "boolq": BOOLQ, "piqa": PIQA, "hellaswag": HELLASWAG, "winogrande": WINOGRANDE,
        "social_i_qa": ARC, "openbookqa": ARC,
    }.items()}  # fmt: skip
    question = "Which word, Answer1: or not, is a colour?"
    assert questions["arc_easy"] == (
        (f"Question: {question}\nAnswer:",), (" red", " loud", " flat"), ("red", "loud", "flat"), 0,
    )  # fmt: skip
    assert questions["social_i_qa"].prompts == (f"Q: {question}\nA:",)
    assert questions["openbookqa"].prompts == (question,)
    assert questions["boolq"] == (("Question: is snow cold?\nAnswer:",), (" no", " yes"), ("no", "yes"), 1)
    assert questions["piqa"].prompts == ("Question: dry hands\nAnswer:",) and questions["piqa"].gold == 1
    assert questions["hellaswag"].prompts == ("Baking: She opens the oven. She",)
    assert questions["hellaswag"].options[1] == " takes out bread."
    stem = "The cup held more than the jar as the "
    assert questions["winogrande"] == (
        (f"{stem}cup", f"{stem}jar"), (" was large.", " was large."), ("cup", "jar"), 0,
    )  # fmt: skip


def test_labels_are_what_the_training_sets_answer():
    assert labels(ARC).options == tuple(f"the correct answer is answer{n}" for n in (1, 2, 3))
    assert labels(BOOLQ).options == ("the correct answer is true", "the correct answer is false")
    assert labels(ARC).options[labels(ARC).gold] == ARC["output"]
    with pytest.raises(SboraxError, match="'answer4' is none of answer1, answer2, answer3"):
        labels({**ARC, "answer": "answer4"})


def test_mmlu_is_asked_as_its_authors_do():
    shot = {"subject": "high_school_physics", "question": "Q1?", "choices": ["a", "b", "c", "d"], "answer": 2}
    record = {**shot, "question": "Q2?", "choices": ["w", "x", "y", "z"]}
    assert mmlu_prompt(record, [shot]) == (
        "The following are multiple choice questions (with answers) about  high school physics.\n\n"
        "Q1?\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\nQ2?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    macro = _macro([[1.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert macro.value == 0.625 and macro.stderr == pytest.approx(math.hypot(0.5, 0.25) / 2)


PARSED = [
    ("4^2 = $\\boxed{16}$.The answer is: 16", "16"),
    ("The answer is 1. Wait. The answer is 50%!", "50"),
    ("#### 18", "18"),
    ("The final answer is: $7$\nNext", "7"),
    ("The answer is: 3\n#### 4", "3"),
    ("42", None),
]


@pytest.mark.parametrize(("text", "answer"), PARSED)
def test_what_pefts_comparison_finds(text, answer):
    assert metamath.parse(text) == answer


def test_pefts_comparison_compares_numbers():
    assert KNOWN["peft_gsm8k"].template.format(question="Q?") == "Question: Q? Think step by step.\nAnswer:"
    gold = {"answer": "so 1/2 of it\n#### 0.5"}
    assert metamath.same("1/2", gold) and metamath.same("0.50", gold) and not metamath.same("half", gold)
    assert not metamath.same(None, gold) and not metamath.same("1/0", gold)
    with pytest.raises(SboraxError, match="has no answer"):
        metamath.same("1", {"answer": "one"})


def test_glue_files_are_read_with_their_quotation_marks(tmp_path):
    text = '\ufeffindex\tsentence1\tsentence2\tlabel\n0\t"A cat\tIt\'s a "cat".\tentailment\n'
    (tmp_path / "dev.tsv").write_text(text)
    (record,) = rows(str(tmp_path), "dev")
    assert record["sentence1"] == '"A cat' and record["label"] == "entailment"
    question = KNOWN["rte"].ask(record)
    assert question.prompts == ('"A cat\nQuestion: It\'s a "cat". True or False?\nAnswer:',)
    assert (question.options, question.gold) == ((" True", " False"), 0)
    assert KNOWN["rte"].ask({**record, "label": 1}).gold == 1
    sst = KNOWN["sst2"].ask({"sentence": "fine . ", "label": "1"})
    assert sst.prompts == ("fine .\nQuestion: Is this sentence positive or negative?\nAnswer:",) and sst.gold == 1
    mrpc = KNOWN["mrpc"].ask({"Quality": "1", "#1 String": "a", "#2 String": "b"})
    assert mrpc.prompts[0].startswith("Sentence 1: a\nSentence 2: b\nQuestion: Do both") and mrpc.gold == 1
    (tmp_path / "dev.tsv").write_text(text + "1\tx\n")
    with pytest.raises(SboraxError, match="line 3 has 2 columns, not 4"):
        rows(str(tmp_path), "dev")
    with pytest.raises(SboraxError, match="the label 'maybe' is none of"):
        KNOWN["rte"].ask({**record, "label": "maybe"})


def test_windows_are_side_by_side():
    pairs = windows(list(range(11)), 4)
    assert [(list(p.prompt), list(p.continuation)) for p in pairs] == [([0], [1, 2, 3]), ([4], [5, 6, 7])]
    assert paragraphs("\n = A = \n \n text\n") == ["", " = A = \n", "", " text\n"]
    with pytest.raises(SboraxError, match="3 tokens does not fill a window of 4"):
        windows([1, 2, 3], 4)


def test_e2e_is_asked_and_compared():
    meaning = "name[Blue Spice], eatType[coffee shop], priceRange[more than £30], familyFriendly[yes]"
    meaning += ", customer rating[5 out of 5]"
    assert nlg.linearised(meaning) == (
        "name : Blue Spice | Type : coffee shop | price : more than £30 | family friendly : yes | "
        "customer rating : 5 out of 5||"
    )
    text, foil = "the Blue Spice is a cheap coffee shop in the centre.", "A dear pub that nobody has ever seen."
    copies = [(text, [foil, text]), (foil, [foil])]
    assert nlg.bleu(copies) == pytest.approx(1.0) and nlg.rouge_l(copies[0]) == pytest.approx(1.0)
    swapped = [(foil, [text]), (text, [foil])]
    assert nlg.bleu(swapped) < 0.1 and nlg.nist(swapped) < nlg.nist(copies)
    assert nlg.nist([("", [text])]) == 0.0


def test_errors_of_scores():
    values = [1.0, 0.0, 1.0, 1.0]
    assert mean(values) == (0.75, pytest.approx(np.std(values, ddof=1) / 2))
    assert mean([1.0]).stderr is None
    # The jackknife of a mean is the mean's own error where every item is a part.
    estimate = jackknife(values, lambda items: float(np.mean(items)))
    assert estimate == pytest.approx(tuple(mean(values)))
    pairs = [(1, 1), (1, 0), (0, 1), (0, 0), (1, 1)]
    assert f1(pairs) == pytest.approx(2 / 3) and mcc(pairs) == pytest.approx(1 / 6)
    assert (f1([(0, 1)]), mcc([(0, 1), (0, 0)])) == (0.0, 0.0)


def test_a_limit_draws_with_its_seed():
    assert draw_indices(5, None, 0) == draw_indices(5, 9, 0) == [0, 1, 2, 3, 4]
    first = draw_indices(1000, 10, 0)
    assert first == draw_indices(1000, 10, 0) == sorted(set(first)) and len(first) == 10 != draw_indices(1000, 10, 1)


def test_items_are_looked_for_in_the_training_data():
    longer = "How many apples has Ann, who bought five and ate two?"
    trained = [{"question": longer, "answer": "3"}, {"question": "Short?"}]
    units = [{"instruction": longer.upper().replace("?", " !")}, {"instruction": "Short?"}, {"instruction": longer[4:]}]
    assert overlap(units, trained) == 1
    # Windows of a corpus, and training data that is one, have no questions to know them by.
    assert overlap([{"window": 0}], trained) is None and overlap(units, [{"text": longer}]) is None


def test_names_of_tasks():
    assert len(KNOWN) == len(TASKS)
    names = [task.name for task in chosen("llm_adapters_arithmetic,arc_easy,arc_easy")]
    assert names[-1] == "arc_easy" and len(names) == 8
    with pytest.raises(SboraxError, match="no task 'arc'; `sborax tasks` lists them"):
        chosen("arc")
