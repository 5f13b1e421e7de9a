"""Banks: leaves that the adapters of several kernels of a model share, and that are trained once for all of them.

A bank is an adapter without a kernel, at the path `bank/NAME` if all kernels share it, or `bank/NAME/KIND` if those of
a kind do, such as the q_proj of all layers. So it is split, saved, counted, decayed, clipped and vmapped once, like
every other adapter. Before the adapters are used, `link` gives each of them a copy of the leaves of its bank, and the
gradients of the copies add up in the bank. Where one layer is computed at a time, as in our models and in merging,
`separate` and `joined` do the same without a copy for each layer.
"""

import abc
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.compose import ByLayer, simple_parts, with_parts
from sborax.adapters.core import AbstractComposite, AbstractKernelless, AbstractMethod, Adapter, Leaves, SboraxError
from sborax.adapters.depth import stack_of
from sborax.adapters.leaves import union

BANK = "bank"
"""Name of the module that banks are under."""
Load = Callable[[], Float[Array, "in out"]]
"""Computes one weight, float32 and dense."""


class AbstractBank(AbstractKernelless):
    """What the adapters of a model share. `init` gets zeros of `shape`."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Its size as `plan` shows it."""

    @abc.abstractmethod
    def settle(self, bank: Adapter, readers: Sequence[Adapter], weights: Sequence[Load]) -> Adapter:
        """The bank with the frozen leaves that depend on the adapters which read it, and on their weights.

        - bank: as `init` made it.
        - readers: all adapters that read it, with one stack axis, without layers that they do not act on.
        - weights: the weights that read it, by layer. Call them one after the other, so that one of a quantised base is
          dense at a time.
        """


class AbstractBanked(AbstractMethod):
    """A method whose adapters read a bank.

    Its `axes` have the leaves of the bank, too, and its functions find them among those of a linked adapter. An adapter
    that has them without a bank, such as one that is linked already, is used as it is.
    """

    bank_name: str
    """The name of the bank in its path. All adapters that give it share a bank, or all of a kind."""
    bank_leaves: frozenset[str]
    """The leaves that are the bank's."""
    bank_of_kind: bool = False
    """Whether each kind of kernel, such as the q_proj of all layers, has its own bank; else the model has one."""
    bank_entries: Mapping[str, int] = {}
    """Leaves of such a bank that have one entry for every so many neighbouring layers, which read only that entry."""

    def reads(self, shape: tuple[int, int]) -> int | None:
        """The largest number of entries of its bank that one weight reads; None if any weight may read all."""
        return None

    @abc.abstractmethod
    def bank(self, shape: tuple[int, int], readers: int) -> AbstractBank:
        """The bank that planning places.

        - shape: (in, out) of a weight that reads it.
        - readers: how many weights of its kind read it.
        """


def banked_parts(method: AbstractMethod) -> tuple[AbstractBanked, ...]:
    """The methods with a bank among `method` and its parts."""
    if isinstance(method, AbstractComposite):
        return tuple(part for member in method.members for part in banked_parts(member))
    return (method,) if isinstance(method, AbstractBanked) else ()


def bank_path(method: AbstractBanked, kernel: str) -> str:
    """Where the bank of a method on the kernel at this path is in a tree of adapters."""
    parts = [part for part in kernel.removesuffix("/kernel").split("/") if not part.isdecimal()]
    return "/".join((BANK, method.bank_name, *(parts if method.bank_of_kind else ())))


class Kernel(NamedTuple):
    """A planned kernel: its path, its method, its stack axes and the (in, out) of one weight."""

    path: str
    method: AbstractMethod
    stack: tuple[int, ...]
    shape: tuple[int, int]


def banks(kernels: Sequence[Kernel]) -> dict[str, AbstractBank]:
    """The banks of a model by their paths. Raises SboraxError for methods that disagree about a bank."""
    placed: dict[str, AbstractBank] = {}
    numbers = numbered((path, method, math.prod(stack)) for path, method, stack, _ in kernels)
    for path, method, _, shape in kernels:
        for part in banked_parts(method):
            where = bank_path(part, path)
            bank = part.bank(shape, len(numbers.get(where, ())))
            if placed.setdefault(where, bank) != bank:
                readers = "all kernels of a kind" if part.bank_of_kind else "the whole model"
                raise SboraxError(
                    f"{path}: {type(part).__name__} has one {where} for {readers}; give all rules the same options of "
                    "it"
                )
    return placed


