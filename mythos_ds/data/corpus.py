"""The built-in corpus: code of the Python installation and the English written in it. Needs no network.

A file is cut into parts of some kilobytes. Each part gives a code document and, where it has enough of it, a
document of its docstrings and comments. The two stay side by side in the shuffled order, so that a
train/validation cut of the document list separates no text from its own copy.
"""

import ast
import hashlib
import io
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from mythos_ds.data.tokenizer import well_formed
from mythos_ds.errors import DataError

DEFAULT_BYTES = 20_000_000
_TOPICS_SHARE = 10
_PART_BYTES = 8_000
_LONGEST_PART_BYTES = 24_000
_SHORTEST_DOCUMENT = 200
_SHORTEST_PARAGRAPH = 40
_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"})
_COMMENT = re.compile(r"\s*#+ ?(.*)")


@dataclass(frozen=True)
class CorpusDocument:
    """One text, with where it comes from: `lib/path.py:part` or `topic:name`."""

    text: str
    kind: Literal["code", "english"]
    source: str

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode("utf-8"))


Group = list[CorpusDocument]


def build_corpus(*, max_bytes: int = DEFAULT_BYTES, seed: int = 0) -> list[CorpusDocument]:
    """Documents of at most `max_bytes` together, in a shuffled order that only `seed` and the texts decide.

    The same for every run of one interpreter. The library comes before its tests, which fill what is left.
    Raises DataError where the installation has no Python sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[bytes] = set()
    topics = _take(_topic_groups(), max_bytes // _TOPICS_SHARE, seen)
    left = max_bytes - sum(document.size for group in topics for document in group)
    files = _take(chain.from_iterable(_file_groups(root, path, seen) for path in _source_files(root)), left, seen)
    if not files:
        raise DataError(f"no Python sources under {root}: give data.datasets instead of the built-in corpus")
    groups = sorted([*topics, *files], key=lambda group: _digest(f"{seed}:{group[0].source}"))
    return [document for group in groups for document in group]


def write_corpus(documents: Iterable[CorpusDocument], path: Path) -> None:
    """Write one JSON object {text, kind, source} per line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            fields = {"text": document.text, "kind": document.kind, "source": document.source}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _take(groups: Iterable[Group], max_bytes: int, seen: set[bytes]) -> list[Group]:
    """Groups in order while they fit, without the documents that were taken before."""
    taken: list[Group] = []
    for group in groups:
        fresh = [document for document in group if _is_new(document.text, seen)]
        max_bytes -= sum(document.size for document in fresh)
        if max_bytes < 0:
            break
        if fresh:
            taken.append(fresh)
    return taken


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = _digest(text)
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _topic_groups() -> Iterator[Group]:
    """The language reference that `help()` shows, where the installation has it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        if len(text) >= _SHORTEST_DOCUMENT:
            yield [CorpusDocument(text.strip() + "\n", "english", f"topic:{name}")]


def _source_files(root: Path) -> list[Path]:
    """Library files, then test files, each sorted by path."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    wanted = [path for path in paths if not (path.name.startswith("_sysconfigdata") or path.is_symlink())]
    return sorted(wanted, key=lambda path: (_is_test(path, root), path.relative_to(root).as_posix()))


def _is_test(path: Path, root: Path) -> bool:
    return any("test" in part for part in path.relative_to(root).parts)


def _file_groups(root: Path, path: Path, seen: set[bytes]) -> Iterator[Group]:
    """The parts of a file; nothing for files that do not parse (some tests are meant not to)."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return
    lines = list(io.StringIO(text))  # unlike splitlines, breaks where the parser does
    english = {} if _is_test(path, root) else _english(tree, lines)
    name = path.relative_to(root).as_posix()
    for number, (start, stop) in enumerate(_parts(lines)):
        code = "".join(lines[start:stop])
        if len(code) < _SHORTEST_DOCUMENT:
            continue
        group = [CorpusDocument(code, "code", f"{name}:{number}")]
        paragraphs = [p for line in range(start, stop) for p in english.get(line, ()) if _is_new(p, seen)]
        prose = "\n\n".join(paragraphs) + "\n"
        if len(prose) >= _SHORTEST_DOCUMENT:
            group.append(CorpusDocument(prose, "english", f"{name}:{number}"))
        yield group


def _parts(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Line ranges [start, stop) that end before a top-level statement, or at a blank line if that is far."""
    start, size = 0, 0
    for number, line in enumerate(lines):
        top_level = size >= _PART_BYTES and line.startswith(("def ", "class ", "@", "async def "))
        if top_level or (size >= _LONGEST_PART_BYTES and not line.strip()):
            yield start, number
            start, size = number, 0
        size += len(line)
    if start < len(lines):
        yield start, len(lines)


def _english(tree: ast.Module, lines: list[str]) -> dict[int, list[str]]:
    """Docstrings and comment paragraphs by the line (from 0) on which they begin."""
    found: dict[int, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and _is_prose(docstring):
                found.setdefault(node.body[0].lineno - 1, []).append(well_formed(docstring))
    for line, comment in _comment_runs(lines):
        if _is_prose(comment):
            found.setdefault(line, []).append(comment)
    return found


def _comment_runs(lines: list[str]) -> Iterator[tuple[int, str]]:
    run: list[str] = []
    for number, line in enumerate([*lines, ""]):
        match = _COMMENT.match(line)
        if match:
            run.append(match.group(1).rstrip())
        elif run:
            yield number - len(run), "\n".join(run).strip()
            run = []


def _is_prose(text: str) -> bool:
    """Long enough, made of letters and spaces for the most part."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= _SHORTEST_PARAGRAPH and letters >= 0.8 * len(text)
