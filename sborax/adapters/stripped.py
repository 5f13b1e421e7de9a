"""The placeholder for hyper-parameters in the method of an attached adapter."""

from typing import Any, NoReturn

from sborax.errors import SboraxError

_USES = """
    bool str format bytes float int complex index round trunc floor ceil neg pos abs invert
    lt le gt ge add sub mul truediv floordiv mod divmod pow matmul lshift rshift and or xor
    radd rsub rmul rtruediv rfloordiv rmod rdivmod rpow rmatmul rlshift rrshift rand ror rxor
    call len iter next reversed contains getitem array
""".split()


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise SboraxError(
        "a hyper-parameter of an attached adapter has no value: its method holds structure only; "
        "read the leaf that `init` made of it, such as adapter.frozen['scale']"
    )


class Stripped:
    """The class of `STRIPPED`, which `core.structure` puts into every `hyper` field.

    Methods that differ in hyper-parameters alone have equal structures, and share compiled programs. So `STRIPPED`
    is equal to itself alone, hashes, and copies and pickles to itself; `repr` works. Any other use raises
    SboraxError: arithmetic, comparison by order, a condition, an attribute, iteration, formatting, conversion to an
    array. (JAX functions that look at their arguments' types first raise a TypeError.)
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "STRIPPED"

    def __reduce__(self) -> str:
        return "STRIPPED"

    def __getattr__(self, name: str) -> Any:
        # Python and NumPy ask every object for optional methods, and take this error for "no".
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse()


for _use in _USES:
    setattr(Stripped, f"__{_use}__", _refuse)

STRIPPED = Stripped()
