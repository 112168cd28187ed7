"""SIGTERM and SIGINT ask for a clean stop: the running step ends, a checkpoint is written, the exit code is 0."""

import signal
import time
from collections.abc import Callable
from types import FrameType

from mythos_ds.log import get_logger

# Launchers forward one request several times (a terminal's Ctrl-C reaches every process and DeepSpeed's launcher
# then sends SIGTERM): signals this close together are one request.
SAME_REQUEST_SECONDS = 3.0

_logger = get_logger(__name__)


class StopSignals:
    """Remembers a request to stop; a second one, later than `SAME_REQUEST_SECONDS`, aborts at once.

    Use as a context manager: the former handlers come back at exit. `requested` is about this process only; the
    trainer asks all ranks before it stops, as launchers may signal only one of them.
    """

    def __init__(self, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)):
        self.requested = False
        self._signals = signals
        self._first_time = 0.0
        self._former: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        for number in self._signals:
            self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._former.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first_time = True, now
            _logger.info("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)
        elif now - self._first_time > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
