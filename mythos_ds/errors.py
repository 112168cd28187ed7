"""Errors that a user can mend. Each message says where, what was given, what is allowed and the nearest valid value."""

from collections.abc import Iterator
from contextlib import contextmanager

USER_ERROR_EXIT_CODE = 2


class MythosError(Exception):
    """Base of all errors that are printed without a traceback and end the program with exit code 2."""


class ConfigError(MythosError):
    """The run's configuration is wrong. Holds every problem found, so that one launch shows them all."""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(MythosError):
    """A corpus, tokenizer or dataset file is missing or does not fit the configuration."""


class CheckpointError(MythosError):
    """A checkpoint is missing, incomplete or belongs to another configuration."""


class OutputError(MythosError):
    """An output cannot be written: another job writes there, or the disk does not take it."""


class ParallelError(MythosError):
    """The processes at hand cannot be laid out as asked, or the software they run does not support it."""


class NumericsError(MythosError):
    """The loss, a gradient or the state is not finite.

    Attributes:
        loss: of the step, where it is known.
        grad_norm: of the step, where the optimizer has moved.
    """

    def __init__(self, message: str, *, loss: float | None = None, grad_norm: float | None = None):
        super().__init__(message)
        self.loss, self.grad_norm = loss, grad_norm


class LabError(MythosError):
    """A study's run failed, or there is too little to draw a conclusion from."""


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Puts the name of a file or folder before the message of a CheckpointError that does not say it."""
    try:
        yield
    except CheckpointError as error:
        if str(place) in str(error):
            raise
        raise CheckpointError(f"{place}: {error}") from error


class ReportedElsewhere(MythosError):
    """Another rank failed and says why; this one only ends with the same exit code."""


class RankError(MythosError):
    """An error that this rank must report, though it may not be rank 0."""
