"""How a command ends: one message and an exit code, whatever happens. Standard library only; mains come here first.

What a file or a value is wrong with is said where it is found, as a MythosError: exit code 2. What gets past that is a
fault of ours: exit code 1, one line, and the traceback in a private file that the line names (`--debug` prints it).
"""

import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from mythos_ds.errors import USER_ERROR_EXIT_CODE, MythosError

FAULT_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
BROKEN_PIPE_EXIT_CODE = 128 + signal.SIGPIPE
"""As the shell has it for a program that its reader has left, which is no error: `mythos-ds plan ... | head`."""
DEBUG = "MYTHOS_DEBUG"
"""Environment variable that `--debug` sets, so that the processes of a run know it too."""
_PACKAGES = ("mythos_ds", "torch", "deepspeed", "megatron-core", "transformers", "numpy", "pydantic")
_OTHERS = 0o027
_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "out of memory", "Cannot allocate memory")
_STOPPED = "stopped; what was finished is kept, nothing unfinished is published"
_interrupted = False


def guarded(prog: str, work: Callable[[], int], folder: Path | None = None) -> int:
    """The exit code of `work`, or of what it ended with, which is told on stderr. folder: where a traceback goes."""
    prepare_streams()
    with _watched_interrupts():
        try:
            code = work()
            sys.stdout.flush()
            return code
        except SystemExit as error:
            # Rich ends the program itself where a console's reader has left.
            if _silenced_stdout() or isinstance(error.__context__, BrokenPipeError):
                return BROKEN_PIPE_EXIT_CODE
            raise
        except (Exception, KeyboardInterrupt) as error:
            return told(error, prog, folder)


def told(error: BaseException, prog: str, folder: Path | None = None) -> int:
    """Tell what a command ended with, once; its exit code."""
    left = _silenced_stdout()
    if left and isinstance(error, BrokenPipeError):
        return BROKEN_PIPE_EXIT_CODE
    if isinstance(error, KeyboardInterrupt) or _interrupted:
        _say(f"{prog}: {_STOPPED}")
        return INTERRUPTED_EXIT_CODE
    mendable = user_error(error)
    if mendable is not None:
        _say(f"{prog}: {mendable.report()}")
        return USER_ERROR_EXIT_CODE
    _say(f"{prog}: {fault(error, folder)}")
    return FAULT_EXIT_CODE


def user_error(error: BaseException) -> MythosError | None:
    """The error as one that the user can mend, with its message and code; None for a fault of ours."""
    if isinstance(error, MythosError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        name = "standard output" if error.filename is None and _is_of_stdout(error) else error.filename or "a file"
        other = f" -> {_shown(error.filename2)}" if error.filename2 else ""
        where = ""
        if isinstance(error, FileNotFoundError) and isinstance(error.filename, str):
            from mythos_ds.io import where_searched

            where = where_searched(error.filename)
        message = f"{_shown(name)}{other}: {(error.strerror or str(error)).lower()}{where}"
        return MythosError(message, code="MDS002")
    if _is_out_of_memory(error):
        message = f"out of memory ({_first_line(error)}); give it less at a time, or a machine with more"
        return MythosError(message, code="MDS003")
    return None


def fault(error: BaseException, folder: Path | None = None) -> str:
    """A line about a fault of ours. Its traceback is printed where `--debug` is given, else it is in the file that the
    line names: in `folder` where that is a directory, else in the one for temporary files."""
    import traceback

    text = "".join(traceback.format_exception(error))
    head = f"a fault of this program: {type(error).__name__}: {_first_line(error)}"
    if os.environ.get(DEBUG):
        _say(text.rstrip())
        return MythosError(head, code="MDS001").report()
    where = _written(text, folder)
    said = f"its traceback is in {where} (--debug prints it)" if where else f"its traceback:\n{text.rstrip()}"
    return MythosError(f"{head}; {said}", code="MDS001").report()


@contextmanager
def files_of_the_group(*, everyone: bool) -> Iterator[None]:
    """New files and folders are for their owner and its group at most; where `everyone`, for whom the umask says."""
    former = os.umask(0o077)
    os.umask(former if everyone else former | _OTHERS)
    try:
        yield
    finally:
        os.umask(former)


def prepare_streams() -> None:
    """Text that the terminal's encoding lacks is written in escapes; a closed stdout or stderr is written nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def interrupt_at_once(prog: str) -> None:
    """Until a command works, Ctrl-C ends it at once with one line: libraries that are being imported may swallow it."""

    def leave(number: int, frame: FrameType | None) -> None:
        _say(f"{prog}: {_STOPPED}")
        os._exit(INTERRUPTED_EXIT_CODE)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)


@contextmanager
def _watched_interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, and is remembered: where it hits an import, another error comes out of that."""

    def note(number: int, frame: FrameType | None) -> None:
        global _interrupted
        _interrupted = True
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    former = signal.getsignal(signal.SIGINT)
    ours = ours and former is not None and former is not signal.SIG_IGN
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if ours and signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, former)


def _silenced_stdout() -> bool:
    """Whether stdout's reader has left; what is still to be written to it then goes nowhere."""
    left = False
    with suppress(OSError, ValueError):
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        left = any(event & select.POLLERR for _, event in watched.poll(0))
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        left = left or isinstance(error, BrokenPipeError)
        with open(os.devnull, "wb") as nowhere, suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return left


def _is_of_stdout(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _NO_MEMORY)


def _written(text: str, folder: Path | None) -> str | None:
    """The new file, readable by its owner alone, that holds a traceback and the versions; None where none can be."""
    import tempfile

    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    places = [str(folder)] if folder is not None and folder.is_dir() else []
    for place in [*places, tempfile.gettempdir()]:
        try:
            descriptor, name = tempfile.mkstemp(f"-{stamp}.txt", "mythos-ds-traceback-", place)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{' '.join(map(ascii, sys.argv))}\n{_versions()}\n\n{text}")
        except OSError:
            continue
        return name
    return None


def _versions() -> str:
    from importlib import metadata

    found = [f"Python {sys.version.split()[0]}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"


def _shown(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # there may be nobody to tell
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
