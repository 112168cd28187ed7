"""The files that text is read from: named ones, and those of folders, with what is left out of these."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mythos_ds.errors import DataError
from mythos_ds.io import where_searched

FileFormat = Literal["jsonl", "json", "text", "csv", "tsv", "parquet"]
FORMATS: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KNOWN = f"{', '.join(FORMATS)} (or these with {', '.join(COMPRESSED)})"
_CARDS = re.compile(
    r"(readme|licen[cs]e|notice|copying|citation|changelog|contributing|code_of_conduct|security|dataset_?card)\b.*",
    re.IGNORECASE,
)
_SETTINGS = re.compile(
    r"(dataset_infos?|dataset_dict|state|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|config|"
    r"generation_config|complete|checksums|merges)\.(json|txt)",
    re.IGNORECASE,
)
_SHOWN = 3


@dataclass
class FoundInputs:
    """Files to read in order, and the names of what folders hold beside them, by the reason why it is left out."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def report(self) -> str:
        """What is taken and what is not, in two lines; empty where only files were named."""
        if not self.left_out:
            return ""
        kinds: dict[str, int] = defaultdict(int)
        for path in self.files:
            kinds[full_ending(path)] += 1
        taken = ", ".join(f"{count} {ending}" for ending, count in sorted(kinds.items()))
        left = "; ".join(
            f"{len(names)} {reason} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
            for reason, names in sorted(self.left_out.items())
        )
        return f"takes {len(self.files)} files: {taken}\nleaves out: {left}\n"


def find_inputs(inputs: Iterable[Path]) -> FoundInputs:
    """The files themselves, and every readable file below the folders, sorted.

    Of a folder, hidden files, cards and settings are left out, and links to folders are not followed. Raises DataError
    for a missing file, one that is no regular file, and a folder without any.
    """
    found = FoundInputs()
    for path in inputs:
        try:
            if path.is_dir():
                _search(path, found)
                continue
            if path.is_file():
                found.files.append(path)
                continue
            there = path.exists()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise DataError(f"input {path}: {getattr(error, 'strerror', None) or error}", code="MDS420") from error
        if there:
            raise DataError(f"input {path} is no regular file; allowed: files and folders of files", code="MDS420")
        hint = "; text from standard input is not read: write it to a file" if str(path) == "-" else ""
        raise DataError(f"input {path} not found{where_searched(path)}{hint}", code="MDS420")
    return found


def _search(folder: Path, found: FoundInputs) -> None:
    inside, before = [], sum(map(len, found.left_out.values()))
    for place, folders, names in os.walk(folder, onerror=_refuse):
        here = Path(place)
        for name in sorted(folders):
            if name.startswith("."):
                found.left_out["hidden"].append(name + "/")
            elif (here / name).is_symlink():
                found.left_out["links to folders"].append(name)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            reason = _left_out(here / name)
            if reason is None:
                inside.append(here / name)
            else:
                found.left_out[reason].append(name)
    if not inside:
        some = [name for names in found.left_out.values() for name in names[:_SHOWN]]
        held = f"; left out: {', '.join(some)}" if sum(map(len, found.left_out.values())) > before else ""
        raise DataError(f"{folder}: no file ending in {KNOWN} in it{held}", code="MDS420")
    found.files.extend(sorted(inside))


def _refuse(error: OSError) -> None:
    raise DataError(f"input {error.filename}: {error.strerror}", code="MDS420") from error


def _left_out(path: Path) -> str | None:
    """Why a file of a folder is not read; None where it is."""
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "not regular files"
    if _CARDS.fullmatch(path.name) or _SETTINGS.fullmatch(path.name):
        return "cards and settings"
    if path.suffix.lower() == ".json" and path.with_suffix(".idx").is_file():
        return "of prepared data"
    if ending(path) not in FORMATS:
        return f"ending in {full_ending(path) or 'nothing'}"
    return None


def ending(path: Path) -> str:
    """The ending that tells a file's format, in small letters."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def full_ending(path: Path) -> str:
    """The ending with that of the compression."""
    suffix = path.suffix.lower()
    return ending(path) + suffix if suffix in COMPRESSED else suffix


def format_of(path: Path, given: FileFormat | None) -> FileFormat:
    """The format that a file is read as. Raises DataError for an ending that says none."""
    chosen = given or FORMATS.get(ending(path))
    if chosen is None:
        raise DataError(f"{path}: unknown ending; allowed: {KNOWN}, or give --format", code="MDS420")
    return chosen
