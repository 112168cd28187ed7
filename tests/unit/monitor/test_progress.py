"""Bars of tools."""

import pytest

from mythos_ds.errors import OutputError
from mythos_ds.monitor.progress import byte_progress


def test_a_bar_is_shown_from_the_first_bytes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused before any are written shows none."""
    with pytest.raises(OutputError), byte_progress("merging", 100):
        raise OutputError("it is another's")
    assert capsys.readouterr().err == ""
    with byte_progress("merging", 100) as add:
        add(40)
        add(60)
    assert "merging" in capsys.readouterr().err
