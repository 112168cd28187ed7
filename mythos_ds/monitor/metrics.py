"""metrics.jsonl: the record of a run, one JSON object per line."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mythos_ds.io import write_atomic

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

    def truncate_after(self, step: int) -> set[str]:
        """Drops the lines of later steps, a torn last line, and what is there twice, as a run that resumes at `step`
        needs. Returns the names that have a value at `step`."""
        self._file.close()
        seen: set[tuple[int, str]] = set()
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            values = _values_of(line)
            if values is None or values["step"] > step:
                continue
            new = {name: value for name, value in values.items() if (values["step"], name) not in seen}
            seen |= {(values["step"], name) for name in new if name != "step"}
            if len(new) > 1:
                kept.append(line if new == values else json.dumps(new))
        write_atomic(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        return {name for at, name in seen if at == step}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What the whole lines of a metrics file say, each with its step."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [values for line in lines if (values := _values_of(line)) is not None]


def _finite(value: Value) -> float | list[float | None] | None:
    if isinstance(value, list):
        return [each if math.isfinite(each) else None for each in value]
    return value if math.isfinite(value) else None


def _values_of(line: str) -> dict[str, Any] | None:
    """What a line says, with its step; None for what is no such line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None
