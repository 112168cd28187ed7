"""What the mains of tools/ share: errors without traceback, and a progress display."""

import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter, _SubParsersAction
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mythos_ds.guard import DEBUG, files_of_the_group, guarded
from mythos_ds.log import configure


def tool_parser(description: str, example: str) -> ArgumentParser:
    """An argument parser whose help ends with an example."""
    epilog = f"example:\n  {example}"
    return ArgumentParser(description=description, epilog=epilog, formatter_class=RawDescriptionHelpFormatter)


def run_tool(parser: ArgumentParser, work: Callable[[Namespace], None], argv: Sequence[str] | None) -> int:
    """Parse `argv`, run `work`, return the exit code: 2, with one message, for an error the user can mend; others are
    in guard.py."""
    add_common(parser)

    def run() -> int:
        arguments = _parsed(parser, argv)
        if arguments.debug:
            os.environ[DEBUG] = "1"
        configure(0)
        # Only what has the option writes what training writes.
        with files_of_the_group(everyone=getattr(arguments, "share", True)):
            work(arguments)
        return 0

    return guarded(parser.prog, run)


def add_share(parser: ArgumentParser) -> None:
    """The option of what writes runs and checkpoints."""
    parser.add_argument(
        "--share", action="store_true", help="files for all (as the umask says), not only for the group"
    )


def add_common(parser: ArgumentParser) -> None:
    """What every main has: `--debug`, and no empty paths."""
    parser.add_argument("--debug", action="store_true", help="print the traceback of a fault of this program")
    inner = [action.choices for action in parser._actions if isinstance(action, _SubParsersAction)]
    for each in (parser, *(one for choices in inner for one in choices.values())):
        each.register("type", Path, _path)


def _path(given: str) -> Path:
    """A path; to Path the empty one is the working folder, to a user who wrote "$FOLDER" it is a mistake."""
    if not given:
        raise ArgumentTypeError("given ''; allowed: a path, such as . for the working folder")
    return Path(given)


def refuse_dashes(parser: ArgumentParser, argv: Sequence[str] | None) -> None:
    """Ends the program with a usage error for a setting that is written as an option, where settings are taken."""
    takes = any(action.dest == "overrides" for action in parser._actions)
    for word in (sys.argv[1:] if argv is None else argv) if takes else ():
        if re.match(r"--[a-z_]+\.[a-z_]", word):
            bare = word[2:] if "=" in word else f"{word[2:]}=VALUE"
            parser.error(f"{word}: a setting, no option; write {bare} without --")


def _parsed(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """The arguments; overrides may also stand after options, which argparse takes only intermixed."""
    refuse_dashes(parser, argv)
    try:
        return parser.parse_intermixed_args(argv)
    except TypeError:  # for parsers that hand on the rest of their line
        return parser.parse_args(argv)


@contextmanager
def counted_progress(label: str, total_documents: int | None) -> Iterator[Callable[[int, int, int], None]]:
    """A progress bar on stderr; yields the callback (documents, tokens, text bytes) that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("documents"))
    counts = TextColumn("{task.fields[tokens]:,} tokens  {task.fields[megabytes]:.1f} MB")
    with Progress(*columns, counts, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total_documents, tokens=0, megabytes=0.0)

        def update(documents: int, tokens: int, text_bytes: int) -> None:
            progress.update(task, completed=documents, tokens=tokens, megabytes=text_bytes / 1e6)

        yield update
