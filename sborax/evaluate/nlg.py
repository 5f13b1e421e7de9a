"""E2E NLG: descriptions of restaurants from their attributes, compared with human references."""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.evaluate.scorer import Scorer
from sborax.evaluate.task import AbstractTask, Measured, Metric, Record, cut_remark, field, jackknife, mean, records
from sborax.evaluate.written import texts

NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
"""Attributes that LoRA's data (github.com/microsoft/LoRA, examples/NLG) names differently."""


def linearised(meaning: str) -> str:
    """`name[Blue Spice], eatType[coffee shop]` as LoRA's `name : Blue Spice | Type : coffee shop||`.

    Raises SboraxError for a meaning representation of another form.
    """
    attributes = re.findall(r"([\w ]+)\[([^\]]*)\]", meaning)
    if not attributes:
        raise SboraxError(f"not a meaning representation: {meaning[:60]!r}")
    return " | ".join(f"{NAMES.get(name.strip(), name.strip())} : {value}" for name, value in attributes) + "||"


Described = tuple[str, Sequence[str]]
"""A text and its references."""


def _tokens(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # pyright: ignore[reportMissingImports]

    return Tokenizer13a()(text.lower()).split()


def bleu(items: Sequence[Described]) -> float:
    """BLEU-4 of the whole set, 0..1, in lower case, with mteval-v13a's tokens (sacrebleu)."""
    from sacrebleu.metrics.bleu import BLEU  # pyright: ignore[reportMissingImports]

    most = max(len(references) for _, references in items)
    streams: Any = [[references[k] if k < len(references) else None for _, references in items] for k in range(most)]
    return float(BLEU(lowercase=True).corpus_score([text for text, _ in items], streams).score) / 100


def nist(items: Sequence[Described]) -> float:
    """NIST-5 of the whole set, with the tokens of `bleu` (nltk). 0 if no text shares a word with its references."""
    from nltk.translate.nist_score import corpus_nist  # pyright: ignore[reportMissingImports]

    references = [[_tokens(reference) for reference in references] for _, references in items]
    texts = [_tokens(text) for text, _ in items]
    # nltk divides by the number of n-grams, which is 0 for a shorter text.
    longest = min(5, max((len(text) for text in texts), default=0))
    overlapping = any(
        set(text) & {word for reference in of_text for word in reference}
        for text, of_text in zip(texts, references, strict=True)
    )
    return float(corpus_nist(references, texts, n=longest)) if longest and overlapping else 0.0


def rouge_l(item: Described) -> float:
    """ROUGE-L's F of a text and the reference that it is closest to (rouge-score)."""
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return float(scorer.score_multi(list(item[1]), item[0])["rougeL"].fmeasure)


def meteor(item: Described) -> float:
    """METEOR of a text (nltk, with WordNet's data)."""
    from nltk.translate.meteor_score import meteor_score  # pyright: ignore[reportMissingImports]

    return float(meteor_score([_tokens(reference) for reference in item[1]], _tokens(item[0])))


def cider(items: Sequence[Described]) -> float:
    """CIDEr of the whole set (pycocoevalcap)."""
    from pycocoevalcap.cider.cider import Cider  # pyright: ignore[reportMissingImports]

    references = {i: [" ".join(_tokens(text)) for text in references] for i, (_, references) in enumerate(items)}
    texts = {i: [" ".join(_tokens(text))] for i, (text, _) in enumerate(items)}
    return float(Cider().compute_score(references, texts)[0])


def _wordnet() -> bool:
    import nltk  # pyright: ignore[reportMissingImports]

    for place in ("corpora/wordnet.zip", "corpora/wordnet"):
        try:
            nltk.data.find(place)
        except LookupError:
            continue
        return True
    return False


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Describe(AbstractTask):
    """Scores a generated description of each meaning against all its references.

    - new_tokens: the most tokens of a description.
    """

    new_tokens: int = 64

    def units(self, scorer: Scorer) -> Sequence[Record]:
        """Every meaning once, with its references."""
        by_meaning: dict[str, list[str]] = {}
        for record in records(self.data, self.split):
            by_meaning.setdefault(str(field(record, "mr")), []).append(str(field(record, "ref")))
        return [{"mr": meaning, "references": references} for meaning, references in by_meaning.items()]

    def measure(self, units: Sequence[Record], scorer: Scorer, seed: int) -> Measured:
        """BLEU, NIST and ROUGE-L; METEOR and CIDEr if they are installed.

        Raises SboraxError where sacrebleu, nltk or rouge-score is missing.
        """
        missing = [name for name in ("sacrebleu", "nltk", "rouge_score") if not _installed(name)]
        if missing:
            raise SboraxError(f"{self.name}: needs {', '.join(missing)}; pip install 'sborax[eval]'")
        prompts = [linearised(unit["mr"]) for unit in units]
        ids = [scorer.encode(prompt) for prompt in prompts]
        outputs = [text.strip() for text in texts(ids, self.new_tokens, ("\n",), scorer)]
        described = [(text, unit["references"]) for text, unit in zip(outputs, units, strict=True)]
        nearest = [rouge_l(item) for item in described]
        metrics = {"BLEU": jackknife(described, bleu), "NIST": jackknife(described, nist), "ROUGE-L": mean(nearest)}
        extras, absent = _optional(described)
        items = [
            {"prompt": prompt, "text": text, "references": list(references), "ROUGE-L": value}
            for prompt, (text, references), value in zip(prompts, described, nearest, strict=True)
        ]
        room = scorer.model.config.context - self.new_tokens
        remarks = (*absent, *cut_remark([max(0, len(prompt) - room) for prompt in ids]))
        return Measured({**metrics, **extras}, items, remarks)


def _optional(described: Sequence[Described]) -> tuple[Mapping[str, Metric], list[str]]:
    """The metrics whose packages are installed, and a remark on each of the others."""
    choices: list[tuple[str, bool, str, Callable[[], Any]]] = [
        (
            "METEOR",
            _wordnet(),
            "nltk.download('wordnet')",
            lambda: mean([meteor(i) for i in described]),
        ),
        ("CIDEr", _installed("pycocoevalcap"), "pycocoevalcap", lambda: jackknife(described, cider)),
    ]
    metrics = {name: score() for name, installed, _, score in choices if installed}
    absent = [f"{name} is absent: not installed ({needs})" for name, installed, needs, _ in choices if not installed]
    return metrics, absent
