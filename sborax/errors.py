"""The error that this package raises for mistakes of users, and a test for errors of Rust libraries."""


class SboraxError(ValueError):
    """A mistake that the user can fix. The message says in one line what is wrong, where, and how to fix it.

    Unprintable characters are escaped. A message longer than 2,000 characters is cut in the middle.
    """

    def __init__(self, message: str) -> None:
        text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
        ValueError.__init__(self, text if len(text) <= 2_000 else f"{text[:995]} ... {text[-995:]}")


def is_panic(failure: BaseException) -> bool:
    """Whether an error is a panic of a Rust library, which is a `BaseException` but no `Exception`."""
    return type(failure).__name__ == "PanicException"
