"""Who says what went wrong, and how the other processes end. No torch: errors may come before anything is started."""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mythos_ds import guard
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import USER_ERROR_EXIT_CODE, MythosError, RankError, ReportedElsewhere

# A launcher that sees one process fail ends the others: rank 0, which may be slower, must get to its message first.
PATIENCE_SECONDS = 20.0
# After a collective the rank that reports is at its message too.
PATIENCE_TOGETHER_SECONDS = 4.0


def fail(error: MythosError, environment: ProcessEnvironment | None) -> int:
    """Report a user's error once over all processes and return the exit code.

    Errors are mostly met by every rank alike, and rank 0 reports them at once. Another rank waits to be ended by the
    launcher; if that does not happen rank 0 did not fail, and this rank reports too.
    """
    rank = environment.rank if environment is not None else 0
    if isinstance(error, ReportedElsewhere):
        _wait(PATIENCE_TOGETHER_SECONDS)
    elif rank == 0 or isinstance(error, RankError):
        _report(error.report(), rank)
    else:
        _wait(PATIENCE_SECONDS)
        _report(error.report(), rank)
    return USER_ERROR_EXIT_CODE


def abort(error: Exception, rank: int, folder: Path) -> NoReturn:
    """Tell an exception of this rank and end its process at once: with exit code 2 for what the user can mend, else
    with 1, and the traceback in a file in the run's `folder`.

    The other ranks wait in a collective, and closing the process groups would wait for them; the launcher ends them.
    """
    mendable = guard.user_error(error)
    _report(guard.fault(error, folder) if mendable is None else mendable.report(), rank)
    os._exit(guard.FAULT_EXIT_CODE if mendable is None else USER_ERROR_EXIT_CODE)


def _report(report: str, rank: int) -> None:
    where = f" (rank {rank})" if rank else ""
    sys.stderr.write(f"error{where}: {report}\n")
    sys.stderr.flush()


def _wait(seconds: float) -> None:
    """Until the launcher's SIGTERM, which then means what this process would have said: exit code 2."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(USER_ERROR_EXIT_CODE)

    signal.signal(signal.SIGTERM, leave)
    time.sleep(seconds)
