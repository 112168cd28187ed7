"""What a logger says, whatever other handlers it or its parents have."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def listening(name: str) -> Iterator[list[str]]:
    """The messages of the logger of this name and of those below it, while the block runs."""
    listener, logger = _Listener(), logging.getLogger(name)
    logger.addHandler(listener)
    try:
        yield listener.said
    finally:
        logger.removeHandler(listener)
