"""Finds classes by the names in configs: sborax's own by their name alone, others with a module, such as `mine:Bone`.

A class is found among the subclasses of a field's type once its module is imported: by the program, by `--import`, or
by an entry point of the group `sborax.plugins`. Entry points are only loaded for a name that is not known yet.
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from sborax.errors import SboraxError

T = TypeVar("T")

GROUP = "sborax.plugins"
"""The group of entry points whose modules define classes."""
EXPERIMENT = "sborax_experiment_"
"""Prefix of the module name of an experiment file, which may thus have the name of another module."""


def is_builtin(kind: type) -> bool:
    """Whether sborax itself defines the class."""
    return kind.__module__.partition(".")[0] == "sborax"


def home(kind: type) -> str:
    """The module of a class, by the name under which another program would import it."""
    return _program() if kind.__module__ == "__main__" else kind.__module__.removeprefix(EXPERIMENT)


def _program() -> str:
    """The name under which the running program would be imported; `__main__` for a notebook."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return spec.name if spec is not None else Path(file).stem if file else "__main__"


def name_of(kind: type) -> str:
    """The name of a class in a config: `LoRA`, or `mine:Bone` for a class outside sborax."""
    return kind.__name__ if is_builtin(kind) else f"{home(kind)}:{kind.__name__}"


def source_of(kind: type) -> str:
    """The argument of `--import` that finds a class: a module on Python's path, or the path of a file."""
    name, file = home(kind), getattr(sys.modules.get(kind.__module__), "__file__", None)
    if "." in name or file is None:
        return name
    spec = importlib.machinery.PathFinder.find_spec(name)
    on_path = spec is not None and spec.origin is not None and os.path.realpath(spec.origin) == os.path.realpath(file)
    return name if on_path else os.path.abspath(file)


def concrete(kind: type[T]) -> Iterator[type[T]]:
    """Every class of the kind that is not abstract. If one was defined twice, as in a notebook, the last."""
    # Subclasses are known once their modules are imported.
    importlib.import_module("sborax.public")
    classes: dict[tuple[str, str], type[T]] = {}
    for child in _below(kind):
        key = home(child), child.__name__
        if key not in classes or not _is_current(classes[key]) or _is_current(child):
            classes[key] = child
    yield from classes.values()


def _below(kind: type[T]) -> Iterator[type[T]]:
    if not inspect.isabstract(kind):
        yield kind
    for child in kind.__subclasses__():
        yield from _below(child)


def _is_current(kind: type) -> bool:
    """Whether its module still has this class under its name, rather than a later definition."""
    return getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind


def foreign(kind: type[T]) -> list[type[T]]:
    """Every concrete class of the kind that sborax does not define."""
    return [child for child in concrete(kind) if not is_builtin(child)]


def instances(kind: type[T]) -> list[T]:
    """An instance of each class that sborax does not define and that needs no arguments."""
    return [instance(child) for child in foreign(kind) if not _needed(child)]


def instance(kind: type[T]) -> T:
    """An instance with default fields. Raises SboraxError for a class that needs arguments."""
    if _needed(kind):
        raise SboraxError(f"{name_of(kind)}: its field {_needed(kind)[0]} has no default; give it one")
    return kind()


def _needed(kind: type) -> list[str]:
    """The fields without a default."""
    missing, fields = dataclasses.MISSING, dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return [
        field.name for field in fields if field.init and field.default is missing and field.default_factory is missing
    ]


def find_class(kind: type[T], name: str, where: str) -> type[T]:
    """The class of the kind that `name` means: `LoRA`, in any case, or `module:Class`.

    A name without a module means sborax's own class, if there is one.

    - where: the field, for errors.

    Raises SboraxError for a name that is unknown, ambiguous, or of a module that is not imported.
    """
    matches = _matching(kind, name) or (load_plugins() and _matching(kind, name)) or []
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SboraxError(f"{where}: {name!r} is ambiguous; write {' or '.join(map(name_of, matches))}")
    module, colon, last = name.rpartition(":")
    if colon and not _is_imported(module):
        raise SboraxError(
            f"{where}: {last} is a class of {module!r}, which is not imported; add --import {_importable(module)}, "
            "or import it before in Python"
        )
    names = {name_of(child).lower(): name_of(child) for child in concrete(kind) if is_offered(child)}
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4) or sorted(names)
    if any(_matching(wider, name) for wider in kind.__mro__[1:] if wider.__module__.startswith("sborax.")):
        expected = f"{kind.__name__}, such as {' or '.join(names[label] for label in close)}"
        raise SboraxError(f"{where}: {name} cannot be used here; this takes an {expected}")
    raise SboraxError(f"{where}: there is no {name!r}; did you mean {' or '.join(names[label] for label in close)}?")


