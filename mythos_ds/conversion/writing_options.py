"""Options that the tools which write model folders share."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from mythos_ds.checkpoint.manifest import list_tags
from mythos_ds.errors import ConfigError, OptionError
from mythos_ds.monitor.progress import byte_progress
from mythos_ds.weights.checksums import checked_bytes, require_whole
from mythos_ds.weights.writer import MAX_FILE_BYTES

BANDWIDTH = 2e9


def add_writing(parser: ArgumentParser) -> None:
    """How files are written, or only planned."""
    parser.add_argument("--jobs", type=int, default=1, help="files written at once")
    parser.add_argument("--max-file-bytes", type=int, default=MAX_FILE_BYTES, help="a larger tensor has its own file")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--bandwidth", type=float, help=f"with --dry-run: bytes per second (default {BANDWIDTH:.0e})")
    parser.add_argument("--json", action="store_true", help="print the plan or the result as JSON")
    add_break_lock(parser)


def add_break_lock(parser: ArgumentParser) -> None:
    """What takes the output from a job that cannot be asked whether it runs."""
    text = "take the output's lock from a process of another host; make sure that it has ended"
    parser.add_argument("--break-lock", action="store_true", help=text)


def check_input(folder: Path) -> None:
    """Raises CheckpointError where a folder's files are not those that its checksums name; shows a bar meanwhile."""
    if total := checked_bytes(folder):
        with byte_progress("checking the input", total) as progress:
            require_whole(folder, progress)


def check_writing(arguments: Namespace) -> None:
    """Raises ConfigError for values of these options that make no sense, or have no effect."""
    for name in ("jobs", "max_file_bytes", "bandwidth"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise OptionError(f"--{name.replace('_', '-')}: given {value:g}; allowed: more than 0; nearest: 1")
    if arguments.bandwidth is not None and not arguments.dry_run:
        raise OptionError("--bandwidth: given without --dry-run; allowed: with it, for the time it prints")
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        raise ConfigError(f"--output: given {arguments.output}, which is a file; allowed: a new folder", code="MDS601")


def refuse_output_in_run(output: Path) -> None:
    """Raises ConfigError for an output that is a run, or lies in its checkpoints: files of two kinds would mix."""
    place = output.resolve()
    if (place / "checkpoints").is_dir() or any(list_tags(folder) for folder in (place, *place.parents)):
        raise ConfigError(
            f"--output: given {output}, which is a run or lies in its checkpoints; allowed: a new folder", code="MDS601"
        )
