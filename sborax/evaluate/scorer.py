"""A model to score: log-likelihoods of continuations, and generated texts."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from sborax.adapters.constraints import ROWS
from sborax.adapters.core import SboraxError
from sborax.adapters.routing import routed_parts
from sborax.adapters.rows import by_row, together
from sborax.adapters.tree import Adapters, averages_tokens, nodes
from sborax.evaluate.likelihood import score_options, score_rows
from sborax.evaluate.shapes import RequestBatch, batches
from sborax.layout.mesh import make_mesh
from sborax.layout.sharding import Layout
from sborax.models.beam import beam_search
from sborax.models.generate import generate
from sborax.models.language_model import LanguageModel, Params
from sborax.models.tokenizer import finished, prompt_tokens

BUDGET = 4096
"""Tokens of one forward pass, by default."""


class Scored(NamedTuple):
    """The score of a continuation.

    - logprob: ln p, in nats.
    - greedy: whether greedy decoding would produce it.
    - tokens: of the continuation.
    - cut: tokens of the prompt that were dropped to fit the context.
    """

    logprob: float
    greedy: bool
    tokens: int
    cut: int


class Pair(NamedTuple):
    """Token ids of a prompt and of a continuation."""

    prompt: Sequence[int]
    continuation: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Batchmates:
    """Adapters that are scored in one batch. A task asks all of them the same, so the first that asks computes for all.

    - adapters: of all, for equal shares of the rows (`sborax.adapters.rows.by_row`).
    - count: how many.
    - results: of each adapter, by a digest of what was asked.
    """

    adapters: Adapters
    count: int
    results: dict[str, list[Any]]

    def ask(self, number: int, key: str, compute: Callable[[], list[Any]]) -> Any:
        """The result of one adapter. compute: gives those of all, in order."""
        if key not in self.results:
            self.results[key] = compute()
        return self.results[key][number]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model with its parameters and adapters on their devices.

    - layout: the mesh, if any.
    - budget: tokens of one forward pass.
    - mates: what it shares forward passes with; None for nothing.
    - number: of its adapter among `mates`.
    """

    model: LanguageModel
    params: Params
    adapters: Adapters | None
    layout: Layout
    budget: int
    mates: Batchmates | None = None
    number: int = 0

    @staticmethod
    def of(
        model: LanguageModel,
        params: Params,
        adapters: Adapters | None = None,
        *,
        mesh: Mapping[str, int] | None = None,
        budget: int = BUDGET,
    ) -> "Scorer":
        """Put a model on its devices.

        - mesh: sizes of the axes data, fsdp, expert and tensor, as in an experiment; None for one device.
        - budget: tokens of one forward pass.

        Raises SboraxError for adapters that the model does not read, for a model without a tokenizer, and for a mesh
        that does not fit.
        """
        if model.tokenizer is None:
            raise SboraxError("this model has no tokenizer.json beside it; put one into its directory")
        if budget < 1:
            raise SboraxError(f"a forward pass needs 1 token or more, got {budget}")
        model.check_adapters(adapters)
        layout = Layout(make_mesh(mesh) if mesh else None)
        params, adapters = layout.model(params, adapters, model.config)
        return Scorer(model, params, adapters, layout, budget)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, to which something is appended.

        - special: whether to add the tokenizer's special tokens; text of a chat template has them already.
        """
        return prompt_tokens(self.model.tokenizer, text, special)

    def pair(self, prompt: str, continuation: str, special: bool = True) -> Pair:
        """A prompt and its continuation as tokens, divided where lm-evaluation-harness divides them.

        Both are tokenised as one text, and white space at the end of the prompt belongs to the continuation. An empty
        prompt becomes `prefix`.
        Raises SboraxError for a continuation of no tokens.
        """
        bare = prompt.rstrip()
        if bare:
            begin = self.encode(bare, special)
            ending = self.encode(prompt + continuation, special)[len(begin) :]
        else:
            begin, ids = self.prefix(), self.encode(prompt + continuation, False)
            ending = ids[1:] if ids[:1] == begin else ids
        if not ending:
            raise SboraxError(f"{(prompt + continuation)[:40]!r}: its continuation has no token of its own")
        return Pair(begin, ending)

    def prefix(self) -> list[int]:
        """The token that precedes a text without a prompt: the beginning-of-text token, or else the end-of-text token.

        Raises SboraxError for a tokenizer with neither.
        """
        tokenizer = self.model.tokenizer
        token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if token is None:
            raise SboraxError("the tokenizer has no token that begins or ends a text, so a text needs a prompt")
        return [token]

    def continuations(self, pairs: Sequence[Pair]) -> list[Scored]:
        """ln p(continuation | prompt) of each pair.

        A prompt that does not fit the context loses its beginning; `Scored.cut` counts the tokens.
        Raises SboraxError for an empty prompt or continuation, an unknown id, and a continuation beyond the context.
        """
        fitted = [self._fit(pair) for pair in pairs]
        scores: list[Scored | None] = [None] * len(pairs)
        lengths = [(len(pair.prompt) + len(pair.continuation) - 1, len(pair.continuation)) for pair, _ in fitted]
        for batch in self._batches(lengths, 1):
            members = [fitted[i][0] for i in batch.members]
            # A row of padding counts as a prompt of one token with one target.
            tokens = _rows([[*pair.prompt, *pair.continuation[:-1]] for pair in members], batch.rows, batch.width)
            prompt_lengths = np.array([len(pair.prompt) for pair in members], np.int32)
            targets = _rows([pair.continuation for pair in members], batch.rows, batch.continuation)
            counts = np.array([len(pair.continuation) for pair in members], np.int32)
            logprobs, greedy = self._run(
                score_rows, tokens, _padded(prompt_lengths, batch.rows), targets, _padded(counts, batch.rows)
            )  # fmt: skip
            for row, i in enumerate(batch.members):
                scores[i] = Scored(float(logprobs[row]), bool(greedy[row]), int(counts[row]), fitted[i][1])
        return [score for score in scores if score is not None]

    def options(self, questions: Sequence[Sequence[Pair]]) -> list[list[Scored]]:
        """`continuations` for the options of each question. A prompt that they share goes through the model once.

        Adapters that a router weighs, or that take means over tokens, read each option with its prompt.
        """
        scores: list[list[Scored]] = [[] for _ in questions]
        may_share = not (self.routed or self.averages)
        together = [i for i, options in enumerate(questions) if may_share and self._share_prompt(options)]
        apart = [i for i in range(len(questions)) if i not in set(together)]
        continuations = iter(self.continuations([pair for i in apart for pair in questions[i]]))
        for i in apart:
            scores[i] = [next(continuations) for _ in questions[i]]
        for i, scored in zip(together, self._together([questions[i] for i in together]), strict=True):
            scores[i] = scored
        return scores

    def _share_prompt(self, options: Sequence[Pair]) -> bool:
        """Whether there are several options of one prompt, which fits the context together with the longest."""
        prompt, longest = list(options[0].prompt), max(len(pair.continuation) for pair in options)
        fits = len(prompt) + longest - 1 <= self.model.config.context
        return fits and len(options) > 1 and all(list(pair.prompt) == prompt for pair in options)

    @property
    def routed(self) -> bool:
        """Whether a router weighs some adapters by the prompt."""
        return any(routed_parts(node.method) for node in nodes(self.adapters or {}).values())

    @property
    def averages(self) -> bool:
        """Whether some adapter takes a mean over tokens. Then each forward pass has one text."""
        return averages_tokens(self.adapters or {})

    def _together(self, questions: Sequence[Sequence[Pair]]) -> list[list[Scored]]:
        """`options` of questions whose options share a prompt."""
        most = max((len(options) for options in questions), default=1)
        fitted = [[self._fit(pair)[0] for pair in options] for options in questions]
        lengths = [(len(options[0].prompt), max(len(pair.continuation) for pair in options)) for options in fitted]
        scores: list[list[Scored]] = [[] for _ in questions]
        for batch in self._batches(lengths, most):
            members = [fitted[i] for i in batch.members]
            prompts = _rows([options[0].prompt for options in members], batch.rows, batch.width)
            prompt_lengths = np.array([len(options[0].prompt) for options in members], np.int32)
            targets = np.zeros((batch.rows, most, batch.continuation), np.int32)
            counts = np.ones((batch.rows, most), np.int32)
            for row, options in enumerate(members):
                for column, pair in enumerate(options):
                    targets[row, column, : len(pair.continuation)] = pair.continuation
                    counts[row, column] = len(pair.continuation)
            logprobs, greedy = self._run(score_options, prompts, _padded(prompt_lengths, batch.rows), targets, counts)
            for row, i in enumerate(batch.members):
                scores[i] = [
                    Scored(float(logprobs[row, column]), bool(greedy[row, column]), len(pair.continuation), 0)
                    for column, pair in enumerate(fitted[i])
                ]
        return scores

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        beams: int = 1,
        stop: Sequence[str] = (),
        eos: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Generate new tokens for each prompt, up to and including the first end token.

        A prompt that does not fit the context together with `new_tokens` loses its beginning.

        - new_tokens: the most tokens of a text.
        - temperature, top_k, top_p, seed: of sampling; a temperature of 0 is greedy.
        - beams: 2 or more for beam search, which samples nothing.
        - stop: strings after which a text may end early. Cut the text after them all the same (`tokenizer.until`).
        - eos: ids that end a text; by default the model's `end_tokens`.

        Raises SboraxError as `generate` does.
        """
        room = self.model.config.context - new_tokens
        if room < 1:
            raise SboraxError(f"{new_tokens} new tokens leave no room in a context of {self.model.config.context}")
        fitted = [list(prompt)[-room:] for prompt in prompts]
        ends = [int(token) for token in (self.model.end_tokens if eos is None else eos)]
        texts: list[list[int]] = [[] for _ in prompts]
        lengths = [(len(prompt) + new_tokens, 1) for prompt in fitted]
        # A drawn token depends on its place in the batch.
        scorer = self if temperature == 0 else dataclasses.replace(self, mates=None)
        for number, batch in enumerate(scorer._batches(lengths, 1, beams)):
            rows = [fitted[i] for i in batch.members]
            # Rows of padding are copies of a prompt, so they end no later than it.
            rows += rows[-1:] * (batch.rows - len(rows))
            key = jax.random.fold_in(jax.random.key(seed), number)
            options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "key": key}
            for i, text in zip(
                batch.members, scorer._texts(rows, new_tokens, beams, stop, ends, options), strict=False
            ):
                texts[i] = text
        return texts

    def _texts(
        self, rows: list[list[int]], new: int, beams: int, stop: Sequence[str], eos: list[int], options: dict[str, Any]
    ) -> list[list[int]]:
        """New tokens for each row of a batch."""

        def write(adapters: Adapters | None, rows: list[list[int]]) -> list[list[int]]:
            with self.layout.context():
                if beams > 1:
                    return beam_search(self.model, self.params, adapters, rows, new, beams, eos=eos)
                stopped = finished(self.model.tokenizer, stop)
                return generate(self.model, self.params, adapters, rows, new, eos=eos, finished=stopped, **options)

        mates = self.mates
        if mates is None:
            return write(self.adapters, rows)

        def write_all() -> list[Any]:
            texts = write(mates.adapters, rows * mates.count)
            return [texts[start : start + len(rows)] for start in range(0, len(texts), len(rows))]

        return mates.ask(self.number, json.dumps([rows, new, beams, list(stop), eos]), write_all)

    def _batches(self, lengths: Sequence[tuple[int, int]], copies: int, share: int = 1) -> Iterable[RequestBatch]:
        mesh = self.layout.mesh
        multiple = 1 if mesh is None else math.prod(mesh.shape[name] for name in ROWS)
        budget = self.budget // (share * (1 if self.mates is None else self.mates.count))
        if self.averages:
            budget, multiple = 1, 1
        requests = list(batches(lengths, self.model.config.context, budget, multiple, copies))
        return tqdm(requests, unit="batch", leave=False, disable=None)

    def _fit(self, pair: Pair) -> tuple[Pair, int]:
        """The pair with its prompt cut to fit the context, and how many tokens were cut."""
        prompt, continuation = list(pair.prompt), list(pair.continuation)
        context, vocab = self.model.config.context, self.model.config.vocab_size
        if not prompt or not continuation:
            raise SboraxError("a prompt and its continuation need at least one token each")
        if not all(0 <= token < vocab for token in (*prompt, *continuation)):
            raise SboraxError(f"a text holds an id outside the vocabulary of {vocab}; is it this model's tokenizer?")
        cut = max(0, len(prompt) + len(continuation) - 1 - context)
        if cut >= len(prompt):
            raise SboraxError(f"a continuation of {len(continuation)} tokens does not fit the context of {context}")
        return Pair(prompt[cut:], continuation), cut

    def _run(self, program: Any, *arrays: np.ndarray) -> Any:
        mates = self.mates
        if mates is None:
            return self._compute(program, self.adapters, arrays)

        def compute_all() -> list[Any]:
            copies = [np.concatenate([array] * mates.count) for array in arrays]
            parts = [np.split(array, mates.count) for array in self._compute(program, mates.adapters, copies)]
            return list(zip(*parts, strict=True))

        return mates.ask(self.number, _digest(program.__name__, arrays), compute_all)

    def _compute(self, program: Any, adapters: Adapters | None, arrays: Sequence[np.ndarray]) -> Any:
        variables = {"params": self.params, "adapters": adapters or {}}
        inputs = [jnp.asarray(array) for array in arrays]
        if self.layout.mesh is not None:
            # One row cannot be cut, so every device gets it.
            rows = PartitionSpec() if self.averages else PartitionSpec(ROWS)
            inputs = [jax.device_put(x, NamedSharding(self.layout.mesh, rows)) for x in inputs]
        with self.layout.context():
            module = self.model.module.clone(remat="none", expert_capacity=None)
            return jax.device_get(program(module, variables, *inputs))


