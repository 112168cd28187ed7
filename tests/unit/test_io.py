"""Reading JSON files: every fault one message with the file and the key; nothing converted."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from mythos_ds.errors import CheckpointError, DataError
from mythos_ds.io import parse_json, read_bytes, read_json


@dataclass(frozen=True)
class Record:
    """A shape with a member of each kind."""

    count: int
    names: dict[str, tuple[str, ...]]
    share: float = 1.0


def test_a_record_is_read_and_unknown_keys_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(b'\xef\xbb\xbf{"count": 3, "names": {"a": ["b", "c"]}, "share": 2, "later": null}')
    assert read_json(path, Record) == Record(3, {"a": ("b", "c")}, 2.0)
    assert read_json(path)["later"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 20_000 + b"]" * 20_000, "recursion limit"),
        (b"1" * 5000, "out of range"),
        (b"", "EOF"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"count": 1', "EOF"),
        (b"[]", "[] given"),
        (b'{"count": true, "names": {}}', "count: "),
        (b'{"count": 1.0, "names": {}}', "count: "),
        (b'{"count": "1", "names": {}}', "'1' given"),
        (b'{"count": 1, "names": {"a": ["b", 7]}}', "names.a.1: "),
        (b'{"count": 1}', "names: Field required"),
    ],
)
def test_what_is_not_of_the_shape_is_one_message_with_the_key(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text)
    with pytest.raises(DataError) as caught:
        read_json(path, Record, DataError)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "absent", Path("a" * 300), Path("a\0b")):
        with pytest.raises(CheckpointError, match=r"no regular file|not readable"):
            read_bytes(path)


def test_a_file_beyond_the_limit_is_refused_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"12345")
    assert read_bytes(tmp_path / "large", max_bytes=5) == b"12345"
    with pytest.raises(CheckpointError, match="5 bytes given"):
        read_bytes(tmp_path / "large", max_bytes=4)


def test_text_at_hand_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="line 7: "):
        parse_json("{", "line 7")
