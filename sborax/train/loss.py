"""Losses: frozen dataclasses, as methods are."""

import abc
import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

if TYPE_CHECKING:
    # Experiments name losses, and are imported without the model.
    from sborax.train.outputs import Outputs


class AbstractLoss(abc.ABC):
    """A loss: a frozen dataclass of its hyper-parameters. Extend it for one of your own."""

    @abc.abstractmethod
    def __call__(self, outputs: "Outputs") -> tuple[Float[Array, ""], Num[Array, ""]]:
        """The loss summed over the items of a microbatch, and the number of items.

        A step minimises the sum over all microbatches divided by the number of their items, so that accumulation is
        exact. An item is what the loss is a mean of: a token, or a pair of answers.
        """

    def by_token(
        self, outputs: "Outputs"
    ) -> tuple[Float[Array, ""], Num[Array, ""], Float[Array, "batch length"] | None]:
        """What a call gives, and the sum's terms by token, from which a run keeps the loss of each held-out sample.

        The terms are None (default) for a loss that is no sum over tokens. No gradient is taken.
        """
        return *self(outputs), None


@dataclasses.dataclass(frozen=True)
class CrossEntropy(AbstractLoss):
    """The mean of -log p(target) over the targets that count, in nats per token."""

    def __call__(self, outputs: "Outputs") -> tuple[Float[Array, ""], Num[Array, ""]]:
        return outputs.cross_entropy(), jnp.sum(outputs.batch["counts"], dtype=jnp.int32)

    def by_token(self, outputs: "Outputs") -> tuple[Float[Array, ""], Num[Array, ""], Float[Array, "batch length"]]:
        total, terms = outputs.cross_entropies()
        return total, jnp.sum(outputs.batch["counts"], dtype=jnp.int32), terms
