"""metrics.jsonl: the record of a run, one JSON object per line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

Value = float | list[float]


class MetricsWriter:
    """Appends {"step": ..., name: number or list, ...} lines to `path`; flushed, so that a killed run keeps them."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """One line. A number that is not finite becomes null: the file stays valid JSON."""
        line = {"step": step, **{name: _finite(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the lines of later steps, and a torn last line, as a run that resumes at `step` needs."""
        self._file.close()
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line, step + 1) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _finite(value: Value) -> float | list[float | None] | None:
    if isinstance(value, list):
        return [each if math.isfinite(each) else None for each in value]
    return value if math.isfinite(value) else None


def _step_of(line: str, otherwise: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return otherwise
