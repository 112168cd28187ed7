"""Tensors of files that torch.save wrote, read without running what a pickle may hold; and which kind a folder has."""

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from mythos_ds.errors import CheckpointError
from mythos_ds.io import open_regular
from mythos_ds.weights.reader import (
    SINGLE,
    TensorFolder,
    TensorSource,
    TensorSpec,
    indexed_files,
    refuse_odd_index,
    refuse_pointer,
    whole_set,
)
from mythos_ds.weights.safe_load import safe_load

PICKLES = (".pt", ".pth", ".bin")
_STEM = "pytorch_model"
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Under which the state_dict lies in a file that holds more."""
_NO_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")
"""What trainers leave beside the weights."""


class Fields:
    """Stands for a configuration object inside a checkpoint: its attributes, none of its code."""


_STAND_INS: list[Any] = [(Fields, "open_mythos.main.MythosConfig")]


class PickledTensors:
    """The state_dict of one file (also one under "model" or "state_dict" beside other things), mapped rather than read.

    Only tensors and plain values are unpickled; `allow_pickle` lets the file run whatever code it names. Raises
    CheckpointError for a file that is no state_dict, or that holds more than may be read.
    """

    def __init__(self, path: Path, *, allow_pickle: bool = False):
        self.path, self.allow_pickle = Path(path), allow_pickle
        refuse_pointer(self.path)
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
        return found if isinstance(found, dict) else vars(found) if hasattr(found, "__dict__") else None

    def _state(self) -> dict[str, Tensor]:
        content = self._content()
        state = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
        odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if odd or not state:
            holds = f"{odd[0]!r} is {type(state[odd[0]]).__name__}" if odd else "it is empty"
            raise CheckpointError(f"{self.path}: not a state_dict (tensors by name): {holds}", code="MDS516")
        return state

    def _content(self) -> dict[str, Any]:
        content = self.__dict__.get("_open")
        if content is None:
            content = self.__dict__["_open"] = _load(self.path, self.allow_pickle)
        return content


class PickledShards:
    """The state_dict that torch.save wrote to several files of a folder; one of them is open at a time.

    `listed`: the file of each tensor, where an index says it. Raises CheckpointError as `PickledTensors` does, and
    where a file is missing, two hold the same tensor, or the index says something else than the files.
    """

    def __init__(
        self, folder: Path, names: list[str], *, listed: Mapping[str, str] | None = None, allow_pickle: bool = False
    ):
        self.folder, self.allow_pickle = Path(folder), allow_pickle
        self._places: dict[str, tuple[str, TensorSpec]] = {}
        for name in names:
            if not (self.folder / name).is_file():
                raise CheckpointError(
                    f"{self.folder / name}: missing; the index of the weights names it", code="MDS511"
                )
            for tensor, spec in self._shard(name).specs().items():
                if tensor in self._places:
                    raise CheckpointError(f"{self.folder / name}: {tensor} is in two files", code="MDS511")
                self._places[tensor] = name, spec
        if listed is not None:
            refuse_odd_index(self.folder / f"{_STEM}.bin.index.json", listed, self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the files."""
        return {name: spec for name, (_, spec) in self._places.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor or some of its rows."""
        return self._shard(self._places[name][0]).read(name, rows)

    def _shard(self, name: str) -> PickledTensors:
        found: PickledTensors | None = self.__dict__.get("_open")
        if found is None or found.path.name != name:
            self.__dict__["_open"] = None  # before the next is read
            found = self.__dict__["_open"] = PickledTensors(self.folder / name, allow_pickle=self.allow_pickle)
        return found


def _load(path: Path, allow_pickle: bool) -> dict[str, Any]:
    content = safe_load(path, mapped=_is_zip(path), classes=_STAND_INS, allow_pickle=allow_pickle)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a state_dict (tensors by name)", code="MDS516")
    return content


def _is_zip(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(2) == b"PK"


def has_safetensors(folder: Path) -> bool:
    """Whether the weights of a folder are safetensors."""
    return folder.is_dir() and _safetensors_stem(folder) is not None


def _safetensors_stem(folder: Path) -> str | None:
    """The stem of a folder's safetensors: the usual one, else that of the only file."""
    stem = SINGLE.removesuffix(".safetensors")
    usual = (folder / SINGLE).exists() or (folder / f"{SINGLE}.index.json").is_file()
    if usual or any(folder.glob(f"{stem}-*-of-*.safetensors")):
        return stem
    others = sorted(folder.glob("*.safetensors"))
    return others[0].name.removesuffix(".safetensors") if len(others) == 1 else None


def open_weights(path: Path, *, allow_pickle: bool = False) -> TensorSource:
    """The weights of a folder (safetensors, else pickled ones; in one file or several) or of a file that torch.save
    wrote. Raises CheckpointError where there are none, where which is not clear, or where some are missing."""
    if path.is_file() and path.suffix in PICKLES:
        return PickledTensors(path, allow_pickle=allow_pickle)
    if path.is_file():
        allowed = ", ".join(PICKLES)
        raise CheckpointError(
            f"{path}: is a file; allowed: a folder with {SINGLE}, or a file that ends in {allowed}", code="MDS516"
        )
    if not path.is_dir():
        return TensorFolder(path)
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path}: holds an adapter; merge it into its base model first (PEFT: merge_and_unload)", code="MDS514"
        )
    if (stem := _safetensors_stem(path)) is not None:
        return TensorFolder(path, stem)
    index = path / f"{_STEM}.bin.index.json"
    if index.is_file():
        listed = indexed_files(index)
        return PickledShards(path, sorted(set(listed.values())), listed=listed, allow_pickle=allow_pickle)
    if names := whole_set(path, _STEM, ".bin"):
        return PickledShards(path, names, allow_pickle=allow_pickle)
    return PickledTensors(_only_pickle(path), allow_pickle=allow_pickle)


def _only_pickle(folder: Path) -> Path:
    """The file of weights, what trainers leave beside it aside."""
    if (folder / f"{_STEM}.bin").is_file():
        return folder / f"{_STEM}.bin"
    files = sorted(file for file in folder.iterdir() if file.suffix in (*PICKLES, ".safetensors"))
    found = [file for file in files if not any(fnmatch(file.name, pattern) for pattern in _NO_WEIGHTS)]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        allowed = f"{SINGLE}, {_STEM}.bin, either in a whole set of files, or one .safetensors, .pt, .pth or .bin"
        raise CheckpointError(f"{folder}: given files of weights: {names}; allowed: {allowed}", code="MDS516")
    return found[0]
