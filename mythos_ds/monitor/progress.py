"""Progress on a terminal: of a run, a live line (elsewhere a plain line per logged step); of bytes and pieces, bars."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
    ("lr", "lr {:.2e}"),
    ("n_loops", "{:.0f} loops"),
    ("grad_norm", "|g| {:.3f}"),
)


class ProgressLine:
    """Shows steps, loss, tokens/s, learning rate, loop count, gradient norm and the time left."""

    def __init__(self, total_steps: int, enabled: bool, start_step: int = 0, console: Console | None = None):
        self._total, self._start_step = total_steps, start_step
        self._values: dict[str, float] = {}
        self._started = time.monotonic()
        self._console = (console or Console()) if enabled else None
        self._live: Progress | None = None
        if self._console is not None and self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("", total=total_steps, completed=start_step, shown="")
            self._live.start()

    def update(self, step: int, **values: float) -> None:
        """Moves a live line to `step`, counted from 1; values not given keep what was shown before."""
        self._values.update(values)
        if self._live is not None:
            self._live.update(self._task, completed=step, shown=self._shown())

    def log(self, step: int, values: Mapping[str, float | list[float]]) -> None:
        """The metrics of a logged step; without a terminal this prints one line."""
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        self.update(step, **{name: numbers[name] for name, _ in _SHOWN if name in numbers})
        if self._console is not None and self._live is None:
            width = len(str(self._total))
            line = f"step {step:>{width}}/{self._total}  {self._shown()}  {self._remaining(step)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def _shown(self) -> str:
        return "  ".join(form.format(self._values[name]) for name, form in _SHOWN if name in self._values)

    def _remaining(self, step: int) -> str:
        done = step - self._start_step
        if done < 1:
            return ""
        seconds = int((time.monotonic() - self._started) / done * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, from the first bytes on: what is refused before shows none. Yields the callback that adds bytes
    done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    task = progress.add_task(label, total=total)

    def add(done: int) -> None:
        progress.start()
        progress.advance(task, done)

    try:
        yield add
    finally:
        if progress.live.is_started:
            progress.stop()


@contextmanager
def piece_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields the callback that adds pieces done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)
