"""Numbers and tables as text: bytes, durations, large numbers, Markdown and plain tables."""

import math
from collections.abc import Iterable, Sequence

_SCALES = (
    (1e24, "Y"),
    (1e21, "Z"),
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
)
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def byte_text(size: float) -> str:
    """1234567 -> '1.23 MB'."""
    power = max(0, min(len(_BYTES) - 1, int(math.log10(max(abs(size), 1.0)) // 3)))
    return f"{size / 1000**power:.3g} {_BYTES[power]}"


def number_text(value: float, digits: int = 3) -> str:
    """1.05G, 600k, 42."""
    for scale, letter in _SCALES:
        if abs(value) >= scale * (1 - 0.5 * 10**-digits):
            return f"{value / scale:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def dollar_text(value: float) -> str:
    """20326000 -> '$20.3M'."""
    return f"${number_text(value)}".replace("G", "B")


def duration_text(hours: float) -> str:
    """In hours, or in seconds below one hour."""
    return f"{hours:.2g} hours" if hours >= 1 else f"{hours * 3600:.2g} seconds"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width."""
    lines = [header, *rows]
    widths = [max(len(row[i]) for row in lines) for i in range(len(header))]
    texts = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in lines)
    return "\n".join(text.rstrip() for text in texts)
