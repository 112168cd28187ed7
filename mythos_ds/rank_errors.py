"""How ranks that failed together, or because another one did, tell who reports it. No torch."""

from mythos_ds.errors import MythosError


class ReportedElsewhere(MythosError):
    """Another rank failed and says why; this one only ends with the same exit code."""


class RankError(MythosError):
    """An error that this rank must report, though it may not be rank 0."""
