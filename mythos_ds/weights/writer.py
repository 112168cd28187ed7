"""Writes a source's tensors as safetensors files: planned first, then a file at a time, resumable, index last.

A worker holds one piece of one tensor. A finished file is renamed into place and its record kept, so that a rerun
after a kill goes on with the files that are missing; `checksums.json` is written when all are there.
"""

import hashlib
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor

from mythos_ds.errors import CheckpointError, OutputError
from mythos_ds.io import (
    FileChecksum,
    checksum_of,
    open_new,
    open_regular,
    read_json,
    real_folder,
    remove_leftovers,
    sync,
    temporary_path,
    write_json,
    writing_to,
)
from mythos_ds.weights.reader import DTYPES, TensorSource, TensorSpec

CHECKSUMS = "checksums.json"
MAX_FILE_BYTES = 5_000_000_000
PIECE_BYTES = 1 << 25
"""Rows are read in pieces of about this size; a single row (an expert) may be larger."""

_CHECKED_AT_ONCE = 1 << 20
_METADATA = {"format": "pt"}
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
class Checksums:
    """The content of checksums.json. `job`: what was written, so that the same job goes on; `made_from`: in words."""

    files: dict[str, FileChecksum]
    job: str = ""
    made_from: str = ""


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
    made_from: str = "",
) -> dict[str, FileChecksum]:
    """Write everything that `source` gives below `folder`; `progress` gets the bytes as they are done. made_from: for
    the message of a later job that finds this one's files.

    The same call after an interruption goes on, also among those for other stems. No other job may write there
    meanwhile (`output_lock`). Raises CheckpointError where `folder` holds another job's files, the source breaks its
    promise of types and shapes, or a value is not finite, and OutputError where the disk does not take a file.
    """
    files = plan_files(source.specs(), max_file_bytes, stem)
    metadata = dict(metadata or _METADATA)
    job = _job(source, files, metadata)
    done = _start(folder, job, {file.name for file in files}, stem)
    report = progress or (lambda done: None)
    for file in files:
        if file.name in done:
            report(file.nbytes)
    todo = [file for file in files if file.name not in done]
    # Closed whatever happens here: its workers must have ended before the lock goes.
    with closing(_run(source, todo, folder, metadata, min(jobs, len(todo)), report)) as finished:
        for file, record in finished:
            write_json(_records(folder, stem) / f"{file.name}.json", asdict(record))
            done[file.name] = record
    if len(files) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", _index(files))
    records = {name: asdict(done[name]) for name in sorted(done)}
    made = {"made_from": made_from} if made_from else {}
    write_json(folder / _checksums(stem), {"format": 1, "job": job, **made, "files": records})
    rmtree(_records(folder, stem))
    return done


