"""What a sentencepiece model file says of its pieces and of what is done to a text first.

The file is a protocol buffer; the few fields that are needed are read here, since the library's own reader needs
another library, in a version that fits.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE, WORD, CHAR = range(1, 5)
KINDS = {UNIGRAM: "unigram", BPE: "bpe", WORD: "word", CHAR: "char"}
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
NO_PREFIX = bytes([0x1A, 4, 0x18, 0, 0x20, 0])
"""At the end of a model file: no space is put before a text, and none is taken away."""
_MODEL = {"piece": 1, "trainer": 2, "normaliser": 3}
_PIECE = {"text": 1, "score": 2, "type": 3}
_TRAINER = {"kind": 3, "space_behind": 24, "byte_fallback": 35}
_NORMALISER = {"table": 2, "space_before": 3, "fewer_spaces": 4, "marked_spaces": 5}


@dataclass(frozen=True)
class SentencePiece:
    """An entry of the vocabulary."""

    text: str
    score: float = 0.0
    type: int = NORMAL


@dataclass
class SentencePieceModel:
    """The settings that decide how text is cut; their values where a file says nothing are sentencepiece's."""

    pieces: list[SentencePiece] = field(default_factory=list)
    kind: int = UNIGRAM
    space_behind: bool = False
    byte_fallback: bool = False
    table: bytes = b""
    """Precompiled, of characters and what becomes of them; empty where they stay."""
    space_before: bool = True
    fewer_spaces: bool = True
    marked_spaces: bool = True

    @classmethod
    def parse(cls, content: bytes) -> "SentencePieceModel":
        """Read a model that sentencepiece itself has read without an error."""
        made = cls()
        for number, value in _fields(content):
            if number == _MODEL["piece"]:
                made.pieces.append(_piece(_bytes(value)))
            elif number == _MODEL["trainer"]:
                made._read(_bytes(value), _TRAINER)
            elif number == _MODEL["normaliser"]:
                made._read(_bytes(value), _NORMALISER)
        return made

    def _read(self, content: bytes, names: dict[str, int]) -> None:
        by_number = {number: name for name, number in names.items()}
        for number, value in _fields(content):
            if number in by_number:
                name = by_number[number]
                setattr(self, name, type(getattr(self, name))(value))

    @property
    def symbols(self) -> list[str]:
        """User-defined symbols; those with a space are never found where text has another sign for it."""
        own = [piece.text for piece in self.pieces if piece.type == USER_DEFINED]
        return [symbol for symbol in own if not (self.marked_spaces and " " in symbol)]


def _piece(content: bytes) -> SentencePiece:
    values = dict(_fields(content))
    score = struct.unpack("<f", _bytes(values.get(_PIECE["score"], bytes(4))))[0]
    kind = values.get(_PIECE["type"], NORMAL)
    return SentencePiece(
        _bytes(values[_PIECE["text"]]).decode("utf-8"), float(score), int(kind) if isinstance(kind, int) else 0
    )


def _bytes(value: int | bytes) -> bytes:
    return value if isinstance(value, bytes) else b""


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _varint(content, place)
            yield number, value
            continue
        size = {_EIGHT: 8, _FOUR: 4}.get(wire)
        if size is None:
            size, place = _varint(content, place)
        yield number, content[place : place + size]
        place += size


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
