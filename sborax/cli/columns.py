"""Tables on the terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[tuple[str, ...]], numbers: Sequence[bool] | None = None) -> list[str]:
    """The rows in columns of equal width, numbers flush right.

    - numbers: which columns hold numbers. By default every cell that is a number is set flush right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def padded(text: str, column: int) -> str:
        right = is_number(text) if numbers is None else numbers[column]
        return text.rjust(widths[column]) if right else text.ljust(widths[column])

    return ["  ".join(padded(text, column) for column, text in enumerate(row)).rstrip() for row in rows]


def is_number(text: str) -> bool:
    """Whether a cell is a number as tables print it: `1,024`, `-0.5`, `56.1M`."""
    return text.lstrip("+-").replace(".", "", 1).replace(",", "").rstrip("M").isdecimal()
