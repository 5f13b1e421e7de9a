"""Runs github.com/EleutherAI/lm-evaluation-harness on sborax models; needs `pip install 'sborax[eval]'`."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from sborax.adapters.core import SboraxError
from sborax.config.terminal import say
from sborax.data.template import apply
from sborax.evaluate.scorer import Pair, Scorer
from sborax.models.tokenizer import prompt_tokens, text_of

NEW_TOKENS = 256
"""Tokens to generate where a task sets no number (the default of the harness' Hugging Face models)."""
RESULTS = "harness.json"
MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Appended to a message that the model is to continue, as transformers does: text after the mark is cut off."""


class HarnessModel(TemplateLM):
    """A `Scorer` as a model of the harness. It tokenises and truncates as the harness' Hugging Face models do."""

    def __init__(self, scorer: Scorer, seed: int = 0) -> None:
        TemplateLM.__init__(self)
        self.scorer = scorer
        self.seed = seed
        self.tokenizer = scorer.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without a prompt."""
        return self.scorer.prefix()[0]

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches prompts of this tokenizer."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids of a text. A beginning-of-text token that it has already is not added again."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.scorer.prefix()))
        return prompt_tokens(self.tokenizer, string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template renders it."""
        if add_generation_prompt:
            return apply(self.tokenizer, chat_history, generate=True)
        # The model is to continue the last message, so the text ends with it, as in transformers.
        *earlier, last = chat_history
        text = apply(self.tokenizer, [*earlier, {**last, "content": last["content"] + MARK}], generate=False)
        before, mark, _ = text.rpartition(MARK.strip())
        if not mark:
            raise SboraxError("the tokenizer's chat template changes the last message, which the model is to continue")
        return before if text[len(before) :].startswith(MARK) else before.rstrip()

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        # The options of a question are consecutive requests with the same prompt.
        groups = [list(group) for _, group in itertools.groupby(requests, key=lambda request: tuple(request[1]))]
        scores = self.scorer.options([[Pair(request[1], request[2]) for request in group] for group in groups])
        answers = [(option.logprob, option.greedy) for scored in scores for option in scored]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text, over windows of the context length in which every token is predicted once."""
        windows = [self._windows(request.args[0]) for request in requests]
        scored = iter(self.scorer.continuations([pair for pairs in windows for pair in pairs]))
        return [sum(next(scored).logprob for _ in pairs) for pairs in windows]

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.scorer.model.config.context,
            context_len=1,
        )
        return [Pair(*make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated after each prompt, up to the first of its stop strings.

        Raises SboraxError for a sampling option that sborax does not have.
        """
        texts: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for members in groups.values():
            outputs = self._write([requests[i].args[0] for i in members], requests[members[0]].args[1])
            for i, text in zip(members, outputs, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _write(self, prompts: Sequence[str], arguments: Mapping[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), NEW_TOKENS))
        stop = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        new, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature = options.pop("temperature", 1.0)
        top_k, top_p = options.pop("top_k", 0), options.pop("top_p", 1.0)
        if options:
            raise SboraxError(
                f"the task asks for {next(iter(options))} = {next(iter(options.values()))}, which sborax does not have"
            )
        texts = self.scorer.write(
            [self.tok_encode(prompt) for prompt in prompts],
            new,
            temperature=temperature if sampled else 0.0,
            top_k=top_k,
            top_p=top_p,
            seed=self.seed,
            stop=stop,
        )
        decoded = [text_of(self.tokenizer, text) for text in texts]
        return [postprocess_generated_text(text, stop, None) for text in decoded]


def run_harness(
    names: Sequence[str],
    scorer: Scorer,
    *,
    limit: int | None = None,
    include: str | None = None,
    out: str | epath.PathLike | None = None,
    seed: int = 0,
    echo: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Run tasks of the harness.

    - names: of tasks.
    - limit: score only the first so many items of each.
    - include: a directory of YAML files with further tasks.
    - out: the directory for `harness.json` and a JSONL file with the items of each task.

    Returns the harness' results.
    Raises SboraxError for an unknown task, and if `out` has results already.
    """
    place = None if out is None else epath.Path(out)
    if place is not None and (place / RESULTS).exists():
        raise SboraxError(f"{place / RESULTS}: exists; choose another --out")
    # Indexing the harness' own thousands of tasks takes seconds, so they come second.
    manager = TaskManager(include_path=include, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include)
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is not None:
        raise SboraxError(
            f"--harness {unknown}: lm-evaluation-harness has no such task; --include adds tasks of your own"
        )
    with _without_git():
        results: Any = evaluator.simple_evaluate(
            model=HarnessModel(scorer, seed), tasks=list(names), limit=limit, task_manager=manager, random_seed=seed,
            bootstrap_iters=1000,
        )  # fmt: skip
    for name, metrics in results["results"].items():
        scores = [f"{key} {_number(metrics, key)}" for key, value in metrics.items() if _is_score(key, value)]
        count = results["n-samples"].get(name, {})
        note = f", --limit {limit}: the first ones" if limit is not None else ""
        echo(f"{name}: {', '.join(scores)} (n {count.get('effective')} of {count.get('original')}, seed {seed}{note})")
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        for name, items in results["samples"].items():
            (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(item, default=str)}\n" for item in items))
        content = {key: results[key] for key in ("results", "n-samples", "versions", "configs")}
        (place / RESULTS).write_text(
            json.dumps({**content, "limit": limit, "seed": seed}, indent=2, default=str) + "\n"
        )
    return results


@contextlib.contextmanager
def _without_git() -> Iterator[None]:
    """Keep the harness from asking git for a commit: it is not used, and outside a checkout git prints an error."""
    ask = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = str
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask


def _is_score(key: str, value: Any) -> bool:
    return isinstance(value, float) and "_stderr" not in key


def _number(metrics: Mapping[str, Any], key: str) -> str:
    metric, comma, kind = key.partition(",")
    error = metrics.get(f"{metric}_stderr{comma}{kind}")
    return f"{metrics[key]:.4f} ± {error:.4f}" if isinstance(error, float) else f"{metrics[key]:.4f}"
