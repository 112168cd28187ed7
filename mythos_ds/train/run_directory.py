"""The folder of one run: resolved configuration, versions, metrics, checkpoints and the pinned manifest. No torch.

megatron-core shuffles all epochs of a run jointly, so the order of the samples changes with the planned length. A run
therefore pins its length and data at the first start; going on for longer appends a *phase*, a new dataset of its own
length and seed that begins where the last one ends.
"""

import fcntl
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import mythos_ds
from mythos_ds.config.loader import LoadedConfig, parse_json
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.schema import ParallelConfig
from mythos_ds.errors import CheckpointError
from mythos_ds.io import write_atomic
from mythos_ds.train.lr_schedule import PlannedLength

MANIFEST_FORMAT = 1
RUNS = Path("runs")
LAYOUT = {"pp_size": "pp", "ep_size": "ep", "zero_stage": "zero"}
"""Settings of `parallel` that cut a run's states over processes, and what they are called in a directory's name."""
_DATASET = "dataset"
_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "sentencepiece", "pydantic")


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


@dataclass(frozen=True)
class Phase:
    """Steps `start_step .. end_step - 1` read a dataset of their own, shuffled with `seed`.

    `decided_at` is the step at which this phase (and with it the run's new length) was planned.
    """

    start_step: int
    end_step: int
    seed: int
    decided_at: int = 0


@dataclass(frozen=True)
class RunManifest:
    """What a run is, fixed at its first start. `pinned` must not change; phases are only appended."""

    pinned: dict[str, Any]
    phases: tuple[Phase, ...]

    @property
    def total_steps(self) -> int:
        """Step count at which the run is complete."""
        return self.phases[-1].end_step

    @property
    def lengths(self) -> list[PlannedLength]:
        """The planned lengths for the learning-rate schedule."""
        return [PlannedLength(phase.decided_at, phase.end_step) for phase in self.phases]

    def phase_index(self, step: int) -> int:
        """Index of the phase that optimizer step `step` reads from; the last one's once the run is complete."""
        return next((i for i, phase in enumerate(self.phases) if step < phase.end_step), len(self.phases) - 1)


def new_manifest(resolved: ResolvedRun) -> RunManifest:
    """The manifest of a run that starts now; its dataset is pinned once that has been opened (`with_dataset`)."""
    training = resolved.config.training
    pinned = {
        "seq_len": training.seq_len,
        "global_batch_size": training.global_batch_size,
        "seed": training.seed,
        "optimizer": training.optimizer,
        "dtype": training.dtype,
        "model": resolved.config.model.model_dump(mode="json"),
    }
    return RunManifest(pinned, (Phase(0, resolved.max_steps, training.seed),))


def with_dataset(manifest: RunManifest, identity: dict[str, Any]) -> RunManifest:
    """The manifest with its dataset pinned. Raises CheckpointError when another one is pinned already."""
    stored = manifest.pinned.get(_DATASET)
    if stored is not None:
        _refuse(_differences(_DATASET, stored, identity))
    return RunManifest({**manifest.pinned, _DATASET: identity}, manifest.phases)


def continue_manifest(manifest: RunManifest, wanted: RunManifest, step: int) -> RunManifest:
    """The manifest for going on at `step` with the configuration that `wanted` was made from.

    A larger length appends a phase; phases decided on but never begun are forgotten. Raises CheckpointError naming
    every pinned value that differs, or a length below the pinned one.
    """
    stored = {name: value for name, value in manifest.pinned.items() if name != _DATASET}
    begun = [phase for phase in manifest.phases if phase.start_step < max(step, 1)]
    manifest = RunManifest(manifest.pinned, tuple(begun))
    problems = _differences("", stored, wanted.pinned)
    if wanted.total_steps < manifest.total_steps:
        problems.append(
            f"training length: {wanted.total_steps} steps now, {manifest.total_steps} when the run was started; "
            "the sample order depends on the length: keep it, or raise it to train on"
        )
    _refuse(problems)
    if wanted.total_steps == manifest.total_steps:
        return manifest
    last = manifest.phases[-1]
    seed = manifest.phases[0].seed + len(manifest.phases)
    phase = Phase(last.end_step, wanted.total_steps, seed, decided_at=step)
    return RunManifest(manifest.pinned, (*manifest.phases, phase))


def _refuse(problems: list[str]) -> None:
    if problems:
        head = "this run directory belongs to another run (use a new --run-dir, or undo the change):"
        raise CheckpointError("\n".join([head, *problems]))


def _differences(prefix: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = ((f"{prefix}.{key}".lstrip("."), old.get(key), new.get(key)) for key in keys)
        return [line for pair in pairs for line in _differences(*pair)]
    return [] if old == new else [f"{prefix}: {new!r} now, {old!r} when the run was started"]


class RunDirectory:
    """Paths and small JSON files of one run. Only rank 0 writes."""

    def __init__(self, root: Path):
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.metrics = root / "metrics.jsonl"
        self.tensorboard = root / "tensorboard"
        self.manifest = root / "manifest.json"

    def lock(self) -> TextIO:
        """Claims the directory while the returned file is open. Raises CheckpointError where another run holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        handle = (self.root / ".lock").open("a", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise CheckpointError(f"{self.root}: another run is using it; wait, or give another --run-dir") from None
        except OSError:  # a file system without locks
            pass
        return handle

    def read_manifest(self) -> RunManifest:
        """The stored manifest. Raises CheckpointError when it is missing or not readable."""
        try:
            stored = json.loads(self.manifest.read_text(encoding="utf-8"))
            phases = tuple(Phase(**phase) for phase in stored["phases"])
            return RunManifest(stored["pinned"], phases)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.manifest}: not a readable run manifest ({error})") from error

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace the manifest atomically."""
        content = {
            "format": MANIFEST_FORMAT,
            "total_steps": manifest.total_steps,
            "tokens": manifest.total_steps * manifest.pinned["global_batch_size"] * manifest.pinned["seq_len"],
            "phases": [asdict(phase) for phase in manifest.phases],
            "pinned": manifest.pinned,
        }
        write_atomic(self.manifest, json.dumps(content, indent=2) + "\n")

    def record_start(self, resolved: ResolvedRun, source_text: str, step: int, argv: Sequence[str]) -> None:
        """Keep the resolved configuration and its text, and append this start to `starts.jsonl`."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.root / "config.resolved.json", json.dumps(resolved.as_dict(), indent=2) + "\n")
        write_atomic(self.root / "config.source.json", source_text)
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": step,
            "world_size": resolved.world_size,
            "argv": list(argv),
            "git_commit": git_commit(),
            "versions": package_versions(),
        }
        with (self.root / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with `+changes` when it has some; None outside of git."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()


def package_versions() -> dict[str, str | None]:
    """Installed versions of what determines the numbers of a run."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "mythos_ds": mythos_ds.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
