"""Named tensors that are read one at a time, and the safetensors files of a folder as such a source."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from mythos_ds.errors import CheckpointError
from mythos_ds.io import read_json

SINGLE = "model.safetensors"
_INDEX_ENDING = ".safetensors.index.json"
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


class TensorFolder:
    """The safetensors file or files of one stem in a folder; a model's is "model".

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
            raise CheckpointError(f"{self.folder}: has no tensor {name}")
        file = self._open(self._places[name][0])
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]

    def _names(self) -> list[str]:
        if not self._index.is_file():
            return [f"{self.stem}.safetensors"]
        content = read_json(self._index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self._index}: has no weight_map")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise CheckpointError(f"{self._index}: names {outside[0]!r}, which is not a file of the folder")
        return names

    def _identity(self, name: str) -> tuple[int, int]:
        try:
            found = (self.folder / name).stat()
        except OSError as error:
            raise CheckpointError(f"{self.folder / name}: not readable ({error})") from None
        return found.st_size, found.st_mtime_ns

    def _open(self, name: str) -> Any:
        handles = self.__dict__.setdefault("_handles", {})
        if name not in handles:
            try:
                handles[name] = safetensors.safe_open(str(self.folder / name), "pt")  # type: ignore[attr-defined]
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{self.folder / name}: not readable ({error})") from None
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
                    raise CheckpointError(f"{self.folder / file}: {name} {reason}")
                places[name] = file, TensorSpec(DTYPES[part.get_dtype()], tuple(part.get_shape()))
        if self._index.is_file():
            listed = set(read_json(self._index)["weight_map"])
            if listed != set(places):
                odd = sorted(listed ^ set(places))[0]
                raise CheckpointError(f"{self._index}: {odd} is in the index or the files, not in both")
        return places
