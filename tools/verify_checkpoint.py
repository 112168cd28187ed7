"""Check that the files of a checkpoint, a model folder or prepared data are those that were written.

    mythos-ds verify runs/quickstart
    mythos-ds verify runs/quickstart/checkpoints/step_00000400
    mythos-ds verify merged --json
    mythos-ds verify data/docs --full

Of a run, every checkpoint; of a folder of data, every dataset and index in it. Of checkpoints and model folders, sizes
and checksums of all files; of token files larger than 256 MB, headers, lengths and samples of the tokens, and with
--full every token. Exit code 0: all are whole; 1: at least one is not, and each fault is named.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.health import content_faults
from mythos_ds.data.verification import data_faults
from mythos_ds.errors import CheckpointError
from mythos_ds.io import looked_for
from mythos_ds.mains import run_tool
from mythos_ds.weights.checksums import folder_faults
from mythos_ds.weights.writer import CHECKSUMS

_DAMAGED = 1


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("path", type=Path, help="a run's directory, a checkpoint (step_<n>), a model folder, or data")
    made.add_argument("--full", action="store_true", help="read token files of any size whole")
    made.add_argument("--json", action="store_true")
    return made


def work(arguments: Namespace) -> None:
    faults = verify(arguments.path, full=arguments.full)
    if arguments.json:
        sys.stdout.write(json.dumps(faults, indent=1) + "\n")
    else:
        for name, found in faults.items():
            sys.stdout.write(f"{name}: {'whole' if not found else '; '.join(found)}\n")
    if any(faults.values()):
        sys.exit(_DAMAGED)


def verify(path: Path, *, full: bool = False) -> dict[str, list[str]]:
    """Faults of each checkpoint or folder at `path`. Raises CheckpointError where there is none."""
    if manifest.is_tag(path.name):
        return {str(path): manifest_faults(path)}
    if (path / CHECKSUMS).is_file():
        return {str(path): folder_faults(path)}
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    tags = manifest.list_tags(folder)
    if not tags and (of_data := data_faults(path, full=full)):
        return of_data
    if not tags:
        if not path.exists():
            raise CheckpointError(f"{looked_for(path)}: no such folder", code="MDS513")
        raise CheckpointError(
            f"{path}: no checkpoint, no prepared data, and no model folder with {CHECKSUMS}", code="MDS518"
        )
    faults = {str(tag): manifest_faults(tag) for tag in tags}
    latest = folder / manifest.LATEST
    named = manifest.read_latest(folder)
    faults[str(latest)] = [] if named in {tag.name for tag in tags} else [f"names {named!r}, which is no checkpoint"]
    return faults


def manifest_faults(tag: Path) -> list[str]:
    """What differs from a checkpoint's manifest."""
    try:
        records = manifest.read_manifest(tag)
    except CheckpointError as error:
        return [str(error)]
    faults = [f"{name}: {fault}" for name, record in sorted(records.items()) if (fault := _fault(tag / name, record))]
    extra = {str(path.relative_to(tag)) for path in manifest.data_files(tag)} - set(records)
    faults += [f"{name}: not in the manifest" for name in sorted(extra)]
    return faults or content_faults(tag)


def _fault(path: Path, record: manifest.FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{size} bytes, {record.size} were written"
        return None if manifest.digest(path) == record else "its content is not what was written"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"not readable ({error.strerror})"


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
