"""Models by name: the one that is installed with the package, or a path. No torch."""

import os
import re
from pathlib import Path

from mythos_ds.config.built_in import BUILT_IN
from mythos_ds.errors import CheckpointError
from mythos_ds.io import where_searched

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".model", ".json", ".pt", ".pth", ".bin", ".safetensors")


def model_path(source: str | Path) -> Path:
    """The path that `source` names; "tiny" is the built-in model where nothing at hand has that name.

    Raises CheckpointError, with the command that downloads it, for a name of the Hugging Face hub.
    """
    place = Path(source)
    refuse_hub_name(source)
    return place if os.path.exists(place) or str(source) != BUILT_IN else _folder()


def find_model(source: str | Path) -> Path:
    """The folder that `source` names, as `model_path`. Raises CheckpointError where there is none."""
    place = Path(source)
    if os.path.isdir(place):
        return place
    if str(source) == BUILT_IN:
        return _folder()
    refuse_hub_name(source)
    near = f'; nearest: "{BUILT_IN}"' if place.name.lower().startswith(BUILT_IN) else ""
    raise CheckpointError(
        f"{source}: no such folder{where_searched(source)}; allowed: a model folder, a run, a "
        f'checkpoint or "{BUILT_IN}"{near}',
        code="MDS513",
    )


def refuse_hub_name(source: str | Path) -> None:
    """Raises CheckpointError for a name of the Hugging Face hub, such as org/model, where no path of that name is."""
    name, place = str(source), Path(source)
    if not _HUB_NAME.fullmatch(name) or os.path.exists(place) or os.path.exists(place.parent) or place.suffix in _FILES:
        return
    raise CheckpointError(
        f"{name}: no such folder{where_searched(name)}; allowed: a folder. If it is a name of the Hugging Face hub, "
        f"this downloads it: hf download {name} --local-dir {place.name}",
        code="MDS513",
    )


def _folder() -> Path:
    """The built-in model's, in a checkout or where the package is installed."""
    package = Path(__file__).resolve().parents[1]
    folders = [package.parent / "models" / BUILT_IN, package / "models" / BUILT_IN]
    return next((folder for folder in folders if folder.is_dir()), folders[-1])
