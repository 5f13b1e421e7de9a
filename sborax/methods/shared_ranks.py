"""Ranks dealt out among all weights by how much of their inputs' variance the components explain."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sborax.adapters.core import SboraxError
from sborax.adapters.informed import Gathered, Inputs, Place
from sborax.methods.incremental_pca import Spectrum, empty, updated

MOST_BATCHES = 1000
"""PEFT takes batches until all components have settled, without a bound."""


class Request(NamedTuple):
    """The ranks that a weight asks for.

    - rank: what it adds to the budget that all weights share. It keeps this rank if `most` is no larger.
    - most: its largest rank.
    - tau: a component has settled once its cosine to its direction before the last batch is at least tau.
    - niter: see `incremental_pca.updated`.
    """

    rank: int
    most: int
    tau: float
    niter: int | None


def shared_ranks(requests: Mapping[Place, Request], batches: Sequence[Callable[[], Inputs]]) -> dict[Place, Gathered]:
    """The components of the inputs of every weight, and its rank if any may differ from what it wants.

    Batches are taken one after another, again from the first one, until the components in use have settled.

    Raises SboraxError if no batch has enough tokens, or if components still turn after `MOST_BATCHES` batches.
    """
    search, count = _Search(requests, batches[0]()), 0
    for number in itertools.cycle(range(len(batches))):
        active = search.unsettled()
        if not active:
            return search.gathered()
        if count == MOST_BATCHES:
            raise SboraxError(
                f"the components of {active[0][0]} still turn after {count} batches; give more data, or lower tau"
            )
        search.take(active, batches[number]())
        count += 1
        if count == len(batches) and not search.complete:
            raise SboraxError(
                f"{active[0][0]} may get rank {search.most[active[0]]}, but no batch has as many tokens of answers; "
                "use larger batches, or lower rank or rho"
            )
    raise AssertionError


class _Search:
    """The search for components. Weights with equal inputs, such as q, k and v, share that of the first: the leader."""

    def __init__(self, requests: Mapping[Place, Request], first: Inputs) -> None:
        """- first: a batch, which tells which weights have equal inputs."""
        self.requests = requests
        self.leaders: dict[Place, Place] = {}
        self.most: dict[Place, int] = {}
        self.spectra: dict[Place, Spectrum] = {}
        by_inputs: dict[bytes, Place] = {}
        for place in requests:
            rows = np.asarray(first.rows[place[0]][place[1]])
            leader = by_inputs.setdefault(hashlib.sha256(rows.tobytes()).digest(), place)
            self.leaders[place] = leader
            self.most[leader] = min(max(self.most.get(leader, 0), requests[place].most), rows.shape[-1])
        self.settled = {leader: np.zeros(most, bool) for leader, most in self.most.items()}
        self.open = [place for place in requests if requests[place].most > requests[place].rank]
        # The order decides between equal shares.
        self.open.sort(key=lambda place: self.leaders[place] != place)
        self.ranks = {place: self.most[leader] for place, leader in self.leaders.items()}
        self.ranks |= {place: weight.rank for place, weight in requests.items() if place not in self.open}

    @property
    def complete(self) -> bool:
        """Whether every search has seen a batch."""
        return self.spectra.keys() == self.settled.keys()

    def unsettled(self) -> list[Place]:
        """The leaders whose components in use still turn."""
        largest = dict.fromkeys(self.settled, 0)
        for place, leader in self.leaders.items():
            largest[leader] = max(largest[leader], self.ranks[place])
        return [place for place, settled in self.settled.items() if not settled[: largest[place]].all()]

    def take(self, places: Sequence[Place], batch: Inputs) -> None:
        """Take the inputs of a batch into the components of some leaders, and deal out the ranks again."""
        mask = jnp.asarray((batch.real & batch.answers).reshape(-1), jnp.float32)
        for path, position in places:
            x = jnp.asarray(batch.rows[path][position], jnp.float32)
            x, place = x.reshape(-1, x.shape[-1]), (path, position)
            if float(mask.sum()) < self.most[place]:
                continue
            spectrum = self.spectra.get(place)
            old = empty(self.most[place], x.shape[-1]) if spectrum is None else spectrum
            self.spectra[place] = updated(old, x, mask, self.requests[place].niter)
            if spectrum is not None:
                self.settled[place] = np.asarray(self.spectra[place].turned) >= self.requests[place].tau
        if self.complete and self.open:
            self._deal()

    def _deal(self) -> None:
        """Give the ranks of the budget to the components that explain the largest shares."""
        shares = [np.asarray(self.spectra[self.leaders[place]].shares) for place in self.open]
        owners = [place for place, share in zip(self.open, shares, strict=True) for _ in share]
        budget = sum(self.requests[place].rank for place in self.open)
        self.ranks |= dict.fromkeys(self.open, 0)
        for number in np.argsort(-np.concatenate(shares), kind="stable")[:budget]:
            self.ranks[owners[number]] += 1

    def gathered(self) -> dict[Place, Gathered]:
        """The components of every weight, filled up with zeros to one number, and its rank."""
        most, gathered = max(self.most.values()), {}
        for place, leader in self.leaders.items():
            spectrum, missing = self.spectra[leader], most - self.most[leader]
            components = np.pad(np.asarray(spectrum.components), ((0, missing), (0, 0)))
            singular = np.pad(np.asarray(spectrum.singular), (0, missing), constant_values=1.0)
            rank = self.ranks[place] if self.open else None
            gathered[place] = Gathered({"components": components, "singular": singular}, rank)
        return gathered
