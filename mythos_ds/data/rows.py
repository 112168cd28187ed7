"""What readers make of files: documents, long documents in pieces, and rows that are none."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mythos_ds.errors import DataError

MAX_ROW_BYTES = 64 << 20
STOP_AFTER = 20
"""Bad rows after which reading ends, where they are errors."""
LONG_CHARACTERS = 1_000_000
"""Length from which on a document is encoded in pieces."""
NO_FIELD = "no field "
_LISTED = 20
_PIECE = 500_000


@dataclass(frozen=True)
class BadRow:
    """A row that holds no document.

    Attributes:
        where: the file, and the line or row.
        reason: what is wrong, in words that rows of one kind share.
        detail: what was found; may be empty.
        damage: whether the file is damaged, so that what comes after the row was not read: never left out silently.
    """

    where: str
    reason: str
    detail: str = ""
    damage: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}{f'; {self.detail}' if self.detail else ''}"


@dataclass(frozen=True)
class LongText:
    """One document in pieces, which are read as they are needed; a BadRow in their place takes the whole away."""

    where: str
    pieces: Iterator["str | BadRow"]


@dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that they may call, as JSON text in the order of the row."""

    where: str
    text: str


Row = str | LongText | Conversation | BadRow


def long_or_whole(text: str, where: str) -> str | LongText:
    """A document that is at hand, as one that is read in pieces where it is long."""
    if len(text) <= LONG_CHARACTERS:
        return text
    return LongText(where, (text[start : start + _PIECE] for start in range(0, len(text), _PIECE)))


@dataclass
class BadRows:
    """Counts bad rows, and remembers the first.

    Attributes:
        skip: leave them out; else they are errors, which are told together.
    """

    skip: bool = False
    count: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    documents: int = 0
    """Good rows so far."""
    _damage: str = ""

    @property
    def full(self) -> bool:
        """Whether there are so many errors that reading on makes no sense."""
        return not self.skip and self.count >= STOP_AFTER

    def add(self, row: BadRow) -> None:
        """Count one more."""
        self.count += 1
        self.reasons[row.reason] = self.reasons.get(row.reason, 0) + 1
        if len(self.examples) < _LISTED:
            self.examples.append(str(row))
        if row.damage and not self._damage:
            self._damage = str(row)

    def check(self, kept: Path | None) -> None:
        """Raises DataError, with every row that was kept, where there are errors. kept: where finished parts are."""
        if not self.count or (self.skip and not self._damage):
            return
        if self.skip:
            raise DataError(
                f"{self._damage}; --on-bad-row skip leaves out rows, not damaged files: mend or remove it",
                code="MDS425",
            )
        them = "it" if self.count == 1 else "them"
        skipped = "" if self._damage else f", or leave {them} out with --on-bad-row skip"
        parts = f"; finished parts are in {kept}, and a rerun goes on from them" if kept else ""
        after = f"nothing published: mend {them}{skipped}{parts}"
        if self.count == 1:
            raise DataError(f"{self.examples[0]}; {after}", code="MDS423")
        only = next(iter(self.reasons)) if self.full and len(self.reasons) == 1 and self.documents == 0 else ""
        if only.startswith(NO_FIELD):
            told = self.examples[0].partition(f"{only}; ")[2]
            raise DataError(f"none of the first {self.count} rows has the key: {only}; {told}", code="MDS422")
        ended = ", after which reading ended" if self.full else ""
        listed = "\n  ".join(self.examples)
        raise DataError(f"{self.count} bad rows{ended} ({self.by_reason()}); {after}\n  {listed}", code="MDS423")

    def by_reason(self) -> str:
        """Counts by reason."""
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())


def whole_texts(rows: Iterable[Row]) -> Iterator[str]:
    """Documents as one string each. Raises DataError for the first bad row."""
    for row in rows:
        yield "".join(_pieces(row))


def text_pieces(rows: Iterable[Row]) -> Iterator[str]:
    """The text of all documents, long ones in pieces. Raises DataError for the first bad row."""
    for row in rows:
        yield from _pieces(row)


def _pieces(row: Row) -> Iterator[str]:
    for piece in row.pieces if isinstance(row, LongText) else (row,):
        if isinstance(piece, BadRow):
            raise DataError(str(piece), code="MDS423")
        yield piece if isinstance(piece, str) else piece.text
