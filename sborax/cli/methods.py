"""`sborax methods`: describes the methods, from their classes."""

import dataclasses
import difflib
import inspect
import itertools
from collections.abc import Iterator

from sborax import methods
from sborax.adapters.core import AbstractComposite, AbstractFactored, AbstractKernelless, AbstractMethod, SboraxError
from sborax.adapters.depth import AbstractLinked
from sborax.config.classes import foreign, instance, load_plugins, name_of
from sborax.interop.peft_table import KNOWN_BY_DEFAULTS, TABLE


def find(name: str) -> type[AbstractMethod]:
    """The method of that name, ignoring case.

    A class of yours is also found by its name without the module, unless another class has the same name.
    Raises SboraxError for an unknown name, and for one that several classes of yours have.
    """
    methods_by_label = listed()
    labels = {label.lower(): method for label, method in methods_by_label.items()}
    if name.lower() in labels:
        return labels[name.lower()]
    named = {label: method for label, method in methods_by_label.items() if method.__name__.lower() == name.lower()}
    if len(named) == 1:
        return next(iter(named.values()))
    if named:
        raise SboraxError(f"{name!r} is the name of several methods: {', '.join(named)}; give the module, too")
    by_name = {method.__name__.lower(): method for method in methods_by_label.values()} | labels
    close = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(name_of(by_name[label]) for label in close)}?" if close else ""
    raise SboraxError(f"there is no method {name!r}; {hint or 'known: ' + ', '.join(methods_by_label)}")


def listed() -> dict[str, type[AbstractMethod]]:
    """Every method by name: sborax's own, then imported ones and those of plug-ins.

    Raises SboraxError for a plug-in that fails.
    """
    load_plugins()
    builtin = {name: getattr(methods, name) for name in methods.__all__}
    plugins = [
        method for method in foreign(AbstractMethod) if not issubclass(method, AbstractComposite | AbstractKernelless)
    ]
    return builtin | {name_of(method): method for method in plugins}


def overview() -> str:
    """Every method: equation, options, paper, whether it merges, its PEFT equivalent."""
    return "\n\n".join(_entry(method, full=False) for method in listed().values())


def describe(name: str) -> str:
    """One method with its full docstring. Raises SboraxError for an unknown name."""
    return _entry(find(name), full=True)


def _entry(method: type[AbstractMethod], full: bool) -> str:
    text = inspect.getdoc(method) or ""
    if not full:
        text = "\n".join(_equation(method, text.split("\n\n")))
    example = _example(method)
    facts = {
        "options": ", ".join(_option(field) for field in _fields(method)),
        "paper": method.paper,
        "merge": _merges(example),
        "PEFT": peft_equivalent(method),
    }
    if method.rewrites_base:
        facts["base"] = "its initialisation rewrites the base weights"
    lines = [name_of(method), *(f"  {line}".rstrip() for line in text.splitlines())]
    return "\n".join([*lines, *(f"  {name + ':':<9}{fact}" for name, fact in facts.items())])


def _equation(method: type[AbstractMethod], paragraphs: list[str]) -> Iterator[str]:
    """The paragraphs before the one that lists the options."""
    options = tuple(f"{field.name}:" for field in _fields(method))
    return itertools.takewhile(lambda paragraph: not paragraph.startswith(options), paragraphs)


def _fields(method: type[AbstractMethod]) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(method)  # type: ignore[arg-type]


def _option(field: dataclasses.Field) -> str:
    return field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"


def _merges(example: AbstractMethod | None) -> str:
    """Whether the method merges, with the default options: what it declares may depend on them."""
    if example is None:
        return "depends on its options"
    return f"no: {example.no_merge}" if example.no_merge else "exact"


def _example(method: type[AbstractMethod]) -> AbstractMethod | None:
    """The method with default options; None where an option has no default."""
    try:
        return instance(method)
    except SboraxError:
        return None


def peft_equivalent(method: type[AbstractMethod]) -> str:
    """The method's name in PEFT, and the form in which `sborax export` writes it."""
    rows = [row for row in TABLE if row.method is method]
    names = [
        " ".join(
            [row.peft_type]
            + [f"{name}={values[0]!r}" for name, values in row.known_by.items() if values[0] != KNOWN_BY_DEFAULTS[name]]
        )
        for row in rows
    ]
    named = " or ".join(names)
    if any(row.write for row in rows):
        return named
    if issubclass(method, AbstractFactored):
        return f"{named}, written as plain LoRA (exact)" if named else "none; written as plain LoRA (exact)"
    if issubclass(method, AbstractLinked):
        return "none; written as plain LoRA (exact) where it merges"
    example = _example(method)
    return "none" if example is None or example.no_merge else "none; `sborax merge` writes a dense model"
