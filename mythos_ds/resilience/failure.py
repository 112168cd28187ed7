"""Who says what went wrong, and how the other processes end. No torch: errors may come before anything is started."""

import os
import signal
import sys
import time
import traceback
from types import FrameType
from typing import NoReturn

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
        _report(error, rank)
    else:
        _wait(PATIENCE_SECONDS)
        _report(error, rank)
    return USER_ERROR_EXIT_CODE


def abort() -> NoReturn:
    """Print the exception being handled and end this process at once, with exit code 1.

    The other ranks wait in a collective, and closing the process groups would wait for them; the launcher ends them.
    """
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _report(error: MythosError, rank: int) -> None:
    where = f" (rank {rank})" if rank else ""
    sys.stderr.write(f"error{where}: {error}\n")
    sys.stderr.flush()


def _wait(seconds: float) -> None:
    """Until the launcher's SIGTERM, which then means what this process would have said: exit code 2."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(USER_ERROR_EXIT_CODE)

    signal.signal(signal.SIGTERM, leave)
    time.sleep(seconds)
