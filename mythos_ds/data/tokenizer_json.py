"""Tokenizers of Hugging Face's `tokenizers` library: tokenizer.json, and tiktoken files converted to it."""

import base64
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos_ds.data.text_cuts import VocabularyIndex
from mythos_ds.data.tokenizer import Place, Span, Tokenizer, well_formed, with_places
from mythos_ds.data.tokenizer_files import Companions, end_of_document, kind_of
from mythos_ds.errors import DataError
from mythos_ds.io import read_bytes

if TYPE_CHECKING:
    import tokenizers

_PREPENDS_FIRST, _PREPENDS_NEVER = '"prepend_scheme":"first"', '"prepend_scheme":"never"'
_PATTERNS = ("pattern", "pat_str")
"""Where tokenizer_config.json may give the pattern that a tiktoken file's text is cut with."""


def open_tokenizer(path: Path) -> "JsonTokenizer":
    """The tokenizer of a tokenizer.json or a tiktoken file. Raises DataError where it is damaged or incomplete."""
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(f"{path}: needs the library tokenizers: pip install 'mythos_ds[hf]'", code="MDS004") from error
    content, companions = read_bytes(path, DataError), Companions(path.parent)
    if kind_of(path) == "tiktoken":
        return JsonTokenizer(_converted(path, content, companions), content, path, companions)
    try:
        made = tokenizers.Tokenizer.from_buffer(content.removeprefix(b"\xef\xbb\xbf"))
    except Exception as error:  # the library raises Exception itself
        raise DataError(
            f"{path}: not a tokenizer.json that the library tokenizers reads ({error})", code="MDS431"
        ) from None
    return JsonTokenizer(made, content, path, companions)


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library, called so that special tokens in a text stay characters.

    Added tokens that are not special are recognised in text, as the library does.
    """

    def __init__(self, made: "tokenizers.Tokenizer", content: bytes, path: Path, companions: Companions):
        self.path, self.companions, self._made = path, companions, made
        made.encode_special_tokens = True
        made.no_truncation()  # a file may hold both, as the last call of its maker left them
        made.no_padding()
        if getattr(made.model, "dropout", None):
            made.model.dropout = None
        ids = made.get_vocab(with_added_tokens=True)
        special = {token.content: number for number, token in made.get_added_tokens_decoder().items() if token.special}
        self._beside = {t: n for t, n in companions.added.items() if t not in ids and n not in ids.values()}
        self.special_tokens = special | self._beside
        self.vocab_size = max([*ids.values(), *self._beside.values()], default=-1) + 1
        self.eos_id = end_of_document(list(self.special_tokens), companions, ids | self._beside, path)
        pad = self.special_tokens.get(companions.named("pad_token") or "", -1)
        # Many name one token for both. It is no padding then: it stays in the targets.
        self.pad_id = -1 if pad == self.eos_id else pad
        self.special_tokens |= {token: number for token, number in ids.items() if number == self.eos_id}
        self.sha256 = companions.digest_of(content, self.eos_id, *self._of_tiktoken(path))
        self._after: tokenizers.Tokenizer | None = None

    def _of_tiktoken(self, path: Path) -> list[object]:
        """What decides a tiktoken file's ids beside its ranks."""
        return [] if kind_of(path) == "json" else [_pattern(path, self.companions), _extra_tokens(self.companions, 0)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special one. Lone surrogates, which no UTF-8 text can hold, become U+FFFD."""
        return list(self._made.encode(well_formed(text), add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, without the offsets that take most of the time."""
        found = self._made.encode_batch_fast([well_formed(text) for text in texts], add_special_tokens=False)
        return [list(each.ids) for each in found]

    def encode_after(self, text: str) -> list[int]:
        """Ids of a text that goes on after a special token: no space is put before it where only a text's start has
        one."""
        return self.encode_on(text)

    def symbols(self) -> dict[str, int]:
        """Added tokens that are not special."""
        added = self._made.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if not token.special}

    def encode_on(self, text: str) -> list[int]:
        """Ids of a text that goes on within a text."""
        return list(self._going_on().encode(well_formed(text), add_special_tokens=False).ids)

    def spans(self, text: str, place: Place) -> list[Span]:
        """The ids with the characters that each stands for."""
        made = self._made if place == "start" else self._going_on()
        found = made.encode(well_formed(text), add_special_tokens=False)
        return with_places(found.ids, found.offsets, len(text))

    def _going_on(self) -> "tokenizers.Tokenizer":
        if self._after is None:
            import tokenizers

            content = json.dumps(json.loads(self._made.to_str()), separators=(",", ":"))
            self._after = tokenizers.Tokenizer.from_str(content.replace(_PREPENDS_FIRST, _PREPENDS_NEVER))
            self._after.encode_special_tokens = True
        return self._after

    def reaches_over(self, left: str, right: str) -> bool:
        """Whether a token might hold the end of a text and the start of what follows it."""
        normaliser, cutter = self._going_on().normalizer, self._going_on().pre_tokenizer
        left, right = well_formed(left), well_formed(right)
        texts = [normaliser.normalize_str(each) if normaliser else each for each in (left, right, left + right)]
        if texts[0] + texts[1] != texts[2] or not texts[0] or not texts[1]:
            return True
        first, second, both = ([word for word, _ in cutter.pre_tokenize_str(t)] if cutter else [t] for t in texts)
        if cutter and first + second == both:
            return False
        bpe = type(self._made.model).__name__ == "BPE" and not self._made.model.continuing_subword_prefix
        if not bpe or self._made.model.end_of_word_suffix or [*first[:-1], first[-1] + second[0], *second[1:]] != both:
            return True
        if min(len(first[-1]), len(second[0])) <= self._words.longest:  # such a word may be a token as it is
            return True
        return self._joins_unknown(first[-1][-1], second[0][0]) or self._words.reaches_over(first[-1], second[0])

    def _joins_unknown(self, before: str, after: str) -> bool:
        """Whether two characters may become one token for the unknown."""
        model: Any = self._made.model
        known = [self._made.token_to_id(character) is not None for character in (before, after)]
        return bool(model.fuse_unk) and not model.byte_fallback and not any(known)

    @cached_property
    def _words(self) -> VocabularyIndex:
        return VocabularyIndex(self._made.get_vocab(with_added_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special ids vanish."""
        special = set(self.special_tokens.values())
        kept = [int(i) for i in ids if int(i) not in special]
        return str(self._made.decode(kept, skip_special_tokens=True))

    def json(self) -> str:
        """The content of tokenizer.json: the file's own, or a tiktoken file converted."""
        if kind_of(self.path) == "json":
            return self.path.read_text(encoding="utf-8-sig")
        self._made.encode_special_tokens = False
        try:
            return str(self._made.to_str(pretty=True))
        finally:
            self._made.encode_special_tokens = True


def _converted(path: Path, content: bytes, companions: Companions) -> "tokenizers.Tokenizer":
    """A tiktoken file as the converter of transformers reads it, with the special tokens that are named beside it."""
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError as error:
        raise DataError(
            f"{path}: is a tiktoken file; reading it needs an extra: pip install 'mythos_ds[hf]'", code="MDS004"
        ) from error
    pattern = _pattern(path, companions)
    ranks = _ranks(path, content)
    given = {} if pattern is None else {"pattern": pattern}

    class Converter(TikTokenConverter):
        """Reads the file without the library tiktoken, which would be needed for nothing else."""

        def extract_vocab_merges_from_model(self, tiktoken_url: str) -> Any:
            return _vocabulary(ranks)

    return Converter(str(path), extra_special_tokens=_extra_tokens(companions, len(ranks)), **given).converted()


def _ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """The tokens of a tiktoken file by their bytes. Raises DataError naming the first line that is none."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise DataError(
                f"{path} line {number}: not a tiktoken line, base64 and a rank ({error})", code="MDS431"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(
            f"{path}: {len(ranks)} tokens, without the byte 0x{missing[0]:02x}; allowed: tiktoken files with all 256 "
            "bytes",
            code="MDS431",
        )
    return ranks


def _pattern(path: Path, companions: Companions) -> str | None:
    """The pattern that text is cut with; None for the converter's own, that of Llama 3, which transformers takes for
    every folder without code of its own. Raises DataError where nothing says it."""
    for name in _PATTERNS:
        if isinstance(companions.config.get(name), str):
            return str(companions.config[name])
    if companions.config and "auto_map" not in companions.config:
        return None
    why = "its folder's code knows it" if companions.config else "tiktoken files do not hold it"
    raise DataError(
        f"{path}: a tiktoken file, whose pattern for cutting text is unknown ({why}); put the model's tokenizer.json "
        f'or tokenizer_config.json beside it, or write {{"pattern": "...", "eos_token": "...", '
        f'"extra_special_tokens": [...]}} to {path.parent / "tokenizer_config.json"}',
        code="MDS431",
    )


def _extra_tokens(companions: Companions, base: int) -> list[str]:
    """The special tokens after a tiktoken file's own, in the order of their ids, with fillers where ids are missing."""
    by_id = {number: token for token, number in companions.added.items() if number >= base}
    numbers = range(base, max(by_id) + 1) if by_id else ()
    tokens = [by_id.get(number, f"<|reserved_token_{number}|>") for number in numbers]
    extra: Any = companions.config.get("extra_special_tokens") or companions.config.get("additional_special_tokens")
    names = list(extra.values() if isinstance(extra, dict) else extra or [])
    named = [companions.named(f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")]
    for token in [*(name.get("content") if isinstance(name, dict) else name for name in names), *named]:
        if token and token not in tokens:
            tokens.append(token)
    return tokens


def _vocabulary(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens as the byte-level strings of tokenizer.json, and the merges that make each of two others."""
    letters = _byte_letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = sorted((ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks)
        merges += [(rank, text(a), text(b)) for _, _, a, b in known]
    merges.sort(key=lambda merge: merge[0])
    return {text(token): rank for token, rank in ranks.items()}, [(a, b) for _, a, b in merges]


def _byte_letters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
