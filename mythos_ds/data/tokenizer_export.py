"""A sentencepiece model as tokenizer.json, with the same ids; or why there is none, before anything is tokenised."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos_ds.data.sentencepiece_model import (
    BPE,
    CHAR,
    KINDS,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
)
from mythos_ds.data.tokenizer import Tokenizer, well_formed
from mythos_ds.data.tokenizer_files import kind_of
from mythos_ds.errors import DataError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
_NEVER = -1e6
"""Log-probability of pieces that no text gives, such as </s>."""
_SAMPLE = (
    "def f(x):\n\t  return  x ** 2  # naïve “quotes” 漢字 \U0001f642 1234567\n\n",
    " two  spaces ",
    "</s><s><unk> <pad> <0x41>",
    "\x00\x01\u200b\ufeff\r\n",
    "ｶﾞ ﬁ ① e\u0301 Å\u0301 \u00a0",
    f"{SPACE}a{SPACE}{SPACE}",
    "\n\n\n\n        x" + "=" * 30,
)
_MIXTURES = 300
_CHARACTERS = 2000
_MOST_DIFFERENT = 0.1


@dataclass(frozen=True)
class LibraryTokenizer:
    """A sentencepiece model in the library tokenizers.

    Attributes:
        made: the library's tokenizer.
        exact: whether its ids are sentencepiece's for every text. Else some texts get others: two ways to cut them have
            the same score, or a normaliser meets several characters at once.
        differing: share of a sample's texts whose ids differ.
    """

    made: "tokenizers.Tokenizer"
    exact: bool
    differing: float


def check_exportable(tokenizer: Tokenizer, documents: Iterable[str]) -> None:
    """Raises DataError where what trains with `tokenizer` could not be exported with the same ids; `documents` are
    tried."""
    if kind_of(tokenizer.path) == "sentencepiece":
        library_tokenizer(tokenizer.path, [document[:_CHARACTERS] for document in documents])


def library_tokenizer(path: Path, documents: Sequence[str] = ()) -> LibraryTokenizer:
    """The model in the library, compared on a sample and on `documents`. Raises DataError for a kind of model that
    the library has not, or where more than a tenth of the texts get other ids."""
    import sentencepiece

    content = path.read_bytes()
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(content)
    model = SentencePieceModel.parse(content)
    made = _library(model, path)
    texts = [well_formed(text) for text in (*_SAMPLE, *_mixtures(model), *documents)]
    found = made.encode_batch(texts, add_special_tokens=False)
    odd = [t for t, own in zip(texts, found, strict=True) if own.ids != pieces.EncodeAsIds(t)]
    share = len(odd) / len(texts)
    if share > _MOST_DIFFERENT:
        raise DataError(
            f"{path}: no tokenizer.json with the same ids can be made, so that a model trained with it could not be "
            f"exported: {share:.0%} of a sample differ, the first {odd[0][:60]!r}"
        )
    known = model.kind != UNIGRAM and not model.table and not (model.space_before and model.symbols)
    return LibraryTokenizer(made, known and not odd, share)


def _mixtures(model: SentencePieceModel) -> list[str]:
    """Pieces of the vocabulary in random order, which meet each other in ways that text seldom has."""
    generator = random.Random(0)
    usable = (NORMAL, USER_DEFINED)
    texts = [piece.text.replace(SPACE, " ") for piece in model.pieces if piece.type in usable] or [" "]
    return ["".join(generator.choices(texts, k=generator.randint(1, 30))) for _ in range(_MIXTURES)]


def _library(model: SentencePieceModel, path: Path) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, normalizers

    made = tokenizers.Tokenizer(_core(model, path))
    if steps := _normaliser(model):
        made.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace(SPACE, " ")] if model.marked_spaces else []
    undo += [decoders.ByteFallback()] if model.byte_fallback else []
    undo += [decoders.Fuse()]
    if (model.space_before or model.fewer_spaces) and not model.space_behind:
        undo.append(decoders.Replace(Regex(r"\A "), ""))
    made.decoder = decoders.Sequence(undo)
    # Found in the normalised text, as sentencepiece finds them; a piece that normalises to nothing is never found.
    kept = [symbol for symbol in model.symbols if made.normalizer is None or made.normalizer.normalize_str(symbol)]
    made.add_tokens([AddedToken(symbol, normalized=True, special=False) for symbol in kept])
    return made


def _core(model: SentencePieceModel, path: Path) -> Any:
    from tokenizers import models

    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    if model.kind == UNIGRAM:
        usable = (NORMAL, USER_DEFINED)
        scored = [(piece.text, piece.score if piece.type in usable else _NEVER) for piece in model.pieces]
        return models.Unigram(scored, unknown, byte_fallback=model.byte_fallback)
    if model.kind not in (BPE, CHAR):
        name = KINDS.get(model.kind, "unknown")
        raise DataError(
            f"{path}: a sentencepiece model of the kind {name}, which cannot be exported; allowed: bpe, unigram, char"
        )
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    normal = {piece.text: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = _merges(normal) if model.kind == BPE else []
    token = model.pieces[unknown].text
    return models.BPE(vocabulary, merges, unk_token=token, fuse_unk=True, byte_fallback=model.byte_fallback)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that make each piece of two others, in the order in which sentencepiece prefers them."""
    found = []
    for piece, score in scores.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in scores and b in scores]
        known.sort(key=lambda pair: (-scores[pair[0]], -scores[pair[1]]))
        found += [(-score, pair) for pair in known]
    found.sort(key=lambda entry: entry[0])
    return [pair for _, pair in found]


def _normaliser(model: SentencePieceModel) -> list[Any]:
    """What sentencepiece does to a text before it is cut, step by step."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(model.table)] if model.table else []
    if model.fewer_spaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    space = SPACE if model.marked_spaces else " "
    if model.marked_spaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if model.space_before and model.space_behind:
        steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), space))
    elif model.space_before and model.symbols:
        # A symbol alone gets no space: the library normalises the symbols too, and then looks for them.
        alone = "|".join(re.escape(symbol) for symbol in model.symbols)
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)(?=[\s\S])"), space))
    elif model.space_before:
        steps.append(normalizers.Prepend(space))
    if model.fewer_spaces and not model.space_behind:
        steps.append(normalizers.Replace(Regex(rf"{space}+\z"), ""))
    return steps