def _digest(name: str, arrays: Sequence[np.ndarray]) -> str:
    """What is asked of a program, in a few letters."""
    digest = hashlib.sha256(name.encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def scorers(
    model: LanguageModel, params: Sequence[Params], adapters: Sequence[Adapters | None], budget: int = BUDGET
) -> list[Scorer]:
    """A scorer for each of several adapters of one base. Those of the same methods and shapes share forward passes.

    Args:
    - params: what goes with each of `adapters`.
    - adapters: trees of adapters; None for the base alone.
    - budget: tokens of one forward pass.

    Raises SboraxError as `Scorer.of` does.
    """
    by_model = [Scorer.of(model, *pair, budget=budget) for pair in zip(params, adapters, strict=True)]
    for group in together(params, adapters):
        if len(group) > 1:
            mates = Batchmates(by_row([adapters[number] or {} for number in group]), len(group), {})
            shared = params[group[0]]
            for place, number in enumerate(group):
                by_model[number] = dataclasses.replace(by_model[number], params=shared, mates=mates, number=place)
    return by_model


def _rows(texts: Sequence[Sequence[int]], rows: int, width: int) -> np.ndarray:
    """Token ids in rows, padded on the right with zeros."""
    out = np.zeros((rows, width), np.int32)
    for row, text in enumerate(texts):
        out[row, : len(text)] = text
    return out


def _padded(counts: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(counts, (0, rows - len(counts)), constant_values=1)
