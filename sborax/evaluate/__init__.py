"""Scoring: log-likelihoods, perplexity, generated answers, and the papers' protocols over them."""

from sborax.evaluate.run import Score, evaluate
from sborax.evaluate.scorer import Pair, Scored, Scorer
from sborax.evaluate.task import AbstractTask
from sborax.evaluate.tasks import GROUPS, TASKS, chosen, every_task

__all__ = ["GROUPS", "TASKS", "AbstractTask", "Pair", "Score", "Scored", "Scorer", "chosen", "evaluate", "every_task"]
