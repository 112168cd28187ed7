"""Writes a source's tensors as safetensors files: planned first, then a file at a time, resumable, index last.

A worker holds one piece of one tensor. A finished file is renamed into place and its record kept, so that a rerun
after a kill goes on with the files that are missing; `checksums.json` is written when all are there.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor

from mythos_ds.errors import CheckpointError
from mythos_ds.io import read_json, sync, write_json
from mythos_ds.weights.reader import DTYPES, TensorSource, TensorSpec

CHECKSUMS = "checksums.json"
MAX_FILE_BYTES = 5_000_000_000
PIECE_BYTES = 1 << 25
"""Rows are read in pieces of about this size; a single row (an expert) may be larger."""

_CHECKED_AT_ONCE = 1 << 20
_CHUNK_BYTES = 1 << 22
_RECORDS = ".written"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class OutputFile:
    """A file to be written and what is in it."""

    name: str
    tensors: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())


@dataclass(frozen=True)
class FileChecksum:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


def plan_files(
    specs: Mapping[str, TensorSpec], max_file_bytes: int = MAX_FILE_BYTES, stem: str = "model"
) -> list[OutputFile]:
    """Files of at most max_file_bytes, in the order of the tensors; a larger tensor has a file of its own."""
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > max_file_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.nbytes
    if len(groups) == 1:
        return [OutputFile(f"{stem}.safetensors", groups[0])]
    return [OutputFile(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", g) for i, g in enumerate(groups, 1)]


def row_pieces(spec: TensorSpec, piece_bytes: int = PIECE_BYTES) -> list[slice | None]:
    """How a tensor is read: all at once, or in slices of rows."""
    if spec.nbytes <= piece_bytes or not spec.shape:
        return [None]
    rows = max(1, piece_bytes * spec.shape[0] // spec.nbytes)
    return [slice(start, min(start + rows, spec.shape[0])) for start in range(0, spec.shape[0], rows)]


def peak_bytes(files: Sequence[OutputFile]) -> int:
    """Most bytes of one piece: what a worker holds beside the libraries (a cast doubles it)."""
    specs = [spec for file in files for spec in file.tensors.values()]
    return max((min(s.nbytes, max(PIECE_BYTES, s.nbytes // max(1, (*s.shape, 1)[0]))) for s in specs), default=0)


def write_tensors(
    source: TensorSource,
    folder: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    jobs: int = 1,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, FileChecksum]:
    """Write everything that `source` gives below `folder`; `progress` gets the bytes as they are done.

    The same call after an interruption goes on. Raises CheckpointError where `folder` holds another job's files, the
    source breaks its promise of types and shapes, or a value is not finite.
    """
    files = plan_files(source.specs(), max_file_bytes, stem)
    metadata = dict(metadata or {"format": "pt"})
    job = hashlib.sha256(pickle.dumps((source, [(f.name, list(f.tensors.items())) for f in files], metadata)))
    done = _start(folder, job.hexdigest(), {file.name for file in files}, stem)
    report = progress or (lambda done: None)
    for file in files:
        if file.name in done:
            report(file.nbytes)
    todo = [file for file in files if file.name not in done]
    for file, record in _run(source, todo, folder, metadata, min(jobs, len(todo)), report):
        write_json(folder / _RECORDS / f"{file.name}.json", asdict(record))
        done[file.name] = record
    if len(files) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", _index(files))
    records = {name: asdict(done[name]) for name in sorted(done)}
    write_json(folder / _checksums(stem), {"format": 1, "job": job.hexdigest(), "files": records})
    rmtree(folder / _RECORDS)
    return done


def _checksums(stem: str) -> str:
    return CHECKSUMS if stem == "model" else f"{stem}.{CHECKSUMS}"


def _index(files: Sequence[OutputFile]) -> dict[str, Any]:
    weight_map = {name: file.name for file in files for name in file.tensors}
    return {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weight_map}


def _start(folder: Path, job: str, names: set[str], stem: str) -> dict[str, FileChecksum]:
    """Make the folder ready and say what an earlier call for the same job finished."""
    records, checksums = folder / _RECORDS, folder / _checksums(stem)
    if checksums.is_file() and read_json(checksums).get("job") == job:
        listed = {name: FileChecksum(**record) for name, record in read_json(checksums)["files"].items()}
        found = {name: record for name, record in listed.items() if name in names and _is_whole(folder / name, record)}
    elif (records / "job.json").is_file() and read_json(records / "job.json") == job:
        paths = [path for path in records.glob("*.json") if path.name != "job.json"]
        found = {path.name.removesuffix(".json"): FileChecksum(**read_json(path)) for path in paths}
    elif existing := sorted({*folder.glob(f"{stem}*.safetensors"), *folder.glob(f"{stem}*.index.json")}):
        raise CheckpointError(f"{folder}: holds {existing[0].name} of something else; choose an empty folder")
    else:
        found = {}
    records.mkdir(parents=True, exist_ok=True)
    write_json(records / "job.json", job)
    whole = {n: r for n, r in found.items() if (folder / n).is_file() and (folder / n).stat().st_size == r.size}
    return {name: record for name, record in whole.items() if name in names}


def checksum(path: Path) -> FileChecksum:
    """Of a file, read in chunks."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileChecksum(size, digest.hexdigest())


