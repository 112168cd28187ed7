"""Long documents in pieces give the ids of the whole, whatever the text and the tokenizer."""

import json
import random

import pytest

from mythos_ds.data import text_cuts
from mythos_ds.data.rows import BadRow
from mythos_ds.data.text_cuts import VocabularyIndex, in_pieces
from mythos_ds.data.tokenizer import Tokenizer
from tests.helpers.tokenizers import SENTENCEPIECE, byte_level_folder, mixed_lines, sentencepiece_model

_CODE = mixed_lines(1500, seed=1)
_WORDS = [*_CODE[0].split(), "the", "of", "hello", "world", "import", "self", "function", "naïve", "½", "x=1;"]
_CONTROL = [*range(32), 127, 0x85, 0xA0, 0xAD, 0x301, 0x200B, 0x2028, 0x3000, 0xFEFF, *range(97, 123)]
_EMOJI = [*map(chr, range(0x1F300, 0x1F6FF)), "\U0001f469\u200d\U0001f467", "❤\ufe0f", "\U0001f1e9\U0001f1ea"]
TEXTS = {
    "words": lambda r: r.choice(_WORDS) + " ",
    "code": lambda r: r.choice(_CODE) + "\n",
    "cjk": lambda r: chr(r.randrange(0x4E00, 0x9FA5)),
    "cjk with marks": lambda r: chr(r.randrange(0x4E00, 0x9FA5)) + r.choice(["", "", "。", "\uff0c"]),
    "kana": lambda r: chr(r.randrange(0x3041, 0x30FF)),
    "hangul": lambda r: chr(r.randrange(0xAC00, 0xD7A3)),
    "jamo": lambda r: chr(r.choice([r.randrange(0x1100, 0x1200), 0xAC00])),
    "emoji": lambda r: r.choice(_EMOJI),
    "hex": lambda r: f"{r.getrandbits(32):08x}",
    "letters": lambda r: r.choice("abcdefghijklmnopqrstuvwxyz"),
    "base64": lambda r: r.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"),
    "digits": lambda r: r.choice("0123456789"),
    "one letter": lambda r: "a",
    "spaces": lambda r: r.choice(["\n", "\n\n", "\r\n", "x", " ", "  ", "\t"]),
    "control characters": lambda r: chr(r.choice(_CONTROL)),
    "anything": lambda r: chr(r.choice([r.randrange(0xD800), r.randrange(0xE000, 0x2FFFF)])),
    "surrogates": lambda r: chr(r.choice([r.randrange(0xD800, 0xE000), 97, 32])),
    "arabic": lambda r: chr(r.randrange(0x620, 0x64B)) + r.choice(["", "\u064e", " "]),
    "special": lambda r: r.choice(["</s>", "<|im_end|>", "<tool>", "hello", " ", "\u2581", "<0x0A>", "a"]),
}
PATTERNS = {
    "llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "thousands": r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)|\p{L}+|\s+|[^\s\p{L}\p{N}]+",
}
BYTE_LEVEL = ("byte level", "byte level, added tokens", *PATTERNS)


