"""launch/preflight.py: what it finds wrong, in how many words, and with which exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import hosts as helper
from tests.helpers.distributed import free_port
from tests.helpers.hosts import Hosts
from tests.helpers.pretrain import ROOT, SMALL, environment, small_data

SCRIPT = ROOT / "launch" / "preflight.py"
LIMIT_S = 120


@dataclass(frozen=True)
class _Ended:
    code: int
    out: str
    err: str

    def report(self) -> dict:
        return json.loads(self.out)

    def failed(self) -> dict[str, str]:
        """What each failed check says."""
        return {check["name"]: check["detail"] for check in self.report()["checks"] if check["ok"] is False}


class _Ranks:
    """Preflight on several ranks without a launcher of its own; more arguments or variables for some of them."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        nprocs: int = 2,
        absent: Sequence[int] = (),
        more: Mapping[int, Sequence[str]] | None = None,
        variables: Mapping[int, Mapping[str, str]] | None = None,
    ):
        port = free_port()
        self.processes = {}
        for rank in set(range(nprocs)) - set(absent):
            place: dict[str, object] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": nprocs,
                "LOCAL_WORLD_SIZE": nprocs,
            }
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**environment(), **{name: str(value) for name, value in place.items()}}
            env |= (variables or {}).get(rank, {})
            command = [sys.executable, str(SCRIPT), *_common(folder), *arguments, *(more or {}).get(rank, ())]
            self.processes[rank] = subprocess.Popen(
                command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )

    def wait(self) -> dict[int, _Ended]:
        ended = {}
        try:
            for rank, process in self.processes.items():
                out, err = process.communicate(timeout=LIMIT_S)
                ended[rank] = _Ended(process.returncode, out, err)
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
        assert not any("Traceback" in one.err for one in ended.values()), ended
        return ended


def _common(folder: Path) -> list[str]:
    return ["--config", "tiny.json", "--run-dir", str(folder / "run"), "--json", *SMALL]


def _alone(folder: Path, arguments: Sequence[str], config: str = "tiny.json") -> _Ended:
    command = [sys.executable, str(SCRIPT), "--config", config, "--run-dir", str(folder / "run"), *arguments]
    done = subprocess.run(
        command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert "Traceback" not in done.stderr
    return _Ended(done.returncode, done.stdout, done.stderr)


def test_two_ranks_are_ready_and_nothing_is_left_behind(tmp_path):
    data = small_data(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    ended = _Ranks(tmp_path, data).wait()
    assert [one.code for one in ended.values()] == [0, 0], ended
    report = ended[0].report()
    assert report["ok"]
    assert report["processes"] == 2
    values = {check["name"]: check["value"] for check in report["checks"]}
    assert values["all-reduce inside hosts"] > 0
    assert values["all-to-all inside hosts"] > 0
    assert abs(values["clocks"]) < 1
    assert ended[1].out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_for_people(tmp_path):
    ended = _alone(tmp_path, [*SMALL, *small_data(tmp_path)])
    assert ended.code == 0, ended
    assert "disk space" in ended.out
    assert ended.out.rstrip().endswith("ready to train")


def test_missing_data_and_a_small_disk_fail(tmp_path):
    ended = _alone(tmp_path, ["--json"], config="1t.json")
    assert ended.code == 1
    failed = ended.failed()
    assert set(failed) == {"data", "disk space"}
    assert "no dataset at data/fineweb-edu/train: train.bin, train.idx, train.json missing" in failed["data"]
    assert "data.tokenizer data/tokenizers/bpe-128k.model: not there" in failed["data"]
    assert "2 + 1 checkpoints of" in failed["disk space"]


def test_another_configuration_and_other_packages_on_one_rank(tmp_path):
    other = tmp_path / "other"
    (other / "numpy-0.0.1.dist-info").mkdir(parents=True)
    (other / "numpy-0.0.1.dist-info" / "METADATA").write_text("Name: numpy\nVersion: 0.0.1\n")
    path = str(other)
    ended = _Ranks(
        tmp_path,
        small_data(tmp_path),
        more={1: ["training.lr=0.5"]},
        variables={1: {"PYTHONPATH": path}},
    ).wait()
    assert [one.code for one in ended.values()] == [1, 1]
    failed = ended[0].failed()
    assert set(failed) == {"configuration", "package versions"}
    assert "numpy 0.0.1 (there: " in failed["package versions"]


def test_a_wrong_configuration_is_one_message(tmp_path):
    ended = _Ranks(tmp_path, ["training.lr=fast"]).wait()
    assert [one.code for one in ended.values()] == [2, 2], ended
    assert ended[0].err.startswith("error: ")
    assert "training.lr" in ended[0].err
    assert ended[1].err == ""


def test_one_rank_with_a_wrong_configuration_is_named(tmp_path):
    ended = _Ranks(tmp_path, small_data(tmp_path), more={1: ["training.lr=fast"]}).wait()
    assert [one.code for one in ended.values()] == [1, 1]
    assert list(ended[0].failed()) == ["facts"]
    assert ended[0].failed()["facts"].startswith("rank 1 (")


def test_a_rank_that_hangs_is_named_in_time(tmp_path):
    started = time.monotonic()
    ranks = _Ranks(tmp_path, [*small_data(tmp_path), "--timeout", "8"])
    ranks.processes[1].send_signal(signal.SIGSTOP)
    out, err = ranks.processes[0].communicate(timeout=60)
    took = time.monotonic() - started
    ranks.processes[1].kill()
    ranks.wait()
    assert "Traceback" not in err
    assert ranks.processes[0].returncode == 1
    failed = _Ended(1, out, err).failed()["processes"]
    assert "rank 1" in failed
    assert took < 40


@pytest.mark.slow
def test_a_rank_that_never_starts_is_named(tmp_path):
    data = [*small_data(tmp_path), "training.global_batch_size=12"]
    ended = _Ranks(tmp_path, [*data, "--timeout", "6"], nprocs=3, absent=[1]).wait()
    assert [one.code for one in ended.values()] == [1, 1]
    assert ended[0].failed()["processes"] == "no answer in 'facts' from rank 1 (never reached rank 0)"
    ended = _Ranks(tmp_path, ["--timeout", "5"], absent=[0]).wait()
    assert ended[1].code == 1
    assert "rank 0 at 127.0.0.1:" in ended[1].err


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("a slots=8\nb slot=8\n", [":2: given 'b slot=8'; allowed: 'host slots=n'; nearest: 'b slots=8'"]),
        ("a slots=8\n# rest\n\na slots=8\nb slots=0\n", [":4: a is already in line 1", ":5: b: given slots=0"]),
        ("# nothing\n", [": names no host"]),
        ("no|de slots=1\n", [":1: given the host name 'no|de'"]),
    ],
)
def test_a_wrong_hostfile_is_told_by_line(tmp_path, text, messages):
    path = tmp_path / "hosts"
    path.write_text(text)
    ended = _alone(tmp_path, ["--hostfile", str(path)])
    assert ended.code == 2
    assert [f"{path}{message}" in ended.err for message in messages] == [True] * len(messages), ended.err
    assert len(ended.err.splitlines()) == len(messages)


