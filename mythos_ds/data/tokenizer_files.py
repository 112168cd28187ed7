"""The files of a tokenizer: which they are, what stands beside them, and how all of it travels with a model."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_ds.errors import DataError
from mythos_ds.io import copy_file, copy_folder, read_bytes, read_json, write_atomic

SENTENCEPIECE, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
_MODELS = (SENTENCEPIECE, TOKENIZER_JSON, "tiktoken.model")
_SPECIAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
_CHAT = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_OF_SLOW_CLASSES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_LARGEST_ID = (1 << 31) - 2
_CARD, _SOURCE_CARD = "README.md", "SOURCE_README.md"
_DOCUMENTS = re.compile(r"(licen[cs]e|notice|use_policy|acceptable_use|copying)", re.IGNORECASE)
CARD_MARK = "# A recurrent-depth mixture-of-experts model"
"""Heading of the cards that an export writes."""

# Names of the end of a document where no file says which it is: one of them must be the only one.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|endofdocument|>")


def tokenizer_file(path: Path) -> Path:
    """The file that a tokenizer is read from: `path` itself, or the one in that folder.

    Of a folder's, a sentencepiece model comes first, then tokenizer.json, then a tiktoken file.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in _MODELS if is_regular(path / name)]
    both = [file for file in found if file.name == TOKENIZER_JSON or kind_of(file) == "sentencepiece"]
    return next(iter(both or found), path / SENTENCEPIECE)


def has_tokenizer(path: Path) -> bool:
    """Whether `path` is a file, or a folder with a tokenizer in it."""
    return tokenizer_file(path).is_file()


def kind_of(file: Path) -> str:
    """ "json", "tiktoken" or "sentencepiece", by the first bytes. Raises DataError for a Git LFS pointer."""
    with file.open("rb") as opened:
        start = opened.read(1024)
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{file}: is a Git LFS pointer, not the file; fetch it with: git lfs pull", code="MDS005")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        return "json"
    first = start.split(b"\n")[0].split()
    tiktoken = len(first) == 2 and first[1].isdigit() and re.fullmatch(rb"[A-Za-z0-9+/]+={0,2}", first[0])
    return "tiktoken" if tiktoken else "sentencepiece"


class Companions:
    """What the files beside a tokenizer say of its special tokens and its chat template."""

    def __init__(self, folder: Path):
        self.folder = folder
        read = {name: _object(folder / name) for name in _SPECIAL}
        self.config: dict[str, Any] = read["tokenizer_config.json"]
        self._generation = read["generation_config.json"]
        self._model = _object(folder / "config.json", lenient=True)
        own = self.config.get("own_special_tokens")
        self._named = {**(own if isinstance(own, dict) else {}), **read["special_tokens_map.json"], **self.config}
        listed = read["added_tokens.json"]
        self.added = {token: _id(number, folder / "added_tokens.json", token) for token, number in listed.items()}
        decoder = self.config.get("added_tokens_decoder") or {}
        place = folder / "tokenizer_config.json"
        if not isinstance(decoder, dict):
            raise DataError(
                f"{place}: added_tokens_decoder: {type(decoder).__name__} given; allowed: ids with their tokens",
                code="MDS431",
            )
        for number, token in decoder.items():
            self.added[_content(token) or ""] = _id(number, place, f"added_tokens_decoder.{number}")

    def named(self, name: str) -> str | None:
        """The token that is named, such as "eos_token"."""
        return _content(self._named.get(name))

    def added_tokens(self) -> dict[str, int]:
        """Tokens that were added to a vocabulary, tokenizer.json's too."""
        own = _object(self.folder / TOKENIZER_JSON).get("added_tokens")
        listed = [token for token in own if isinstance(token, dict)] if isinstance(own, list) else []
        file = self.folder / TOKENIZER_JSON
        own_ids = {str(token.get("content")): _id(token.get("id", -1), file, "added_tokens.id") for token in listed}
        return own_ids | self.added

    def ends(self) -> list[int]:
        """Ids at which generation ends, as generation_config.json and config.json list them."""
        inner = self._model.get("text_config")
        model = inner if inner and isinstance(inner, dict) else self._model
        for source, name in ((self._generation, "generation_config.json"), (model, "config.json")):
            given = source.get("eos_token_id")
            if given is not None:
                numbers = given if isinstance(given, list) else [given]
                return [_id(number, self.folder / name, "eos_token_id") for number in numbers]
        return []

    def chat_template(self) -> str | None:
        """The chat template in Jinja; None where there is none."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return _text(file)
        given = _object(self.folder / "chat_template.json").get("chat_template") or self.config.get("chat_template")
        if isinstance(given, list):
            given = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}.get("default")
        return given if isinstance(given, str) else None

    def digest_of(self, content: bytes, *parts: object) -> str:
        """SHA-256 of a tokenizer's file and of what else decides ids."""
        digest = hashlib.sha256(content)
        for part in parts:
            digest.update(json.dumps(part, sort_keys=True).encode("utf-8"))
        return digest.hexdigest()


