"""The changes of each weight matrix by training: spectrum, intruder dimensions, regions; and the ranks of adapters.

Nothing here knows a method: changes are differences of merged and original kernels, and ranks are those that methods
declare.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float
from scipy import linalg

from sborax.adapters.core import AbstractComposite, AbstractMethod, SboraxError, dense
from sborax.adapters.paths import kernels, module_path
from sborax.adapters.rebase import as_matrix
from sborax.adapters.tree import Adapters, Params, link, merged_node, nodes
from sborax.config.codec import decode
from sborax.config.documents import read_object
from sborax.records.adapter import PLAN
from sborax.records.disk import ADAPTER

LEADING = 10
"""Leading singular vectors of a changed matrix that are looked at (k; the paper varies it)."""
SIMILAR = 0.5
"""Cosine below which such a vector is like none of the original ones (epsilon; the paper varies it)."""
KEPT = 64
"""Singular values of a change that are kept."""
NEGLIGIBLE = 1e-4
"""Singular values of a change below this share of the largest count as zero."""


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """What training changed in one matrix W, D being the change.

    - kernel: path of the kernel without numbers of layers, such as "layers/self_attn/q_proj".
    - layer: its number.
    - size: |D| / |W|, Frobenius norms.
    - singular: the largest singular values of D over |W|, descending, at most `KEPT`.
    - rank: singular values of D that are not negligible.
    - intruders: how many of the `LEADING` leading right singular vectors of W + D, which lie in the space of outputs,
      have a cosine below `SIMILAR` with every one of W's (arXiv:2410.21228, whose weights are (out, in), so that
      they are its left ones).
    - rows, columns: which inputs and outputs changed at all.
    """

    kernel: str
    layer: int
    size: float
    singular: Float[np.ndarray, " k"]
    rank: int
    intruders: int
    rows: Bool[np.ndarray, " in"]
    columns: Bool[np.ndarray, " out"]


def right_vectors(weight: Float[np.ndarray, "in out"], most: int | None = None) -> Float[np.ndarray, "k out"]:
    """Right singular vectors of a matrix, the leading ones first, as rows; `most` of them, or all that there are.

    From the eigenvectors of the smaller Gram matrix, in float64: several times as fast as decomposing the matrix.
    Vectors of singular values that are zero to rounding are left out.
    """
    wide = weight.astype(np.float64)
    by_inputs = wide.shape[0] < wide.shape[1]
    gram = wide @ wide.T if by_inputs else wide.T @ wide
    count = len(gram)
    squares, vectors = linalg.eigh(gram, subset_by_index=(max(0, count - (most or count)), count - 1))
    nonzero = squares > squares[-1] * count * np.finfo(np.float64).eps
    squares, vectors = squares[nonzero][::-1], vectors[:, nonzero][:, ::-1]
    return (wide.T @ (vectors / np.sqrt(squares))).T if by_inputs else vectors.T


def intruders(before: Float[np.ndarray, "n out"], changed: Float[np.ndarray, "in out"], leading: int = LEADING) -> int:
    """How many leading singular vectors of a changed matrix are like none of the original ones.

    Args:
    - before: right singular vectors of the original matrix, as rows.
    - changed: the matrix after training.
    - leading: how many of its singular vectors are looked at, at most.
    """
    after = right_vectors(changed, leading)
    return int(np.sum(np.abs(after @ before.T).max(axis=1) < SIMILAR))


class Spectra:
    """Changes of runs over one base, whose decomposition is made once.

    - base: the original parameters.
    """

    def __init__(self, base: Params) -> None:
        self.base = {path: _matrices(leaf) for path, leaf in kernels(base).items()}
        self._vectors = functools.cache(lambda path, layer: right_vectors(self.base[path][layer]))

    def changes(self, params: Params, adapters: Adapters | None) -> Iterator[Change]:
        """Every kernel and layer that a run changed.

        Args:
        - params: the parameters that the run's adapters stand on, with what it trained of the base.
        - adapters: the run's; None for full fine-tuning.

        Raises SboraxError for a method without a merged form, and for parameters of another model.
        """
        adapted = nodes(link(adapters)) if adapters else {}
        for path, leaf in kernels(params).items():
            node = adapted.get(path)
            if node is not None and node.method.no_merge:
                raise SboraxError(f"{path}: {type(node.method).__name__} has no merged form: {node.method.no_merge}")
            after = _matrices(leaf) if node is None else _matrices(merged_node(_dense(leaf), node))
            before = self.base.get(path)
            if before is None or before.shape != after.shape:
                raise SboraxError(f"{path}: is not of the base's shape; the run was trained on another model")
            module, number = module_path(path)
            for layer in range(len(before)):
                change = after[layer] - before[layer]
                if change.any():
                    place = layer if number is None else number
                    yield self._change(path, layer, change, after[layer], module, place)

    def _change(self, path: str, layer: int, change: np.ndarray, after: np.ndarray, kernel: str, number: int) -> Change:
        norm = float(np.linalg.norm(self.base[path][layer]))
        singular = singular_values(change)
        # What sums in float32 leave of a change that is zero: rounding errors of W, as singular values.
        rounding = np.finfo(np.float32).eps * norm * sum(size**-0.5 for size in change.shape)
        return Change(
            kernel=kernel.removesuffix("/kernel"),
            layer=number,
            size=float(np.linalg.norm(change)) / norm,
            singular=singular[:KEPT] / norm,
            rank=int(np.sum(singular > max(NEGLIGIBLE * singular[0], rounding))),
            intruders=intruders(self._vectors(path, layer), after),
            rows=np.asarray(change.any(axis=1)),
            columns=np.asarray(change.any(axis=0)),
        )


def singular_values(matrix: Float[np.ndarray, "in out"]) -> Float[np.ndarray, " k"]:
    """Singular values, descending, from the smaller Gram matrix in float64; exact to 1e-8 of the largest."""
    wide = matrix.astype(np.float64)
    gram = wide @ wide.T if wide.shape[0] < wide.shape[1] else wide.T @ wide
    return np.sqrt(np.maximum(linalg.eigvalsh(gram), 0.0))[::-1]


def _dense(leaf: Any) -> Any:
    """A kernel in float32: changes would be rounded off in bfloat16."""
    return dense(leaf).astype("float32")


def _matrices(leaf: Any) -> Float[np.ndarray, "layers inputs outputs"]:
    """A kernel as float32 matrices, one for every position of its stack."""
    weight = np.asarray(_dense(leaf))
    return np.asarray(as_matrix(weight, weight.ndim - 2, 1)).reshape(-1, *weight.shape[-2:])


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """The changes of one run.

    - size, rank, intruders: means over matrices.
    - spectrum: median over matrices of each singular value over |W|.
    - moved_rows, moved_columns: shares of inputs and outputs that changed, over matrices.
    - matrices: how many changed.
    """

    size: float
    rank: float
    intruders: float
    spectrum: Float[np.ndarray, " k"]
    moved_rows: float
    moved_columns: float
    matrices: int


def summary(changes: Sequence[Change]) -> Summary:
    """Means and medians over the matrices of a run. Raises SboraxError for a run that changed none."""
    if not changes:
        raise SboraxError("the run changed no kernel")
    shortest = min(len(change.singular) for change in changes)
    return Summary(
        size=float(np.mean([change.size for change in changes])),
        rank=float(np.mean([change.rank for change in changes])),
        intruders=float(np.mean([change.intruders for change in changes])),
        spectrum=np.median([change.singular[:shortest] for change in changes], axis=0),
        moved_rows=float(np.mean([change.rows.mean() for change in changes])),
        moved_columns=float(np.mean([change.columns.mean() for change in changes])),
        matrices=len(changes),
    )


def regions(changes: Sequence[Change]) -> dict[str, Bool[np.ndarray, "_layers _size"]]:
    """By kernel, which rows (or columns) changed in each layer, where a part of them stayed as it was.

    Empty for methods that move every row and every column.
    """
    kinds: dict[str, list[Change]] = {}
    for change in sorted(changes, key=lambda change: change.layer):
        kinds.setdefault(change.kernel, []).append(change)
    maps = {}
    for kernel, layers in kinds.items():
        for side in ("rows", "columns"):
            mask = np.array([getattr(change, side) for change in layers])
            if not mask.all():
                maps[f"{kernel}, {side}"] = mask
    return maps


def ranks(run: epath.Path, folder: str = ADAPTER) -> dict[str, tuple[int, ...]]:
    """By kernel, the rank of every layer as the run's methods declare it, where layers differ.

    Needs no model. Raises SboraxError for a damaged `plan.json`.
    """
    plan = run / folder / PLAN
    sites = read_object(plan).get("sites") if plan.exists() else []
    if not isinstance(sites, list):
        raise SboraxError(f"{plan}: sites is missing, or of another kind")
    kinds: dict[str, list[int]] = {}
    for site in sites:
        if not isinstance(site, dict) or not isinstance(site.get("path"), str):
            raise SboraxError(f"{plan}: sites: expected a path and a method")
        method = decode(AbstractMethod, site.get("method"), f"{plan}: {site['path']}", structural=True)  # type: ignore[type-abstract]
        kernel = module_path(site["path"])[0].removesuffix("/kernel")
        for rank in _ranks(method):
            kinds.setdefault(kernel, []).extend(rank if isinstance(rank, tuple) else (rank,))
    return {kernel: tuple(of_kernel) for kernel, of_kernel in kinds.items() if len(set(of_kernel)) > 1}


def _ranks(method: AbstractMethod) -> Iterator[int | tuple[int, ...]]:
    if isinstance(method, AbstractComposite):
        for part in method.members:
            yield from _ranks(part)
    elif isinstance(method.rank, int | tuple):
        yield method.rank


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """What the adapters of a setting's groups say, by label of the group; see `Change` and `ranks`.

    - notes: why the changes of a group are not known.
    """

    changes: Mapping[str, Sequence[Change]]
    ranks: Mapping[str, Mapping[str, tuple[int, ...]]]
    notes: tuple[str, ...] = ()
