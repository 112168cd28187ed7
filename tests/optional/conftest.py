"""What the optional tests of the exported model share."""

from tests.parity.conftest import tiny

__all__ = ["tiny"]
