"""Measures how fast prepare-data reads the same text as JSONL, one text file, tiny documents, Parquet and .zst."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.bench.preparation import Preparation, make_inputs, measure
from mythos_ds.errors import DataError
from mythos_ds.mains import run_tool, tool_parser
from mythos_ds.weights.built_in import model_path


def main(argv: Sequence[str] | None = None) -> int:
    parser = tool_parser(__doc__ or "", "mythos-ds bench-data --megabytes 1000 --workers 2 --folder /scratch/bench")
    parser.add_argument("--megabytes", type=int, default=100, help="text in each file (default: %(default)s)")
    parser.add_argument("--row-groups", type=int, default=10_000, help="of the Parquet file (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise (default: %(default)s)")
    parser.add_argument("--folder", type=Path, required=True, help="where the files are written, and stay")
    parser.add_argument("--tokenizer", type=Path, default=Path("tiny"), help="a file or folder (default: tiny's)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of the files to measure (default: all)")
    return run_tool(parser, _measure, argv)


def _measure(arguments: Namespace) -> None:
    if min(arguments.megabytes, arguments.row_groups, arguments.workers) < 1:
        raise DataError("--megabytes, --row-groups and --workers: allowed: 1 or more", code="MDS120")
    inputs = make_inputs(arguments.folder, arguments.megabytes, arguments.row_groups)
    first: Preparation | None = None
    for name in arguments.only or inputs:
        if name not in inputs:
            raise DataError(f"--only {name} given; allowed: {', '.join(inputs)}", code="MDS120")
        found = measure(inputs[name], model_path(arguments.tokenizer), arguments.workers)
        first = first or found
        sys.stdout.write(_line(found, first) + "\n")
        sys.stdout.flush()


def _line(found: Preparation, first: Preparation) -> str:
    speed, share = _speed(found.text_bytes, found.seconds), found.seconds / found.text_bytes
    cores, core_share = _speed(found.text_bytes, found.core_seconds), found.core_seconds / found.text_bytes
    return (
        f"{found.name:<20} {found.documents:>10,} documents {speed:6.2f} MB/s"
        f" ({first.seconds / first.text_bytes / share:.0%} of {first.name}), {cores:.2f} MB per second of a core"
        f" ({first.core_seconds / first.text_bytes / core_share:.0%}), memory {found.reader_bytes / 1e6:.0f} MB in the"
        f" reader, {found.worker_bytes / 1e6:.0f} MB in a worker"
    )


def _speed(text_bytes: int, seconds: float) -> float:
    return text_bytes / seconds / 1e6


if __name__ == "__main__":
    sys.exit(main())
