"""Which GPU a process takes: the one of its number, or the only one that its launcher shows it; and the host's network.
The GPUs are pretended."""

import os
import resource
import socket
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as torch_distributed

from mythos_ds.cluster.preflight.devices import device_verdicts
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError
from mythos_ds.parallel import groups, rendezvous
from mythos_ds.parallel.rendezvous import allow_connections, claim_device, in_time, name_interface

SLURM = {
    "SLURM_PROCID": "13", "SLURM_NTASKS": "16", "SLURM_LOCALID": "5", "SLURM_NNODES": "2", "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.fixture
def cuda(monkeypatch):
    """A machine whose processes see as many GPUs as its attribute says."""
    seen = SimpleNamespace(count=8, current=None)
    monkeypatch.setattr(groups, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen.count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(seen, "current", index))
    return seen


@pytest.mark.parametrize(("present", "index"), [(8, 5), (6, 5), (1, 0)])
def test_a_process_takes_the_gpu_of_its_number_or_the_only_one(cuda, present, index):
    cuda.count = present
    assert groups.select_device(ProcessEnvironment.detect(SLURM)) == torch.device("cuda", index)
    assert cuda.current == index


@pytest.mark.parametrize("present", [0, 2, 5])
def test_too_few_gpus(cuda, present):
    cuda.count = present
    with pytest.raises(ParallelError, match=f"8 processes on this node, but {present} GPUs"):
        groups.select_device(ProcessEnvironment.detect(SLURM))


@pytest.mark.parametrize("open_mpi", [False, True])
def test_deepspeed_is_told_the_device_and_the_node_keeps_its_size(cuda, monkeypatch, open_mpi):
    cuda.count = 1
    told: dict[str, str] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # put back at the end
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    if open_mpi:
        monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "5")
    monkeypatch.setattr(torch_distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(groups.deepspeed, "init_distributed", lambda **_: told.update(os.environ))
    environment = ProcessEnvironment.detect(SLURM)
    groups._start(environment, groups.select_device(environment), groups.timedelta(seconds=1))
    assert (told["RANK"], told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"], told["LOCAL_SIZE"]) == ("13", "0", "8", "8")
    # DeepSpeed's engine compares the two.
    assert told.get("OMPI_COMM_WORLD_LOCAL_RANK", "0") == "0"
    again = ProcessEnvironment.detect(told)
    assert (again.rank, again.local_world_size) == (13, 8)
    assert groups.select_device(again) == torch.device("cuda", 0)


def test_two_processes_on_one_gpu(monkeypatch):
    """A launcher that shows each process one GPU, and to all the same."""
    uuids = iter(["a", "b", "a"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=next(uuids)))
    store, device = torch_distributed.HashStore(), torch.device("cuda", 0)
    places = [ProcessEnvironment(rank, 3, rank, 3, "127.0.0.1", 29500, "srun") for rank in range(3)]
    claim_device(places[0], store, device)
    claim_device(places[1], store, device)
    with pytest.raises(ParallelError, match=r"rank 2: 3 processes on this node, but another one has the GPU"):
        claim_device(places[2], store, device)


def test_the_preflight_finds_two_processes_on_one_gpu():
    def verdict(*uuids: str):
        facts = {"right": True, "device": "GPU", "flops": 1e12, "memory_free": 99, "memory_total": 100}
        everybody = [{**facts, "uuid": uuid} for uuid in uuids]
        checks = device_verdicts(everybody, [f"rank {rank}" for rank in range(len(uuids))])
        return next(check for check in checks if check.name == "one GPU each")

    assert verdict("a", "b", "c").ok
    assert verdict("None", "None").ok, "the driver does not tell"
    shared = verdict("a", "b", "a")
    assert shared.ok is False
    assert shared.detail == "rank 0 and rank 2: a"


def test_gloo_uses_the_interface_that_reaches_rank_zero(monkeypatch):
    """On a host whose name is a loopback address to itself it would otherwise use that one."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    one_host = ProcessEnvironment(0, 2, 0, 2, "127.0.0.1", 29500, "srun")
    name_interface(one_host)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    two_hosts = ProcessEnvironment(1, 2, 0, 1, "127.0.0.1", 29500, "srun")
    name_interface(two_hosts)
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    name_interface(two_hosts)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib7"


def test_the_host_of_rank_zero_may_know_its_name_by_a_loopback_address(monkeypatch):
    """As many have it in /etc/hosts. Others would connect to themselves there."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    ways = {"node1": "127.0.0.1", rendezvous._BEYOND: "10.0.0.1", "127.0.0.1": "127.0.0.1"}
    monkeypatch.setattr(rendezvous, "_own_address", ways.get)
    monkeypatch.setattr(rendezvous, "_interface_of", {"10.0.0.1": "eth3", "127.0.0.1": "lo"}.get)
    for address, interface in (("node1", "eth3"), ("127.0.0.1", "lo")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
        name_interface(ProcessEnvironment(0, 2, 0, 1, address, 29500, "srun"))
        assert os.environ["GLOO_SOCKET_IFNAME"] == interface


@pytest.mark.parametrize(("own", "most", "allowed"), [(1024, -1, 5120), (1024, 4096, 4096), (9000, 9000, None)])
def test_many_processes_may_have_a_connection_each(monkeypatch, own, most, allowed):
    """A world of 1,024 in a host's usual limit of 1,024 open files."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (own, most))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    allow_connections(1024)
    assert asked == ([] if allowed is None else [(allowed, most)])


def test_hosts_that_gloo_does_not_connect_are_one_clear_error(monkeypatch):
    """One process is refused at once; another would wait for it as long as for one that works alone."""

    def refused():
        raise RuntimeError("Gloo connectFullMesh failed")

    assert isinstance(in_time(lambda: time.sleep(2.0), 0.05), TimeoutError)
    environment = ProcessEnvironment(1, 2, 0, 1, "127.0.0.1", 29500, "srun")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(groups, "_start", lambda *_: None)
    monkeypatch.setattr(groups.deepspeed_groups, "_WORLD_GROUP", object())
    monkeypatch.setattr(groups, "host_group", refused)
    with pytest.raises(ParallelError, match=r"rank 1 of 2 .*connectFullMesh failed\); its interface here: lo; nearest"):
        groups.init_parallel(environment, 1, timeout_s=5.0)
