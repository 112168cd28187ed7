"""What a chat template, which comes with somebody's tokenizer, may take: time, memory, and the size of numbers.

Jinja's sandbox bounds what a template reaches, not what it costs: `{{ 'a' * 3000000000 }}` is three gigabytes, and
`{{ 9 ** (9 ** 9) }}` days in one operation that nothing interrupts.
"""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

_MOST_BITS = 4096
"""Of a number: multiplying larger ones again and again takes ever longer, without a place to stop at."""
_ALONE = threading.RLock()
"""The limit of memory is the whole process's: two threads would each put the other's back."""


class OverLimit(Exception):
    """A template takes more than it may."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox in which numbers stay small. Raises SecurityError where one would not."""

    intercepted_binops = frozenset(("*", "**", "/", "//", "%"))

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        rounded: Any = self.filters["round"]
        whole: Any = self.filters["int"]
        divides: Any = self.tests["divisibleby"]

        def bounded_round(value: Any, precision: int = 0, method: Any = "common") -> Any:
            _check(abs(precision) * 4)  # 10 ** precision is computed
            return rounded(value, precision, method)

        def bounded_int(*args: Any, **kwargs: Any) -> Any:
            made = whole(*args, **kwargs)
            _check(made.bit_length())
            return made

        def bounded_divides(value: int, num: int) -> Any:
            for each in (value, num):
                _check(each.bit_length() if isinstance(each, int) else 0)
            return divides(value, num)

        self.filters |= {"round": bounded_round, "int": bounded_int}
        self.tests["divisibleby"] = bounded_divides

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, which is not computed where it, or a number that is given, is too large."""
        bits, others = (each.bit_length() if isinstance(each, int) else 0 for each in (left, right))
        if isinstance(left, int) and isinstance(right, int):
            _check({"*": bits + others, "**": bits * abs(right)}.get(operator, max(bits, others)))
        return super().call_binop(context, operator, left, right)


def _check(bits: int) -> None:
    if bits > _MOST_BITS:
        raise SecurityError(f"a number of {bits:,} bits; allowed: {_MOST_BITS:,}")


def bound_transformers() -> None:
    """Let transformers render every chat template of this process in a BoundedEnvironment."""
    from transformers.utils import chat_template_utils as theirs

    if theirs.ImmutableSandboxedEnvironment is not BoundedEnvironment:
        theirs.ImmutableSandboxedEnvironment = BoundedEnvironment  # type: ignore[misc]


@contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """Raises OverLimit where the block takes more memory than this beyond what the process has. The limit is the whole
    process's: other threads, and children that start meanwhile, have it too. None where the system does not say what
    the process has."""
    with _ALONE:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        try:
            taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            taken = None
        given = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
        try:
            if taken is not None:
                resource.setrlimit(resource.RLIMIT_AS, (min([taken + nbytes, *given]), hard))
            yield
        except MemoryError:
            raise OverLimit(f"it takes more than {nbytes / (1 << 30):.3g} GiB of memory for a conversation") from None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OverLimit where the block takes longer, in processor time, the system's for it included; in the main
    thread, where alone that is possible, and between two operations of Python."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise OverLimit(f"it did not come to an end in {seconds:g} s")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
