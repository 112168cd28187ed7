"""One job at a time for each output: who holds the lock, who may take it over, and what stays behind."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mythos_ds.errors import OutputError
from mythos_ds.io import temporary_path
from mythos_ds.output_lock import LOCK, LockRecord, locked_output
from mythos_ds.process_identity import ProcessIdentity

TOKEN = "0123456789abcdef"


def record(**changes: object) -> LockRecord:
    """A lock of this process, changed."""
    return LockRecord(replace(ProcessIdentity.own(), **changes), "2030-01-01T00:00:00+00:00", "merge", TOKEN)  # type: ignore[arg-type]


def plant(folder: Path, held: LockRecord | str, name: str = LOCK) -> None:
    """A lock that another job has left."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(held if isinstance(held, str) else json.dumps(asdict(held)))


def in_child(work: Callable[[], int]) -> int:
    """The number of a forked process that does `work` and ends with what it returns."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        code = work()
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 98
    finally:
        os._exit(code)


def code_of(pid: int) -> int:
    """The exit code of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def take(target: Path, seconds: float = 0.0, **options: bool) -> int:
    """0 where the lock was had, 2 where it was refused."""
    try:
        with locked_output(target, "convert", **options):
            time.sleep(seconds)
    except OutputError:
        return 2
    return 0


DEAD: dict[str, dict[str, object]] = {
    "absent process": {"pid": 2**22 + 1},
    "number used again": {"start": 1},
    "earlier boot": {"boot": "00000000-0000-0000-0000-000000000000"},
}
UNKNOWN: dict[str, dict[str, object]] = {
    "other host": {"host": "node-17"},
    "other container": {"namespace": "pid:[1]", "pid": 2**22 + 1},
    "host of the same name": {"machine": "f" * 32, "pid": 2**22 + 1},
    "same name, other boot": {"machine": "", "boot": "0", "pid": 2**22 + 1},
}
BROKEN = ["", "{", "[]", '{"token": 1}', json.dumps({**asdict(record()), "token": "../../../etc"}), "\0" * 40]


@pytest.mark.parametrize("folder", [True, False])
def test_a_second_job_is_refused_and_told_of_the_first(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "out"
    with locked_output(target, "merge", folder=folder):
        with pytest.raises(OutputError) as caught, locked_output(target, "convert", folder=folder):
            pass
        text = str(caught.value)
        assert all(part in text for part in (str(target), str(os.getpid()), os.uname().nodename, "merge", "since 20"))
        with pytest.raises(OutputError), locked_output(target, "convert", folder=folder, break_lock=True):
            pass
    assert take(target, folder=folder) == 0
    assert list(tmp_path.iterdir()) == []


def test_spellings_of_one_folder_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "later").symlink_to("not-yet")
    monkeypatch.chdir(tmp_path)
    pairs = [("real/out", "link/out"), ("real/out", "./real/../link/out/"), ("real", "link"), ("later", "not-yet")]
    for first, second in pairs:
        for folder in (True, False):
            with locked_output(Path(first), "merge", folder=folder):
                assert take(Path(second), folder=folder) == 2
            assert take(tmp_path / second, folder=folder) == 0
    with locked_output(Path("real/a"), "merge", folder=False), locked_output(Path("real/b"), "merge", folder=False):
        pass