def made_text(kind, size, seed):
    generator, parts, length = random.Random(f"{kind} {seed}"), [], 0
    while length < size:
        parts.append(TEXTS[kind](generator))
        length += len(parts[-1])
    return "".join(parts)[:size]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {
        kind: Tokenizer.load(sentencepiece_model(folder / kind / "tokenizer.model", kind)) for kind in SENTENCEPIECE
    }
    for kind in BYTE_LEVEL:
        place = byte_level_folder(folder / kind, added="added" in kind)
        if kind in PATTERNS:
            content = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
            split = {"type": "Split", "pattern": {"Regex": PATTERNS[kind]}, "behavior": "Isolated", "invert": False}
            letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, letters]}
            content["normalizer"] = {"type": "NFC"} if kind == "thousands" else None
            content["model"]["ignore_merges"] = kind == "llama 3"
            (place / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        found[kind] = Tokenizer.load(place)
    return found


def ids_in_pieces(tokenizer, text, *, block=700):
    blocks = (text[start : start + block] for start in range(0, len(text), block))
    pieces = list(in_pieces(tokenizer, blocks, "here"))
    if isinstance(pieces[-1], BadRow):
        return pieces[-1], len(pieces)
    assert "".join(map(str, pieces)) == text
    ids = tokenizer.encode(pieces[0])
    for piece in pieces[1:]:
        ids += tokenizer.encode_piece(piece)
    return ids, len(pieces)


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, *BYTE_LEVEL])
def test_ids_are_those_of_the_whole(tokenizers, kind, monkeypatch):
    monkeypatch.setattr(text_cuts, "PIECE_CHARACTERS", 1500)
    monkeypatch.setattr(text_cuts, "MAX_WHOLE_BYTES", 12_000)  # unigram models go in pieces too after that
    tokenizer, cut = tokenizers[kind], 0
    for text_kind in TEXTS:
        for seed in range(2):
            text = made_text(text_kind, 9000, seed)
            found, pieces = ids_in_pieces(tokenizer, text)
            if not isinstance(found, BadRow):
                assert found == tokenizer.encode(text), (kind, text_kind, seed)
                cut += pieces > 2
    assert cut >= {"space behind": 0, "t5": 4, "defaults": 4}.get(kind, 8)


@pytest.mark.parametrize("kind", ["bpe", "llama", "gemma", "chat symbols", *BYTE_LEVEL])
def test_common_text_is_cut_as_often_as_asked(tokenizers, kind, monkeypatch):
    monkeypatch.setattr(text_cuts, "PIECE_CHARACTERS", 1500)
    for text_kind in ("words", "code", "cjk", "cjk with marks", "emoji"):
        text = made_text(text_kind, 30_000, 0)
        found, pieces = ids_in_pieces(tokenizers[kind], text)
        assert found == tokenizers[kind].encode(text)
        assert pieces >= 12, text_kind


def test_text_without_a_place_to_cut_is_refused_by_its_size(tokenizers, monkeypatch):
    monkeypatch.setattr(text_cuts, "PIECE_CHARACTERS", 1500)
    tokenizer = tokenizers["byte level"]
    found, _ = ids_in_pieces(tokenizer, "x" + " " * 20_000)
    assert found == tokenizer.encode("x" + " " * 20_000)
    monkeypatch.setattr(text_cuts, "MAX_WHOLE_BYTES", 12_000)
    found, count = ids_in_pieces(tokenizer, made_text("code", 5000, 0) + "x" + " " * 20_000)
    assert count > 1
    assert str(found) == "here: more than 12,000 bytes without a place where the tokenizer surely cuts"


def test_entries_that_reach_over_a_place():
    generator = random.Random(0)
    for _ in range(300):
        entries = ["".join(generator.choices("abc", k=generator.randint(1, 5))) for _ in range(12)]
        left, right = ("".join(generator.choices("abc", k=8)) for _ in range(2))
        slow = any(
            left.endswith(entry[:size]) and right.startswith(entry[size:])
            for entry in entries
            for size in range(1, len(entry))
        )
        assert VocabularyIndex(entries).reaches_over(left, right) == slow


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "unigram", "llama", "gemma", *BYTE_LEVEL])
def test_ids_of_documents_of_megabytes(tokenizers, kind):
    """In the sizes that are used: 1 to 5 MB, of every kind of text."""
    tokenizer, generator = tokenizers[kind], random.Random(kind)
    for number, text_kind in enumerate(TEXTS):
        text = made_text(text_kind, generator.randint(1_000_000, 5_000_000), number)
        while len(text.encode("utf-8", "replace")) > 5_000_000:
            text = text[: len(text) // 2]
        if (kind, text_kind) == ("thousands", "digits"):  # whose pattern looks ahead to the end of each run of digits
            text = text[:50_000]
        found, _ = ids_in_pieces(tokenizer, text, block=1 << 20)
        assert found == tokenizer.encode(text), text_kind
