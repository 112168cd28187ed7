"""Each launcher's variables lead to the same facts."""

import os
import subprocess
import sys

import pytest

from mythos_ds.environment import ALLOCATOR_VARIABLES, ProcessEnvironment, first_host, prefer_expandable_segments
from mythos_ds.errors import ParallelError
from tests.helpers.paths import ROOT

CASES = {
    "deepspeed": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
        (1, 2, 1, 2, "a", 7, "deepspeed"),
    ),
    "torchrun": (
        {
            "RANK": "5",
            "WORLD_SIZE": "8",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "b",
            "MASTER_PORT": "8",
            "TORCHELASTIC_RUN_ID": "x",
        },
        (5, 8, 1, 4, "b", 8, "torchrun"),
    ),
    "open mpi": (
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        (1, 2, 1, 2, "127.0.0.1", 29500, "mpirun"),
    ),
    "mpich": (
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "c"},
        (3, 4, 1, 2, "c", 29500, "mpirun"),
    ),
    "srun": (
        {
            "SLURM_PROCID": "9",
            "SLURM_NTASKS": "12",
            "SLURM_LOCALID": "1",
            "SLURM_NNODES": "2",
            "SLURM_NODEID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "8,4",
            "SLURM_JOB_NODELIST": "gpu[007-008]",
            "SLURM_JOB_ID": "123456",
            "SLURM_STEP_ID": "2",
        },
        (9, 12, 1, 4, "gpu007", 23458, "srun"),
    ),
    "srun, one node": (
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"},
        (1, 2, 1, 2, "127.0.0.1", 29500, "srun"),
    ),
    "srun without a node list": (
        {
            "SLURM_PROCID": "1",
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": "0",
            "SLURM_NNODES": "2",
            "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.5",
        },
        (1, 2, 0, 1, "10.0.0.5", 29500, "srun"),
    ),
    "srun with pmi2": (
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "PMI_RANK": "1", "PMI_SIZE": "2"},
        (1, 2, 1, 2, "127.0.0.1", 29500, "srun"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_launchers(name):
    environ, expected = CASES[name]
    found = ProcessEnvironment.detect(environ)
    assert (
        found.rank,
        found.world_size,
        found.local_rank,
        found.local_world_size,
        found.master_addr,
        found.master_port,
        found.launcher,
    ) == expected


@pytest.mark.parametrize("environ", [{}, {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}])
def test_no_launcher_is_one_process_on_a_free_port(environ):
    found = ProcessEnvironment.detect(environ)
    assert (found.rank, found.world_size, found.launcher) == (0, 1, "python")
    assert 1024 <= found.master_port < 65536


def test_export_is_what_detect_reads():
    found = ProcessEnvironment.detect(CASES["srun"][0])
    exported: dict[str, str] = {}
    found.export(exported)
    again = ProcessEnvironment.detect(exported)
    assert again.launcher == "deepspeed"
    assert (again.rank, again.local_world_size, again.master_port) == (9, 4, 23458)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: given 'x'"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_LOCALID"),
    ],
)
def test_contradictions_are_one_clear_error(environ, message):
    with pytest.raises(ParallelError, match=message):
        ProcessEnvironment.detect(environ)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [("n1", "n1"), ("n[3-5],m1", "n3"), ("gpu[007,009-12]", "gpu007"), ("r[1-2]n[03-04]", "r1n03"), ("a,b", "a")],
)
def test_first_host(node_list, host):
    assert first_host(node_list) == host


def test_segments_grow_unless_the_user_has_a_setting():
    bare: dict[str, str] = {"OTHER": "x"}
    prefer_expandable_segments(bare)
    assert bare == {"OTHER": "x", **dict.fromkeys(ALLOCATOR_VARIABLES[:2], "expandable_segments:True")}
    for name in ALLOCATOR_VARIABLES:
        own = {name: "max_split_size_mb:128"}
        prefer_expandable_segments(own)
        assert own == {name: "max_split_size_mb:128"}


def test_every_start_of_training_lets_segments_grow_before_torch_is_there():
    """Also one without launch/environment.sh, as by the deepspeed launcher."""
    program = (
        "import os, sys; from launch import pretrain; code = pretrain.main(['--config', 'tiny', '--print-config']); "
        "print(code, os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules, file=sys.stderr)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "0 expandable_segments:True False", done.stderr
