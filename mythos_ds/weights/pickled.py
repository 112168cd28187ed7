"""Tensors of a file that torch.save wrote, read without running what a pickle may hold; and which kind a folder has."""

from pathlib import Path
from typing import Any

from torch import Tensor

from mythos_ds.errors import CheckpointError
from mythos_ds.weights.reader import SINGLE, TensorFolder, TensorSource, TensorSpec
from mythos_ds.weights.safe_load import safe_load

PICKLES = (".pt", ".pth", ".bin")


class Fields:
    """Stands for a configuration object inside a checkpoint: its attributes, none of its code."""


_STAND_INS: list[Any] = [(Fields, "open_mythos.main.MythosConfig")]


class PickledTensors:
    """The state_dict of one file (also one under "model" beside other things), mapped rather than read.

    Only tensors and plain values are unpickled; `allow_pickle` lets the file run whatever code it names. Raises
    CheckpointError for a file that is no state_dict, or that holds more than may be read.
    """

    def __init__(self, path: Path, *, allow_pickle: bool = False):
        self.path, self.allow_pickle = Path(path), allow_pickle
        found = self.path.stat()
        self._identity = found.st_size, found.st_mtime_ns
        self._state()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "allow_pickle": self.allow_pickle, "_identity": self._identity}

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the state_dict."""
        return {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in self._state().items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor or some of its rows."""
        value: Tensor = self._state()[name]
        return value if rows is None else value[rows]

    def config_fields(self) -> dict[str, Any] | None:
        """The attributes of the configuration that lies in the file beside the weights, where one does."""
        found = self._content().get("cfg")
        return vars(found) if hasattr(found, "__dict__") else None

    def _state(self) -> dict[str, Tensor]:
        content = self._content()
        state = content.get("model", content)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{self.path}: not a state_dict (tensors by name)")
        return state

    def _content(self) -> dict[str, Any]:
        content = self.__dict__.get("_open")
        if content is None:
            content = self.__dict__["_open"] = _load(self.path, self.allow_pickle)
        return content


def _load(path: Path, allow_pickle: bool) -> dict[str, Any]:
    content = safe_load(path, mapped=_is_zip(path), classes=_STAND_INS, allow_pickle=allow_pickle)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a state_dict (tensors by name)")
    return content


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def has_safetensors(folder: Path) -> bool:
    """Whether the weights of a folder are safetensors."""
    return (folder / SINGLE).is_file() or (folder / f"{SINGLE}.index.json").is_file()


def open_weights(path: Path, *, allow_pickle: bool = False) -> TensorSource:
    """The weights of a folder (safetensors, else its one pickled file) or of a file that torch.save wrote. Raises
    CheckpointError where there are none, or where which is not clear."""
    if path.is_file() and path.suffix in PICKLES:
        return PickledTensors(path, allow_pickle=allow_pickle)
    if path.is_file():
        allowed = ", ".join(PICKLES)
        raise CheckpointError(f"{path}: is a file; allowed: a folder with {SINGLE}, or a file that ends in {allowed}")
    if not path.is_dir() or has_safetensors(path):
        return TensorFolder(path)
    found = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"{path}: given pickled weights: {names}; allowed: {SINGLE}, or one .pt, .pth or .bin")
    return PickledTensors(found[0], allow_pickle=allow_pickle)