@pytest.mark.parametrize("name", DEAD)
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, name: str) -> None:
    if name == "earlier boot" and not ProcessIdentity.own().machine:
        pytest.skip("this host has no machine id, so that boots of others are not told from its own")
    plant(tmp_path / "out", record(**DEAD[name]))
    assert take(tmp_path / "out") == 0
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_may_be_alive_is_refused_until_the_lock_is_broken(tmp_path: Path, name: str) -> None:
    plant(tmp_path / "out", record(**UNKNOWN[name]))
    with pytest.raises(OutputError, match="--break-lock"), locked_output(tmp_path / "out", "merge"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    assert take(tmp_path / "out", break_lock=True) == 0
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("text", BROKEN)
def test_a_lock_that_is_not_readable_is_refused_until_it_is_broken(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mythos_ds.output_lock._PAUSE_SECONDS", 0.0001)
    plant(tmp_path / "out", text)
    with pytest.raises(OutputError, match="--break-lock"), locked_output(tmp_path / "out", "merge"):
        pass
    assert take(tmp_path / "out", break_lock=True) == 0


def test_a_lock_that_is_a_link_or_a_folder_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mythos_ds.output_lock._PAUSE_SECONDS", 0.0001)
    (tmp_path / "victim").write_text("precious")
    for name, target in (("whole", "victim"), ("dangling", "nowhere")):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK).symlink_to(tmp_path / target)
        assert [take(tmp_path / name), take(tmp_path / name, break_lock=True)] == [2, 0]
    (tmp_path / "folder" / LOCK).mkdir(parents=True)
    assert [take(tmp_path / "folder"), take(tmp_path / "folder", break_lock=True)] == [2, 2]
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("seed", range(4))
def test_one_of_several_takers_gets_a_stale_lock(tmp_path: Path, seed: int) -> None:
    """Also where a taker was killed on the way: its claim is taken over too."""
    generator, target = random.Random(seed), tmp_path / "out"
    first = record(pid=2**22 + 1)
    plant(target, first)
    if seed % 2:
        plant(target, replace(first, token="f" * 16), f"{LOCK}.{first.token}")
    refused = tmp_path / "refused"
    refused.mkdir()
    start, end = time.time() + 0.05, time.time() + 60

    def taker() -> int:
        time.sleep(max(0.0, start - time.time()) + generator.random() * 0.001)
        try:
            with locked_output(target, "convert"):
                while len(list(refused.iterdir())) < 7 and time.time() < end:
                    time.sleep(0.001)
        except OutputError:
            (refused / str(os.getpid())).touch()
            return 2
        return 0

    codes = [code_of(pid) for pid in [in_child(taker) for _ in range(8)]]
    assert sorted(codes) == [0] + [2] * 7
    assert time.time() < end
    assert not list(target.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_lock_is_released_when_its_process_is_ended(tmp_path: Path, number: int) -> None:
    target, inside = tmp_path / "out", tmp_path / "inside"

    def hold() -> int:
        # A shell that starts the tests in the background has them ignore these.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with locked_output(target, "convert"):
            inside.touch()
            time.sleep(30)
        return 0

    pid = in_child(hold)
    while not inside.is_file():
        time.sleep(0.001)
    os.kill(pid, number)
    code = code_of(pid)
    assert (
        code == {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 98, signal.SIGKILL: -9}[signal.Signals(number)]
    )
    assert target.exists() == (number == signal.SIGKILL)
    assert take(target) == 0
    assert not target.exists() or not list(target.iterdir())


@pytest.mark.parametrize("seed", range(3))
def test_takers_that_are_killed_leave_nothing_that_stays(tmp_path: Path, seed: int) -> None:
    generator, target = random.Random(seed), tmp_path / "out"

    def insist() -> int:
        while True:
            take(target)

    for _ in range(25):
        pids = [in_child(insist) for _ in range(2)]
        for pid in pids:
            time.sleep(generator.random() * 0.01)
            os.kill(pid, signal.SIGKILL)
        assert [code_of(pid) for pid in pids] == [-9, -9]
    assert take(target) == 0
    assert not target.exists() or not list(target.iterdir())


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    pid = in_child(lambda: temporary_path(tmp_path).write_bytes(b"x") and 0)
    assert code_of(pid) == 0
    elsewhere = tmp_path / f".mythos_ds-{'0' * 8}-1-1-{TOKEN}.tmp"
    kept = [tmp_path / ".mythos_ds-mine.tmp", tmp_path / ".model.tmp", temporary_path(tmp_path)]
    for path in (*kept, elsewhere):
        path.write_bytes(b"x")
    assert take(tmp_path / "data", folder=False) == 0
    assert set(tmp_path.iterdir()) == {*kept, elsewhere}
    assert take(tmp_path) == 0
    assert set(tmp_path.iterdir()) == set(kept)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="of Linux")
@pytest.mark.parametrize("folder", [True, False])
def test_a_folder_that_takes_no_files_is_refused_at_once(folder: bool) -> None:
    with (
        pytest.raises(OutputError, match="cannot be written"),
        locked_output(Path("/proc/self") if folder else Path("/proc/self/x"), "convert", folder=folder),
    ):
        pass
