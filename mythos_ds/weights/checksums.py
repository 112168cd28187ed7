"""Whether a folder's files are those that were written."""

import json
from collections.abc import Callable
from pathlib import Path

from mythos_ds.errors import CheckpointError
from mythos_ds.io import read_json, write_atomic, write_json
from mythos_ds.weights.model_folder import CONFIG
from mythos_ds.weights.writer import CHECKSUMS, checksum


def seal(folder: Path, config: dict[str, object]) -> None:
    """Write config.json, which makes a folder complete, after the checksums of all that stands beside the weights.

    Cards (*.md) are for people to edit and have none.
    """
    text = json.dumps(config, indent=2) + "\n"
    content = read_json(folder / CHECKSUMS)
    for path in sorted(folder.iterdir()):
        named = path.name not in (CHECKSUMS, CONFIG, *content["files"]) and not path.name.startswith(".")
        if path.is_file() and named and path.suffix != ".md":
            content["files"][path.name] = vars(checksum(path))
    temporary = folder / f".{CONFIG}.checked"
    write_atomic(temporary, text)
    content["files"][CONFIG] = vars(checksum(temporary))
    write_json(folder / CHECKSUMS, content)
    temporary.replace(folder / CONFIG)


def folder_faults(folder: Path, report: Callable[[int], None] = lambda done: None) -> list[str]:
    """What differs from a model folder's checksums; `report` gets the bytes of each file that was read."""
    content = read_json(folder / CHECKSUMS)
    records = content.get("files") if isinstance(content, dict) else None
    if not isinstance(records, dict) or not all(
        isinstance(record, dict) and {"size", "sha256"} <= set(record) for record in records.values()
    ):
        return [f"{CHECKSUMS}: not a list of files with size and sha256"]
    faults = []
    for name, record in sorted(records.items()):
        if fault := _fault(folder / name, record["size"], record["sha256"]):
            faults.append(f"{name}: {fault}")
        report(record["size"])
    if CONFIG not in records and not (folder / CONFIG).is_file():
        faults.append(f"{CONFIG}: missing, the folder is not finished")
    return faults


def _fault(path: Path, size: int, sha256: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{found} bytes, {size} were written"
        return None if checksum(path).sha256 == sha256 else "its content is not what was written"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"not readable ({error.strerror})"


def checked_bytes(folder: Path) -> int:
    """About what `require_whole` reads; 0 where there are no checksums."""
    if not (folder / CHECKSUMS).is_file():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def require_whole(folder: Path, report: Callable[[int], None] = lambda done: None) -> None:
    """Raises CheckpointError where a folder's files are not those that its checksums name; without checksums there is
    nothing to compare. `report` gets the bytes of each file that was read."""
    if (folder / CHECKSUMS).is_file() and (faults := folder_faults(folder, report)):
        raise CheckpointError(f"{folder}: {'; '.join(faults)}")
