"""Errors that only some ranks meet (a file missing on one node) must end all ranks, with one message."""

from collections.abc import Callable
from typing import TypeVar

from mythos_ds.errors import MythosError, RankError, ReportedElsewhere
from mythos_ds.guard import user_error
from mythos_ds.parallel.groups import ParallelGroups

Result = TypeVar("Result")


def together(groups: ParallelGroups, action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; if it raises a MythosError or OSError anywhere, every rank raises.

    The lowest failing rank raises RankError with the message, the others ReportedElsewhere. Also a barrier, which waits
    for hours: no time limit of the device's collectives runs meanwhile.
    """
    failure: MythosError | OSError | None = None
    result: Result | None = None
    try:
        result = action()
    except (MythosError, OSError) as error:
        failure = error
    lowest = int(groups.agree([groups.rank if failure else groups.world_size], "min", patient=True)[0])
    if lowest == groups.world_size:
        return result  # type: ignore[return-value]
    if lowest == groups.rank:
        assert failure is not None
        mendable = user_error(failure) or MythosError(str(failure), code="MDS002")
        raise RankError(mendable.problems) from failure
    raise ReportedElsewhere(f"rank {lowest} failed")


def on_rank_zero(groups: ParallelGroups, action: Callable[[], object]) -> None:
    """Run `action` on rank 0 only while the others wait; its error ends every rank."""
    together(groups, action if groups.rank == 0 else lambda: None)
