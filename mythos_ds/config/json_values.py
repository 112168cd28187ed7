"""The JSON text of a configuration: read within bounds, and what no setting can hold is told with its key."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mythos_ds.errors import Coded, ConfigError, Problem
from mythos_ds.io import read_bytes

MAX_BYTES = 1 << 22
MAX_DEPTH = 64
MAX_DIGITS = 64
"""Digits of a whole number; every bound of the schema has fewer."""
_WIDE = (b"\xff\xfe", b"\xfe\xff")
_SHOWN_DIGITS = 12


class Pairs(list[tuple[str, Any]]):
    """A JSON object before duplicate keys are looked for (a dict would keep only the last)."""


class _TooLong(str):
    """The digits of a number beyond MAX_DIGITS."""


def text_of(path: Path, shown: str) -> str:
    """The text of a configuration. Raises ConfigError, which calls the file `shown`, for anything but UTF-8 text in a
    regular file of bounded size; a byte order mark is left out."""
    try:
        content = read_bytes(path, ConfigError, MAX_BYTES)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(path), shown, 1), code="MDS106") from None
    if content.startswith(_WIDE) or b"\0" in content[:4]:
        message = f"{shown}: UTF-16 or UTF-32 text, or no text; allowed: UTF-8 (save it as UTF-8)"
        raise ConfigError(message, code="MDS106")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        given = f"byte 0x{content[error.start]:02x}"
        message = f"{shown}: line {line}: {given} is no UTF-8 text (save it as UTF-8)"
        raise ConfigError(message, code="MDS106") from None


def parse(text: str, source: str, refuse_constant: Callable[[str], Any]) -> Any:
    """The value of a JSON text, with objects as Pairs. Raises ValueError where it is no JSON, and ConfigError where it
    nests too deep to be read."""
    try:
        return json.loads(text, object_pairs_hook=Pairs, parse_constant=refuse_constant, parse_int=_integer)
    except RecursionError:
        message = f"{source}: nested too deep; allowed: {MAX_DEPTH} levels"
        raise ConfigError(message, code="MDS108") from None


def _integer(digits: str) -> Any:
    return int(digits) if len(digits) <= MAX_DIGITS else _TooLong(digits)


def unusable(value: Any, at: str = "", depth: int = 0) -> list[Problem]:
    """(key path, message) of each place in a configuration that no setting can hold, whatever its key: half a surrogate
    pair or a null character in a text, a number of too many digits, too deep nesting, what is no JSON value."""
    if depth > MAX_DEPTH:
        return [(at[:80], Coded("MDS108", f"nested too deep; allowed: {MAX_DEPTH} levels"))]
    if isinstance(value, dict):
        found = [problem for key in value for problem in _bad_key(key, at)]
        inside = [(f"{at}.{key}" if at else str(key), item) for key, item in value.items()]
        return found or [problem for key, item in inside for problem in unusable(item, key, depth + 1)]
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
        return [problem for index, item in items for problem in unusable(item, f"{at}[{index}]", depth + 1)]
    message = _bad_value(value)
    return [] if message is None else [(at, Coded("MDS108", message))]


def _bad_key(key: Any, at: str) -> list[Problem]:
    where = at or "the configuration"
    if not isinstance(key, str):
        return [(where, Coded("MDS108", f"the key {key!r} given; allowed: texts"))]
    message = _bad_text(key)
    return [] if message is None else [(where, Coded("MDS108", f"the key {key!a} {message}"))]


def _bad_value(value: Any) -> str | None:
    if isinstance(value, _TooLong):
        return f"a number of {len(value):,} digits given ({value[:_SHOWN_DIGITS]}...); allowed: at most {MAX_DIGITS}"
    if isinstance(value, str):
        message = _bad_text(value)
        return None if message is None else f"{ascii(value)[:80]} {message}"
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        fits = abs(value) < 10**MAX_DIGITS
        return None if fits else f"a number of more than {MAX_DIGITS} digits given; allowed: at most {MAX_DIGITS}"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} given; allowed: finite numbers"
    return f"a {type(value).__name__} given; allowed: what JSON can hold"


def _bad_text(text: str) -> str | None:
    if "\0" in text:
        return "holds a null character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a surrogate pair, or a byte that is no UTF-8 text"
    return None
