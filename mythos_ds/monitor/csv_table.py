"""metrics.csv: one row for each logged step, one column for each metric."""

import csv
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from mythos_ds.io import new_file
from mythos_ds.monitor.metrics import read_lines
from mythos_ds.monitor.views import Values, flat

STEP = "step"
_STEPS = re.compile("[0-9]{1,15}")
Row = dict[str, str]


class CsvWriter:
    """Writes a table for spreadsheets and pandas; an empty cell is a number that the step lacks or that is not finite.

    A start at `start_step` drops later rows and fills the others from the record (metrics.jsonl), so that a table which
    is switched on late, or whose end was torn, is whole again.
    """

    def __init__(self, path: Path, record: Path, start_step: int = -1):
        self._path = path
        rows = _rows(path, start_step)
        for line in read_lines(record) if record.is_file() else ():
            step = line.pop(STEP)
            if step <= start_step:
                rows.setdefault(step, {STEP: str(step)}).update(_cells(line))
        ordered = [rows[step] for step in sorted(rows)]
        self._columns = list(dict.fromkeys([STEP, *(name for row in ordered for name in row)]))
        self._last = ordered[-1] if ordered else {}
        self._start = self._end = 0  # of the last row, in bytes
        self._file = self._rewritten(ordered)

    def write(self, step: int, values: Values) -> None:
        """Add to the row of `step`, which is the last one or a new one; flushed, so that a killed run keeps it."""
        same = self._last.get(STEP) == str(step)
        row = {STEP: str(step), **_cells(values), **(self._last if same else {})}
        new = [name for name in row if name not in self._columns]
        self._last = row
        if new:
            self._columns += new
            self._file.close()
            rows = _rows(self._path, step) | {step: row}
            self._file = self._rewritten([rows[at] for at in sorted(rows)])
        else:
            # One write, no shorter than the row that it replaces.
            self._file.seek(self._start if same else self._end)
            self._start = self._file.tell()
            self._file.write(_text(self._columns, [row]))
            self._file.flush()
            self._end = self._file.tell()

    def text(self, step: int, name: str, text: str) -> None:
        """Leave text out: a table has numbers only."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _rewritten(self, rows: list[Row]) -> BinaryIO:
        """Replace the file by all rows under all columns, and open it."""
        before = _text(self._columns, [{name: name for name in self._columns}, *rows[:-1]])
        last = _text(self._columns, rows[-1:])
        with new_file(self._path) as file:
            file.write(before + last)
        self._start, self._end = len(before), len(before + last)
        return self._path.open("r+b")


def _cells(values: Values) -> Row:
    """The cells of the numbers that are finite."""
    return {name: repr(value) for name, value in flat(values).items() if value is not None and math.isfinite(value)}


def _text(columns: list[str], rows: Iterable[Row]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([row.get(name, "") for name in columns] for row in rows)
    return text.getvalue().encode()


def _rows(path: Path, last_step: int) -> dict[int, Row]:
    """The whole rows of a table up to a step, by step; what is no such row is left out."""
    if not path.is_file():
        return {}
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    found: dict[int, Row] = {}
    try:
        header, *lines = [*csv.reader(whole.split("\n"))] or [[]]
    except csv.Error:  # the record has what it had
        return {}
    for line in lines:
        row = {name: cell for name, cell in zip(header, line, strict=False) if cell}
        if len(line) == len(header) and _STEPS.fullmatch(row.get(STEP, "")) and int(row[STEP]) <= last_step:
            found.setdefault(int(row[STEP]), {}).update(row)
    return found