def end_of_document(special: list[str], companions: Companions, ids: dict[str, int], path: Path) -> int:
    """The id that ends documents: the named end-of-sequence token, else the only special token of a usual name.

    Raises DataError, naming what to write and where, when there is none or more than one.
    """
    named = companions.named("eos_token")
    if named is not None:
        if named not in ids:
            raise DataError(
                f"{path}: eos_token {named!r} of {companions.folder} is not in the vocabulary", code="MDS432"
            )
        return ids[named]
    listed = [number for number in companions.ends() if number in ids.values()]
    if listed:
        return listed[0]
    usual = [token for token in _END_NAMES if token in special]
    if len(usual) == 1:
        return ids[usual[0]]
    some = ", ".join(special[:8]) or "none; add one to the tokenizer first"
    example = usual[0] if usual else special[0] if special else "TOKEN"
    raise DataError(
        f'{path}: no token is named to end every document; write {{"eos_token": "{example}"}} to '
        f"{companions.folder / 'special_tokens_map.json'}; allowed: a special token of it ({some})",
        code="MDS432",
    )


def is_regular(path: Path) -> bool:
    """Whether there is a file. Raises DataError for a device, a pipe or a link to nothing, which is not left out in
    silence."""
    if path.is_file():
        return True
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise DataError(f"{path}: no regular file, and no link to one", code="MDS431")
    return False


def _object(path: Path, *, lenient: bool = False) -> dict[str, Any]:
    """A JSON object, empty where the file is missing. Raises DataError for what is no JSON, unless `lenient`."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path, Any, DataError)
    except DataError:
        if lenient:  # of a model, which its own reader judges
            return {}
        raise
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str:
    try:
        return read_bytes(path, DataError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})", code="MDS431") from error


def _id(given: Any, path: Path, key: str) -> int:
    """A token's id, which may be written as text. Raises DataError for anything else."""
    text = str(given) if isinstance(given, int | str) and not isinstance(given, bool) else ""
    if not re.fullmatch(r"-?[0-9]{1,10}", text) or int(text) > _LARGEST_ID:
        raise DataError(
            f"{path}: {key[:80]}: {str(given)[:40]!r} given; allowed: an id, up to {_LARGEST_ID}", code="MDS431"
        )
    return int(text)


def _content(token: Any) -> str | None:
    """A token's string, which may stand in an object."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def travelling(place: Path) -> Iterator[Path]:
    """Tokenizer, chat template, licences and card of a model's folder; of a tokenizer file, what decides its ids."""
    folder = place if place.is_dir() else place.parent
    names = (*_MODELS, *_OF_SLOW_CLASSES, *_SPECIAL, *_CHAT) if place.is_dir() else (place.name, *_SPECIAL, *_CHAT)
    found = [folder / name for name in names]
    if place.is_dir():
        documents = (_CARD, _SOURCE_CARD)
        found += [path for path in sorted(folder.iterdir()) if path.name in documents or _DOCUMENTS.match(path.name)]
    for path in found:
        # A tokenizer is not left out in silence; what only stands beside it may be.
        if path.is_dir() or (is_regular(path) if path.name in _MODELS else path.is_file()):
            yield path


def copy_tokenizer(place: Path, output: Path) -> list[str]:
    """Copy what travels beside weights from a model's folder, or a tokenizer file, to `output`; names what was copied.

    A file of another name is called what its kind is called in a model folder. A source's own card becomes
    SOURCE_README.md: the weights beside it are no longer those it speaks of.
    """
    if not place.is_dir() and not place.is_file():
        return []
    if place.name in _MODELS and (place.parent / "config.json").is_file():
        place = place.parent
    output.mkdir(parents=True, exist_ok=True)
    copied = []
    for path in travelling(place):
        name = path.name
        if path == place:
            name = TOKENIZER_JSON if kind_of(path) == "json" else SENTENCEPIECE
        if name == "chat_template.json" and (path.parent / "chat_template.jinja").is_file():
            continue
        if name == _CARD and not is_export_card(path):
            if (path.parent / _SOURCE_CARD).is_file():
                continue
            name = _SOURCE_CARD
        if path.is_dir():
            copy_folder(path, output / name)
        elif path.is_file():
            copy_file(path, output / name)
        copied.append(name)
    return copied


@dataclass(frozen=True)
class ChatFormat:
    """What a model that learnt from conversations is told: its chat template, and ids that end its answers."""

    template: str
    ends: frozenset[int]


def write_chat_format(folder: Path, chat: ChatFormat, ends: Iterable[int]) -> None:
    """Writes the chat template to a model's folder, and to its generation_config.json where generation ends: at the
    answers' ends, and at `ends`, those of before."""
    write_atomic(folder / "chat_template.jinja", chat.template)
    path = folder / "generation_config.json"
    given = _object(path)
    # The first is the end of documents where no other file says it.
    numbers = Companions(folder).ends()
    listed = list(dict.fromkeys([*numbers, *sorted(ends), *sorted(chat.ends)]))
    content = {**given, "eos_token_id": listed[0] if len(listed) == 1 else listed}
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def is_export_card(path: Path) -> bool:
    """Whether a model card was written by an export."""
    return CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
