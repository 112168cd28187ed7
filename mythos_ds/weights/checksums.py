"""Whether a folder's files are those that were written."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mythos_ds.errors import CheckpointError, DamagedCheckpointError
from mythos_ds.io import FileChecksum, read_json, write_atomic, write_json
from mythos_ds.weights.model_folder import CONFIG, read_config
from mythos_ds.weights.writer import CHECKSUMS, checksum, read_checksums


def seal(folder: Path, config: dict[str, object]) -> None:
    """Write config.json, which makes a folder complete, after the checksums of all that stands beside the weights.

    Cards (*.md) are for people to edit and have none.
    """
    text = json.dumps(config, indent=2) + "\n"
    content = read_checksums(folder / CHECKSUMS)
    files = dict(content.files)
    for path in sorted(folder.iterdir()):
        named = path.name not in (CHECKSUMS, CONFIG, *files) and not path.name.startswith(".")
        if path.is_file() and named and path.suffix != ".md":
            files[path.name] = checksum(path)
    files[CONFIG] = FileChecksum(len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
    records = {name: asdict(record) for name, record in files.items()}
    made = {"made_from": content.made_from} if content.made_from else {}
    write_json(folder / CHECKSUMS, {"format": 1, "job": content.job, **made, "files": records})
    write_atomic(folder / CONFIG, text)


def folder_faults(folder: Path, report: Callable[[int], None] = lambda done: None) -> list[str]:
    """What differs from a model folder's checksums; `report` gets the bytes of each file that was read."""
    try:
        records = read_checksums(folder / CHECKSUMS).files
    except CheckpointError as error:
        return [str(error)]
    faults = []
    for name, record in sorted(records.items()):
        if fault := _fault(folder / name, record):
            faults.append(f"{name}: {fault}")
        report(record.size)
    if CONFIG not in records and not (folder / CONFIG).is_file():
        faults.append(f"{CONFIG}: missing, the folder is not finished")
    return faults or _config_faults(folder)


def _config_faults(folder: Path) -> list[str]:
    """What is wrong with the configuration of a mythos folder; those of others are for others to judge."""
    try:
        content = read_json(folder / CONFIG)
        if isinstance(content, dict) and {"format", "model"} <= set(content):
            read_config(folder)
    except CheckpointError as error:
        return [str(error)]
    return []


def _fault(path: Path, record: FileChecksum) -> str | None:
    try:
        found = path.stat().st_size
        if found != record.size:
            return f"{found} bytes, {record.size} were written"
        return None if checksum(path) == record else "its content is not what was written"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"not readable ({error.strerror})"
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")


def checked_bytes(folder: Path) -> int:
    """About what `require_whole` reads; 0 where there are no checksums."""
    if not (folder / CHECKSUMS).is_file():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def require_whole(folder: Path, report: Callable[[int], None] = lambda done: None) -> None:
    """Raises CheckpointError where a folder's files are not those that its checksums name; without checksums there is
    nothing to compare. `report` gets the bytes of each file that was read."""
    if (folder / CHECKSUMS).is_file() and (faults := folder_faults(folder, report)):
        raise DamagedCheckpointError(f"{folder}: {'; '.join(faults)}")