def require_own(source: TensorSource, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Raises CheckpointError where `folder` holds what another job has finished; of one that goes on the lock tells."""
    if not _records(folder, "model").exists():
        files = plan_files(source.specs(), max_file_bytes)
        _finished(folder, _job(source, files, _METADATA), {file.name for file in files}, "model")


def _job(source: TensorSource, files: Sequence[OutputFile], metadata: Mapping[str, str]) -> str:
    content = (source, [(f.name, list(f.tensors.items())) for f in files], dict(metadata))
    return hashlib.sha256(pickle.dumps(content)).hexdigest()


def _records(folder: Path, stem: str) -> Path:
    """Where it is kept which files of a stem are finished, while others are not."""
    return folder / (_RECORDS if stem == "model" else f"{_RECORDS}-{stem}")


def _checksums(stem: str) -> str:
    return CHECKSUMS if stem == "model" else f"{stem}.{CHECKSUMS}"


def read_checksums(path: Path) -> Checksums:
    """The content of a file of checksums. Raises CheckpointError for what is none, or names files elsewhere."""
    found: Checksums = read_json(path, Checksums)
    for name in found.files:
        if Path(name).name != name:
            raise CheckpointError(f"{path}: files: names {name!r}, which is not a file of the folder")
    return found


def _index(files: Sequence[OutputFile]) -> dict[str, Any]:
    weight_map = {name: file.name for file in files for name in file.tensors}
    return {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weight_map}


def _start(folder: Path, job: str, names: set[str], stem: str) -> dict[str, FileChecksum]:
    """Make the folder ready and say what an earlier call for the same job finished."""
    found, records = _finished(folder, job, names, stem), _records(folder, stem)
    real_folder(records)
    remove_leftovers(folder)
    remove_leftovers(records)
    write_json(records / "job.json", job)
    whole = {n: r for n, r in found.items() if _size(folder / n) == r.size}
    return {name: record for name, record in whole.items() if name in names}


def _finished(folder: Path, job: str, names: set[str], stem: str) -> dict[str, FileChecksum]:
    """What an earlier call for the same job finished. Raises CheckpointError for files of another one."""
    records, checksums = _records(folder, stem), folder / _checksums(stem)
    if checksums.is_file() and (listed := read_checksums(checksums)).job == job:
        own = {name: record for name, record in listed.files.items() if name in names}
        found = {name: record for name, record in own.items() if _is_whole(folder / name, record)}
    elif (records / "job.json").is_file() and read_json(records / "job.json", str) == job:
        paths = [path for path in records.glob("*.json") if path.name != "job.json"]
        found = {path.name.removesuffix(".json"): read_json(path, FileChecksum) for path in paths}
    elif existing := sorted({*folder.glob(f"{stem}*.safetensors"), *folder.glob(f"{stem}*.index.json")}):
        half = (
            " (of a job that has not finished: start that one again, or remove the folder)" if records.exists() else ""
        )
        made_from = read_checksums(checksums).made_from if checksums.is_file() else ""
        made = f", made from {made_from}" if made_from else ""
        raise CheckpointError(
            f"{folder}: holds {existing[0].name} of something else{made}{half}; choose an empty folder", code="MDS601"
        )
    else:
        found = {}
    return found


def _size(path: Path) -> int | None:
    """Of a file that is one, not a link to one."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else None


def checksum(path: Path) -> FileChecksum:
    """Of a file, read in chunks. Raises CheckpointError where it is missing, no regular file, or not readable."""
    with open_regular(path) as file:
        return checksum_of(file)


def _is_whole(path: Path, record: FileChecksum) -> bool:
    return _size(path) == record.size and checksum(path) == record


def _run(
    source: TensorSource,
    files: Sequence[OutputFile],
    folder: Path,
    metadata: dict[str, str],
    jobs: int,
    report: Callable[[int], None],
) -> Generator[tuple[OutputFile, FileChecksum], None, None]:
    """Every file when it is in place. Workers write temporary files only: one that outlives a killed job must not
    publish anything into what the next job writes."""
    temporaries = {file.name: temporary_path(folder) for file in files}

    def published(file: OutputFile, record: FileChecksum) -> tuple[OutputFile, FileChecksum]:
        with writing_to(folder / file.name):
            temporaries[file.name].replace(folder / file.name)
            sync(folder)
        return file, record

    try:
        if jobs <= 1:
            for file in files:
                yield published(file, _write_file(source, file, folder, temporaries[file.name], metadata, report))
            return
        arguments = [(source, file, folder, temporaries[file.name], metadata) for file in files]
        with closing(_in_workers(_write_file, arguments, jobs)) as results:
            for number, record in results:
                report(files[number].nbytes)
                yield published(files[number], record)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _in_workers(
    work: Callable[..., FileChecksum], arguments: Sequence[tuple[Any, ...]], jobs: int
) -> Generator[tuple[int, FileChecksum], None, None]:
    """The results of calls in other processes, as they come, with their numbers."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start_worker) as pool:
        futures = {pool.submit(work, *each): number for number, each in enumerate(arguments)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise OutputError(
                f"a worker of --jobs {jobs} was ended by the system, as it does where memory is short; finished files "
                "are kept: start again with fewer --jobs",
                code="MDS003",
            ) from error
        except BaseException:
            for process in list(pool._processes.values()):  # they would finish files of gigabytes first
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_file(
    source: TensorSource,
    file: OutputFile,
    folder: Path,
    temporary: Path,
    metadata: Mapping[str, str],
    report: Callable[[int], None] = lambda done: None,
) -> FileChecksum:
    """Write one file piece by piece under a temporary name, and force it to disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in file.tensors.items():
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with writing_to(folder / file.name), open_new(temporary) as output:

        def write(data: Any) -> None:
            digest.update(data)
            output.write(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name, spec in file.tensors.items():
            for piece in _pieces(source, name, spec):
                write(piece.reshape(-1).view(torch.uint8).numpy())
                report(piece.nbytes)
    size = temporary.stat().st_size
    if size != 8 + len(text) + end:
        raise OutputError(f"{folder / file.name}: {size} bytes written, {8 + len(text) + end} planned", code="MDS602")
    return FileChecksum(size, digest.hexdigest())


def _pieces(source: TensorSource, name: str, spec: TensorSpec) -> Iterator[Tensor]:
    for rows in row_pieces(spec):
        piece = source.read(name, rows).contiguous()
        shape = spec.shape if rows is None else (rows.stop - rows.start, *spec.shape[1:])
        if piece.dtype != spec.dtype or tuple(piece.shape) != shape:
            found = f"{piece.dtype} {tuple(piece.shape)}"
            raise CheckpointError(f"{name}: read as {found}, announced as {spec.dtype} {shape}")
        if spec.dtype.is_floating_point and not all_finite(piece):
            raise CheckpointError(f"{name}: has values that are not finite", code="MDS515")
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
