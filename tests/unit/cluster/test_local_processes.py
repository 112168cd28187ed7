"""The processes of a run on one machine: their places, exit codes and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mythos_ds.cluster.local_processes import TIME_LIMIT_EXIT_CODE, run_processes
from tests.helpers.pretrain import environment

PLACE = """
import os, pathlib, sys
from mythos_ds.environment import ProcessEnvironment
found = ProcessEnvironment.detect(os.environ)
text = f"{found.rank} {found.world_size} {found.local_rank} {found.local_world_size} {found.master_port}"
pathlib.Path(sys.argv[1], str(found.rank)).write_text(text)
"""
ONE_FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(7)
time.sleep(120)
"""
KILLED = "import os; os.kill(os.getpid(), 9)"
WAITS = """
import os, pathlib, signal, sys, time
def leave(number, frame):
    pathlib.Path(sys.argv[1], "left" + os.environ["RANK"]).write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, leave)
pathlib.Path(sys.argv[1], "up" + os.environ["RANK"]).touch()
time.sleep(120)
"""


def test_every_process_knows_its_place(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert run_processes([sys.executable, "-c", PLACE, str(tmp_path)], 3) == 0
    places = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [place[:4] for place in places] == [[str(rank), "3", str(rank), "3"] for rank in range(3)]
    assert len({place[4] for place in places}) == 1


def test_one_that_fails_ends_the_others_and_its_code_is_handed_on():
    started = time.monotonic()
    assert run_processes([sys.executable, "-c", ONE_FAILS], 2) == 7
    assert time.monotonic() - started < 60
    assert run_processes([sys.executable, "-c", KILLED], 1) == 128 + signal.SIGKILL


def test_what_each_prints_is_kept_and_variables_are_handed_on(tmp_path):
    program = "import os, sys; print(os.environ['RANK'], os.environ['OWN']); sys.exit('wrong')"
    assert run_processes([sys.executable, "-c", program], 1, variables={"OWN": "x"}, logs=tmp_path) == 1
    assert (tmp_path / "rank_0.log").read_text().split() in (["0", "x", "wrong"], ["wrong", "0", "x"])


def test_past_the_time_limit_all_are_ended(tmp_path):
    assert run_processes([sys.executable, "-c", WAITS, str(tmp_path)], 2, limit_s=0.5) == TIME_LIMIT_EXIT_CODE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process(tmp_path: Path, number: int):
    program = (
        "import sys; from mythos_ds.cluster.local_processes import run_processes;"
        f"sys.exit(run_processes([sys.executable, '-c', {WAITS!r}, {str(tmp_path)!r}], 2))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env=environment())
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"up{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    assert {(tmp_path / f"left{rank}").read_text() for rank in range(2)} == {str(int(number))}
