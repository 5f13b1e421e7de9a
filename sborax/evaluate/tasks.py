"""The list of all tasks."""

import difflib

from sborax.adapters.core import SboraxError
from sborax.config.classes import instances, load_plugins, name_of
from sborax.data.template import ALPACA, LLM_ADAPTERS_ASKED
from sborax.evaluate import glue, metamath
from sborax.evaluate.choice import Choice, Mmlu
from sborax.evaluate.instructions import (
    ANSWER,
    BOOLQ,
    END,
    ENDING,
    LETTER,
    OPTION,
    PIQA,
    blank,
    cloze,
    labels,
    last_number,
    same_number,
    same_word,
    yes_no,
)
from sborax.evaluate.nlg import Describe
from sborax.evaluate.perplexity import Perplexity
from sborax.evaluate.task import AbstractTask
from sborax.evaluate.written import Written

_CLOZE = "option likelihood with lm-evaluation-harness' prompt; acc_norm by length in characters"
_LABELS = 'likelihood of "the correct answer is ..." after the instruction of LLM-Adapters (arXiv:2304.01933)'
_COMMONSENSE = "LLM-Adapters (arXiv:2304.01933): the first answer in at most 32 tokens, 4 beams"
_ARITHMETIC = "LLM-Adapters (arXiv:2304.01933): the last number in at most 256 tokens, 4 beams, within 1e-3"
_WINDOWS = "exp of the mean loss over windows side by side, as LoRAPrune (arXiv:2305.18403)"
_NO_PASSAGE = "LLM-Adapters' copy has no passage: the question alone is asked"
_MAWPS = (
    "{} of its questions are in MAWPS' training set, and with it in math_10k: a model trained on either cannot be "
    "scored on it (exact match)"
)

COMMONSENSE = {
    "boolq": ("boolq", BOOLQ, 3270, (_NO_PASSAGE,)),
    "piqa": ("piqa", PIQA, 1838, ()),
    "social_i_qa": ("social_i_qa", ANSWER, 1954, ()),
    "hellaswag": ("hellaswag", ENDING, 10042, ()),
    "winogrande": ("winogrande", OPTION, 1267, ()),
    "arc_easy": ("ARC-Easy", ANSWER, 2376, ()),
    "arc_challenge": ("ARC-Challenge", ANSWER, 1172, ()),
    "openbookqa": ("openbookqa", ANSWER, 500, ()),
}
"""By name: data, a function that extracts the answer from a text, published size, notes."""
_ASK = {
    "boolq": yes_no,
    "piqa": cloze("Question: {question}\nAnswer:"),
    "social_i_qa": cloze("Q: {question}\nA:"),
    "hellaswag": cloze("{question}"),
    "winogrande": blank,
    "arc_easy": cloze("Question: {question}\nAnswer:"),
    "arc_challenge": cloze("Question: {question}\nAnswer:"),
    "openbookqa": cloze("{question}"),
}
_ARITHMETIC_SETS = {
    "gsm8k": ("gsm8k/test.json", 1319, ()),
    "svamp": ("SVAMP", 1000, ()),
    "multiarith": ("MultiArith", 600, (_MAWPS.format("432 of 580 distinct"),)),
    "addsub": ("AddSub", 395, (_MAWPS.format("327"),)),
    "singleeq": ("SingleEq", 508, (_MAWPS.format("415 of 507 distinct"),)),
    "mawps": ("mawps/test.json", 238, ("27 of 234 distinct questions are in MAWPS' own training set",)),
}


def _plain(name: str) -> Choice:
    data, _, full, notes = COMMONSENSE[name]
    metrics = ("acc",) if name in ("boolq", "winogrande") else ("acc", "acc_norm")
    return Choice(name=name, data=data, full=full, notes=notes, about=_CLOZE, ask=_ASK[name], metrics=metrics)


def _labelled(name: str) -> Choice:
    data, _, full, notes = COMMONSENSE[name]
    return Choice(name=f"{name}_labels", data=data, full=full, notes=notes, about=_LABELS, ask=labels, template=ALPACA)


def _commonsense(name: str) -> Written:
    data, extract, full, notes = COMMONSENSE[name]
    return Written(
        name=f"llm_adapters_{name}", data=data, full=full, notes=notes, about=_COMMONSENSE,
        template=LLM_ADAPTERS_ASKED, new_tokens=32, beams=4, stop=(END,), extract=extract, right=same_word,
    )  # fmt: skip


def _arithmetic(name: str) -> Written:
    data, full, notes = _ARITHMETIC_SETS[name]
    return Written(
        name=f"llm_adapters_{name}", data=data, full=full, notes=notes, about=_ARITHMETIC,
        template=LLM_ADAPTERS_ASKED, new_tokens=256, beams=4, stop=(END,), extract=last_number, right=same_number,
    )  # fmt: skip


def _glue(name: str, data: str, full: int, ask: tuple, metrics: tuple[str, ...] = ("acc",), *notes: str) -> Choice:
    return Choice(
        name=name, data=data, split="dev", full=full, notes=notes, metrics=metrics, rows=glue.rows,
        about="likelihood of the label's word with lm-evaluation-harness' prompt", ask=glue.asking(*ask),
    )  # fmt: skip


