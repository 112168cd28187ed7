"""Work that may stop where rows are under way, so that other work runs meanwhile.

A function that does so is a generator: it yields wherever it let rows leave and waits for them next. Whoever calls it
alone runs it to its end; a driver of several lanes runs each to its next stop in turn (`parallel/overlap.py`).
"""

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, None, Result]


def finish(steps: Steps[Result]) -> Result:
    """Runs steps to their end, without a pause, and returns their result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
