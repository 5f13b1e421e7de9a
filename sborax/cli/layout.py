"""`--mesh` of the commands: what an override of `mesh` takes, too."""

import dataclasses
import json
from collections.abc import Sequence

from sborax.adapters.core import SboraxError
from sborax.config.codec import override
from sborax.layout.mesh import check_mesh


@dataclasses.dataclass(frozen=True)
class _Given:
    """The field of an experiment that `--mesh` is."""

    mesh: dict[str, int]


def read_mesh(words: Sequence[str]) -> dict[str, int]:
    """The sizes of axes in `fsdp=8,tensor=2`, or in one word for each; none without words.

    Raises SboraxError for text of another form, and as `check_mesh` does.
    """
    if not words:
        return {}
    text = ",".join(words)
    try:
        sizes = override(_Given({}), [f"mesh={text}"]).mesh
    except SboraxError:
        raise SboraxError(f"--mesh {text}: write sizes of axes, such as fsdp=8,tensor=2") from None
    check_mesh(sizes)
    return sizes


def with_mesh(changes: Sequence[str], text: str | None) -> list[str]:
    """The changes of an experiment on a command line, what `--mesh` says among them.

    Raises SboraxError as `read_mesh` does.
    """
    return [*changes] if text is None else [*changes, f"mesh={json.dumps(read_mesh([text]))}"]
