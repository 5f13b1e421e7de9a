"""Parses `--mesh`, by the same rules as a change `mesh=...` of an experiment."""

import dataclasses
import json
from collections.abc import Sequence

from sborax.adapters.core import SboraxError
from sborax.config.codec import override
from sborax.layout.mesh import check_mesh


@dataclasses.dataclass(frozen=True)
class _MeshOption:
    """A config with the one field that `--mesh` sets."""

    mesh: dict[str, int]


def read_mesh(words: Sequence[str]) -> dict[str, int]:
    """The sizes of the axes in `fsdp=8,tensor=2`, or in one word for each axis. Empty without words.

    Raises SboraxError for text of another form, and as `check_mesh` does.
    """
    if not words:
        return {}
    text = ",".join(words)
    try:
        sizes = override(_MeshOption({}), [f"mesh={text}"]).mesh
    except SboraxError:
        raise SboraxError(f"--mesh {text}: write sizes of axes, such as fsdp=8,tensor=2") from None
    check_mesh(sizes)
    return sizes


def with_mesh(changes: Sequence[str], text: str | None) -> list[str]:
    """The changes of an experiment, with that of `--mesh` added.

    Raises SboraxError as `read_mesh` does.
    """
    return [*changes] if text is None else [*changes, f"mesh={json.dumps(read_mesh([text]))}"]
