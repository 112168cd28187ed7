"""What every study has: runs to make, and a page of tables and pictures made from their results."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mythos_ds.formatting import markdown_table
from mythos_ds.io import write_atomic
from mythos_ds.lab.spec import RunSpec
from mythos_ds.lab.sweep import Result

Results = Mapping[tuple[str, int], Result]
"""By arm and seed."""


@dataclass
class Report:
    """What a study shows. Numbers are written to results.json; `tables` are (caption, markdown rows)."""

    numbers: dict[str, Any]
    tables: list[tuple[str, list[list[str]]]]
    pictures: list[tuple[str, Callable[[Path], None]]] = field(default_factory=list)
    """(file name, what draws it to a path)."""


@dataclass(frozen=True)
class Study:
    """A question, the runs that answer it, and what is made of their results.

    Attributes:
        runs: (scale, data folder) -> the runs by arm and seed.
        analyse: (results, folder of each run, scale) -> the report.
        limit_s: seconds after which one run has failed.
        needs: raises LabError where what the runs need is missing.
    """

    name: str
    title: str
    runs: Callable[[str, str], dict[tuple[str, int], RunSpec]]
    analyse: Callable[[Results, Mapping[tuple[str, int], Path], str], Report]
    limit_s: float = 3600.0
    scales: tuple[str, ...] = ("cpu", "gpu")
    needs: Callable[[], object] = lambda: None


def write_report(study: Study, report: Report, folder: Path, header: Mapping[str, str]) -> None:
    """Writes results.json, the pictures and results.md (tables and pictures, to be included by a page).

    `header`: how the study was run, by name; it stands above the tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in report.pictures:
        draw(folder / name)
    lines = [f"<!-- written by the command below; read {study.name}.md for what it means -->", ""]
    lines += [f"* {name}: {value}" for name, value in header.items()] + [""]
    for caption, rows in report.tables:
        lines += [f"**{caption}**", "", markdown_table(rows[0], rows[1:]), ""]
    lines += [f"![{name}]({name})\n" for name, _ in report.pictures]
    write_atomic(folder / "results.md", "\n".join(lines))
    content = {"study": study.name, **header, "numbers": report.numbers}
    write_atomic(folder / "results.json", json.dumps(content, indent=1) + "\n")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and sample standard deviation, as a table shows them; nothing for no values."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    form = f".{digits}f" if abs(mean) < 1e5 else ".1e"
    if len(values) == 1:
        return f"{mean:{form}}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:{form}} ± {deviation:{form}}"


def by_arm(results: Results, name: str) -> list[Result]:
    """The results of one arm, by seed."""
    return [result for (arm, _), result in sorted(results.items()) if arm == name]
