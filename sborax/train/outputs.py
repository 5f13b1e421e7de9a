"""A model at one microbatch: the argument of a loss."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array, Bool, Float, Int, Key

from sborax.adapters.core import Context, SboraxError
from sborax.adapters.invocation import Invocations, find, invocations_of
from sborax.adapters.tables import HEAD, TABLE
from sborax.adapters.tree import Adapters, Params, nodes
from sborax.models.language_model import LanguageModel
from sborax.train.head_loss import head_log_probs, head_loss, head_losses, trained_head_loss, trained_head_losses


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A model at one microbatch, as a loss sees it.

    - hidden: final states of the adapted model, after the last norm.
    - batch: the microbatch, arrays (batch, length): `tokens`, `targets`, `counts` (True for targets that count),
        `segments` (0 is padding), and anything else that the run's batches hold.
    - trained: paths of the base leaves that are trained.
    - key: of dropout; None for no dropout.
    - folded: paths of the kernels of the base that a procedure changes between steps.
    """

    hidden: Float[Array, "batch length d"]
    batch: Mapping[str, Array]
    model: LanguageModel
    params: Params
    adapters: Adapters
    trained: frozenset[str] = frozenset()
    key: Key[Array, ""] | None = None
    folded: frozenset[str] = frozenset()

    def cross_entropy(self) -> Float[Array, ""]:
        """sum_t counts_t (-log p(target_t)), in nats. No (tokens, vocab) array is kept."""
        flat, targets, counts = self._flat()
        if self._calls_head():
            return trained_head_loss(self._head(self.adapters), self._states(flat, self.adapters), targets, counts)
        return head_loss(flat, self._table(), targets, counts, self._tied)

    def cross_entropies(self) -> tuple[Float[Array, ""], Float[Array, "batch length"]]:
        """`cross_entropy`, and its terms by token, which are 0 for targets that do not count; for evaluation only."""
        flat, targets, counts = self._flat()
        if self._calls_head():
            states = self._states(flat, self.adapters)
            total, terms = trained_head_losses(self._head(self.adapters), states, targets, counts)
        else:
            total, terms = head_losses(flat, self._table(), targets, counts, self._tied)
        return total, terms.reshape(self.batch["targets"].shape)

    def log_probs(self) -> Float[Array, "batch length"]:
        """log p(target) of every token, in nats, float32. The backward pass computes logits again."""
        return self._log_probs(self.hidden, self.adapters)

    def base_log_probs(self) -> Float[Array, "batch length"]:
        """`log_probs` of the base without adapters and without dropout; its gradient is zero.

        Raises SboraxError if the base changes in the run: if leaves of it are trained, a method rewrites it, or a
        procedure merges into it.
        """
        rewriting = {path for path, node in nodes(self.adapters).items() if node.method.rewrites_base}
        if changing := self.trained or rewriting or self.folded:
            path = min(changing)
            raise SboraxError(
                f"{path}: changes in this run, so that the base is no reference; load a second model as the reference"
            )
        segments = self.batch["segments"]
        hidden = self.model.hidden(self.params, None, self.batch["tokens"], segment_ids=segments)
        return jax.lax.stop_gradient(self._log_probs(hidden, {}))

    @property
    def _tied(self) -> bool:
        return self.model.config.tie_word_embeddings

    def _flat(self) -> tuple[Float[Array, "tokens d"], Int[Array, " tokens"], Bool[Array, " tokens"]]:
        """States, targets and counts of all tokens."""
        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
        return flat, self.batch["targets"].reshape(-1), self.batch["counts"].reshape(-1)

    def _calls_head(self) -> bool:
        """Whether the head is trained, adapted or more than a product with a frozen table."""
        if not self.model.module.plain_head:
            return True
        leaf = TABLE if self._tied else HEAD
        return leaf in self.trained or not nodes(self.adapters).keys().isdisjoint((leaf, HEAD))

    def _table(self) -> Float[Array, "_ _"]:
        return self.params["embed_tokens"]["embedding"] if self._tied else self.params["lm_head"]["kernel"]

    def _states(
        self, flat: Float[Array, "tokens d"], adapters: Adapters
    ) -> tuple[Float[Array, "tokens d"], Invocations]:
        """What the head reads of each token: its state, and whether an adapter of the head acts on it."""
        of_head = {path: node for path, node in nodes(adapters).items() if path == HEAD}
        masks = find(self.batch["tokens"], self.batch["segments"], invocations_of(of_head))
        return flat, jax.tree.map(lambda mask: mask.reshape(-1), masks)

    def _head(self, adapters: Adapters) -> Callable[[tuple[Array, Invocations], Array], Array]:
        def head(
            states: tuple[Float[Array, "tokens d"], Invocations], number: Int[Array, ""]
        ) -> Float[Array, "tokens vocab"]:
            hidden, masks = jax.tree.map(lambda leaf: leaf[None], states)
            # With one key, all chunks would drop the same entries.
            key = None if self.key is None else jax.random.fold_in(self.key, number)
            ctx = Context(invocations=masks)
            return self.model.head(self.params, adapters, hidden, dropout_key=key, ctx=ctx)[0]

        return head

    def _log_probs(self, hidden: Float[Array, "batch length d"], adapters: Adapters) -> Float[Array, "batch length"]:
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), self.batch["targets"]
        states = self._states(flat, adapters)
        return head_log_probs(self._head(adapters), states, targets.reshape(-1)).reshape(targets.shape)
