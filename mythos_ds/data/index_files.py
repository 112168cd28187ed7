"""The files of an index cache: written with their digests, and read as plain numbers whatever lies there."""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mythos_ds.errors import DamagedIndexError, DataError
from mythos_ds.io import checksum_of, read_json, write_json

COMPLETE = "complete.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Complete:
    """The mark that a cache is whole: the names of its files, and "bytes" and "sha256" of each."""

    arguments: dict[str, Any]
    files: list[str]
    written: dict[str, dict[str, int | str]]


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises DataError where it is missing, a link or anything but a regular file."""
    if path.is_symlink():
        raise DamagedIndexError(f"{path}: a link, which no file of an index is")
    return _opened(path, os.O_NOFOLLOW)


def open_regular_or_link(path: Path) -> BinaryIO:
    """As `open_regular`, of a file that may also be a link to one."""
    return _opened(path, 0)


def _opened(path: Path, flags: int) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        said = getattr(error, "strerror", None) or error
        raise DamagedIndexError(f"{path}: not readable ({said})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedIndexError(f"{path}: no regular file")
    return os.fdopen(descriptor, "rb")


def _as_written(path: Path) -> dict[str, int | str]:
    """What the mark says of a file that is no link."""
    with open_regular(path) as file:
        found = checksum_of(file)
    return {"bytes": found.size, "sha256": found.sha256}


_HEADER_FAULTS = (ValueError, KeyError, EOFError, TypeError, SyntaxError, RecursionError, MemoryError, TokenError)
"""What numpy raises of a damaged header; TokenError of one that it takes for that of Python 2."""


def load_array(path: Path, ndim: int) -> NDArray[np.integer[Any]]:
    """Map a .npy file of integers, from the very file that was checked: nothing in it is unpickled.

    Raises DataError for any other content, and for a size other than its header's.
    """
    with open_regular(path) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(file)
        except _HEADER_FAULTS as error:
            raise DamagedIndexError(f"{path}: not an array of numbers ({error})") from error
        plain = dtype.kind in "iu" and dtype.isnative and not fortran and len(shape) == ndim
        if not plain or min(shape, default=0) < 0:
            raise DamagedIndexError(
                f"{path}: not a plain array of integers of {ndim} dimensions: {dtype} of shape {shape}"
            )
        start, count = file.tell(), 1
        for size in shape:
            count *= size
        expected, found = start + count * dtype.itemsize, os.fstat(file.fileno()).st_size
        if found != expected:
            raise DamagedIndexError(f"{path}: {found:,} bytes given, {expected:,} written")
        if not count:
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype=dtype, mode="r", offset=start, shape=shape)


def mark_complete(folder: Path, arguments: dict[str, Any]) -> None:
    """Write the mark, with the digest of every file in `folder`."""
    written = {path.name: _as_written(path) for path in sorted(folder.iterdir())}
    content = asdict(_Complete(arguments, sorted(written), written))
    write_json(folder / COMPLETE, content, indent=2, sort_keys=True)


def is_complete(folder: Path) -> bool:
    """Whether the index is there. Raises DataError where a file of it is missing or of another size."""
    if not (folder / COMPLETE).exists() and not (folder / COMPLETE).is_symlink():
        return False
    _raise_first(folder, cache_faults(folder, full=False))
    return True


def check_digests(folder: Path) -> None:
    """Raises DataError where a file of the index is not what was written."""
    _raise_first(folder, cache_faults(folder, full=True))


def _raise_first(folder: Path, faults: Iterable[str]) -> None:
    for fault in faults:
        raise DamagedIndexError(f"index {folder} is damaged: {fault}; remove the folder to have it made anew")


def cache_faults(folder: Path, *, full: bool) -> list[str]:
    """What is wrong with an index cache: sizes and formats of its files, and with `full` their digests."""
    try:
        with open_regular(folder / COMPLETE):
            complete = read_json(folder / COMPLETE, _Complete, DataError)
    except DataError as error:
        return [str(error)]
    named = {COMPLETE, *complete.files}
    faults = [
        f"{path.name}: not one of those that {COMPLETE} names"
        for path in sorted(folder.iterdir())
        if path.name not in named and not path.name.startswith(".")
    ]
    for name in complete.files:
        written = complete.written.get(name)
        if written is None or Path(name).name != name:
            faults.append(f"{COMPLETE} has no digest of {name!r}")
            continue
        try:
            found = _as_written(folder / name) if full else {**written, "bytes": _size(folder / name)}
            if name.endswith(".npy"):
                load_array(folder / name, 2 if name.endswith("-sample_index.npy") else 1)
        except DataError as error:
            faults.append(str(error).removeprefix(f"{folder}/"))
            continue
        if found["bytes"] != written.get("bytes"):
            faults.append(f"{name}: {found['bytes']:,} bytes given, {written.get('bytes')} written")
        elif found != written:
            faults.append(f"{name}: its content is not what was written")
    return faults


def _size(path: Path) -> int:
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def check_samples(
    folder: Path,
    documents: NDArray[Any],
    order: NDArray[Any],
    samples: NDArray[Any],
    shuffle: NDArray[Any],
    lengths: NDArray[Any],
) -> None:
    """Check that an index points only into the text. Raises DataError.

    documents: those of the part. order, samples [n + 1, 2], shuffle: the index. lengths: tokens of every document.
    """
    sound = len(samples) > 1 and len(order) > 0 and samples.shape[1] == 2 and len(shuffle) == len(samples) - 1
    sound = sound and _within(order, int(documents[0]), int(documents[-1])) and _within(shuffle, 0, len(shuffle) - 1)
    sound = sound and _within(samples[:, 0], 0, len(order) - 1)
    if not sound or not all(_ordered(block, order, lengths) for block in _blocks(samples, overlap=1)):
        _raise_first(folder, ["it points outside of the text"])


def _ordered(samples: NDArray[Any], order: NDArray[Any], lengths: NDArray[Any]) -> bool:
    """Whether places go on from one to the next, and offsets lie in their documents."""
    place, offset = samples[:, 0].astype(np.int64), samples[:, 1].astype(np.int64)
    going_on = (place[1:] > place[:-1]) | ((place[1:] == place[:-1]) & (offset[1:] >= offset[:-1]))
    return bool(going_on.all() and offset.min() >= 0 and (offset <= lengths[order[place]]).all())


def _within(numbers: NDArray[Any], low: int, high: int) -> bool:
    return all(low <= int(block.min()) and int(block.max()) <= high for block in _blocks(numbers))


def _blocks(numbers: NDArray[Any], overlap: int = 0) -> Iterator[NDArray[Any]]:
    return (numbers[start : start + _CHUNK + overlap] for start in range(0, len(numbers), _CHUNK))
