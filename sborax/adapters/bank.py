"""Banks: leaves that the adapters of all kernels of a model share, and that are trained once for all of them.

A bank is an adapter without a kernel, at the path `bank/NAME`. So it is split, saved, counted, decayed, clipped and
vmapped once, like every other adapter. Before the adapters are used, `link` gives each of them a copy of the leaves of
its bank, and the gradients of the copies add up in the bank.
"""

import abc
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sborax.adapters.compose import with_parts
from sborax.adapters.core import AbstractComposite, AbstractKernelless, AbstractMethod, Adapter, SboraxError
from sborax.adapters.depth import stack_of

BANK = "bank"
"""Name of the module that banks are under."""


class AbstractBank(AbstractKernelless):
    """What the adapters of a model share. `init` gets zeros of `shape`."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Its size as `plan` shows it."""

    @abc.abstractmethod
    def settle(self, bank: Adapter, readers: Sequence[Adapter]) -> Adapter:
        """The bank with the frozen leaves that depend on the adapters which read it.

        - bank: as `init` made it.
        - readers: all adapters that read it, with one stack axis, without layers that they do not act on.
        """


class AbstractBanked(AbstractMethod):
    """A method whose adapters read a bank.

    Its `axes` have the leaves of the bank, too, and its functions find them among those of a linked adapter. An adapter
    that has them without a bank, such as one that is linked already, is used as it is.
    """

    bank_name: str
    """The last part of the path of the bank, which all adapters that give this name share."""
    bank_leaves: frozenset[str]
    """The leaves that are the bank's."""

    @abc.abstractmethod
    def bank(self) -> AbstractBank:
        """The bank that planning places."""


def banked_parts(method: AbstractMethod) -> tuple[AbstractBanked, ...]:
    """The methods with a bank among `method` and its parts."""
    if isinstance(method, AbstractComposite):
        return tuple(part for member in method.members for part in banked_parts(member))
    return (method,) if isinstance(method, AbstractBanked) else ()


def bank_path(method: AbstractBanked) -> str:
    """Where the bank of a method is in a tree of adapters."""
    return f"{BANK}/{method.bank_name}"


def banks(methods: Iterable[tuple[str, AbstractMethod]]) -> dict[str, AbstractBank]:
    """The banks of a model by their paths.

    - methods: the method of every kernel, with the kernel's path.

    Raises SboraxError for methods that disagree about a bank.
    """
    placed: dict[str, AbstractBank] = {}
    for path, method in methods:
        for part in banked_parts(method):
            bank = part.bank()
            if placed.setdefault(bank_path(part), bank) != bank:
                raise SboraxError(
                    f"{path}: {type(part).__name__} has one {bank_path(part)} for the whole model; give all rules the "
                    "same options of it"
                )
    return placed


def link(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters by path without banks; those that read one have a copy of its leaves in every layer.

    Raises SboraxError for an adapter whose bank is missing.
    """
    shared = {path: node for path, node in adapters.items() if isinstance(node.method, AbstractBank)}
    return {path: _linked(path, node, shared, stack_of(node)) for path, node in adapters.items() if path not in shared}


def _linked(path: str, node: Adapter, shared: Mapping[str, Adapter], stack: tuple[int, ...]) -> Adapter:
    method = node.method
    if not banked_parts(method):
        return node
    if isinstance(method, AbstractComposite):
        return with_parts(node, [_linked(path, child, shared, stack) for child, _ in method.children(node)])
    assert isinstance(method, AbstractBanked)
    if bank_path(method) not in shared:
        if method.bank_leaves <= {*node.train, *node.frozen}:
            return node
        raise SboraxError(f"{path}: {type(method).__name__} reads {bank_path(method)}, which these adapters lack")
    bank = shared[bank_path(method)]
    train, frozen = (
        jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*stack, *leaf.shape)), half)
        for half in (bank.train, bank.frozen)
    )
    return Adapter({**node.train, **train}, {**node.frozen, **frozen}, method, node.in_axes)


def bank_leaf(adapter: Adapter, name: str) -> Array:
    """A leaf of an adapter's copy of its bank. Raises SboraxError for an adapter that is not linked."""
    leaf = {**adapter.train, **adapter.frozen}.get(name)
    if leaf is None:
        raise SboraxError(f"{type(adapter.method).__name__} reads a bank of the whole model; give sx.link(adapters)")
    return leaf


def settle(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters by path, all of them as they were made, with settled banks."""

    def settled(path: str, node: Adapter) -> Adapter:
        if not isinstance(node.method, AbstractBank):
            return node
        readers = [
            reader
            for other in adapters.values()
            for reader in _readers(other, stack_of(other))
            if isinstance(reader.method, AbstractBanked) and bank_path(reader.method) == path
        ]
        return node.method.settle(node, readers)

    return {path: settled(path, node) for path, node in adapters.items()}


def _readers(node: Adapter, stack: tuple[int, ...]) -> Iterator[Adapter]:
    """The parts of an adapter that read a bank, with one stack axis that has the layers they act on."""
    method = node.method
    if not banked_parts(method):
        return
    if isinstance(method, AbstractComposite):
        for child, layers in method.children(node):
            acting = np.arange(math.prod(stack)) if layers is None else np.asarray(layers)
            for reader in _readers(child, stack):
                yield jax.tree.map(lambda leaf, acting=acting: leaf[acting], reader)
        return
    yield jax.tree.map(lambda leaf: leaf.reshape(math.prod(stack), *leaf.shape[len(stack) :]), node)
