"""Faults of prepared data: pairs of token files, and indexes of a run's samples."""

from pathlib import Path

from mythos_ds.data.dataset_info import dataset_files, read_info
from mythos_ds.data.index_files import COMPLETE, cache_faults
from mythos_ds.data.token_files import pair_faults
from mythos_ds.errors import DataError

_ENDINGS = (".bin", ".idx", ".json", ".mask")


def data_faults(path: Path, *, full: bool) -> dict[str, list[str]]:
    """Faults by dataset and index: of the prefix `path`, or of all in the folder `path`; empty where there is no data.

    full: reads every token and compares the digests; else sizes, headers, lengths, and blocks of the tokens. Whatever
    `full` says, small files are read whole, as is an index.
    """
    faults = {str(prefix): _pair(prefix, full=full) for prefix in _prefixes(path)}
    return faults | {str(folder): cache_faults(folder, full=True) for folder in _indexes(path)}


def _pair(prefix: Path, *, full: bool) -> list[str]:
    try:
        return pair_faults(prefix, read_info(prefix), full=full)
    except DataError as error:
        return [str(error)]


def _prefixes(path: Path) -> list[Path]:
    if not path.is_dir():
        given = path.with_name(path.name.removesuffix(path.suffix)) if path.suffix in _ENDINGS else path
        return [prefix for prefix in (path, given) if any(file.exists() for file in dataset_files(prefix)[:2])][:1]
    folders = [path, *(folder for folder in sorted(path.iterdir()) if _visible(folder))]
    idx_paths = [file for folder in folders for file in sorted(folder.glob("*.idx")) if not file.name.startswith(".")]
    return [file.with_suffix("") for file in idx_paths]


def _indexes(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    marked = [folder for folder in (path, *sorted(path.glob("*"))) if (folder / COMPLETE).is_file()]
    return [folder for folder in (*marked, *sorted(path.glob("index/*"))) if _visible(folder)]


def _visible(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".")
