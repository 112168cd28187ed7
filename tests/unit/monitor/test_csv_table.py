"""The table of a run: one row a step, whatever was logged when, and whatever lies in its place."""

import csv
import json
from pathlib import Path

import pytest

from mythos_ds.monitor.csv_table import CsvWriter


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_calls_for_one_step_make_one_row_and_late_names_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = CsvWriter(path, tmp_path / "metrics.jsonl")
    table.write(0, {"first": 9.5})
    table.write(1, {"loss": 3.0, "load": [1.0, 2.0]})
    table.write(2, {"loss": float("nan"), "load": [1.0, 2.0], "n_loops": 4})
    table.write(2, {"first": 1.25, "n_loops": 5})
    assert path.read_text() == (
        "step,first,loss,load/0,load/1,n_loops\n0,9.5,,,,\n1,,3.0,1.0,2.0,\n2,1.25,,1.0,2.0,4\n"
    )
    table.write(3, {"loss": 1e-30})
    table.write(3, {"first": 2.0, "load": [0.5, 0.25]})
    table.write(4, {"loss": 1.0})
    table.text(4, "sample", "a\nb")
    table.close()
    assert [row["step"] for row in rows(path)] == ["0", "1", "2", "3", "4"]
    assert rows(path)[3] == {"step": "3", "first": "2.0", "loss": "1e-30", "load/0": "0.5", "load/1": "0.25",
                             "n_loops": ""}  # fmt: skip


@pytest.mark.parametrize(
    "former", [b"", b"step,loss\n1,3.0\n2,2", b"\xff\0\n\n1,2\n", b"step\n" + b"9" * 200_000 + b"\n1"]
)
def test_a_table_that_is_torn_or_was_not_there_is_filled_from_the_record(tmp_path: Path, former: bytes) -> None:
    path, record = tmp_path / "metrics.csv", tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "load": [1, None]}, {"step": 2, "validation": 2.5}]
    record.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "loss": 1.0}]))
    if former:
        path.write_bytes(former)
    table = CsvWriter(path, record, 2)
    table.write(2, {"validation": 7.0, "seconds": 0.5})
    table.write(4, {"loss": 0.5})
    table.close()
    found = [{name: cell for name, cell in row.items() if cell} for row in rows(path)]
    assert found == [
        {"step": "1", "loss": "3.0"},
        {"step": "2", "loss": "2.0", "load/0": "1", "validation": "2.5", "seconds": "0.5"},
        {"step": "4", "loss": "0.5"},
    ]


def test_what_a_reader_sees_between_two_writes_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = CsvWriter(path, tmp_path / "metrics.jsonl")
    for step in range(1, 30):
        table.write(step, {"loss": 1.0 / step})
        if step % 7 == 0:
            table.write(step, {"validation": 2.0 / step})
        assert path.read_text().endswith("\n")
        assert [int(row["step"]) for row in rows(path)] == list(range(1, step + 1))
    table.close()