def check_read(kernels: Sequence[Kernel]) -> None:
    """Raise SboraxError for a bank with more entries than all its readers together read."""
    most: dict[str, int] = {}
    for path, method, stack, shape in kernels:
        for part, positions in _acting(method, range(math.prod(stack))):
            reads = part.reads(shape)
            if reads is not None:
                where = bank_path(part, path)
                most[where] = most.get(where, 0) + reads * len(positions)
    for where, bank in banks(kernels).items():
        if where in most and bank.shape[1] > most[where]:
            raise SboraxError(
                f"{where}: {bank.shape[1]:,} entries are more than the {most[where]:,} that the adapted kernels have "
                "places for; give fewer"
            )


def numbered(kernels: Iterable[tuple[str, AbstractMethod, int]]) -> dict[str, dict[tuple[str, int], int]]:
    """For each bank, the weights that read it, numbered by layer: `{bank: {(path, position): number}}`.

    - kernels: path, method and number of weights of every kernel.
    """
    readers: dict[str, set[tuple[str, int]]] = {}
    for path, method, count in kernels:
        for part, positions in _acting(method, range(count)):
            readers.setdefault(bank_path(part, path), set()).update((path, position) for position in positions)

    def layer(weight: tuple[str, int]) -> tuple[list[int], str]:
        return [*(int(part) for part in weight[0].split("/") if part.isdecimal()), weight[1]], weight[0]

    return {
        where: {weight: number for number, weight in enumerate(sorted(weights, key=layer))}
        for where, weights in readers.items()
    }


def _acting(method: AbstractMethod, positions: Sequence[int]) -> Iterator[tuple[AbstractBanked, Sequence[int]]]:
    """The methods with a bank among `method` and its parts, with the positions of the stack that they act on."""
    if isinstance(method, ByLayer):
        for part, layers in zip(method.parts, method.layers, strict=True):
            yield from _acting(part, layers)
    elif isinstance(method, AbstractComposite):
        for part in method.members:
            yield from _acting(part, positions)
    elif isinstance(method, AbstractBanked):
        yield method, positions


def separate(adapters: Mapping[str, Adapter]) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """The adapters by path without banks, and by path the leaves of banks that all their layers read.

    The first have the entries of a bank that only some layers read. The second have no stack axes, and are missing at
    paths without such leaves. `joined` puts both together.

    Raises SboraxError for an adapter whose bank is missing.
    """
    banks = {path: node for path, node in adapters.items() if isinstance(node.method, AbstractBank)}
    readers = {path: (node, stack_of(node)) for path, node in adapters.items() if path not in banks}
    numbers = numbered((path, node.method, math.prod(stack)) for path, (node, stack) in readers.items())
    pairs = {path: _separated(path, node, banks, stack, numbers) for path, (node, stack) in readers.items()}
    shared = {path: common for path, (_, common) in pairs.items() if jax.tree.leaves(common)}
    return {path: node for path, (node, _) in pairs.items()}, shared


