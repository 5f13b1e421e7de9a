"""The one error of this package."""

LONGEST_MESSAGE = 2000
"""Letters of an error's line."""


class SboraxError(ValueError):
    """A mistake the user can mend; its message is one line that says what, where and how.

    What it quotes out of files is written out where it is no printable letter, and cut in the middle where endless.
    """

    def __init__(self, message: str) -> None:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        half = LONGEST_MESSAGE // 2 - 5
        whole = len(text) <= LONGEST_MESSAGE
        ValueError.__init__(self, text if whole else f"{text[:half]} ... {text[-half:]}")
