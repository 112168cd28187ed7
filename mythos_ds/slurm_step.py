"""Whether a process that sees srun's variables is one task of a step, or was started by hand in the step's shell.

`srun --pty bash` with several tasks gives its shell the variables of task 0; a program started there would wait for
tasks that nobody starts. No torch.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError

WAIT_S = 5.0
"""What the tasks of a node may lie apart: one daemon starts them all."""
_PAUSE_S = 0.25
_PROC = Path("/proc")
_SHELLS = {"bash", "sh", "dash", "zsh", "fish", "ksh", "csh", "tcsh"}
_DAEMON = "slurmstepd"
_TASK = "SLURM_PROCID"


def require_task(environment: ProcessEnvironment, environ: Mapping[str, str]) -> None:
    """Raises ParallelError where this process stands alone in an interactive shell of several Slurm tasks."""
    if in_shell(environment, environ):
        tasks = environment.world_size
        raise ParallelError(
            f"SLURM_PROCID=0 and {tasks} tasks are set, but no other task of this step runs here: an interactive Slurm "
            f"shell (srun --pty). Start it with srun (srun -n {tasks} mythos-ds ...), or on this node alone: "
            f"mythos-ds pretrain --processes {tasks}",
            code="MDS709",
        )


def in_shell(environment: ProcessEnvironment, environ: Mapping[str, str], proc: Path = _PROC) -> bool:
    """Whether `environment` is that of a step's interactive shell. Waits up to `WAIT_S` for the node's other tasks."""
    if environment.launcher != "srun" or environment.rank or environment.world_size == 1:
        return False
    if environment.local_world_size == 1:  # no other task is expected here
        return _below_interactive_shell(proc)
    if not (proc / "self").exists() or _TASK in _variables(proc / "1"):  # a container of its own for each task
        return False
    until = time.monotonic() + WAIT_S
    while not _has_sibling(environ, proc):
        if time.monotonic() > until:
            return True
        time.sleep(_PAUSE_S)
    return False


def _has_sibling(environ: Mapping[str, str], proc: Path) -> bool:
    """Whether another task of the same step runs on this node."""
    same = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    for path in proc.iterdir():
        found = _variables(path) if path.name.isdecimal() else {}
        task = found.get(_TASK)
        if task not in (None, environ.get(_TASK)) and all(found.get(name) == environ.get(name) for name in same):
            return True
    return False


def _variables(process: Path) -> dict[str, str]:
    """The environment that a process was started with; {} where it may not be read."""
    try:
        text = (process / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return {name: value for name, equals, value in (part.partition("=") for part in text.split("\0")) if equals}


def _below_interactive_shell(proc: Path) -> bool:
    """Whether a shell with a terminal and without a script stands between this process and Slurm's daemon."""
    names: list[bool] = []
    for name, arguments, terminal in _ancestors(proc):
        if name == _DAEMON:
            return any(names)
        names.append(name in _SHELLS and terminal and not any(not word.startswith("-") for word in arguments[1:]))
    return False


def _ancestors(proc: Path) -> Iterator[tuple[str, list[str], bool]]:
    """Name, command line and whether it has a terminal, of each process above this one."""
    place = proc / "self"
    while True:
        try:
            parent = _status(place)[1]
            if parent == "0":
                return
            place = proc / parent
            name, _, terminal = _status(place)
            arguments = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, IndexError):
            return
        yield name, [word for word in arguments if word], terminal != "0"


def _status(process: Path) -> tuple[str, str, str]:
    """Name, parent and terminal of a process, from its `stat`: the name stands in brackets and may hold any letter."""
    before, _, after = (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
    fields = after.split()
    return before.partition("(")[2], fields[1], fields[4]