def test_a_missing_hostfile_and_one_under_a_launcher(tmp_path):
    ended = _alone(tmp_path, ["--hostfile", "nowhere"])
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"hostfile nowhere (looked for in {tmp_path}): not readable (No such file" in ended.err
    ranks = _Ranks(tmp_path, ["--hostfile", "nowhere"]).wait()
    assert {one.code for one in ranks.values()} == {2}


@pytest.mark.skipif(helper.unavailable() is not None, reason=str(helper.unavailable()))
def test_hosts_by_ssh(tmp_path):
    """One host each with another package, with missing data and with a full disk, and one that is cut off."""
    for name in ("run", "empty", "packages", "other/numpy-0.0.1.dist-info"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "other/numpy-0.0.1.dist-info/METADATA").write_text("Name: numpy\nVersion: 0.0.1\n")
    folder = tmp_path / "data"
    folder.mkdir()
    arguments = [*_common(tmp_path), *small_data(folder), f"data.data_dir={tmp_path / 'index'}"]
    arguments += ["training.global_batch_size=20"]
    mounts = {
        1: [f"mount --bind {tmp_path / 'other'} {tmp_path / 'packages'}"],
        2: [f"mount --bind {tmp_path / 'empty'} {folder}"],
        3: [f"mount -t tmpfs -o size=1m none {tmp_path / 'run'}"],
    }
    with Hosts(6, tmp_path / "hosts", mounts=mounts) as hosts:

        def ask(*numbers: int) -> _Ended:
            addresses = [hosts.all[number].address for number in numbers]
            file = hosts.hostfile(hosts=addresses)
            path = str(tmp_path / "packages")
            command = [sys.executable, str(SCRIPT), "--hostfile", str(file), "--timeout", "60", *arguments]
            variables = {**environment(), "PYTHONPATH": path, "PATH": f"{hosts.folder}:{os.environ['PATH']}"}
            log = tmp_path / "log"
            process = hosts.start(hosts.all[0], command, log=log, limit_s=90, cwd=tmp_path, variables=variables)
            return _Ended(process.wait(100), log.read_text(), "")

        well = ask(0, 5)
        assert (well.code, well.failed()) == (0, {}), well
        assert well.report()["hosts"] == [hosts.all[0].address, hosts.all[5].address]
        hosts.cut(hosts.all[4])
        ill = ask(0, 1, 2, 3, 4)
        assert ill.code == 1
        failed = ill.failed()
        assert set(failed) == {"hosts", "package versions", "data", "shared folders", "write"} | (
            {"disk space"} if "disk space" in failed else set()
        )
        addresses = [host.address for host in hosts.all]
        assert failed["hosts"].startswith(f"{addresses[4]}: not reached by ssh (")
        assert failed["package versions"].split(": ")[1].endswith(addresses[1])
        assert failed["data"].startswith(f"{addresses[2]}: ")
        assert failed["write"] == f"{addresses[3]}: {tmp_path / 'run'}: the disk is full"
        assert failed["shared folders"].startswith(f"{addresses[3]}: run directory")
