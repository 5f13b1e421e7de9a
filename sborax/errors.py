"""The one error of this package, and how those of another kind are known."""


class SboraxError(ValueError):
    """A mistake the user can mend; its message is one line that says what, where and how, of 2,000 letters at most."""

    def __init__(self, message: str) -> None:
        text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
        ValueError.__init__(self, text if len(text) <= 2_000 else f"{text[:995]} ... {text[-995:]}")


def is_panic(failure: BaseException) -> bool:
    """Whether an error is the end of a library in Rust, of which Python makes no `Exception`."""
    return type(failure).__name__ == "PanicException"
