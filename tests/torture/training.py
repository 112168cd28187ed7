"""A training run that is killed at some moment and started again."""

import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

from tests.helpers.pretrain import SMALL, Pretrain, metrics, small_data
from tests.torture.jobs import verify
from tests.torture.trials import Trial

_STEPS = 24
_LIMIT_SECONDS = 300
_OWN = re.compile(r"\.mythos_ds-|\.partial")
_TIMED = ("tokens_per_second", "mfu", "peak_memory_bytes", "memory", "seconds", "time")


class Trainings:
    """Runs of one small model that saves every second step, in folders below `scratch`."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self._number = 0
        self._data: list[str] = []
        self._known: tuple[float, dict[int, dict[str, Any]], str] | None = None

    def kill(self, generator: random.Random) -> Trial:
        """Kill a run and start it again: its steps are those of one that was left alone, its checkpoints are whole, and
        nothing of ours is left in its folder."""
        seconds, steps, state = self._undisturbed()
        folder = self._folder()
        after = generator.uniform(0.3 * seconds, seconds)
        with Pretrain(self._arguments(folder), nprocs=1, folder=folder / "first") as run:
            deadline = time.monotonic() + after
            while time.monotonic() < deadline and run.processes[0].poll() is None:
                time.sleep(0.002)
            run.kill()
            first = run.processes[0].returncode
        with Pretrain(self._arguments(folder), nprocs=1, folder=folder / "again") as run:
            again = run.wait(_LIMIT_SECONDS)
        faults = [] if again.codes == [0] else [f"started again it ends with {again.codes}: {again.outputs[0][-300:]}"]
        faults += [fault for found in verify(folder / "run").values() for fault in found]
        if _steps(folder / "run") != steps:
            faults.append("its steps are not those of an undisturbed run")
        if _last_state(folder / "run") != state:
            faults.append("its last training state is not that of an undisturbed run")
        faults += [f"left behind: {path.name}" for path in (folder / "run").rglob(".*") if _OWN.match(path.name)]
        if not faults:
            shutil.rmtree(folder)
        return Trial(f"training, killed after {after:.2f} of {seconds:.2f} s: code {first}", faults, first == -9)

    def _undisturbed(self) -> tuple[float, dict[int, dict[str, Any]], str]:
        if self._known is None:
            self.scratch.mkdir(parents=True)
            self._data = small_data(self.scratch)
            folder, started = self._folder(), time.monotonic()
            with Pretrain(self._arguments(folder), nprocs=1, folder=folder / "first") as run:
                run.wait(_LIMIT_SECONDS).check()
            self._known = time.monotonic() - started, _steps(folder / "run"), _last_state(folder / "run")
        return self._known

    def _arguments(self, folder: Path) -> list[str]:
        saves = ["checkpoint.interval=2", f"training.max_steps={_STEPS}", "parallel.ep_size=1"]
        return ["--config", "tiny.json", "--run-dir", str(folder / "run"), *SMALL, *self._data, *saves]

    def _folder(self) -> Path:
        self._number += 1
        return self.scratch / f"run_{self._number:03d}"


def _steps(run: Path) -> dict[int, dict[str, Any]]:
    """What each step computed; the rest is about time and memory."""
    lines = [line for line in metrics(run) if "loss" in line]
    return {
        line["step"]: {name: value for name, value in line.items() if not any(part in name for part in _TIMED)}
        for line in lines
    }


def _last_state(run: Path) -> str:
    return (run / "checkpoints" / f"step_{_STEPS:08d}" / "training_state.json").read_text()
