"""A model folder as an output: locked while it is written, weights first, config.json last."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mythos_ds.errors import ConfigError
from mythos_ds.output_lock import locked_output
from mythos_ds.weights.reader import TensorSource
from mythos_ds.weights.writer import MAX_FILE_BYTES, write_tensors


def write_model(
    source: TensorSource,
    output: Path,
    finish: Callable[[Path], None],
    *,
    command: str,
    made_from: str,
    jobs: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Callable[[int], None] | None = None,
    break_lock: bool = False,
) -> None:
    """Write `source` to `output`, and let `finish` write what stands beside the weights. Goes on after an interruption.

    Raises OutputError where another job writes there (see `locked_output`), or the disk does not take a file.
    """
    with locked_output(output, command, break_lock=break_lock):
        told = f"{made_from} by {command}"
        write_tensors(source, output, jobs=jobs, max_file_bytes=max_file_bytes, progress=progress, made_from=told)
        finish(output)


def refuse_input(output: Path, inputs: Sequence[Path], name: str = "--output", what: str = "the input") -> None:
    """Raises ConfigError for an output that is one of the inputs, by whatever name, or that cannot be a folder."""
    try:
        place = output.resolve()
        same = any(place == given.resolve() or (place.exists() and place.samefile(given)) for given in inputs)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead back to themselves
        raise ConfigError(
            f"{name}: given {output}, which is not readable ({error}); allowed: a new folder", code="MDS601"
        ) from None
    if same:
        raise ConfigError(f"{name}: given {output}, which is {what}; allowed: a new folder", code="MDS601")
