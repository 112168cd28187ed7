"""Where a long text may be cut so that its pieces, encoded one by one, give the ids of the whole.

A place is taken where no entry of the vocabulary could reach over it, or where the tokenizer itself always cuts, and
where the text around it gives the same ids in two pieces as in one, from several starts.
"""

import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mythos_ds.data.rows import BadRow

if TYPE_CHECKING:
    from mythos_ds.data.tokenizer import Tokenizer

PIECE_CHARACTERS = 500_000
MAX_WHOLE_BYTES = 6 << 20
"""What is encoded in one piece where there is no place to cut."""
_BLOCK = 1 << 15
_WINDOW = 192
_MOST_CHECKS = 400
_JAMO = ((0x1100, 0x11FF), (0xA960, 0xA97F), (0xD7B0, 0xD7FF))


class VocabularyIndex:
    """The entries of a vocabulary, to be asked whether one of them reaches over a place."""

    def __init__(self, entries: Iterable[str]):
        self._entries = sorted(set(entries))
        self.longest = max(map(len, self._entries), default=0)
        self._pairs = {entry[i : i + 2] for entry in self._entries for i in range(len(entry) - 1)}

    def reaches_over(self, left: str, right: str) -> bool:
        """Whether an entry is the end of `left` and the start of `right`."""
        if left[-1:] + right[:1] not in self._pairs:
            return False
        for size in range(1, min(self.longest, len(left) + 1)):
            entry = left[-size:]
            place = self._first(entry)
            for character in right:
                if place is None:
                    break
                entry += character
                place = self._first(entry)
                if place is not None and self._entries[place] == entry:
                    return True
        return False

    def _first(self, start: str) -> int | None:
        """The first entry with that start."""
        place = bisect_left(self._entries, start)
        return place if place < len(self._entries) and self._entries[place].startswith(start) else None


def in_pieces(
    tokenizer: "Tokenizer", blocks: Iterable[str | BadRow], where: str, size: int | None = None
) -> Iterator[str | BadRow]:
    """A text in pieces whose ids are those of the whole: of the first by `encode`, of the others by `encode_piece`.

    Ends with a BadRow where the text does, or where so much of it has no place to be cut at that encoding it would fill
    the memory.
    """
    text, searched = "", 0
    cut = False
    size = size or PIECE_CHARACTERS
    for block in blocks:
        if isinstance(block, BadRow):
            yield block
            return
        text += block
        if tokenizer.needs_whole_text and not cut and len(text.encode("utf-8", "replace")) <= MAX_WHOLE_BYTES:
            continue
        while len(text) - searched > size + 2 * _WINDOW:
            place = last_cut(tokenizer, text, searched + 1, searched + size)
            if place is None:
                searched += size
                continue
            yield text[:place]
            text, searched, cut = text[place:], 0, True
        if len(text) * 4 > MAX_WHOLE_BYTES and len(text.encode("utf-8", "replace")) > MAX_WHOLE_BYTES:
            yield _uncuttable(where)
            return
    if text or not cut:
        yield text


def ids_of_piece(tokenizer: "Tokenizer", text: str, *, starts: bool) -> list[int]:
    """Ids of a piece, or of a text's start, encoded in still smaller pieces where that is faster."""
    if tokenizer.needs_whole_text or not tokenizer.fastest_characters:
        return tokenizer.encode(text) if starts else tokenizer.encode_piece(text)
    ids: list[int] = []
    blocks = (text[start : start + _BLOCK] for start in range(0, len(text), _BLOCK))  # what is left is copied each time
    for number, piece in enumerate(in_pieces(tokenizer, blocks, "", tokenizer.fastest_characters)):
        assert isinstance(piece, str)  # no more than was found to be encodable at once
        ids += tokenizer.encode(piece) if starts and not number else tokenizer.encode_piece(piece)
    return ids


def _uncuttable(where: str) -> BadRow:
    return BadRow(where, f"more than {MAX_WHOLE_BYTES:,} bytes without a place where the tokenizer surely cuts")


def last_cut(tokenizer: "Tokenizer", text: str, low: int, high: int) -> int | None:
    """The last place from `low` to `high` at which `text` may be cut; None where none is found."""
    checks = 0
    for place in range(min(high, len(text) - _WINDOW), max(low, _WINDOW), -1):
        if not _plain(text[place - 1], text[place]):
            continue
        checks += 1
        if checks > _MOST_CHECKS:
            return None
        if may_cut(tokenizer, text, place):
            return place
    return None


def _plain(before: str, after: str) -> bool:
    """Whether no normalisation joins two characters (marks, joiners, jamo, surrogates); and `before` is no space."""
    if before.isspace():
        return False
    for character in (before, after):
        number = ord(character)
        if unicodedata.category(character)[0] == "M" or unicodedata.category(character) in ("Cf", "Cs"):
            return False
        if any(low <= number <= high for low, high in _JAMO):
            return False
    return True


def may_cut(tokenizer: "Tokenizer", text: str, place: int) -> bool:
    """Whether `text` may be cut at `place`."""
    left, right = text[max(0, place - _WINDOW) : place], text[place : place + _WINDOW]
    if tokenizer.reaches_over(left, right):
        return False
    window = min(_WINDOW, tokenizer.checked_characters)
    for shift in range(tokenizer.cut_checks):
        left, right = text[max(0, place - window + shift) : place], text[place : place + window - shift]
        if tokenizer.encode_piece(left) + tokenizer.encode_piece(right) != tokenizer.encode_piece(left + right):
            return False
    return True
