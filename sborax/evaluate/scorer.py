"""A model that is to be scored: what it makes of continuations, texts and prompts."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from sborax.adapters.constraints import ROWS
from sborax.adapters.core import SboraxError
from sborax.adapters.routing import routed_parts
from sborax.adapters.tree import Adapters, nodes
from sborax.evaluate.likelihood import alone, shared
from sborax.evaluate.shapes import Batch, batches
from sborax.layout.mesh import make_mesh
from sborax.layout.sharding import Layout
from sborax.models.beam import beam_search
from sborax.models.generate import generate
from sborax.models.language_model import LanguageModel, Params
from sborax.models.tokenizer import finished, tokens_of

BUDGET = 4096
"""Tokens of one forward pass."""


class Scored(NamedTuple):
    """A continuation: ln p in nats, whether greedy text would be it, its tokens, and tokens of its prompt left out."""

    logprob: float
    greedy: bool
    tokens: int
    cut: int


class Pair(NamedTuple):
    """Token ids of a prompt and of what may follow it."""

    prompt: Sequence[int]
    continuation: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model, its parameters and adapters on their devices. budget: tokens of one forward pass."""

    model: LanguageModel
    params: Params
    adapters: Adapters | None
    layout: Layout
    budget: int

    @staticmethod
    def of(
        model: LanguageModel,
        params: Params,
        adapters: Adapters | None = None,
        *,
        mesh: Mapping[str, int] | None = None,
        budget: int = BUDGET,
    ) -> "Scorer":
        """mesh: sizes of the axes data, fsdp and tensor, as an experiment's.

        Raises SboraxError for adapters that the model never reads, a model without a tokenizer, and a mesh that does
        not fit.
        """
        if model.tokenizer is None:
            raise SboraxError("this model has no tokenizer.json beside it; put one into its directory")
        if budget < 1:
            raise SboraxError(f"a forward pass of {budget} tokens is none; give 1 or more")
        model.check_adapters(adapters)
        layout = Layout(make_mesh(mesh) if mesh else None)
        params, adapters = layout.model(params, adapters, model.config)
        return Scorer(model, params, adapters, layout, budget)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; special: with the tokens that the tokenizer adds to a text, which a chat template has already."""
        return tokens_of(self.model.tokenizer, text, add_special_tokens=special)["input_ids"]

    def pair(self, prompt: str, continuation: str, special: bool = True) -> Pair:
        """A prompt and its continuation as tokens, cut where the harness cuts them.

        The text is tokenised whole, and white space at the end of the prompt goes to the continuation. An empty
        prompt is the token that begins texts, or ends them where there is none.
        Raises SboraxError for a continuation of no tokens.
        """
        bare = prompt.rstrip()
        if bare:
            begin = self.encode(bare, special)
            rest = self.encode(prompt + continuation, special)[len(begin) :]
        else:
            begin, whole = self.prefix(), self.encode(prompt + continuation, False)
            rest = whole[1:] if whole[:1] == begin else whole
        if not rest:
            raise SboraxError(f"{(prompt + continuation)[:40]!r}: its continuation has no token of its own")
        return Pair(begin, rest)

    def prefix(self) -> list[int]:
        """The token that stands before a text which has no prompt.

        Raises SboraxError for a tokenizer without marks for the beginning and the end.
        """
        tokenizer = self.model.tokenizer
        found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if found is None:
            raise SboraxError("the tokenizer has no token that begins or ends a text, so a text needs a prompt")
        return [found]

    def continuations(self, pairs: Sequence[Pair]) -> list[Scored]:
        """ln p(continuation | prompt) of each pair.

        What does not fit the context loses the beginning of its prompt, and says so in `cut`.
        Raises SboraxError for an empty prompt or continuation, an unknown id, and a continuation beyond the context.
        """
        fitted = [self._fit(pair) for pair in pairs]
        found: list[Scored | None] = [None] * len(pairs)
        lengths = [(len(one.prompt) + len(one.continuation) - 1, len(one.continuation)) for one, _ in fitted]
        for batch in self._batches(lengths, 1):
            members = [fitted[i][0] for i in batch.members]
            # A row of padding is a prompt of one token with a target.
            whole = [[*one.prompt, *one.continuation[:-1]] for one in members]
            tokens = _rows(whole, batch.rows, batch.width)
            lasts = np.array([len(one.prompt) for one in members], np.int32)
            targets = _rows([one.continuation for one in members], batch.rows, batch.continuation)
            counts = np.array([len(one.continuation) for one in members], np.int32)
            done = self._run(alone, tokens, _padded(lasts, batch.rows), targets, _padded(counts, batch.rows))
            for row, i in enumerate(batch.members):
                found[i] = Scored(float(done[0][row]), bool(done[1][row]), int(counts[row]), fitted[i][1])
        return [one for one in found if one is not None]

    def options(self, questions: Sequence[Sequence[Pair]]) -> list[list[Scored]]:
        """`continuations` for the options of each question; where they have one prompt, it is read once."""
        alike = [self._alike(own) for own in questions]
        found: list[list[Scored]] = [[] for _ in questions]
        together = [i for i, same in enumerate(alike) if same and not self.routed]
        apart = [i for i in range(len(questions)) if i not in set(together)]
        done = iter(self.continuations([pair for i in apart for pair in questions[i]]))
        for i in apart:
            found[i] = [next(done) for _ in questions[i]]
        for i, scored in zip(together, self._together([questions[i] for i in together]), strict=True):
            found[i] = scored
        return found

    def _alike(self, options: Sequence[Pair]) -> bool:
        """Whether options have one prompt, which all of it fits before the longest of them."""
        prompt, longest = list(options[0].prompt), max(len(pair.continuation) for pair in options)
        fits = len(prompt) + longest - 1 <= self.model.config.context
        return fits and len(options) > 1 and all(list(pair.prompt) == prompt for pair in options)

    @property
    def routed(self) -> bool:
        """Whether a router weighs adapters by the prompt."""
        return any(routed_parts(node.method) for node in nodes(self.adapters or {}).values())

    def _together(self, questions: Sequence[Sequence[Pair]]) -> list[list[Scored]]:
        most = max((len(own) for own in questions), default=1)
        fitted = [[self._fit(pair)[0] for pair in own] for own in questions]
        lengths = [(len(own[0].prompt), max(len(pair.continuation) for pair in own)) for own in fitted]
        found: list[list[Scored]] = [[] for _ in questions]
        for batch in self._batches(lengths, most):
            members = [fitted[i] for i in batch.members]
            prompts = _rows([own[0].prompt for own in members], batch.rows, batch.width)
            lasts = np.array([len(own[0].prompt) for own in members], np.int32)
            targets = np.zeros((batch.rows, most, batch.continuation), np.int32)
            counts = np.ones((batch.rows, most), np.int32)
            for row, own in enumerate(members):
                for place, pair in enumerate(own):
                    targets[row, place, : len(pair.continuation)] = pair.continuation
                    counts[row, place] = len(pair.continuation)
            done = self._run(shared, prompts, _padded(lasts, batch.rows), targets, counts)
            for row, i in enumerate(batch.members):
                found[i] = [
                    Scored(float(done[0][row, place]), bool(done[1][row, place]), len(pair.continuation), 0)
                    for place, pair in enumerate(fitted[i])
                ]
        return found

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
    ) -> list[list[int]]:
        """New tokens for each prompt, up to and including the first that ends a text; greedy at temperature 0.

        beams: two or more search, and nothing is drawn.
        stop: strings after which a text needs no more; it may go on nevertheless, so cut it (`tokenizer.until`).

        A prompt too long for the context beside `new_tokens` loses its beginning.
        Raises SboraxError as `generate` does.
        """
        room = self.model.config.context - new_tokens
        if room < 1:
            raise SboraxError(f"{new_tokens} new tokens leave no room in a context of {self.model.config.context}")
        fitted = [list(prompt)[-room:] for prompt in prompts]
        found: list[list[int]] = [[] for _ in prompts]
        lengths = [(len(prompt) + new_tokens, 1) for prompt in fitted]
        for number, batch in enumerate(self._batches(lengths, 1, beams)):
            rows = [fitted[i] for i in batch.members]
            # Rows of padding are copies, which end no later than what they are copies of.
            rows += rows[-1:] * (batch.rows - len(rows))
            key = jax.random.fold_in(jax.random.key(seed), number)
            with self.layout.context():
                if beams > 1:
                    done = beam_search(self.model, self.params, self.adapters, rows, new_tokens, beams)
                else:
                    done = generate(
                        self.model, self.params, self.adapters, rows, new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, key=key, finished=finished(self.model.tokenizer, stop),
                    )  # fmt: skip
            for i, new in zip(batch.members, done, strict=False):
                found[i] = new
        return found

    def _batches(self, lengths: Sequence[tuple[int, int]], copies: int, share: int = 1) -> Iterable[Batch]:
        mesh = self.layout.mesh
        multiple = 1 if mesh is None else math.prod(mesh.shape[name] for name in ROWS)
        listed = list(batches(lengths, self.model.config.context, self.budget // share, multiple, copies))
        return tqdm(listed, unit="batch", leave=False, disable=None)

    def _fit(self, pair: Pair) -> tuple[Pair, int]:
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

    def _run(self, program: Any, tokens: np.ndarray, *rest: np.ndarray) -> Any:
        variables = {"params": self.params, "adapters": self.adapters or {}}
        inputs = [jnp.asarray(array) for array in (tokens, *rest)]
        if self.layout.mesh is not None:
            inputs = [jax.device_put(x, NamedSharding(self.layout.mesh, PartitionSpec(ROWS))) for x in inputs]
        with self.layout.context():
            return jax.device_get(program(self.model.module.clone(remat="none"), variables, *inputs))


def _rows(texts: Sequence[Sequence[int]], rows: int, width: int) -> np.ndarray:
    """Token ids on the left of an array of zeros."""
    out = np.zeros((rows, width), np.int32)
    for row, text in enumerate(texts):
        out[row, : len(text)] = text
    return out


def _padded(counts: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(counts, (0, rows - len(counts)), constant_values=1)
