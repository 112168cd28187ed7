"""Rows of JSON: lines, or the elements of an array of any length, each checked before and after it is parsed."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mythos_ds.data.rows import LONG_CHARACTERS, NO_FIELD, BadRow, Row, long_or_whole

_MAX_DEPTH = 200
_MAX_VALUES = 1_000_000
_SAFE_BYTES = 1 << 20
_SHOWN_KEYS = 10
_SHOWN_CHARACTERS = 40
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_OPENINGS = re.compile(rb"[\[{]")
_BRACKETS = re.compile(rb"[\[\]{}]")
_IN_STRING = re.compile(rb'["\\]')
_OUTSIDE = re.compile(rb'["\[\]{},]')
_first_value = json.JSONDecoder().raw_decode
_MANY = "is JSON over several lines; as JSON lines each object is on one: jq -c"
OVER_LINES = {
    b"{": f"{_MANY} . FILE > NEW.jsonl (or '.NAME[]' for the list under a name of it)",
    b"[": f"{_MANY} '.[]' FILE > NEW.jsonl, or --format json, which reads an array of objects as it is",
}
"""What is said of a file of JSON lines by its first line."""


def parsed(line: bytes, encoding: str, where: str) -> Any:
    """The value of a row's JSON, without white space around it, or a BadRow."""
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError as error:
        return not_text(error, where)
    reason = _too_much(line)
    if reason:
        return BadRow(where, reason)
    try:
        value, end = _first_value(text)
        return value if end == len(text) else json.loads(text)  # which tells what comes after it
    except ValueError as error:  # also for a number of more digits than Python converts
        return BadRow(where, "not JSON", str(error))
    except (RecursionError, MemoryError) as error:
        return BadRow(where, "not JSON", type(error).__name__)


def not_text(error: UnicodeDecodeError, where: str) -> BadRow:
    """What is said of bytes that are no text."""
    byte = error.object[error.start]
    name = "UTF-8" if error.encoding == "utf-8" else error.encoding
    return BadRow(
        where, f"not readable as {name} text", f"byte 0x{byte:02x} at byte {error.start} of it; or give --encoding"
    )


def _too_much(line: bytes) -> str | None:
    """Why a row must not be parsed: deep nesting overruns the parser, many small values fill the memory."""
    if len(line) < _SAFE_BYTES and line.count(b"[") + line.count(b"{") <= _MAX_DEPTH:
        return None
    bare = _STRING.sub(b"", line)
    if bare.count(b",") + len(_OPENINGS.findall(bare)) > _MAX_VALUES:
        return f"more than {_MAX_VALUES:,} values in it"
    depth = 0
    for found in _BRACKETS.finditer(bare):
        depth += 1 if found[0] in b"[{" else -1
        if depth > _MAX_DEPTH:
            return f"nested beyond {_MAX_DEPTH} levels"
    return None


def text_of(row: Any, key: str, where: str) -> Row:
    """The text under a key of a row, "a.b" for that of an object in it; or a BadRow."""
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value if len(value) <= LONG_CHARACTERS else long_or_whole(value, where)
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict):
        return BadRow(where, f"a JSON object is needed, {_kind(row)} given")
    value, inside = row, ""
    for name in [key] if key in row or "." not in key else key.split("."):
        if not isinstance(value, dict):
            return BadRow(where, f"field {inside!r} is {_kind(value)}, an object is needed for --key {key}")
        if name not in value:
            given = f"{inside}.{name}" if inside else name
            return BadRow(where, f"{NO_FIELD}{given!r}", f"allowed for --key: {_keys(value, inside)}")
        value, inside = value[name], f"{inside}.{name}" if inside else name
    if not isinstance(value, str):
        return BadRow(where, f"field {key!r} is {_kind(value)}, text is needed")
    return long_or_whole(value, where)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _keys(row: dict[str, Any], inside: str) -> str:
    names = [repr((f"{inside}.{name}" if inside else name)[:_SHOWN_CHARACTERS]) for name in list(row)[:_SHOWN_KEYS]]
    return ", ".join(names) + (", ..." if len(row) > _SHOWN_KEYS else "") if names else "none"


def array_elements(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """The elements of an array that is read in blocks, without being parsed; None for one above `max_bytes`.

    Raises ValueError where the array does not end, or where more comes after it.
    """
    scanner = _ArrayScanner(max_bytes)
    for block in blocks:
        yield from scanner.feed(block)
    scanner.end()


class _ArrayScanner:
    """Where elements begin and end; `depth` is 0 before the array, 1 between its elements, -1 after it."""

    def __init__(self, max_bytes: int):
        self.depth = 0
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._in_string = self._escaped = self._any = False

    def feed(self, block: bytes) -> Iterator[bytes | None]:
        """The elements that end in one more block."""
        start = place = 0
        if self._escaped and block:
            self._escaped, place = False, 1
        while found := (_IN_STRING if self._in_string else _OUTSIDE).search(block, place):
            sign, place = found[0], found.end()
            if sign == b"\\":
                self._escaped = place == len(block)
                place += 1
            elif sign == b'"':
                self._in_string = not self._in_string
            elif self.depth == 1 and sign in b",]}":
                yield from self._end(block[start : found.start()], sign)
                start = place
            elif self.depth < 1:
                self._begin(block[start : found.start()], sign)
                start = place
            else:
                self.depth += 1 if sign in b"[{" else -1 if sign in b"]}" else 0
        self._keep(block[start:])

    def end(self) -> None:
        """Raises ValueError where the array has not ended, or something comes after it."""
        if self.depth >= 0:
            raise ValueError("the array does not end: its last element is cut off")
        if self._rest().strip():
            raise ValueError("more comes after the array")

    def _begin(self, before: bytes, sign: bytes) -> None:
        if self.depth < 0 or sign != b"[" or before.strip() or self._rest().strip():
            raise ValueError("more comes after the array" if self.depth < 0 else "no array at its start")
        self.depth = 1

    def _end(self, last: bytes, sign: bytes) -> Iterator[bytes | None]:
        self._keep(last)
        too_long, element = self._size > self._max_bytes, self._rest()
        empty = not too_long and not element.strip()
        if sign == b"]" and empty and not self._any:
            self.depth = -1
            return
        yield None if too_long else element
        self._any, self.depth = True, self.depth if sign == b"," else -1

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._max_bytes:
            self._parts.clear()
        else:
            self._parts.append(part)

    def _rest(self) -> bytes:
        whole = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return whole