def _is_whole(path: Path, record: FileChecksum) -> bool:
    return path.is_file() and path.stat().st_size == record.size and checksum(path) == record


def _run(
    source: TensorSource,
    files: Sequence[OutputFile],
    folder: Path,
    metadata: dict[str, str],
    jobs: int,
    report: Callable[[int], None],
) -> Iterator[tuple[OutputFile, FileChecksum]]:
    if jobs <= 1:
        for file in files:
            yield file, write_file(source, file, folder, metadata, report)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(write_file, source, file, folder, metadata): file for file in files}
        try:
            for future in as_completed(futures):
                report(futures[future].nbytes)
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_file(
    source: TensorSource,
    file: OutputFile,
    folder: Path,
    metadata: Mapping[str, str],
    report: Callable[[int], None] = lambda done: None,
) -> FileChecksum:
    """Write one file piece by piece under a temporary name, force it to disk, and rename it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in file.tensors.items():
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = folder / f".{file.name}.tmp"
    digest = hashlib.sha256()
    with _named(temporary), temporary.open("wb") as output:

        def write(data: Any) -> None:
            digest.update(data)
            output.write(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name, spec in file.tensors.items():
            for piece in _pieces(source, name, spec):
                write(piece.reshape(-1).view(torch.uint8).numpy())
                report(piece.nbytes)
        output.flush()
        sync(temporary)
    size = temporary.stat().st_size
    if size != 8 + len(text) + end:
        raise CheckpointError(f"{temporary}: {size} bytes written, {8 + len(text) + end} planned")
    temporary.replace(folder / file.name)
    sync(folder)
    return FileChecksum(size, digest.hexdigest())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the disk name the file, which those of a write do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _pieces(source: TensorSource, name: str, spec: TensorSpec) -> Iterator[Tensor]:
    for rows in row_pieces(spec):
        piece = source.read(name, rows).contiguous()
        shape = spec.shape if rows is None else (rows.stop - rows.start, *spec.shape[1:])
        if piece.dtype != spec.dtype or tuple(piece.shape) != shape:
            found = f"{piece.dtype} {tuple(piece.shape)}"
            raise CheckpointError(f"{name}: read as {found}, announced as {spec.dtype} {shape}")
        if spec.dtype.is_floating_point and not all_finite(piece):
            raise CheckpointError(f"{name}: has values that are not finite")
        yield piece


def same_values(source: TensorSource, one: str, other: str) -> bool:
    """Whether two tensors are of one type and shape and hold the same values."""
    spec = source.specs()[one]
    if spec != source.specs()[other]:
        return False
    return all(torch.equal(source.read(one, rows), source.read(other, rows)) for rows in row_pieces(spec))


def all_finite(piece: Tensor) -> bool:
    """Whether no value is infinite or not a number."""
    # In parts: the check takes several times the memory of what it looks at, and fp8 has to be widened first.
    parts = piece.reshape(-1).split(_CHECKED_AT_ONCE)
    return all(bool(torch.isfinite(part if part.dtype.itemsize > 1 else part.float()).all()) for part in parts)
