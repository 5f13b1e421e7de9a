"""The held-out loss of every sample, in `eval_losses.jsonl` of a run and of its best adapter."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from sborax.data.batches import Batch
from sborax.records.disk import replace

EVAL_LOSSES = "eval_losses.jsonl"


@dataclasses.dataclass(frozen=True)
class SampleLoss:
    """The loss of a held-out sample.

    - digest: of its tokens, and of which of them count.
    - tokens: how many count.
    - loss: summed over these, in nats.
    """

    digest: str
    tokens: int
    loss: float


def sample_losses(batch: Batch, terms: Float[np.ndarray, "batch length"]) -> Iterator[SampleLoss]:
    """The losses of the samples of a held-out batch, row by row. Padding is no sample.

    Args:
    - batch: as `in_order` makes it, whole.
    - terms: the loss of every token, 0 for those that do not count. They are added up in float64.
    """
    for row, of_row in enumerate(np.asarray(terms, np.float64)):
        segments = batch["segments"][row]
        for segment in range(1, int(segments.max(initial=0)) + 1):
            (places,) = np.nonzero(segments == segment)
            tokens = np.append(batch["tokens"][row, places], batch["targets"][row, places[-1]])
            counts = batch["counts"][row, places]
            content = tokens.astype("<i4").tobytes() + counts.tobytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
            yield SampleLoss(digest, int(counts.sum()), float(of_row[places].sum()))


def write_eval_losses(place: epath.Path, losses: Sequence[SampleLoss]) -> None:
    """Write the losses of all samples into the directory `place`. Raises SboraxError if that fails."""
    lines = (json.dumps({"item": number, **dataclasses.asdict(loss)}) for number, loss in enumerate(losses))
    replace(place / EVAL_LOSSES, "".join(f"{line}\n" for line in lines))