def _separated(
    path: str,
    node: Adapter,
    banks: Mapping[str, Adapter],
    stack: tuple[int, ...],
    numbers: Mapping[str, Mapping[tuple[str, int], int]],
) -> tuple[Adapter, Adapter]:
    method, nothing = node.method, Adapter({}, {}, node.method, node.in_axes)
    if not banked_parts(method):
        return node, nothing
    if isinstance(method, AbstractComposite):
        parts = [_separated(path, child, banks, stack, numbers) for child, _ in method.children(node)]
        return with_parts(node, [part for part, _ in parts]), with_parts(nothing, [common for _, common in parts])
    assert isinstance(method, AbstractBanked)
    where = bank_path(method, path)
    if where not in banks:
        if method.bank_leaves <= {*node.train, *node.frozen}:
            return node, nothing
        raise SboraxError(f"{path}: {type(method).__name__} reads {where}, which these adapters lack")

    readers = len(numbers[where])
    for name, neighbours in method.bank_entries.items():
        leaf = {**banks[where].train, **banks[where].frozen}.get(name)
        if leaf is not None and len(leaf) != math.ceil(readers / neighbours):
            raise SboraxError(
                f"{where}: {name} has {len(leaf)} entries for {readers} layers; keep the adapters of all its layers"
            )

    def entries(leaves: Leaves) -> Leaves:
        # Layers on which the method does not act have a copy that nothing uses.
        of_weights = [numbers[where].get((path, position), 0) for position in range(math.prod(stack))]
        return {
            name: leaves[name][np.reshape(of_weights, stack) // neighbours]
            for name, neighbours in method.bank_entries.items()
            if name in leaves
        }

    def common(leaves: Leaves) -> Leaves:
        return {name: leaf for name, leaf in leaves.items() if name not in method.bank_entries}

    bank = banks[where]
    train, frozen = {**node.train, **entries(bank.train)}, {**node.frozen, **entries(bank.frozen)}
    return (
        Adapter(train, frozen, method, node.in_axes),
        Adapter(common(bank.train), common(bank.frozen), method, node.in_axes),
    )


def joined(adapter: Adapter, shared: Adapter | None) -> Adapter:
    """The adapter with the leaves that it shares with others, copied for each layer of its stack.

    - shared: what `separate` gives for the adapter, or for a layer of it.
    """
    if shared is None:
        return adapter
    stack = stack_of(adapter)
    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*stack, *leaf.shape)), shared)
    train, frozen = union(adapter.train, copies.train), union(adapter.frozen, copies.frozen)
    return Adapter(train, frozen, adapter.method, adapter.in_axes)


def link(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters by path without banks; those that read one have a copy of its leaves in every layer.

    Raises SboraxError for an adapter whose bank is missing.
    """
    readers, shared = separate(adapters)
    return {path: joined(node, shared.get(path)) for path, node in readers.items()}


def bank_leaf(adapter: Adapter, name: str) -> Array:
    """A leaf of an adapter's copy of its bank. Raises SboraxError for an adapter that is not linked."""
    leaf = {**adapter.train, **adapter.frozen}.get(name)
    if leaf is None:
        raise SboraxError(f"{type(adapter.method).__name__} reads a bank of the whole model; give sx.link(adapters)")
    return leaf


def settle(adapters: Mapping[str, Adapter], weight: Callable[[str, int], Float[Array, "in out"]]) -> dict[str, Adapter]:
    """The adapters by path, all of them as they were made, with settled banks.

    - weight: computes the weight at a path and a position in its flattened stack, float32 and dense.

    Raises SboraxError as a bank does, with its path.
    """
    kernels = {path: node for path, node in adapters.items() if not isinstance(node.method, AbstractKernelless)}
    numbers = numbered((path, node.method, math.prod(stack_of(node))) for path, node in kernels.items())

    def settled(path: str, node: Adapter) -> Adapter:
        if not isinstance(node.method, AbstractBank):
            return node
        readers = [
            reader
            for kernel, adapter in kernels.items()
            for reader in _readers(adapter, stack_of(adapter))
            if isinstance(reader.method, AbstractBanked) and bank_path(reader.method, kernel) == path
        ]
        weights = [functools.partial(weight, *place) for place in numbers.get(path, ())]
        try:
            return node.method.settle(node, readers, weights)
        except SboraxError as error:
            raise SboraxError(f"{path}: {error}") from None

    return {path: settled(path, node) for path, node in adapters.items()}


def leaves_of(path: str, node: Adapter, adapters: Mapping[str, Adapter]) -> dict[str, Leaves]:
    """The leaves of the banks that the adapter at a path reads, by the name of the bank. adapters: all, by path."""
    leaves = {}
    for part in banked_parts(node.method):
        bank = adapters.get(bank_path(part, path))
        if bank is not None:
            leaves[part.bank_name] = {**bank.train, **bank.frozen}
    return leaves


def _readers(node: Adapter, stack: tuple[int, ...]) -> Iterator[Adapter]:
    """The parts of an adapter that read a bank, with one stack axis that has the layers they act on."""
    for part, layers in simple_parts(node):
        if isinstance(part.method, AbstractBanked):
            acting = np.arange(math.prod(stack)) if layers is None else np.asarray(layers)
            yield jax.tree.map(lambda leaf, acting=acting: leaf.reshape(-1, *leaf.shape[len(stack) :])[acting], part)
