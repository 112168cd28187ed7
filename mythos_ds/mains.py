"""What the mains of tools/ share: errors without traceback, and a progress display."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mythos_ds.errors import USER_ERROR_EXIT_CODE, MythosError
from mythos_ds.log import configure

INTERRUPTED_EXIT_CODE = 130


def tool_parser(description: str, example: str) -> ArgumentParser:
    """An argument parser whose help ends with an example."""
    epilog = f"example:\n  {example}"
    return ArgumentParser(description=description, epilog=epilog, formatter_class=RawDescriptionHelpFormatter)


def run_tool(parser: ArgumentParser, work: Callable[[Namespace], None], argv: Sequence[str] | None) -> int:
    """Parse `argv`, run `work`, return the exit code: 2, with one message, for an error the user can mend."""
    arguments = _parsed(parser, argv)
    configure(0)
    try:
        work(arguments)
    except MythosError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return USER_ERROR_EXIT_CODE
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        sys.stderr.write(f"{parser.prog}: {error.filename or 'a file'}: {error.strerror}\n")
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        sys.stderr.write(f"{parser.prog}: stopped; what was finished is kept, nothing unfinished is published\n")
        return INTERRUPTED_EXIT_CODE
    return 0


def _parsed(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """The arguments; overrides may also stand after options, which argparse takes only intermixed."""
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
