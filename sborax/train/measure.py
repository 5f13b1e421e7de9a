"""The loss of a model on held-out data."""

from collections.abc import Sequence

from sborax.adapters.tree import Adapters, Params, split
from sborax.data.batches import Batch
from sborax.layout.state import flatten
from sborax.models.language_model import LanguageModel
from sborax.train.step import make_loss


def loss_on(model: LanguageModel, params: Params, adapters: Adapters | None, batches: Sequence[Batch]) -> float:
    """Cross-entropy over all `batches`, in nats per token that counts; its exponential is the perplexity."""
    loss, base = make_loss(model), flatten(params)
    train, frozen = split(adapters or {})
    total = tokens = 0.0
    for batch in batches:
        part, counted = loss({"adapters": train, "base": {}}, frozen, base, batch)
        total, tokens = total + float(part), tokens + float(counted)
    return total / max(tokens, 1.0)
