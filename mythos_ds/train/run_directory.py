"""The folder of one run: resolved configuration, versions, metrics, checkpoints and the pinned manifest. No torch."""

import fcntl
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from mythos_ds.config.loader import LoadedConfig, parse_json
from mythos_ds.config.resolve import ResolvedStage, whole_file
from mythos_ds.config.schema import ParallelConfig
from mythos_ds.errors import CheckpointError
from mythos_ds.io import looked_for, read_json, write_atomic
from mythos_ds.provenance import git_commit, package_versions
from mythos_ds.train.run_manifest import RunManifest

MANIFEST_FORMAT = 1
RUNS = Path("runs")
LAYOUT = {"pp_size": "pp", "ep_size": "ep", "zero_stage": "zero"}
"""Settings of `parallel` that cut a run's states over processes, and what they are called in a directory's name."""


def default_run_directory(loaded: LoadedConfig, proxy_processes: int | None = None) -> Path:
    """The directory of a run that is given none: `runs/<file>`, with what makes another run than the file's.

    That is a layout from the command line (`runs/tiny-ep2-zero1`), and being a proxy, whose batch follows from the
    number of its processes (`runs/1t-proxy-x4-pp2`). Any other run keeps its directory on any number of processes.
    """
    name = loaded.path.stem + (f"-proxy-x{proxy_processes}" if proxy_processes is not None else "")
    in_file = parse_json(loaded.text, loaded.path.name, []).get("parallel") or {}
    for key, short in LAYOUT.items():
        value = getattr(loaded.config.parallel, key)
        if value != in_file.get(key, ParallelConfig.model_fields[key].default):
            name += f"-{short}" + "-".join(str(size) for size in (value if isinstance(value, list) else [value]))
    return RUNS / name


def another_layout_note(loaded: LoadedConfig, run_dir: Path) -> str | None:
    """What to tell who starts afresh in the directory of another layout, beside a run of the file's own layout."""
    own = RUNS / loaded.path.stem
    if run_dir == own or run_dir.exists() or not RunDirectory(own).manifest.is_file():
        return None
    return f"{run_dir}: another layout than the file's is a run of its own; to go on from {own} give --resume {own}"


def copy_metrics(source: "RunDirectory", target: "RunDirectory") -> None:
    """Begin the metrics of a run that has no checkpoint yet with those of the run it goes on from."""
    if source.metrics.is_file():
        write_atomic(target.metrics, source.metrics.read_text(encoding="utf-8", errors="replace"))


class RunDirectory:
    """Paths and small JSON files of one run. Only rank 0 writes."""

    def __init__(self, root: Path):
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.metrics = root / "metrics.jsonl"
        self.tensorboard = root / "tensorboard"
        self.csv = root / "metrics.csv"
        self.wandb = root / "wandb_run.json"
        self.manifest = root / "manifest.json"
        self._made: list[Path] = []
        self.configuration = root / "config.resolved.json"

    def lock(self) -> TextIO:
        """Claims the directory while the returned file is open. Raises CheckpointError where another run holds it."""
        try:
            made = _make(self.root)
            handle = (self.root / ".lock").open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"run directory {looked_for(self.root)}: cannot be written ({error.strerror}); give another --run-dir",
                code="MDS602",
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise CheckpointError(
                f"{self.root}: another run is using it; wait, or give another --run-dir", code="MDS603"
            ) from None
        except OSError:  # a file system without locks
            return handle
        self._made = made  # to remove again: by who holds the lock alone, and folders that nobody else has made
        return handle

    def remove_unused(self) -> None:
        """Remove the directory again where `lock` has made it and nothing but the lock is in it: a refused start."""
        with suppress(OSError):
            if self._made and [path.name for path in self.root.iterdir()] == [".lock"]:
                (self.root / ".lock").unlink()
                for each in self._made:
                    each.rmdir()

    def read_manifest(self) -> RunManifest:
        """The stored manifest. Raises CheckpointError when it is missing, not readable or contradicts itself."""
        content = read_json(self.manifest, dict[str, Any])
        stored = RunManifest.of(content, str(self.manifest))
        if content.get("total_steps") != stored.planned_steps:
            raise CheckpointError(
                f"{self.manifest}: total_steps: given {content.get('total_steps')!r}, but phases end at step "
                f"{stored.planned_steps}; one of them was changed by hand or is damaged",
                code="MDS506",
            )
        return stored

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace the manifest atomically."""
        content = {
            "format": MANIFEST_FORMAT,
            "total_steps": manifest.planned_steps,
            "tokens": manifest.planned_tokens,
            **manifest.as_dict(),
        }
        write_atomic(self.manifest, json.dumps(content, indent=2) + "\n")

    def record_configuration(self, stages: Sequence[ResolvedStage], source_text: str) -> None:
        """Keep the resolved configuration and its text."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.configuration, json.dumps(whole_file(stages), indent=2) + "\n")
        write_atomic(self.root / "config.source.json", source_text)

    def record_start(self, step: int, world_size: int, argv: Sequence[str]) -> None:
        """Append this start to `starts.jsonl`."""
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": step,
            "world_size": world_size,
            "argv": list(argv),
            "git_commit": git_commit(),
            "versions": package_versions(),
        }
        with (self.root / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")


def _make(folder: Path) -> list[Path]:
    """Makes the folder and those around it; the ones that this call has made, the innermost first."""
    made: list[Path] = []
    for each in (*reversed(folder.parents), folder):
        try:
            each.mkdir()
        except FileExistsError:
            if not each.is_dir():
                raise
        except OSError:
            if not each.is_dir():  # a folder that is there may be on a file system that takes none
                raise
        else:
            made.insert(0, each)
    return made
