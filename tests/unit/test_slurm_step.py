"""An interactive Slurm shell is told from a task of a step, over a family of environments and process trees."""

import itertools

import pytest

from mythos_ds import slurm_step
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
}
LAYOUTS = {
    "a node": {"SLURM_NNODES": "1"},
    "two nodes": {"SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_NODELIST": "n[1-2]"},
    "a task a node": {"SLURM_NNODES": "4", "SLURM_TASKS_PER_NODE": "1(x4)", "SLURM_JOB_NODELIST": "n[1-4]"},
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(slurm_step, "WAIT_S", 0.0)


class Tree:
    """A made /proc: processes with a parent, a command line, a terminal and an environment; one of them is "self"."""

    def __init__(self, root):
        self.root = root

    def add(self, pid, parent, name, arguments=(), *, terminal=0, variables=None):
        folder = self.root / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} ({name}) S {parent} {pid} {pid} {terminal} -1 0\n")
        (folder / "cmdline").write_text("".join(f"{word}\0" for word in (name, *arguments)))
        if variables is not None:
            (folder / "environ").write_text("".join(f"{key}={value}\0" for key, value in variables.items()))
        return pid

    def chain(self, *processes, variables):
        """Slurm's daemon, what stands below it, and this process last."""
        parent = self.add(1, 0, "systemd")
        parent = self.add(50, parent, "slurmstepd")
        for number, (name, arguments, terminal) in enumerate(processes):
            parent = self.add(60 + number, parent, name, arguments, terminal=terminal, variables=variables)
        last = self.add(100, parent, "python3 (x) y", variables=variables)
        (self.root / "self").symlink_to(self.root / str(last))


SHELL = ("bash", (), 34816)
CHAINS = {
    "shell": (SHELL,),
    "login shell": (("zsh", ("-l",), 34816), ("timeout", ("9",), 34816)),
    "script of a shell": (SHELL, ("bash", ("run.sh",), 34816)),
}
REAL = {
    "task": (),
    "script": (("bash", ("run.sh",), 0),),
    "script with a terminal": (("bash", ("run.sh", "x"), 34816),),
    "shell fed by its input": (("bash", (), 0),),
}


def _environment(layout, **more):
    environ = {**STEP, **LAYOUTS[layout], **more}
    return ProcessEnvironment.detect(environ), environ


@pytest.mark.parametrize(("layout", "chain"), list(itertools.product(LAYOUTS, CHAINS)))
def test_a_shell_that_stands_alone_is_told(tmp_path, layout, chain):
    environment, environ = _environment(layout)
    Tree(tmp_path).chain(*CHAINS[chain], variables=environ)
    assert slurm_step.in_shell(environment, environ, tmp_path)


@pytest.mark.parametrize(("layout", "chain"), list(itertools.product(LAYOUTS, REAL)))
def test_a_task_of_a_step_is_not_refused(tmp_path, layout, chain):
    environment, environ = _environment(layout)
    tree = Tree(tmp_path)
    tree.chain(*REAL[chain], variables=environ)
    if environment.local_world_size > 1:
        tree.add(200, 50, "python", variables={**environ, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"})
    assert not slurm_step.in_shell(environment, environ, tmp_path)


@pytest.mark.parametrize(
    "other",
    [{"SLURM_PROCID": "0"}, {"SLURM_PROCID": "1", "SLURM_STEP_ID": "1"}, {"SLURM_PROCID": "1", "SLURM_JOB_ID": "8"}],
)
def test_processes_of_other_steps_are_no_siblings(tmp_path, other):
    environment, environ = _environment("a node")
    tree = Tree(tmp_path)
    tree.chain(SHELL, variables=environ)
    tree.add(200, 50, "python", variables={**environ, **other})
    assert slurm_step.in_shell(environment, environ, tmp_path)


def test_a_container_for_each_task_is_not_refused(tmp_path):
    environment, environ = _environment("a node")
    tree = Tree(tmp_path)
    tree.add(1, 0, "python", variables=environ)
    (tmp_path / "self").symlink_to(tmp_path / "1")
    assert not slurm_step.in_shell(environment, environ, tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"},  # task 0 speaks
        {"SLURM_NTASKS": "1"},
        {"RANK": "0", "WORLD_SIZE": "4"},  # another launcher, started from the shell
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
        {"SLURM_STEP_ID": str(2**32 - 6)},  # salloc's shell as a step: one process
        {"SLURM_STEP_ID": str(2**32 - 5)},
    ],
)
def test_others_are_not_looked_at(tmp_path, more):
    environment, environ = _environment("a node", **more)
    assert not slurm_step.in_shell(environment, environ, tmp_path)


def test_without_proc_nothing_is_known(tmp_path):
    environment, environ = _environment("a node")
    assert not slurm_step.in_shell(environment, environ, tmp_path)


def test_the_message_says_what_to_start_instead():
    environment, environ = _environment("a node")
    with pytest.raises(ParallelError, match=r"interactive Slurm shell.*srun -n 4.*--processes 4"):
        slurm_step.require_task(environment, environ)
