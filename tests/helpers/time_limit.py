"""A limit on one step of a test, for what must answer at once whatever it is given."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TooSlowError(BaseException):
    """Nothing that a case catches."""


@contextmanager
def at_most(seconds: float, what: Any) -> Iterator[None]:
    """Raises TooSlowError, naming `what`, in the main thread once the block has taken so long."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"{what}: not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if time.monotonic() - started > seconds:  # a call into C that no signal interrupts
        late(0, None)
