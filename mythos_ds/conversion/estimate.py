"""What a conversion will write, hold and take, before it starts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mythos_ds.formatting import byte_text, duration_text
from mythos_ds.weights.writer import OutputFile, peak_bytes

LIBRARY_BYTES = 300_000_000
"""Anonymous memory of a Python process with torch; measured 230-300 MB on Linux."""


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes; `hours` at `bandwidth` (bytes per second) through which everything is read once and written
    once, if the workers keep up."""

    tensors: int
    files: int
    bytes: int
    largest_file: int
    peak_bytes_per_worker: int
    bandwidth: float
    hours: float


def estimate(files: Sequence[OutputFile], read_bytes: int, bandwidth: float) -> Estimate:
    """The cost of writing `files` from `read_bytes` of input."""
    total = sum(file.nbytes for file in files)
    # A piece is held as it was read, as it is written, and once more while it is checked.
    peak = LIBRARY_BYTES + 3 * peak_bytes(files)
    seconds = (read_bytes + total) / bandwidth
    return Estimate(
        sum(len(file.tensors) for file in files),
        len(files),
        total,
        max((file.nbytes for file in files), default=0),
        peak,
        bandwidth,
        seconds / 3600,
    )


def print_estimate(label: str, made: Estimate, as_json: bool) -> None:
    """One JSON object, or a line for people."""
    if as_json:
        sys.stdout.write(json.dumps(asdict(made)) + "\n")
        return
    sys.stdout.write(
        f"{label}: {made.tensors:,} tensors, {byte_text(made.bytes)} in {made.files:,} files of at most "
        f"{byte_text(made.largest_file)}; up to {byte_text(made.peak_bytes_per_worker)} of memory per worker; "
        f"{duration_text(made.hours)} at {made.bandwidth / 1e9:g} GB/s\n"
    )
