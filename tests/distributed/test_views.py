"""A killed run that goes on: its table and its W&B run have every step once, from rank 0 only, and hold no key."""

import csv
from pathlib import Path

import pytest

from tests.helpers.pretrain import SMALL, Pretrain, metrics, run_pretrain, small_data

KEY = "0123456789abcdef" * 2 + "01234567"
STEPS = 8


@pytest.mark.slow
def test_a_killed_run_is_one_table_and_one_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = tmp_path / "run"
    views = ["monitor.csv=true", "monitor.wandb=looped", "checkpoint.interval=2", f"training.max_steps={STEPS}"]
    arguments = ["--config", "tiny.json", "--run-dir", str(run), *SMALL, *small_data(tmp_path), *views]
    with Pretrain(arguments, nprocs=2, folder=tmp_path) as first:
        first.wait_until(lambda: any(line["step"] >= 4 for line in metrics(run)), 240)
    finished = run_pretrain(arguments, nprocs=2, folder=tmp_path).check()
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, STEPS + 1))
    losses = {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}
    assert {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]} == losses
    starts = list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(starts) == 2
    assert len({path.name for path in starts}) == 1
    assert KEY not in "".join(finished.outputs) + first.output()
    assert [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []
