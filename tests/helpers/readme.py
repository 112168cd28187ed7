"""The fenced blocks of README.md and of pages of docs/, and the commands in them, in their order."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.helpers.pretrain import ROOT

README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
LAPTOP, CLUSTER, OUTPUT = "laptop", "cluster", "output"
KINDS = (LAPTOP, CLUSTER, OUTPUT)
INSTALL = ("pip install torch==2.13.0", "pip install -e .")
"""Commands that would change the environment that tests run in; `make setup` does the same."""
_FENCE = re.compile(r"\s*(?P<marks>`{3,}|~{3,})(?P<info>.*)")
_MARK = re.compile(r"<!-- (?P<kind>\w+) -->")
_PROMPT = "$ "


@dataclass(frozen=True)
class Command:
    """A command as written, its comment left out, and the lines that it prints where a console block shows them."""

    text: str
    prints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A fenced block and the line of its fence. `kind`: where it runs, or `output`, what the block before it prints."""

    language: str
    kind: str
    line: int
    lines: tuple[str, ...]

    def commands(self) -> list[Command]:
        """The commands of a block that runs: of one in Python, one. In the language `console` they begin with "$ ", and
        output follows."""
        if self.language == "python":
            return [Command("\n".join(["python - <<'END'", *self.lines, "END"]))]
        if self.language == "console":
            return list(self._shown())
        whole = "\n".join(self.lines).replace("\\\n", " ")
        return [Command(text) for text in map(_without_comment, whole.splitlines()) if text]

    def _shown(self) -> Iterator[Command]:
        starts = [index for index, line in enumerate(self.lines) if line.startswith(_PROMPT)]
        if not starts or starts[0] != 0:
            raise ValueError(f"line {self.line}: a console block begins with a command, {_PROMPT!r} before it")
        for start, end in zip(starts, [*starts[1:], len(self.lines)], strict=True):
            text = _without_comment(self.lines[start].removeprefix(_PROMPT))
            yield Command(text, self.lines[start + 1 : end])


def fenced_blocks(markdown: str) -> list[Block]:
    """The blocks in their order. Raises ValueError with the line of one that is not marked, or that never ends."""
    blocks: list[Block] = []
    lines = iter(enumerate(markdown.splitlines(), 1))
    for number, line in lines:
        fence = _FENCE.fullmatch(line)
        if fence is None:
            continue
        language, _, kind = fence["info"].strip().partition(" ")
        if kind not in KINDS:
            raise ValueError(f"line {number}: a block marked {fence['info']!r}; allowed: a language and one of {KINDS}")
        blocks.append(Block(language, kind, number, tuple(_inside(lines, fence["marks"], number))))
    return blocks


def marked_blocks(markdown: str) -> list[Block]:
    """The blocks of a page of the site that run: a comment of one word before the fence says where.

    Other blocks are left out. Raises ValueError with the line of a mark that is unknown or stands before no block.
    """
    blocks: list[Block] = []
    lines = iter(enumerate(markdown.splitlines(), 1))
    marked: str | None = None
    for number, line in lines:
        fence = _FENCE.fullmatch(line)
        if marked is not None and fence is None:
            raise ValueError(f"line {number}: no block follows the mark")
        if fence is not None:
            block = Block(
                fence["info"].strip(), marked or OUTPUT, number, tuple(_inside(lines, fence["marks"], number))
            )
            blocks += [block] if marked is not None else []
            marked = None
        elif mark := _MARK.fullmatch(line):
            if mark["kind"] not in KINDS:
                raise ValueError(f"line {number}: {line} given; allowed: a comment with one of {KINDS}")
            marked = mark["kind"]
    return blocks


def _inside(lines: Iterator[tuple[int, str]], marks: str, number: int) -> Iterator[str]:
    for _, line in lines:
        if line.strip() == marks:
            return
        yield line
    raise ValueError(f"line {number}: this block never ends")


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)\s*#.*", "", line).strip()
