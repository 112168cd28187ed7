"""Check that a checkpoint's or a model folder's files are those that were written: sizes and checksums of all.

    python tools/verify_checkpoint.py runs/quickstart
    python tools/verify_checkpoint.py runs/quickstart/checkpoints/step_00000400
    python tools/verify_checkpoint.py merged --json

Of a run, every checkpoint. Exit code 0: all are whole; 1: at least one is not, and each fault is named.
"""

import hashlib
import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from mythos_ds.checkpoint import files
from mythos_ds.checkpoint.tensor_writer import CHECKSUMS
from mythos_ds.data.command import run_tool
from mythos_ds.errors import CheckpointError

_CHUNK_BYTES = 1 << 22
_DAMAGED = 1


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("path", type=Path, help="a run's directory, a checkpoint (step_<n>) or a model folder")
    made.add_argument("--json", action="store_true")
    return made


def work(arguments: Namespace) -> None:
    faults = verify(arguments.path)
    if arguments.json:
        sys.stdout.write(json.dumps(faults, indent=1) + "\n")
    else:
        for name, found in faults.items():
            sys.stdout.write(f"{name}: {'whole' if not found else '; '.join(found)}\n")
    if any(faults.values()):
        sys.exit(_DAMAGED)


def verify(path: Path) -> dict[str, list[str]]:
    """Faults of each checkpoint or folder at `path`. Raises CheckpointError where there is none."""
    if files.is_tag(path.name):
        return {str(path): manifest_faults(path)}
    if (path / CHECKSUMS).is_file():
        return {str(path): checksum_faults(path)}
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    tags = files.list_tags(folder)
    if not tags:
        raise CheckpointError(f"{path}: no checkpoint, and no model folder with {CHECKSUMS}")
    faults = {str(tag): manifest_faults(tag) for tag in tags}
    latest = folder / files.LATEST
    named = latest.read_text().strip() if latest.is_file() else ""
    faults[str(latest)] = [] if named in {tag.name for tag in tags} else [f"names {named!r}, which is no checkpoint"]
    return faults


def manifest_faults(tag: Path) -> list[str]:
    """What differs from a checkpoint's manifest."""
    try:
        records = files.read_manifest(tag)
    except CheckpointError as error:
        return [str(error)]
    wanted = {name: {"size": record.size, "crc32": record.crc32} for name, record in records.items()}
    faults = _differences(tag, wanted, lambda path: {"crc32": files.digest(path).crc32})
    extra = {str(path.relative_to(tag)) for path in files.data_files(tag)} - set(records)
    return faults + [f"{name}: not in the manifest" for name in sorted(extra)]


def checksum_faults(folder: Path) -> list[str]:
    """What differs from a model folder's checksums."""
    content = files.read_json(folder / CHECKSUMS)
    records = content.get("files") if isinstance(content, dict) else None
    if not isinstance(records, dict) or not all(
        isinstance(record, dict) and {"size", "sha256"} <= set(record) for record in records.values()
    ):
        return [f"{CHECKSUMS}: not a list of files with size and sha256"]
    return _differences(folder, records, lambda path: {"sha256": _sha256(path)})


def _differences(folder: Path, wanted: dict[str, dict[str, Any]], read: Any) -> list[str]:
    faults = []
    for name, record in sorted(wanted.items()):
        path = folder / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif path.stat().st_size != record["size"]:
            faults.append(f"{name}: {path.stat().st_size} bytes, {record['size']} were written")
        elif any(record[key] != value for key, value in read(path).items()):
            faults.append(f"{name}: its content is not what was written")
    return faults


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
