"""Errors that a user can mend. Each message says where, what was given, what is allowed and the nearest valid value.

Each kind of problem has a short code, such as MDS101, that is printed after its message: a word to search for. All of
them stand in `mythos_ds/error_codes.py` and, for readers, in docs/troubleshooting.md.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec

USER_ERROR_EXIT_CODE = 2
Parameters = ParamSpec("Parameters")


class Coded(str):
    """A message with the code of its kind. Equal to its text; `after` puts text before it and keeps the code."""

    code: str

    def __new__(cls, code: str, text: str) -> "Coded":
        made = super().__new__(cls, text)
        made.code = code
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return self.code, str(self)

    def after(self, before: str) -> "Coded":
        """The message with text before it."""
        return Coded(self.code, before + self)


Problem = tuple[str, Coded]
"""A key of the configuration, and what is wrong with it."""


def coded(
    code: str,
) -> Callable[[Callable[Parameters, str | None]], Callable[Parameters, Coded | None]]:
    """Decorate a rule, which returns a message or None: its messages get the rule's code."""

    def decorate(rule: Callable[Parameters, str | None]) -> Callable[Parameters, Coded | None]:
        def broken(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Coded | None:
            message = rule(*args, **kwargs)
            return None if message is None else Coded(code, message)

        broken.__doc__, broken.__name__ = rule.__doc__, rule.__name__
        return broken

    return decorate


class MythosError(Exception):
    """Base of all errors that are printed without a traceback and end the program with exit code 2.

    Attributes:
        code: of the first problem, such as "MDS101"; what has none of its own has that of its class.
        problems: one message or more, each with its code; `str(error)` has them without codes, `report()` with them.
    """

    code = "MDS000"

    def __init__(self, message: str | Sequence[Coded], *, code: str | None = None):
        if isinstance(message, str):
            own = message.code if isinstance(message, Coded) else self.code
            message = [Coded(code or own, message)]
        self.problems = list(message)
        if self.problems:
            self.code = self.problems[0].code
        super().__init__("\n".join(self.problems))

    def report(self) -> str:
        """What is printed: each message with its code at the end of its first line."""
        return "\n".join(_with_code(problem) for problem in self.problems)


def _with_code(problem: Coded) -> str:
    first, newline, rest = problem.partition("\n")
    return f"{first} [{problem.code}]{newline}{rest}"


class ConfigError(MythosError):
    """The run's configuration is wrong. Holds every problem found, so that one launch shows them all."""

    code = "MDS100"


class OptionError(ConfigError):
    """An option of the command line has a value that is not allowed, or has no effect beside the others."""

    code = "MDS120"


class DataError(MythosError):
    """A corpus, tokenizer or dataset file is missing or does not fit the configuration."""

    code = "MDS400"


class DamagedDatasetError(DataError):
    """Files of prepared data are missing, damaged or of another run of prepare-data."""

    code = "MDS419"


class DamagedIndexError(DataError):
    """The index of a run's samples is not what was written; it can be removed, and is then made anew."""

    code = "MDS414"


class CheckpointError(MythosError):
    """A checkpoint is missing, incomplete or belongs to another configuration."""

    code = "MDS500"


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint or of weights are missing, damaged or contradict each other."""

    code = "MDS507"


class TensorMismatchError(CheckpointError):
    """The tensors at hand are not those of the model: one is missing, unknown, or of another shape or type."""

    code = "MDS510"


class OutputError(MythosError):
    """An output cannot be written: another job writes there, or the disk does not take it."""

    code = "MDS600"


class ParallelError(MythosError):
    """The processes at hand cannot be laid out as asked, or the software they run does not support it."""

    code = "MDS700"


class NumericsError(MythosError):
    """The loss, a gradient or the state is not finite.

    Attributes:
        loss: of the step, where it is known.
        grad_norm: of the step, where the optimizer has moved.
    """

    code = "MDS800"

    def __init__(
        self, message: str, *, loss: float | None = None, grad_norm: float | None = None, code: str | None = None
    ):
        super().__init__(message, code=code)
        self.loss, self.grad_norm = loss, grad_norm


class LabError(MythosError):
    """A study's run failed, or there is too little to draw a conclusion from."""

    code = "MDS900"


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Puts the name of a file or folder before the message of a CheckpointError that does not say it."""
    try:
        yield
    except CheckpointError as error:
        if str(place) in str(error):
            raise
        raise type(error)([problem.after(f"{place}: ") for problem in error.problems]) from error


class ReportedElsewhere(MythosError):
    """Another rank failed and says why; this one only ends with the same exit code."""

    code = "MDS008"


class RankError(MythosError):
    """An error that this rank must report, though it may not be rank 0."""

    code = "MDS009"
