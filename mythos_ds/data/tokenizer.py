"""sentencepiece models as tokenizers, and their training."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mythos_ds.errors import DataError
from mythos_ds.io import partial_path, sync
from mythos_ds.weights.built_in import model_path

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
_CHUNK_CHARACTERS = 1200
_LONGEST_SENTENCE_BYTES = 1 << 16


class Tokenizer:
    """A sentencepiece model. `encode` adds no special ids; `decode(encode(text)) == text` for models trained
    here.

    The one exception is U+2581, which sentencepiece itself uses for the space and decodes to one.
    """

    def __init__(self, model: bytes, path: Path):
        import sentencepiece

        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor: SentencePieceProcessor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(f"{path} is no sentencepiece model; mythos-ds train-tokenizer makes one") from error
        if self.eos_id < 0:
            raise DataError(f"{path} has no end-of-sentence piece, which must end every document")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a model file, or that of a model folder or of "tiny".

        Raises DataError when it is missing or of another kind.
        """
        path = model_path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            command = f"mythos-ds train-tokenizer INPUT --output {path}"
            raise DataError(f"tokenizer {path} not found; make it with: {command}")
        return cls(path.read_bytes(), path)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, the special ones included."""
        return int(self._processor.GetPieceSize())

    @property
    def eos_id(self) -> int:
        """Id that ends every document."""
        return int(self._processor.eos_id())

    @property
    def pad_id(self) -> int:
        """Id that no text encodes to; -1 where the model has none."""
        return int(self._processor.pad_id())

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Lone surrogates, which no UTF-8 text can hold, become U+FFFD."""
        return list(self._processor.EncodeAsIds(well_formed(text)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special ids vanish."""
        return str(self._processor.DecodeIds([int(i) for i in ids]))


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
    work = partial_path(path)
    work.write_bytes(model.getvalue())
    sync(work)
    work.replace(path)
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
