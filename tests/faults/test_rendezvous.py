"""Processes that do not find each other: one message with the address, in bounded time, for many wrong places."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from mythos_ds import ports
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError
from mythos_ds.parallel import rendezvous
from tests.helpers.distributed import free_port
from tests.helpers.pretrain import ROOT, SMALL, Pretrain, environment, small_data

NO_HOST = "192.0.2.1"
"""Of a net that no host has (RFC 5737)."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for name, seconds in {"REACH_S": 1.0, "RESOLVE_S": 0.5, "SELF_S": 1.0, "_ATTEMPT_S": 0.5}.items():
        monkeypatch.setattr(rendezvous, name, seconds)
    monkeypatch.setattr(rendezvous, "_met", set())


def place(rank: int, address: str, port: int, processes: int = 2) -> ProcessEnvironment:
    return ProcessEnvironment(rank, processes, rank, processes, address, port, "deepspeed")


def refusal(rank: int, address: str, port: int) -> str:
    started = time.monotonic()
    with pytest.raises(ParallelError) as caught:
        rendezvous.meet(place(rank, address, port), 1.0)
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("address", ["no.such.host.invalid", "a b", "..", "x" * 300, "é" * 80, "1.2.3.4.5", "a\nb"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_nobody_knows_is_told(rank, address):
    assert f"MASTER_ADDR: given {address!r}" in refusal(rank, address, free_port())


@pytest.mark.parametrize("address", ["..", "a..b", "x" * 300, "\udc80"])
def test_what_is_no_name_at_all_is_told_at_once(address, monkeypatch):
    monkeypatch.setattr(rendezvous, "SELF_S", 60.0)
    assert "which is no host name" in refusal(0, address, free_port())


def test_an_address_of_another_host_is_told_by_rank_0():
    said = refusal(0, NO_HOST, port := free_port())
    assert f"{NO_HOST!r}" in said
    assert f"port {port} " in said
    assert "the host that runs rank 0" in said
    ports.listening(port).close()  # nothing is left that holds it


def test_a_port_where_nobody_listens_is_told():
    assert f"nobody listens at 127.0.0.1:{(port := free_port())}" in refusal(1, "127.0.0.1", port)


@pytest.mark.parametrize("kind", ["silent", "closing", "talking"])
def test_a_port_of_another_program_is_told_by_every_rank(kind):
    with socket.create_server(("127.0.0.1", 0)) as other:
        if kind != "silent":
            threading.Thread(target=_serve, args=(other, kind), daemon=True).start()
        port = ports.port_of(other)
        said = refusal(0, "127.0.0.1", port)
        assert f"127.0.0.1:{port}: port {port} is taken by process {os.getpid()} (" in said
        assert "MASTER_PORT" in said
        if kind == "silent":
            assert f"127.0.0.1:{port} is not rank 0 of this run" in refusal(1, "127.0.0.1", port)


def _serve(listener: socket.socket, kind: str) -> None:
    while True:
        try:
            connection = listener.accept()[0]
        except OSError:
            return
        with connection:
            if kind == "talking":
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize("processes", [2, 3, 20])
def test_ranks_that_never_come_are_named(processes):
    with pytest.raises(ParallelError, match=rf"1 of {processes} processes came to 127.0.0.1:\d+ within 1 s .*rank 1"):
        rendezvous.meet(place(0, "127.0.0.1", free_port(), processes), 1.0)


def test_one_process_needs_no_port_of_its_own_choice():
    with ports.listening(ports.ANY) as taken:
        alone = ProcessEnvironment(0, 1, 0, 1, "127.0.0.1", ports.port_of(taken), "python")
        met, store = rendezvous.meet(alone, 5.0)
    assert met.master_port != alone.master_port
    assert store is not None


def test_a_run_at_a_taken_port_ends_with_one_message(tmp_path):
    """Both ranks started as a launcher does: exit code 2 and one message, from rank 0, which names the holder."""
    arguments = ["--config", "tiny.json", "--run-dir", str(tmp_path / "run"), *SMALL, *small_data(tmp_path)]
    with socket.create_server(("", 0)) as other:
        variables = {**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports.port_of(other))}
        variables |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *arguments]
        ranks = [
            subprocess.Popen(
                command,
                env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
            )
            for rank in (0, 1)
        ]
        first = ranks[0].communicate(timeout=120)[0]
        ranks[1].terminate()
        second = ranks[1].communicate(timeout=60)[0]
    assert ranks[0].returncode == 2
    assert first.count("error: ") == 1
    assert f"taken by process {os.getpid()}" in first
    assert "Traceback" not in first + second
    assert "error" not in second
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [{}, {"NODE_RANK": "0", "NNODES": "2"}])
def test_torchrun_is_not_started_at_a_taken_port(tmp_path, more):
    """It would wait for minutes, and not say why."""
    with socket.create_server(("", 0)) as other:
        variables = {**environment(), **more, "NPROC": "2", "PYTHON": sys.executable, "VERB": "preflight"}
        variables["MASTER_PORT"] = str(ports.port_of(other))
        command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "--config", "tiny.json"]
        done = subprocess.run(
            command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"port {variables['MASTER_PORT']} is taken by process {os.getpid()} (")
    assert len(done.stderr.splitlines()) == 1


def test_an_interactive_slurm_shell_is_told_in_seconds(tmp_path):
    step = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0"}
    step |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    arguments = ["--config", "tiny.json", "--run-dir", str(tmp_path / "run"), *SMALL, *small_data(tmp_path)]
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *arguments]
    done = subprocess.run(
        command, env={**environment(), **step}, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "interactive Slurm shell" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_ranks_of_a_held_port_meet(tmp_path):
    arguments = ["--config", "tiny.json", "--run-dir", "run", *SMALL, *small_data(tmp_path), "training.max_steps=3"]
    with Pretrain(arguments, nprocs=2, folder=tmp_path) as run:
        run.wait(120).check()
