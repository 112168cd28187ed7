"""Busy and idle time of a process during a pipeline run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Runs from its making to `finish`; `busy()` blocks are work. On CUDA the device's own clock is read: nothing waits
    before `idle_share`."""

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._first = self._mark()
        self._last = self._first
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The work inside counts as busy."""
        started = self._mark()
        yield
        self._spans.append((started, self._mark()))

    def finish(self) -> None:
        """The run is over."""
        self._last = self._mark()

    def idle_share(self) -> float:
        """1 - busy / total, in 0..1. On CUDA it waits for the device."""
        if isinstance(self._last, torch.cuda.Event):
            self._last.synchronize()  # all others came before it
        total = self._seconds(self._first, self._last)
        busy = sum(self._seconds(start, end) for start, end in self._spans)
        return max(0.0, 1.0 - busy / total) if total > 0 else 0.0

    def _mark(self) -> "float | torch.cuda.Event":
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return start.elapsed_time(end) / 1000.0
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
