"""The hostfile that `deepspeed --hostfile` reads: one "host slots=n" a line. No torch.

What DeepSpeed's launcher reads is read here, into the same hosts and slots, but for what could only fail later: no
slots, more than any host has, letters that no name has, and one host under two spellings.
"""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from mythos_ds.errors import Coded, ParallelError
from mythos_ds.io import read_bytes

MAX_SLOTS = 1 << 16
_LINE = re.compile(r"^(?P<host>\S+)\s+slots=(?P<slots>\d+)")
"""DeepSpeed's: what follows the number is not looked at."""
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_MARK = "\ufeff"
_NO_NAME = re.compile(r"^-|@-|@$|[|&;<>()$`\"'\\!{}*?]")
_MAX_BYTES = 1 << 24
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Line:
    """A host, with its user where one is given (`user@host`), and its number of processes."""

    host: str
    slots: int


def read_hostfile(path: Path) -> list[Line]:
    """The hosts in order. Raises ParallelError with every wrong line and its number."""
    try:
        text = read_bytes(path, ParallelError, _MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ParallelError(f"{path}:{line}: no UTF-8 text; allowed: lines of 'host slots=8'", code="MDS710") from None
    except ParallelError as error:
        raise ParallelError(f"hostfile {error}; allowed: lines of 'host slots=8'", code="MDS710") from None
    lines: list[Line] = []
    seen: dict[str, tuple[str, int]] = {}
    problems: list[Coded] = []
    for number, raw in enumerate(_LINE_ENDS.split(text), 1):
        content = raw.strip()
        if not content or content.startswith("#"):
            continue
        problem = _problem(content, seen)
        if problem is not None:
            problems.append(Coded("MDS710", f"{path}:{number}: {problem}"))
            continue
        match = _LINE.match(content)
        assert match is not None
        seen[_meant(match["host"])] = match["host"], number
        lines.append(Line(match["host"], int(match["slots"])))
    if not lines and not problems:
        problems.append(Coded("MDS710", f"{path}: names no host; allowed: lines of 'host slots=8'"))
    if problems:
        raise ParallelError(problems)
    return lines


def _problem(content: str, seen: dict[str, tuple[str, int]]) -> str | None:
    shown = repr(content if len(content) <= _SHOWN_CHARACTERS else f"{content[:_SHOWN_CHARACTERS]}...")
    if _MARK in content:
        return f"given {shown}, with a byte order mark (U+FEFF), which DeepSpeed takes for a letter; save it without"
    match = _LINE.match(content)
    if match is None:
        host = content.split()[0].rstrip(":,=")[:_SHOWN_CHARACTERS]
        return f"given {shown}; allowed: 'host slots=n'; nearest: '{host} slots=8'"
    host, digits = match["host"], match["slots"]
    if not host.isprintable() or _NO_NAME.search(host):
        shown = repr(host[:_SHOWN_CHARACTERS])
        return (
            f"given the host name {shown}; allowed: 'host' or 'user@host', without letters of the shell or '-' in front"
        )
    if len(digits) > len(str(MAX_SLOTS)) or not 0 < int(digits) <= MAX_SLOTS:
        given = digits if len(digits) < _SHOWN_CHARACTERS else f"a number of {len(digits)} digits"
        nearest = "1, or no such line" if not digits.strip("0") else str(MAX_SLOTS)
        return f"{host}: given slots={given}; allowed: 1 to {MAX_SLOTS}; nearest: {nearest}"
    if (former := seen.get(_meant(host))) is not None:
        same = "" if former[0] == host else f" as {former[0]}, which is the same host"
        return f"{host} is already in line {former[1]}{same}; give it once, with the sum of its slots"
    return None


def _meant(host: str) -> str:
    """One spelling of a host: letters, a dot at the end and the user do not matter, nor how an address is written."""
    name = host.rpartition("@")[2].rstrip(".").casefold()
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return name
