"""One interface over tokenizers of several kinds; sentencepiece models as tokenizers, and their training."""

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mythos_ds.data.sentencepiece_model import BPE, CHAR, NO_PREFIX, UNIGRAM, USER_DEFINED, SentencePieceModel
from mythos_ds.data.text_cuts import VocabularyIndex
from mythos_ds.data.tokenizer_files import Companions, kind_of, tokenizer_file
from mythos_ds.errors import DataError
from mythos_ds.io import new_file, read_bytes, where_searched
from mythos_ds.weights.built_in import model_path

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
_CHUNK_CHARACTERS = 1200
_LONGEST_SENTENCE_BYTES = 1 << 16


Span = tuple[int, int, int]
"""An id, and the first character that it stands for, and the one after its last."""
Place = Literal["start", "after", "within"]
"""Of a text: at a text's start, after a special token, within a text."""


class Tokenizer(ABC):
    """Text to ids and back. Text is always text: a special token's name in it gives the ids of its characters.

    Attributes:
        path: the file that was read.
        sha256: digest of all that decides ids.
        vocab_size: ids there are, the special ones included.
        eos_id: id that ends every document.
        pad_id: id that no text encodes to; -1 where there is none.
        special_tokens: ids that only a chat template or a program writes, by name.
        companions: what the files beside it say.
        fastest_characters: length of text from which on encoding gets slower by the character; 0 where it does not.
        cut_checks: how many surroundings a place in a text is tried in before the text is cut there.
        checked_characters: how many characters on each side these have.
    """

    path: Path
    sha256: str
    vocab_size: int
    eos_id: int
    pad_id: int
    special_tokens: dict[str, int]
    companions: Companions
    fastest_characters = 0
    cut_checks = 4
    checked_characters = 192

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer: a sentencepiece model, a tokenizer.json or a tiktoken file, told apart by their content; or
        that of a model folder or of "tiny".

        Raises DataError when it is missing or of another kind.
        """
        path = tokenizer_file(model_path(path))
        if not path.is_file():
            command = f"mythos-ds train-tokenizer INPUT --output {path}"
            raise DataError(f"tokenizer {path} not found{where_searched(path)}; make it with: {command}", code="MDS430")
        if kind_of(path) == "sentencepiece":
            return SentencePieceTokenizer(read_bytes(path, DataError), path)
        from mythos_ds.data.tokenizer_json import open_tokenizer

        return open_tokenizer(path)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special one. Lone surrogates, which no UTF-8 text can hold, become U+FFFD."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_after(self, text: str) -> list[int]:
        """Ids of a text that goes on after a special token."""
        return self.encode(text)

    @abstractmethod
    def encode_on(self, text: str) -> list[int]:
        """Ids of a text that goes on within a text: nothing is put before it."""

    @abstractmethod
    def spans(self, text: str, place: Place) -> list[Span]:
        """The ids of `encode`, `encode_after` or `encode_on`, by the place of the text, each with the characters that
        it stands for: one at least, which several may share."""

    def encode_piece(self, text: str) -> list[int]:
        """Ids of a text that goes on where `text_cuts` has cut it."""
        return self.encode_on(text)

    @abstractmethod
    def reaches_over(self, left: str, right: str) -> bool:
        """Whether a token might hold the end of a text and the start of what follows it. The two are some hundred
        characters around a place."""

    @property
    def needs_whole_text(self) -> bool:
        """Whether ids depend on how much text stands before, by the rounding of sums."""
        return False

    def symbols(self) -> dict[str, int]:
        """Tokens that are recognised in text, by name."""
        return {}

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special ids vanish."""

    def unknown_token(self) -> str | None:
        """Name of what stands for the unknown; None where there is none."""
        return self.companions.named("unk_token")

    def begin_token(self) -> str | None:
        """Name of the token of a text's begin; None where there is none."""
        return self.companions.named("bos_token")

    def ends(self) -> frozenset[int]:
        """Ids at which generated text ends: the end of a document, and those of a chat's turns that the files beside
        it name."""
        return frozenset({self.eos_id, *(number for number in self.companions.ends() if number < self.vocab_size)})


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. `decode(encode(text)) == text` for models trained here.

    The one exception is U+2581, which sentencepiece itself uses for the space and decodes to one. Of raw text only its
    user-defined symbols are recognised.
    """

    fastest_characters = 8_000
    cut_checks = 1  # its pieces are all that decides: the few characters are tried to be sure
    checked_characters = 48

    def __init__(self, model: bytes, path: Path):
        import sentencepiece

        self.path, self.companions = path, Companions(path.parent)
        self.sha256 = self.companions.digest_of(model)
        pieces: SentencePieceProcessor = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError) as error:  # ValueError: its own message of damage is no UTF-8 text
            raise DataError(
                f"{path} is no sentencepiece model, tokenizer.json or tiktoken file; mythos-ds train-tokenizer makes "
                "a sentencepiece model",
                code="MDS431",
            ) from error
        self._processor = pieces
        self._going_on: SentencePieceProcessor | None = None
        self.eos_id, self.pad_id = int(pieces.eos_id()), int(pieces.pad_id())
        if self.eos_id < 0:
            raise DataError(
                f"{path} has no end-of-sentence piece, which must end every document; allowed: models trained with "
                "eos_id of 0 or more",
                code="MDS432",
            )
        size = int(pieces.GetPieceSize())
        control = [i for i in range(size) if pieces.IsControl(i) or pieces.IsUnknown(i)]
        added = {token: number for token, number in self.companions.added_tokens().items() if number >= size}
        self.special_tokens = {str(pieces.IdToPiece(i)): i for i in control} | added
        self.vocab_size = max([size - 1, *added.values()]) + 1
        self._added = {number: token for token, number in added.items()}

    def unknown_token(self) -> str | None:
        """Name of the piece that stands for the unknown."""
        return str(self._processor.IdToPiece(self._processor.unk_id()))

    def begin_token(self) -> str | None:
        """Name of the piece of a text's begin; None where there is none."""
        number = int(self._processor.bos_id())
        return None if number < 0 else str(self._processor.IdToPiece(number))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special one. Lone surrogates, which no UTF-8 text can hold, become U+FFFD."""
        return list(self._processor.EncodeAsIds(well_formed(text)))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, at once."""
        return list(self._processor.EncodeAsIds([well_formed(text) for text in texts], num_threads=1))

    def encode_on(self, text: str) -> list[int]:
        """Ids of a text that goes on within a text: nothing is put before it."""
        if self._going_on is None:
            import sentencepiece

            self._going_on = sentencepiece.SentencePieceProcessor()
            self._going_on.LoadFromSerializedProto(self._processor.serialized_model_proto() + NO_PREFIX)
        return list(self._going_on.EncodeAsIds(well_formed(text)))

    def spans(self, text: str, place: Place) -> list[Span]:
        """The ids with the characters that each stands for. Raises DataError where the library is too old to say."""
        self.encode_on("")
        pieces: Any = self._going_on if place == "within" else self._processor
        if not hasattr(pieces, "EncodeAsOffsetMapping"):
            raise DataError(
                f"{self.path}: conversations need a newer sentencepiece: pip install 'sentencepiece>=0.2.2'",
                code="MDS004",
            )
        found = pieces.EncodeAsOffsetMapping(well_formed(text))
        return with_places(found["ids"], found["offsets"], len(text))

    def encode_piece(self, text: str) -> list[int]:
        """Ids of a text that goes on where `text_cuts` has cut it: before a space, where spaces at a start count for
        nothing and one is put there."""
        return self.encode(text) if self._model.fewer_spaces else self.encode_on(text)

    def reaches_over(self, left: str, right: str) -> bool:
        """Whether a token might hold the end of a text and the start of what follows it."""
        model = self._model
        if model.space_behind or model.kind not in (BPE, UNIGRAM, CHAR):
            return True
        self.encode_on("")
        pieces: Any = self._processor if model.fewer_spaces else self._going_on
        first, second, both = (pieces.Normalize(well_formed(each)) for each in (left, right, left + right))
        if first + second != both or not first or not second:
            return True
        unknown = not model.byte_fallback and not {first[-1], second[0]} & self._characters
        return unknown or self._pieces.reaches_over(first, second)  # unknown ones become one token together

    @property
    def needs_whole_text(self) -> bool:
        """Unigram models sum scores over a whole text, in single precision."""
        return self._model.kind == UNIGRAM

    @cached_property
    def _model(self) -> SentencePieceModel:
        return SentencePieceModel.parse(self._processor.serialized_model_proto())

    @cached_property
    def _pieces(self) -> VocabularyIndex:
        return VocabularyIndex(piece.text for piece in self._model.pieces)

    @cached_property
    def _characters(self) -> set[str]:
        return {piece.text for piece in self._model.pieces if len(piece.text) == 1}

    def symbols(self) -> dict[str, int]:
        """User-defined symbols."""
        pieces = self._model.pieces
        return {piece.text: number for number, piece in enumerate(pieces) if piece.type == USER_DEFINED}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special ids vanish."""
        return str(self._processor.DecodeIds([int(i) for i in ids if int(i) not in self._added]))


def with_places(ids: Sequence[int], offsets: Iterable[tuple[int, int]], length: int) -> list[Span]:
    """Ids with the characters that a library gives them; what has none, such as bytes of a character or a space that is
    put before a text, gets the one at its place."""
    made = []
    for number, (start, end) in zip(ids, offsets, strict=True):
        start = min(start, max(length - 1, 0))
        made.append((int(number), start, max(end, start + 1)))
    return made


def well_formed(text: str) -> str:
    """`text` itself, or with its lone surrogates replaced where it has any."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def train_tokenizer(
    documents: Iterable[str],
    path: Path,
    *,
    vocab_size: int = 4096,
    kind: Literal["bpe", "unigram"] = "bpe",
    max_bytes: int = 8_000_000,
) -> Tokenizer:
    """Train a lossless sentencepiece model on the first `max_bytes` of `documents` and write it to `path`.

    Bytes that no piece covers become byte pieces, nothing is normalised and no space is added, so that every
    text survives. A small corpus may give fewer pieces than asked. Raises DataError when there is too little
    text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_first_bytes(_chunks(documents), max_bytes),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            max_sentence_length=_LONGEST_SENTENCE_BYTES,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"cannot train a tokenizer of {vocab_size} pieces on this text: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(model.getvalue())
    return Tokenizer.load(path)


def _chunks(documents: Iterable[str]) -> Iterator[str]:
    """Pieces of about 1200 characters cut at line ends, so that newlines and indents are learnt."""
    for document in documents:
        lines: list[str] = []
        size = 0
        for line in _short_lines(well_formed(document)):
            lines.append(line)
            size += len(line)
            if size >= _CHUNK_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
        if lines:
            yield "".join(lines)


def _short_lines(document: str) -> Iterator[str]:
    for line in re.split(r"(?<=\n)", document):
        for start in range(0, len(line), _CHUNK_CHARACTERS):
            yield line[start : start + _CHUNK_CHARACTERS]


def _first_bytes(chunks: Iterable[str], max_bytes: int) -> Iterator[str]:
    size = 0
    for chunk in chunks:
        size += len(chunk.encode("utf-8"))
        if size > max_bytes:
            return
        yield chunk
