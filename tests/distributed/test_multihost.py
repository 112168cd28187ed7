"""Training over three hosts started by `deepspeed --hostfile`, and what happens when one of them is cut off.

The hosts are network namespaces with their own addresses and ssh servers (tests/helpers/hosts.py).
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import hosts as helper
from tests.helpers.hosts import Hosts
from tests.helpers.pretrain import ROOT, SCRIPT, SMALL, environment, metrics, run_pretrain, small_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(helper.unavailable("pdsh") is not None, reason=str(helper.unavailable("pdsh"))),
]

TIMEOUT_S = 20
STEPS = 10
GRACE_S = 25
# Every expert lives on one host, so every token that it gets from the other two crosses the network.
LAYOUT = ("model.n_experts=6", "parallel.ep_size=3", "parallel.zero_stage=2", "training.global_batch_size=12")
EVERY_SECOND_STEP = "checkpoint.interval=2"


def _arguments(run_dir: Path, data: list[str], steps: int, *more: str) -> list[str]:
    options = ["--config", "tiny.json", "--run-dir", str(run_dir)]
    return [*options, *SMALL, *LAYOUT, f"training.max_steps={steps}", *more, *data]


class _Run:
    """`deepspeed --hostfile` on the first host, as a user would type it."""

    def __init__(self, hosts: Hosts, arguments: list[str], name: str, script: Path = SCRIPT):
        self.log = hosts.folder / f"{name}.log"
        # DeepSpeed's launcher carries only PYTHON* variables to the hosts, and what this file names.
        exported = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        exported["TORCH_EXTENSIONS_DIR"] = str(hosts.folder / "extensions")
        (hosts.folder / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in exported.items()))
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts.hostfile())]
        launcher += ["--master_addr", hosts.all[0].address, str(script), *arguments]
        self.process = hosts.start(
            hosts.all[0], launcher, log=self.log, limit_s=300, cwd=hosts.folder, variables=_variables(hosts)
        )

    def output(self) -> str:
        return self.log.read_text()

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)


def _variables(hosts: Hosts) -> dict[str, str]:
    path = f"{hosts.folder}:{environment()['PATH']}:/usr/sbin"
    return {**environment(), "PATH": path, "GLOO_SOCKET_IFNAME": "eth0"}


def _wait_for(condition: Callable[[], bool], run: _Run, timeout_s: float) -> None:
    def reached() -> bool:
        assert run.process.poll() is None, run.output()
        return condition()

    _until(reached, timeout_s)


def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(run_dir) if "loss" in line}


def test_three_hosts_train_as_one_and_survive_the_loss_of_one(tmp_path):
    data, alone, together, broken = small_data(tmp_path), tmp_path / "alone", tmp_path / "together", tmp_path / "broken"
    run_pretrain(_arguments(alone, data, STEPS), nprocs=3, folder=tmp_path / "alone_logs").check()
    expected = _losses(alone)
    assert list(expected) == list(range(1, STEPS + 1))

    with Hosts(3, tmp_path / "hosts") as hosts:
        run = _Run(hosts, _arguments(together, data, STEPS), "together")
        assert run.wait(240) == 0, run.output()
        assert _losses(together) == expected, "bit-equal to the run on one host"

        command = _arguments(broken, data, STEPS, EVERY_SECOND_STEP, f"parallel.timeout_s={TIMEOUT_S}")
        idle = {host: len(hosts.pids(host)) for host in hosts.all}
        run = _Run(hosts, command, "cut")
        _wait_for(lambda: len(_losses(broken)) >= 3, run, 120)
        hosts.cut(hosts.all[2])
        assert run.wait(TIMEOUT_S + GRACE_S) != 0, run.output()
        for host in hosts.all[:2]:
            lines = [line for line in run.output().splitlines() if line.startswith(f"{host.address}: ")]
            assert any("Error" in line and "imed out" in line for line in lines), run.output()
            assert any("exits with return code = 1" in line for line in lines), run.output()
        assert f"{hosts.all[2].address}: ssh exited with exit code 255" in run.output()
        done = max(_losses(broken))
        assert done < STEPS

        hosts.join(hosts.all[2])
        # The host that was cut off noticed too, by itself.
        _until(lambda: {host: len(hosts.pids(host)) for host in hosts.all} == idle, TIMEOUT_S + GRACE_S)
        run = _Run(hosts, command, "resumed")
        assert run.wait(240) == 0, run.output()
        assert _losses(broken) == expected, "bit-equal to the run that never stopped"
        starts = [json.loads(line)["step"] for line in (broken / "starts.jsonl").read_text().splitlines()]
        assert starts == [0, done // 2 * 2]


def test_torchrun_without_ssh_and_mpirun_train_as_one_host_does(tmp_path):
    """launch/torchrun.sh on every host, as a Kubernetes Job starts it; and launch/mpirun.sh on the first one."""
    data, alone = small_data(tmp_path), tmp_path / "alone"
    run_pretrain(_arguments(alone, data, 4), nprocs=3, folder=tmp_path / "alone_logs").check()
    with Hosts(3, tmp_path / "hosts") as hosts:
        shared = {**_variables(hosts), "PYTHON": sys.executable, "MASTER_ADDR": hosts.all[0].address}
        command = [str(ROOT / "launch" / "torchrun.sh"), *_arguments(tmp_path / "torchrun", data, 4)]
        nodes = []
        for number, host in enumerate(hosts.all):
            variables = {**shared, "NNODES": "3", "NPROC": "1", "JOB_COMPLETION_INDEX": str(number)}
            log = tmp_path / f"torchrun_{number}.log"
            nodes.append(hosts.start(host, command, log=log, limit_s=200, cwd=tmp_path, variables=variables))
        codes = [node.wait(240) for node in nodes]
        assert codes == [0, 0, 0], (tmp_path / "torchrun_0.log").read_text()
        assert _losses(tmp_path / "torchrun") == _losses(alone)
        if shutil.which("mpirun") is None:
            return
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        variables = {**shared, **root, "HOSTFILE": str(hosts.hostfile())}
        command = [str(ROOT / "launch" / "mpirun.sh"), *_arguments(tmp_path / "mpirun", data, 4)]
        log = tmp_path / "mpirun.log"
        process = hosts.start(hosts.all[0], command, log=log, limit_s=200, cwd=tmp_path, variables=variables)
        assert process.wait(240) == 0, log.read_text()
        assert _losses(tmp_path / "mpirun") == _losses(alone)


def test_preflight_measures_the_links_between_hosts_and_names_one_that_is_away(tmp_path):
    arguments = ["--config", "tiny.json", "--run-dir", str(tmp_path / "run"), *SMALL, *LAYOUT, *small_data(tmp_path)]
    script = ROOT / "launch" / "preflight.py"
    with Hosts(3, tmp_path / "hosts") as hosts:
        run = _Run(hosts, arguments, "well", script)
        assert run.wait(120) == 0, run.output()
        for line in ("3 processes on 3 hosts", "all-reduce across hosts", "all-to-all across hosts", "ready to train"):
            assert line in run.output()
        hosts.cut(hosts.all[1])
        run = _Run(hosts, [*arguments, "--timeout", "12"], "ill", script)
        assert run.wait(120) != 0
        assert "no answer in 'facts' from rank 1" in run.output()
        assert "Traceback" not in run.output()


def test_hosts_leave_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), Hosts(2, tmp_path / "hosts") as hosts:  # noqa: PT012
        process = hosts.start(
            hosts.all[1], ["sleep", "600"], log=tmp_path / "log", limit_s=700, cwd=tmp_path, variables={}
        )
        raise RuntimeError
    assert process.returncode is not None
    assert not any(hosts.pids(host) for host in hosts.all)
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert hosts.all[0].namespace not in listed