def is_known(kind: type, name: str) -> bool:
    """Whether `name` is the name of a class of the kind, or has the form `module:Class`."""
    return ":" in name or bool(_matching(kind, name))


def _matching(kind: type[T], name: str) -> list[type[T]]:
    classes, (module, colon, last) = list(concrete(kind)), name.rpartition(":")
    if colon:
        return [child for child in classes if child.__name__ == last and home(child) == module]
    exact = [child for child in classes if child.__name__ == name]
    similar = [child for child in classes if child.__name__.lower() == name.lower()]
    return [child for child in exact if is_builtin(child)] or exact or [child for child in similar if is_offered(child)]


def is_offered(kind: type) -> bool:
    """Whether errors may suggest the class: one of a user's, or a public name of sborax."""
    return not is_builtin(kind) or getattr(sys.modules["sborax"], kind.__name__, None) is kind


def _importable(module: str) -> str:
    return module if "." in module else f"{module}.py"


def import_source(source: str) -> str:
    """Import a module on Python's path, or a `.py` file as a module of its name. Returns the module's name.

    Raises SboraxError for a source that does not exist, fails, or has the name of another module.
    """
    file = Path(source).expanduser().resolve()
    name = file.stem if source.endswith(".py") else source
    if source.endswith(".py"):
        if not file.is_file():
            raise SboraxError(f"--import {source}: no such file")
        if not name.isidentifier():
            raise SboraxError(f"--import {source}: {name!r} cannot be the name of a module; rename the file")
        existing = sys.modules.get(name) or importlib.machinery.PathFinder.find_spec(name)
        origin = getattr(existing, "__file__", None) or getattr(existing, "origin", None)
        if existing is not None and (origin is None or os.path.realpath(origin) != str(file)):
            raise SboraxError(f"--import {source}: there is another module {name} ({origin}); rename the file")
    try:
        if name not in sys.modules and source.endswith(".py"):
            execute(file, name)
        else:
            importlib.import_module(name)
    except SboraxError as error:
        raise SboraxError(f"--import {source}: {error}") from None
    # A user's module may raise anything.
    except Exception as error:
        raise SboraxError(f"--import {source}: {type(error).__name__}: {error}") from error
    return name


def execute(file: Path, name: str) -> ModuleType:
    """Run a file as a module of this name, in `sys.modules`. Raises what the file raises."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module, before = importlib.util.module_from_spec(spec), sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    return module


@functools.cache
def load_plugins() -> bool:
    """Load the entry points of installed packages, once. Raises SboraxError for an entry point that fails."""
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            point.load()
        # Another package may raise anything.
        except Exception as error:
            raise SboraxError(f"plug-in {point.name} ({point.value}): {type(error).__name__}: {error}") from error
    return True


def check_imported(sources: Iterable[str], where: str) -> None:
    """Raise SboraxError for a source that neither the program nor a plug-in has imported.

    A file cannot make sborax import code: the user must.

    - sources: as `import_source` takes them.
    - where: the file that needs them, for the error.
    """
    for source in sources:
        module = Path(source).stem if source.endswith(".py") else source
        offered = {point.module for point in importlib.metadata.entry_points(group=GROUP)}
        if not _is_imported(module) and not (module in offered and load_plugins()):
            raise SboraxError(f"{where}: uses classes of {source}; if you trust that code, add --import {source}")


def _is_imported(module: str) -> bool:
    return module == _program() or any(name in sys.modules for name in (module, EXPERIMENT + module))
