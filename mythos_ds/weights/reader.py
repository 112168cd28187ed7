"""Named tensors that are read one at a time, and the safetensors files of a folder as such a source."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from math import prod
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from mythos_ds.errors import CheckpointError, DamagedCheckpointError
from mythos_ds.io import open_regular, read_json

SINGLE = "model.safetensors"
_INDEX_ENDING = ".safetensors.index.json"
_POINTER = b"version https://git-lfs"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "C64": torch.complex64, "I64": torch.int64, "I32": torch.int32,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Name in a safetensors header -> dtype."""


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StartingWeights:
    """The weights that a run starts from. `identity`: last name of the path, kind and digest, as JSON values; `notes`:
    what there is to say of them."""

    source: "TensorSource"
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()


class TensorSource(Protocol):
    """Tensors by name. A conversion wraps one source in another. Sources are pickled to worker processes: they hold
    paths and small data, and open files when they read."""

    def specs(self) -> dict[str, TensorSpec]:
        """What there is, in the order in which it is to be written."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or rows start:stop of its first dimension."""


class InMemorySource:
    """A mapping of tensors, such as a state_dict, as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def specs(self) -> dict[str, TensorSpec]:
        """The type and shape of each."""
        return {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in self.tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One of them, or some of its rows."""
        return self.tensors[name] if rows is None else self.tensors[name][rows]


def elements(source: TensorSource, name: str, start: int, stop: int) -> Tensor:
    """Elements start:stop of a flattened tensor; only the rows that hold them are read."""
    shape = source.specs()[name].shape
    if start == stop:
        return torch.empty(0)
    if not shape:
        return source.read(name).reshape(1)
    per_row = prod(shape[1:])
    first, last = start // per_row, -(-stop // per_row)
    return source.read(name, slice(first, last)).reshape(-1)[start - first * per_row : stop - first * per_row]


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError for what Git LFS leaves in a weights file's place until it downloads it."""
    with open_regular(path) as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path}: is a pointer of Git LFS, the weights themselves were not downloaded. In {path.parent}: "
                "git lfs pull",
                code="MDS005",
            )


def whole_set(folder: Path, stem: str, ending: str) -> list[str]:
    """The names of the files STEM-00001-of-0000N.ENDING in `folder`, all N; none where there is no such file. Raises
    CheckpointError where some are missing, or files of two sets are there."""
    pattern = re.compile(rf"{re.escape(stem)}-([0-9]+)-of-([0-9]+){re.escape(ending)}")
    files = folder.iterdir() if folder.is_dir() else ()
    found = [match for path in files if (match := pattern.fullmatch(path.name))]
    if not found:
        return []
    totals = sorted({match.group(2) for match in found})
    if len(totals) > 1:
        raise CheckpointError(
            f"{folder}: holds files -of-{totals[0]} and -of-{totals[1]}{ending}; allowed: one set", code="MDS511"
        )
    digits, total = len(found[0].group(1)), totals[0]
    there = {match.group(0) for match in found if (folder / match.group(0)).is_file()}
    names = (f"{stem}-{number:0{digits}d}-of-{total}{ending}" for number in count(1))
    whole = list(takewhile(there.__contains__, names))  # `total` may be any number
    if len(whole) != int(total):
        absent = f"{stem}-{len(whole) + 1:0{digits}d}-of-{total}{ending}"
        missing = int(total) - len(there)
        raise CheckpointError(
            f"{folder / absent}: missing; {missing} of {total} files of the weights are", code="MDS511"
        )
    return whole


def indexed_files(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index names it. Raises CheckpointError for what is no index, or names files
    elsewhere."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map", code="MDS511")
    outside = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: names {outside[0]!r}, which is not a file of the folder", code="MDS511")
    return weight_map


def refuse_odd_index(index: Path, listed: Iterable[str], found: Iterable[str]) -> None:
    """Raises CheckpointError where an index and its files hold different tensors."""
    if odd := sorted(set(listed) ^ set(found)):
        raise CheckpointError(f"{index}: {odd[0]} is in the index or the files, not in both", code="MDS511")


class TensorFolder:
    """The safetensors file or files of one stem in a folder, with an index or without; a model's stem is "model".

    Files are mapped, so that only what is read takes memory. Raises CheckpointError where one is missing or damaged.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder, self.stem = Path(folder), stem
        self._files = {name: self._identity(name) for name in self._names()}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "stem": self.stem, "_files": self._files}

    @property
    def _index(self) -> Path:
        return self.folder / f"{self.stem}{_INDEX_ENDING}"

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the files."""
        return {name: spec for name, (_, spec) in self._places.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor or some of its rows, as a copy. Raises CheckpointError for an unknown name."""
        if name not in self._places:
            raise CheckpointError(f"{self.folder}: has no tensor {name}", code="MDS511")
        file = self._open(self._places[name][0])
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]

    def _names(self) -> list[str]:
        single = f"{self.stem}.safetensors"
        if self._index.is_file():
            return sorted(set(indexed_files(self._index).values()))
        if (self.folder / single).is_file():
            return [single]
        return whole_set(self.folder, self.stem, ".safetensors") or [single]

    def _identity(self, name: str) -> tuple[int, int]:
        try:
            refuse_pointer(self.folder / name)
            found = (self.folder / name).stat()
        except OSError as error:
            raise DamagedCheckpointError(f"{self.folder / name}: not readable ({error})") from None
        return found.st_size, found.st_mtime_ns

    def _open(self, name: str) -> Any:
        handles = self.__dict__.setdefault("_handles", {})
        if name not in handles:
            try:
                handles[name] = safetensors.safe_open(str(self.folder / name), "pt")  # type: ignore[attr-defined]
            except (OSError, safetensors.SafetensorError) as error:
                raise DamagedCheckpointError(f"{self.folder / name}: not readable ({error})") from None
        return handles[name]

    @cached_property
    def _places(self) -> dict[str, tuple[str, TensorSpec]]:
        places: dict[str, tuple[str, TensorSpec]] = {}
        for file in self._files:
            handle = self._open(file)
            names = handle.keys()
            for name in names:
                part = handle.get_slice(name)
                if name in places or part.get_dtype() not in DTYPES:
                    reason = "is in two files" if name in places else f"has the unknown type {part.get_dtype()}"
                    raise CheckpointError(f"{self.folder / file}: {name} {reason}", code="MDS511")
                places[name] = file, TensorSpec(DTYPES[part.get_dtype()], tuple(part.get_shape()))
        if self._index.is_file():
            refuse_odd_index(self._index, indexed_files(self._index), places)
        return places
