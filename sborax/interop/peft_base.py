"""PEFT's kinds that change parts of the base and have no adapters: LN_TUNING, BEFT and TRAINABLE_TOKENS.

Here such parts are trained by `train_also` and `train_tokens` of an experiment without rules.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sborax.adapters.core import SboraxError
from sborax.interop.peft_layout import EMBEDDING, HEAD, PREFIX, HFLayout, tensor_in, wide
from sborax.interop.peft_targets import naming, targeted
from sborax.interop.peft_tokens import DELTA, changed_rows, checked_indices, with_rows

INDICES = "token_indices"


class Written(NamedTuple):
    """What a kind's files hold, beside the fields of all kinds: config fields, and tensors by name."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Kind(NamedTuple):
    """One of these kinds.

    - peft_type: PEFT's name.
    - suffix: the name of a module's tensor, behind the module's.
    - leaf: the name of our leaves that it changes.
    - of: in words, the modules that have such leaves.
    - reads: config fields beside those of all kinds.
    - inert: config fields that do not change the function of a saved adapter, with the reason.
    - shape: (our leaf's shape, config) -> the tensor's.
    - applied: (our leaf, the tensor, config) -> our leaf, changed.
    - taken: (our leaf, what it was before) -> the tensor and further config fields.
    """

    peft_type: str
    suffix: str
    leaf: str
    of: str
    reads: frozenset[str]
    inert: Mapping[str, str]
    shape: Callable[[tuple[int, ...], Mapping[str, Any]], tuple[int, ...]]
    applied: Callable[[np.ndarray, np.ndarray, Mapping[str, Any]], np.ndarray]
    taken: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, dict[str, Any]]]

    def places(self, layout: HFLayout) -> dict[str, str]:
        """Hugging Face's tensors that it can change, by module."""
        names = (name for name, slot in layout.slots.items() if slot.path.endswith(f"/{self.leaf}"))
        return {name.rpartition(".")[0]: name for name in names}

    def targets(self, config: Mapping[str, Any], layout: HFLayout) -> dict[str, str]:
        """Hugging Face's tensors that it changes, by the name of the tensor in the file.

        Raises SboraxError for other modules, and for none.
        """
        places, modules = self.places(layout), targeted(config, layout.modules)
        strays = [module for module in modules if module not in places]
        if strays or not modules:
            raise SboraxError(f"{self.peft_type} of {strays[0] if strays else 'no module'}: only {self.of} can have it")
        return {f"{PREFIX}{module}.{self.suffix}": places[module] for module in modules}

    def copies(self, targets: Iterable[str], layout: HFLayout) -> dict[str, str]:
        """`{name of the copy: name of the tensor}` for the tensors that PEFT also writes for a head that is tied."""
        ours, theirs = (f"{PREFIX}{module}.{self.suffix}" for module in (EMBEDDING, HEAD))
        return {theirs: ours} if layout.tied and ours in set(targets) else {}

    def expected(self, config: Mapping[str, Any], layout: HFLayout) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name in the file. Raises SboraxError as `targets` does."""
        targets = self.targets(config, layout)
        shapes = {
            key: self.shape(tensor_in(layout, layout.leaves, name).shape, config) for key, name in targets.items()
        }
        return shapes | {copy: shapes[key] for copy, key in self.copies(targets, layout).items()}

    def changed(
        self, config: Mapping[str, Any], layout: HFLayout, read: Callable[[str], np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Hugging Face's tensors after the change. read: gives a tensor of the file."""
        targets = self.targets(config, layout)
        for copy, key in self.copies(targets, layout).items():
            if not np.array_equal(read(copy), read(key)):
                raise SboraxError(f"{copy} differs from the tensor of the embedding, to which the head is tied here")
        return {
            name: self.applied(np.asarray(wide(tensor_in(layout, layout.leaves, name))), read(key), config)
            for key, name in targets.items()
        }

    def written(self, paths: Iterable[str], layout: HFLayout, leaves: Mapping[str, Any]) -> Written:
        """Config fields and tensors for the leaves at these paths."""
        selection, config, tensors = set(paths), {}, {}
        modules = [module for module, name in self.places(layout).items() if layout.slots[name].path in selection]
        for module in modules:
            name = self.places(layout)[module]
            final, initial = (np.asarray(wide(tensor_in(layout, source, name))) for source in (leaves, layout.leaves))
            tensor, fields = self.taken(final, initial)
            tensors[f"{PREFIX}{module}.{self.suffix}"] = np.ascontiguousarray(tensor)
            config |= fields
        tensors |= {copy: tensors[key] for copy, key in self.copies(tensors, layout).items()}
        return Written({**naming(modules, layout.modules, layered=False), **config}, tensors)


def _indices(config: Mapping[str, Any], count: int) -> list[int]:
    return checked_indices(config.get(INDICES), INDICES, count)


def _rows(final: np.ndarray, initial: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    indices = changed_rows(final, initial)
    # A text, as PEFT's own: of a list it says that a tied head would be forgotten, though it is not.
    return final[indices], {INDICES: indices.tolist(), "target_modules": EMBEDDING}


START = {"init_weights": "how PEFT makes the start"}
KINDS = (
    Kind(
        "LN_TUNING", "ln_tuning_layers.weight", "scale", "norms", frozenset(), {},
        lambda shape, _: shape, lambda _, tensor, __: tensor, lambda final, _: (final, {}),
    ),
    Kind(
        "BEFT", "beft_bias", "bias", "projections with a bias", frozenset(), START,
        lambda shape, _: (1, *shape), lambda bias, tensor, _: bias + tensor[0],
        lambda final, initial: ((final - initial)[None], {}),
    ),
    Kind(
        "TRAINABLE_TOKENS", DELTA, "embedding", "the embedding", frozenset({INDICES}), START,
        lambda shape, config: (len(_indices(config, shape[0])), *shape[1:]),
        lambda table, rows, config: with_rows(table, _indices(config, len(table)), rows), _rows,
    ),
)  # fmt: skip


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """The kind of a config, if it is one of these."""
    return next((kind for kind in KINDS if kind.peft_type == config.get("peft_type")), None)


def kind_for(changed: Iterable[str]) -> Kind:
    """The kind that can hold the changes of the leaves at these paths. Raises SboraxError if none can."""
    paths = sorted(changed)
    for kind in KINDS:
        if all(path.endswith(f"/{kind.leaf}") for path in paths):
            return kind
    raise SboraxError(
        f"{paths[0]} and {len(paths) - 1} others were trained without an adapter: PEFT can store norms, biases or the "
        "embedding, but no mixture of them and nothing else; merge instead"
    )
