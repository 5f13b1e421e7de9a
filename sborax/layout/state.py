"""The arguments of a step: a model and its adapters, taken apart into what is trained and what is constant."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from sborax.adapters.core import AbstractWeight, SboraxError
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.paths import bias_path
from sborax.adapters.rebase import reads_base
from sborax.adapters.tables import leaf_of
from sborax.adapters.tree import Adapters, Params, count, nodes, split
from sborax.adapters.vectors import TABLES, TOKENS, Chosen, by_module, vectors_of, with_vectors

Flat = dict[str, Any]
"""Leaves by path; a quantised weight is one leaf."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step changes.

    - step: int32, the number of steps made.
    - train: `{"adapters": trained halves, "base": float32 master copies of trained base leaves by path}`.
    - opt: state of the optimiser.
    """

    # Any: a pytree node also holds shapes, specs and numpy arrays.
    step: Any
    train: Any
    opt: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """A model and its adapters, taken apart. `base` has none of the leaves in `trained_base`.

    Where vectors of tokens are trained, `base` has the tokens beside the table.
    """

    adapters: Any
    frozen: Any
    base: Any
    trained_base: Any

    @property
    def train(self) -> PyTree:
        """The tree that is differentiated and optimised."""
        return {"adapters": self.adapters, "base": self.trained_base}

    @property
    def tokens(self) -> dict[str, Array]:
        """The leaves with the tokens whose vectors are trained, by path; empty without any."""
        return {path: self.base[path] for path in TOKENS if path in self.base}

    @property
    def count(self) -> int:
        """The number of trained parameters."""
        return count(self.adapters) + sum(leaf.size for leaf in self.trained_base.values())


def selected(paths: list[str], train_base: bool, train_also: Sequence[str], adapted: Iterable[str] = ()) -> list[str]:
    """Paths of the base leaves that are trained.

    - train_base: whether all are.
    - train_also: "norm" for the scales of norms, "bias" for biases, "adapted_bias" for those of adapted projections,
      "router" for the routers of experts, "embed_tokens" and "lm_head" for these modules.
    - adapted: paths of the adapted kernels.

    Raises SboraxError for a name that matches nothing.
    """
    if train_base:
        return paths
    selection: set[str] = set()
    beside = set(map(bias_path, adapted))
    for name in train_also:
        end = {"norm": ("scale",), "bias": ("bias",), "router": ("router", "weight")}.get(name)
        parts = {path: tuple(path.split("/")) for path in paths}
        matched = {path for path, names in parts.items() if (names[-len(end) :] == end if end else names[0] == name)}
        if name == "adapted_bias":
            matched = beside & set(paths)
        if not matched:
            reason = "; the head is tied, train embed_tokens" if name == "lm_head" else ""
            raise SboraxError(f"train_also: the model has no {name}{reason}")
        selection |= matched
    return [path for path in paths if path in selection]


Halves = Callable[[Adapters], tuple[PyTree, PyTree]]
"""Splits adapters into trained and constant leaves, as `split` does."""


def take_apart(
    params: Params,
    adapters: Adapters,
    train_base: bool = False,
    train_also: Sequence[str] = (),
    halves: Halves = split,
    train_tokens: Chosen = (),
) -> Parts:
    """Split into trained and constant leaves. Trained base leaves move into float32 master copies.

    - train_base, train_also: which base leaves are trained, see `selected`.
    - halves: the split of the adapters. Some optimisers hold leaves fixed that a method trains.
    - train_tokens: tokens whose vectors in the embedding are trained, or those of embedding and head by module.

    Raises SboraxError as `selected` and `vectors_of` do, for a trained leaf that is quantised, and for one whose
    adapter keeps leaves that follow from it.
    """
    flat = flatten(params)
    selection = set(selected(list(flat), train_base, train_also, nodes(adapters)))
    quantised = [path for path in sorted(selection) if isinstance(flat[path], AbstractWeight)]
    if quantised:
        raise SboraxError(f"{quantised[0]}: a quantised weight cannot be trained itself")
    changing = selection | {TABLES[module].path for module in by_module(train_tokens)}
    for path, node in nodes(adapters).items():
        if leaf_of(path, flat) in changing and reads_base(node.method):
            raise SboraxError(
                f"{path}: {type(node.method).__name__} keeps what follows from this weight, so the weight cannot be "
                "trained as well; leave one of the two out"
            )
    train, frozen = halves(adapters)
    # Leaves in float32 are copied too, because the step donates their buffers.
    masters = {path: jnp.array(flat[path], jnp.float32, copy=True) for path in flat if path in selection}
    base = {path: leaf for path, leaf in flat.items() if path not in selection}
    vectors, tokens = vectors_of(train_tokens, base, list(nodes(adapters)))
    return Parts(train, frozen, {**base, **tokens}, {**masters, **vectors})


def put_together(base: Flat, trained_base: Mapping[str, Array], dtype: Any = None) -> Params:
    """The parameter tree, with trained leaves in `dtype`; None keeps their dtypes."""
    trained = {path: leaf.astype(dtype or leaf.dtype) for path, leaf in trained_base.items()}
    return nest(with_vectors({**base, **trained}))


def start(parts: Parts, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step. It has its own buffers, so that donating it leaves `parts` alone."""
    train = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), parts.train)
    return TrainState(jnp.zeros((), jnp.int32), train, jax.jit(tx.init)(train))


def parameters(params: Params) -> int:
    """The number of parameters in a tree. A quantised weight counts by its logical shape."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())
