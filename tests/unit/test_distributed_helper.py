"""The launcher of the distributed tests reports failures and leaves no process behind."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import RankFailedError, run_distributed

HERE = "tests.unit.test_distributed_helper"


def describe(value: int) -> list[Any]:
    return [os.environ["RANK"], os.environ["WORLD_SIZE"], value]


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("wrong on purpose")
    time.sleep(60)


def sleep() -> None:
    time.sleep(60)


def fail_with_a_child(pid_file: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(pid_file).write_text(str(child.pid))
    raise ValueError("wrong on purpose")


def _runs(pid: int) -> bool:
    """Whether the process lives; one that has ended and waits to be reaped does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")


def test_results_come_back_by_rank() -> None:
    assert run_distributed(f"{HERE}:describe", 2, 60, value=7) == [["0", "2", 7], ["1", "2", 7]]


def test_a_failing_rank_is_shown_and_ends_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailedError, match="wrong on purpose"):
        run_distributed(f"{HERE}:fail_on_rank_one", 2, 60)
    assert time.monotonic() - started < 40


def test_a_hanging_run_is_ended() -> None:
    with pytest.raises(RankFailedError, match="did not end within"):
        run_distributed(f"{HERE}:sleep", 1, 8)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look at a process")
def test_a_failing_rank_leaves_no_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(RankFailedError, match="wrong on purpose"):
        run_distributed(f"{HERE}:fail_with_a_child", 1, 60, pid_file=str(pid_file))
    deadline = time.monotonic() + 5
    while _runs(int(pid_file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(pid_file.read_text()))
