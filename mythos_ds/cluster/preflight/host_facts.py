"""What one process sees on its host, as plain JSON values, and what follows from everybody's. No torch."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mythos_ds.checkpoint.manifest import list_tags
from mythos_ds.cluster.preflight.report import Check, places
from mythos_ds.config.resolve import ResolvedRun, ResolvedStage
from mythos_ds.config.schema import DataConfig
from mythos_ds.config.starting_model import is_here
from mythos_ds.costs.params import checkpoint_disk_bytes
from mythos_ds.data.dataset_info import read_info
from mythos_ds.errors import DataError
from mythos_ds.formatting import byte_text
from mythos_ds.hardware import compiler_problem
from mythos_ds.io import where_searched
from mythos_ds.provenance import git_commit, package_versions

HostFacts = dict[str, Any]

WRITE_BYTES = 64 * 2**20
MARKER_WAIT_S = 5.0
"""A network file system may show another host's new file a little later."""
CLOCK_LIMIT_S = 1.0
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def config_hash(stages: Sequence[ResolvedStage]) -> str:
    """A name of the configuration's content, whatever its file looks like."""
    content = [(stage.name, stage.run.config.model_dump(mode="json")) for stage in stages]
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folders(run_dir: Path, stages: Sequence[ResolvedStage]) -> list[tuple[str, Path]]:
    """The folders that all processes must share, with their names."""
    caches = dict.fromkeys(Path(stage.run.config.data.data_dir) for stage in stages)
    return [("run directory", run_dir), *(("index cache", cache) for cache in caches)]


class Markers:
    """A file in each shared folder, by which the others tell that they see the same storage.

    A context manager: removes the files, and the folders that it made.
    """

    def __init__(self, run_dir: Path, stages: Sequence[ResolvedStage], token: str):
        self.problems: list[str] = []
        self._folders, self._token = folders(run_dir, stages), token
        self._made: list[Path] = []

    def __enter__(self) -> "Markers":
        for name, folder in self._folders:
            try:
                self._make(folder)
                marker = folder / marker_name(self._token)
                marker.write_text(self._token, encoding="utf-8")
            except OSError as error:
                self.problems.append(f"{name} {folder}: not writable ({_reason(error)})")
        return self

    def __exit__(self, *exception: object) -> None:
        for _, folder in self._folders:
            with contextlib.suppress(OSError):
                (folder / marker_name(self._token)).unlink()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _make(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += reversed(missing)


def marker_name(token: str) -> str:
    """Name of the file that `Markers` leaves in a shared folder."""
    return f".preflight-{token}"


def gather(stages: Sequence[ResolvedStage], run_dir: Path, token: str | None, *, write: bool) -> HostFacts:
    """The calling process's facts.

    token: that of the markers to look for; None where they could not be made. write: also measure the run directory's
    write speed (one process a host).
    """
    training = stages[0].run.config.training
    facts: HostFacts = {
        "host": socket.gethostname(),
        "time": time.time(),
        "python": sys.executable,
        "versions": {**package_versions(), "commit": git_commit()},
        "config": config_hash(stages),
        "data": [*_stages_data_problems(stages), *_weights_problems(training.init_from, run_dir)],
        "shared": [
            f"{name} {folder}: not shared, a file made by the first process is not seen here"
            for name, folder in folders(run_dir, stages)
            if token is not None and not _appears(folder / marker_name(token))
        ],
    }
    if _offloads(stages) and NVIDIA_DRIVER.exists() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        facts["compiler"] = [problem] if (problem := compiler_problem(os.environ)) else []
    with contextlib.suppress(OSError):
        facts["free_bytes"] = shutil.disk_usage(run_dir).free
    if write:
        facts |= _write_speed(run_dir)
    return facts


def _offloads(stages: Sequence[ResolvedStage]) -> bool:
    """Whether a training stage has DeepSpeed's CPU Adam compiled, where there are GPUs."""
    configs = [stage.run.config for stage in stages]
    return any(c.parallel.offload_optimizer == "cpu" and c.training.optimizer == "adamw" for c in configs)


def _stages_data_problems(stages: Sequence[ResolvedStage]) -> list[str]:
    """`_data_problems` of every training stage, told of the first that has them."""
    told: dict[str, str | None] = {}
    for stage in stages:
        for problem in _data_problems(stage.run.config.data):
            told.setdefault(problem, stage.name)
    return [problem if name is None else f"stage {name}: {problem}" for problem, name in told.items()]


def _data_problems(data: DataConfig) -> list[str]:
    """What is missing or damaged of the data; a dataset's content is compared by its sidecar."""
    problems = []
    if data.tokenizer is not None and not os.access(data.tokenizer, os.R_OK):
        problems.append(f"data.tokenizer {data.tokenizer}: not there, or not readable{where_searched(data.tokenizer)}")
    for dataset in (*(data.datasets or ()), *data.own_validation):
        try:
            info = read_info(Path(dataset.prefix))
            with Path(f"{dataset.prefix}.bin").open("rb") as file:
                file.seek(max(0, info.bin_bytes - 1))
                file.read(1)
        except DataError as error:
            problems.append(str(error).split("; make it with")[0])
        except OSError as error:
            problems.append(f"{dataset.prefix}: not readable ({_reason(error)})")
    return problems


def _weights_problems(source: str | None, run_dir: Path) -> list[str]:
    """Whether the weights of a start are missing; a run that goes on needs none."""
    if source is None or is_here(source) or list_tags(run_dir / "checkpoints"):
        return []
    return [f"training.init_from {source}: not there"]


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + MARKER_WAIT_S
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _write_speed(run_dir: Path) -> HostFacts:
    """Bytes per second of a file forced to disk; a problem where it cannot be written."""
    path = run_dir / marker_name(f"speed-{socket.gethostname()}-{os.getpid()}")
    block = os.urandom(2**20)
    try:
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return {"write_bytes_per_s": WRITE_BYTES / (time.perf_counter() - started)}
    except OSError as error:
        return {"write": f"{run_dir}: {_reason(error)}"}
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _reason(error: OSError) -> str:
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))


