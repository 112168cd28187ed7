"""A sentencepiece model as tokenizer.json, with the same ids; or why there is none, before anything is tokenised."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    proto = _proto(content)
    made = _library(proto, path)
    texts = [well_formed(text) for text in (*_SAMPLE, *_mixtures(proto), *documents)]
    found = made.encode_batch(texts, add_special_tokens=False)
    odd = [t for t, own in zip(texts, found, strict=True) if own.ids != pieces.EncodeAsIds(t)]
    share = len(odd) / len(texts)
    if share > _MOST_DIFFERENT:
        raise DataError(
            f"{path}: no tokenizer.json with the same ids can be made, so that a model trained with it could not be "
            f"exported: {share:.0%} of a sample differ, the first {odd[0][:60]!r}"
        )
    known = proto.trainer_spec.model_type != _kinds()["UNIGRAM"] and not proto.normalizer_spec.precompiled_charsmap
    return LibraryTokenizer(made, known and not odd and not _prefix_before_symbols(proto), share)


def _proto(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(content)


def _kinds() -> dict[str, int]:
    from sentencepiece import sentencepiece_model_pb2

    return dict(sentencepiece_model_pb2.TrainerSpec.ModelType.items())


def _types() -> dict[str, int]:
    from sentencepiece import sentencepiece_model_pb2

    return dict(sentencepiece_model_pb2.ModelProto.SentencePiece.Type.items())


def _symbols(proto: Any) -> list[str]:
    """User-defined symbols; those with a space are never found, since text has another sign for it."""
    spaces = proto.normalizer_spec.escape_whitespaces
    own = [piece.piece for piece in proto.pieces if piece.type == _types()["USER_DEFINED"]]
    return [symbol for symbol in own if not (spaces and " " in symbol)]


def _prefix_before_symbols(proto: Any) -> bool:
    return bool(proto.normalizer_spec.add_dummy_prefix and _symbols(proto))


def _mixtures(proto: Any) -> list[str]:
    """Pieces of the vocabulary in random order, which meet each other in ways that text seldom has."""
    generator = random.Random(0)
    usable = {_types()[kind] for kind in ("NORMAL", "USER_DEFINED")}
    texts = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type in usable] or [" "]
    return ["".join(generator.choices(texts, k=generator.randint(1, 30))) for _ in range(_MIXTURES)]


def _library(proto: Any, path: Path) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, normalizers

    made = tokenizers.Tokenizer(_model(proto, path))
    spec, symbols = proto.normalizer_spec, _symbols(proto)
    suffix = proto.trainer_spec.treat_whitespace_as_suffix
    if steps := _normaliser(spec, symbols, suffix):
        made.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace(SPACE, " ")] if spec.escape_whitespaces else []
    undo += [decoders.ByteFallback()] if proto.trainer_spec.byte_fallback else []
    undo += [decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        undo += [] if suffix else [decoders.Replace(Regex(r"\A "), "")]
    made.decoder = decoders.Sequence(undo)
    # Found in the normalised text, as sentencepiece finds them; a piece that normalises to nothing is never found.
    kept = [symbol for symbol in symbols if made.normalizer is None or made.normalizer.normalize_str(symbol)]
    made.add_tokens([AddedToken(symbol, normalized=True, special=False) for symbol in kept])
    return made


def _model(proto: Any, path: Path) -> Any:
    from tokenizers import models

    kinds, types, spec = _kinds(), _types(), proto.trainer_spec
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == types["NORMAL"]}
    unknown = next(number for number, piece in enumerate(proto.pieces) if piece.type == types["UNKNOWN"])
    if spec.model_type == kinds["UNIGRAM"]:
        usable = {*normal, *_symbols(proto)}
        scored = [(piece.piece, piece.score if piece.piece in usable else _NEVER) for piece in proto.pieces]
        return models.Unigram(scored, unknown, byte_fallback=spec.byte_fallback)
    if spec.model_type not in (kinds["BPE"], kinds["CHAR"]):
        name = next(name for name, number in kinds.items() if number == spec.model_type).lower()
        raise DataError(
            f"{path}: a sentencepiece model of the kind {name}, which cannot be exported; allowed: bpe, unigram, char"
        )
    merges = _merges(normal) if spec.model_type == kinds["BPE"] else []
    token = proto.pieces[unknown].piece
    return models.BPE(vocabulary, merges, unk_token=token, fuse_unk=True, byte_fallback=spec.byte_fallback)


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


def _normaliser(spec: Any, symbols: list[str], suffix: bool) -> list[Any]:
    """What sentencepiece does to a text before it is cut, step by step."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    space = SPACE if spec.escape_whitespaces else " "
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix and suffix:
        steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), space))
    elif spec.add_dummy_prefix and symbols:
        # A symbol alone gets no space: the library normalises the symbols too, and then looks for them.
        alone = "|".join(re.escape(symbol) for symbol in symbols)
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)(?=[\s\S])"), space))
    elif spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(space))
    if spec.remove_extra_whitespaces and not suffix:
        steps.append(normalizers.Replace(Regex(rf"{space}+\z"), ""))
    return steps