_YES = ("no", "yes")
_TRUE = ("True", "False")

TASKS: tuple[AbstractTask, ...] = (
    *map(_plain, COMMONSENSE),
    *map(_labelled, COMMONSENSE),
    *map(_commonsense, COMMONSENSE),
    *map(_arithmetic, _ARITHMETIC_SETS),
    Written(
        name="llm_adapters_aqua", data="AQuA/test.json", full=254, template=LLM_ADAPTERS_ASKED, new_tokens=256, beams=4,
        about="LLM-Adapters (arXiv:2304.01933): the first letter A to E in at most 256 tokens, 4 beams",
        stop=(END,), extract=LETTER, right=same_word,
    ),
    Written(
        name="peft_gsm8k", data="gsm8k/test.jsonl", full=1319, template=metamath.PROMPT, new_tokens=300,
        about="PEFT's method comparison: greedy, zero-shot, at most 300 tokens, what follows \"The answer is\"",
        extract=metamath.parse, right=metamath.same,
    ),
    Mmlu(
        name="mmlu", data="mmlu", full=14042,
        about="5-shot, the likeliest of A, B, C, D, mean over subjects (arXiv:2009.03300)",
        notes=("SBoRA's and QLoRA's numbers are of the validation split",),
    ),
    *(
        Perplexity(name=name, data="wikitext-2", window=window, about=f"{_WINDOWS}, {window} tokens, test split")
        for name, window in (("wikitext2", 512), ("wikitext2_128", 128), ("wikitext2_1024", 1024))
    ),
    *(
        Perplexity(
            name=name, data="ptb", split="validation", column="sentence", window=window,
            about=f"{_WINDOWS}, {window} tokens, validation split",
        )
        for name, window in (("ptb", 512), ("ptb_128", 128))
    ),
    _glue("rte", "glue/RTE", 277, ("{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:", _TRUE, "label",
          ("entailment", "not_entailment"))),
    _glue("mrpc", "glue/MRPC/test.tsv", 1725, (
        "Sentence 1: {#1 String}\nSentence 2: {#2 String}\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        _YES, "Quality", ("0", "1")), ("acc", "f1")),
    _glue("sst2", "glue/SST-2", 872, ("{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
          ("negative", "positive"), "label", ("0", "1"))),
    _glue("cola", "glue/CoLA", 1043, ("{sentence}\nQuestion: Does this sentence make sense?\nAnswer:", _YES, "label",
          ("0", "1")), ("mcc", "acc")),
    _glue("qnli", "glue/QNLI", 5463, (
        "{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:", ("yes", "no"), "label",
        ("entailment", "not_entailment"))),
    _glue("qqp", "glue/QQP", 40430, (
        "Question 1: {question1}\nQuestion 2: {question2}\nQuestion: Do both questions ask the same thing?\nAnswer:",
        _YES, "is_duplicate", ("0", "1")), ("acc", "f1")),
    Describe(
        name="e2e_nlg", data="e2e_nlg/testset_w_refs.csv", full=630,
        about="LoRA's prompt (arXiv:2106.09685), at most 64 tokens, up to the end of the line",
        notes=("greedy text, where LoRA searches with 10 beams",),
    ),
)  # fmt: skip
GROUPS: dict[str, tuple[str, ...]] = {
    "llm_adapters_commonsense": tuple(f"llm_adapters_{name}" for name in COMMONSENSE),
    "llm_adapters_arithmetic": (*(f"llm_adapters_{name}" for name in _ARITHMETIC_SETS), "llm_adapters_aqua"),
}


def chosen(names: str) -> list[AbstractTask]:
    """The tasks of a comma-separated list of names. The name of a group stands for its tasks.

    Raises SboraxError for an unknown name.
    """
    tasks = {task.name: task for task in every_task()}
    task_names = [task for name in names.split(",") if name for task in GROUPS.get(name.strip(), (name.strip(),))]
    if any(name not in tasks for name in task_names) and load_plugins():
        tasks = {task.name: task for task in every_task()}
    unknown = next((name for name in task_names if name not in tasks), None)
    if unknown is not None or not task_names:
        close = difflib.get_close_matches(unknown or names, [*tasks, *GROUPS], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`sborax tasks` lists them"
        raise SboraxError(f"there is no task {unknown or names!r}; {hint}")
    return [tasks[name] for name in dict.fromkeys(task_names)]


def every_task() -> list[AbstractTask]:
    """`TASKS`, and an instance of each imported class of a user's that extends `AbstractTask` with all defaults.

    Raises SboraxError for two tasks of one name.
    """
    tasks = [*TASKS, *instances(AbstractTask)]
    names = [task.name for task in tasks]
    repeated = next((task for number, task in enumerate(tasks) if task.name in [*names[:number], *GROUPS]), None)
    if repeated is not None:
        raise SboraxError(f"{name_of(type(repeated))}: there is a task {repeated.name!r} already; choose another name")
    return tasks