def verdicts(everybody: Sequence[HostFacts], stages: Sequence[ResolvedStage]) -> list[Check]:
    """Checks of all processes' facts, the first of which is the one that the others are compared with."""
    return [
        *_versions(everybody),
        _equal("configuration", "config", everybody),
        _problems("data", everybody, "data", "every dataset and the tokenizer are there"),
        _problems("shared folders", everybody, "shared", "run directory and index cache are the same storage"),
        *_compiler(everybody),
        _disk_space(everybody, stages),
        _write(everybody, stages[0].run),
    ]


def _compiler(everybody: Sequence[HostFacts]) -> list[Check]:
    """A check where the optimizer is offloaded from GPUs."""
    looked = [facts for facts in everybody if "compiler" in facts]
    return [_problems("compiler", looked, "compiler", "what offloading needs is there")] if looked else []


def _versions(everybody: Sequence[HostFacts]) -> list[Check]:
    first, problems = everybody[0]["versions"], []
    for facts in everybody[1:]:
        differing = [
            f"{package} {facts['versions'].get(package)} (there: {version})"
            for package, version in first.items()
            if facts["versions"].get(package) != version
        ]
        if differing:
            problems.append(f"{facts['host']}: {', '.join(differing)}")
    if problems:
        return [Check("package versions", False, f"not those of {everybody[0]['host']}: {places(problems)}")]
    listed = ", ".join(f"{package} {version}" for package, version in first.items() if version and package != "commit")
    return [Check("package versions", True, f"equal: {listed}")]


def _equal(name: str, key: str, everybody: Sequence[HostFacts]) -> Check:
    common = Counter(facts[key] for facts in everybody).most_common(1)[0][0]
    others = [f"{facts['host']} has {facts[key]}" for facts in everybody if facts[key] != common]
    if others:
        return Check(name, False, f"most processes have {common}; {places(others)}")
    return Check(name, True, f"equal: {common}")


def _problems(name: str, everybody: Sequence[HostFacts], key: str, fine: str) -> Check:
    found = [f"{facts['host']}: {problem}" for facts in everybody for problem in facts[key]]
    return Check(name, False, places(found)) if found else Check(name, True, fine)


def _disk_space(everybody: Sequence[HostFacts], stages: Sequence[ResolvedStage]) -> Check:
    """A new checkpoint is written before the oldest is removed; the stages count that keep most, and write the largest,
    as with another dtype."""
    keep = max(stage.run.config.checkpoint.keep for stage in stages)
    need = max(checkpoint_disk_bytes(stage.run.config) for stage in stages) * (keep + 1)
    known = [facts for facts in everybody if "free_bytes" in facts]
    if not known:
        return Check("disk space", False, "the run directory does not exist and cannot be made")
    least: HostFacts = min(known, key=lambda facts: facts["free_bytes"])
    text = f"{byte_text(least['free_bytes'])} free; {keep} + 1 checkpoints of {byte_text(need // (keep + 1))}"
    text += f" need {byte_text(need)}"
    fits = least["free_bytes"] >= need
    return Check("disk space", fits, text if fits else f"{least['host']}: {text}", least["free_bytes"], "bytes")


def _write(everybody: Sequence[HostFacts], resolved: ResolvedRun) -> Check:
    failed = [f"{facts['host']}: {facts['write']}" for facts in everybody if "write" in facts]
    if failed:
        return Check("write", False, places(failed))
    speeds: list[tuple[float, str]] = [
        (facts["write_bytes_per_s"], facts["host"]) for facts in everybody if "write_bytes_per_s" in facts
    ]
    if not speeds:
        return Check("write", None, "not measured")
    total, slowest = sum(speed for speed, _ in speeds), min(speeds)
    seconds = checkpoint_disk_bytes(resolved.config) / total
    text = f"{byte_text(total)}/s from all hosts together: {seconds:,.1f} s a checkpoint; slowest {slowest[1]}"
    return Check("write", True, f"{text} {byte_text(slowest[0])}/s", total, "bytes/s")


def clocks(offsets: Sequence[tuple[str, float]], uncertainty_s: float) -> Check:
    """`offsets`: host and its clock minus the first's, in seconds, known to `uncertainty_s`."""
    host, worst = max(offsets, key=lambda pair: abs(pair[1]))
    text = f"largest offset {worst * 1e3:+.0f} ms ({host}), known to {uncertainty_s * 1e3:.0f} ms"
    fine = abs(worst) <= CLOCK_LIMIT_S + uncertainty_s
    return Check("clocks", fine, text if fine else f"{text}; allowed: {CLOCK_LIMIT_S:g} s", worst, "s")
