"""How commands end: interrupts, broken pipes, full outputs, foreign locales, faults of ours."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mythos_ds import guard
from mythos_ds.errors import ConfigError
from tests.helpers.paths import ROOT
from tests.helpers.pretrain import environment

DRY_RUN = ["pretrain", "--config", "tiny", "--dry-run"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "mythos_ds", *words]


@pytest.fixture
def ended(capsys, monkeypatch):
    """How a command that raises an error ends: its exit code and what it says."""
    monkeypatch.delenv(guard.DEBUG, raising=False)

    def end(error: BaseException, folder: Path | None = None) -> tuple[int, str]:
        def work() -> int:
            raise error

        return guard.guarded("it", work, folder), capsys.readouterr().err

    return end


def test_a_console_whose_reader_has_left_is_a_broken_pipe(ended):
    """Rich ends the program with 1, from inside the handler of the broken pipe."""
    leaving = SystemExit(1)
    leaving.__context__ = BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert ended(leaving) == (guard.BROKEN_PIPE_EXIT_CODE, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("x: 3 given"), "it: x: 3 given [MDS100]\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "it: a/b: permission denied [MDS002]\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), "it: aaa: file name too long [MDS002]\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "it: a/b: no space left on device [MDS002]\n"),
        (
            OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"),
            "it: a -> b: invalid cross-device link [MDS002]\n",
        ),
        (MemoryError(), "it: out of memory (no message); give it less at a time, or a machine with more [MDS003]\n"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
    ],
)
def test_what_the_user_can_mend_is_one_message(ended, error, said):
    code, message = ended(error)
    assert code == 2
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyError("k"), ValueError("\ud800"), OSError("no number"), RecursionError(), TypeError()]
)
def test_a_fault_of_ours_has_its_traceback_in_a_private_file(ended, tmp_path, monkeypatch, error):
    code, message = ended(error, tmp_path)
    assert code == 1
    assert message.count("\n") == 1
    (written,) = tmp_path.iterdir()
    assert str(written) in message
    assert type(error).__name__ in message
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    text = written.read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "mythos_ds 0." in text
    monkeypatch.setenv(guard.DEBUG, "1")
    code, message = ended(error, tmp_path)
    assert (code, len(list(tmp_path.iterdir()))) == (1, 1)
    assert "Traceback" in message


def test_without_a_folder_that_can_be_written_the_traceback_is_told(ended, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "absent"))
    code, message = ended(KeyError("k"), tmp_path / "not there either")
    assert code == 1
    assert "Traceback" in message


def test_an_interrupt_is_one_line(ended):
    assert ended(KeyboardInterrupt()) == (
        130,
        "it: stopped; what was finished is kept, nothing unfinished is published\n",
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["plan", "--help"], DRY_RUN, ["pretrain", "--config", "tiny", "--print-config"]]
)
def test_a_reader_that_leaves_ends_it_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command(*words), stdout=writing, stderr=subprocess.PIPE, env=environment(), check=False, timeout=120
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_an_output_that_is_full_is_said():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(*DRY_RUN), stdout=full, stderr=subprocess.PIPE, env=environment(), check=False, timeout=120
        )
    assert (done.returncode, done.stderr) == (2, b"error: standard output: no space left on device [MDS002]\n")


@pytest.mark.parametrize(
    "words", [DRY_RUN, ["inspect", "tiny"], ["pretrain", "--config", b"\xff\xfe\xed\xa0\x80", "--dry-run"]]
)
def test_an_ascii_terminal_takes_everything(words):
    variables = {**environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": "C"}
    done = subprocess.run(command(*words), env=variables, capture_output=True, check=False, timeout=120, cwd=ROOT)
    assert done.returncode == (2 if "pretrain" in words and words != DRY_RUN else 0), done.stderr
    assert b"Traceback" not in done.stderr
    assert b"codec" not in done.stderr


def test_closed_streams_are_no_fault():
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command(*DRY_RUN)], env=environment(), check=False, timeout=120
    )
    assert done.returncode == 0


@pytest.mark.parametrize("words", [["rehearse", "--config", "1t", "--rank", "7"], ["inspect", "tiny"]])
def test_an_interrupt_while_libraries_are_imported(words):
    """From the moment that the command is there; before it only the interpreter is."""
    program = (
        "import sys; from mythos_ds import __main__ as command\n"
        "find = command.verbs\n"
        "def verbs():\n    sys.stderr.write('here\\n'); sys.stderr.flush(); return find()\n"
        f"command.verbs = verbs\nsys.exit(command.main({words}))"
    )
    for wait in (0.05, 0.4, 0.9):
        process = subprocess.Popen(
            [sys.executable, "-c", program], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        assert process.stderr.readline() == b"here\n"
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        if process.returncode == 0:
            continue  # it was faster
        assert process.returncode == 130, said
        assert said.count(b"\n") == 1
