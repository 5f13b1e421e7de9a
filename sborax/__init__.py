"""sborax: parameter-efficient fine-tuning in JAX. Adapters are pure transforms over Flax parameter trees."""

import importlib
from typing import TYPE_CHECKING, Any

from sborax.layout.xla_flags import guard as _guard

if TYPE_CHECKING:
    from sborax.methods import *  # noqa: F403
    from sborax.public import *  # noqa: F403

__version__ = "0.1.0"

# Before the first computation: XLA reads its flags once.
_guard()


# On first use: JAX takes seconds to import, and `sborax --help` does not need it.
def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'sborax' has no attribute {name!r}")
    public = importlib.import_module("sborax.public")
    # Importing it makes subpackages attributes of this module.
    return globals()[name] if name in globals() else getattr(public, name)


def __dir__() -> list[str]:
    return [*globals(), *importlib.import_module("sborax.public").__all__]
