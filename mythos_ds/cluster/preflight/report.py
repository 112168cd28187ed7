"""The outcome of checks as a table for people and as JSON for programs. No torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

LISTED = 8
"""Places that are named before "and n more"."""


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` None: measured or not possible here, nothing to pass or fail.

    `value` is a number in `unit` where the check has one.
    """

    name: str
    ok: bool | None
    detail: str
    value: float | None = None
    unit: str | None = None


def passed(checks: Sequence[Check]) -> bool:
    """Whether no check failed."""
    return all(check.ok is not False for check in checks)


def places(names: Sequence[str]) -> str:
    """Several hosts or ranks in a line: the first few, and how many more."""
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - LISTED} more" if len(unique) > LISTED else ""
    return ", ".join(unique[:LISTED]) + more


def as_json(checks: Sequence[Check], hosts: Sequence[str], processes: int) -> str:
    """The report as one JSON object: ok, processes, hosts, checks."""
    content = {
        "ok": passed(checks),
        "processes": processes,
        "hosts": list(dict.fromkeys(hosts)),
        "checks": [asdict(check) for check in checks],
    }
    return json.dumps(content, indent=2)


def show(checks: Sequence[Check], hosts: Sequence[str], processes: int) -> None:
    """The report as a table on stdout, and its verdict below."""
    console = Console()
    n_hosts = len(dict.fromkeys(hosts))
    table = Table(title=f"{processes} processes on {n_hosts} host{'s' if n_hosts != 1 else ''}", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    marks = {True: ("ok", "green"), False: ("FAIL", "bold red"), None: ("-", "dim")}
    for check in checks:
        word, style = marks[check.ok]
        table.add_row(Text(check.name), Text(word, style=style), Text(check.detail))
    console.print(table)
    failed = [check.name for check in checks if check.ok is False]
    verdict = f"not ready: {', '.join(failed)}" if failed else "ready to train"
    console.print(Text(verdict, style="bold red" if failed else "bold green"))
