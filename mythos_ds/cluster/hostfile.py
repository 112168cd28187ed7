"""The hostfile that `deepspeed --hostfile` reads: one "host slots=n" a line. No torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from mythos_ds.errors import ParallelError

_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)\s*(#.*)?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Line:
    """A host and its number of processes."""

    host: str
    slots: int


def read_hostfile(path: Path) -> list[Line]:
    """The hosts in order. Raises ParallelError with every wrong line and its number."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParallelError(f"hostfile {path}: cannot be read ({error}); allowed: lines of 'host slots=8'") from None
    lines: list[Line] = []
    seen: dict[str, int] = {}
    problems: list[str] = []
    for number, raw in enumerate(text.splitlines(), 1):
        content = raw.strip()
        if not content or content.startswith("#"):
            continue
        problem = _problem(content, seen)
        if problem is not None:
            problems.append(f"{path}:{number}: {problem}")
            continue
        match = _LINE.fullmatch(content)
        assert match is not None
        seen[match["host"]] = number
        lines.append(Line(match["host"], int(match["slots"])))
    if not lines and not problems:
        problems.append(f"{path}: names no host; allowed: lines of 'host slots=8'")
    if problems:
        raise ParallelError("\n".join(problems))
    return lines


def _problem(content: str, seen: dict[str, int]) -> str | None:
    match = _LINE.fullmatch(content)
    if match is None:
        host = content.split()[0]
        return f"given {content!r}; allowed: 'host slots=n'; nearest: '{host} slots=8'"
    if not _HOST.fullmatch(match["host"]):
        return f"given the host name {match['host']!r}; allowed: letters, digits, '.', '-', '_' and ':'"
    if int(match["slots"]) == 0:
        return f"{match['host']}: given slots=0; allowed: at least 1; nearest: 1, or no such line"
    if match["host"] in seen:
        return f"{match['host']} is already in line {seen[match['host']]}; give it once, with the sum of its slots"
    return None
