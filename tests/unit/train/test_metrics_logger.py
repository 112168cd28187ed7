"""metrics.jsonl, TensorBoard, CSV and W&B hold every step once, wherever a run is killed and goes on."""

import csv
import json
import random
from collections import Counter

import pytest
from tensorboard.summary.writer import event_file_writer

from mythos_ds.config.schema import MonitorConfig
from mythos_ds.monitor.tensorboard import truncate_events
from mythos_ds.train.metrics_logger import MetricsLogger
from mythos_ds.train.run_directory import RunDirectory

TOTAL, LOG, SAVE, EVALUATE = 12, 2, 3, 4


@pytest.fixture(autouse=True)
def names_that_sort(monkeypatch):
    """Event files of one second are told apart by a counter of the process, whose number of digits may not change."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1_000_000))


class Killed(Exception):
    """A made end of a start."""


class Start:
    """One start of a run as the trainer makes it, killed after so many calls of the logger."""

    def __init__(self, run, step, calls):
        self.step, self.calls, self.saved = step, calls, []
        self.logger = MetricsLogger(run, MonitorConfig(log_interval=LOG, csv=True), True, step, TOTAL)

    def tick(self):
        self.calls -= 1
        if self.calls < 0:
            raise Killed

    def evaluate(self):
        self.tick()
        self.logger.evaluation(self.step, {1: 3.0, 4: 2.0})
        self.tick()
        self.logger.samples(self.step, [("a", "b")])

    def train(self):
        if self.step == 0:
            self.tick()
            self.logger.evaluation(0, {4: 9.0})
        while self.step < TOTAL:
            self.step += 1
            self.tick()
            if self.step % LOG == 0 or self.step in (1, TOTAL):
                self.logger.step(self.step, {"loss": 1.0 / self.step, "load": [1.0, 2.0]})
            if self.step == TOTAL:
                break
            if self.step % SAVE == 0:
                self.save()
            if self.step % EVALUATE == 0:
                self.evaluate()
        self.save()
        self.evaluate()

    def save(self):
        self.tick()
        self.saved.append(self.step)
        self.tick()
        self.logger.checkpoint(self.step, {"checkpoint/seconds": 1.0})


@pytest.mark.parametrize("seed", range(25))
def test_every_step_is_there_once_after_any_restart(tmp_path, seed):
    pick = random.Random(seed)
    run = RunDirectory(tmp_path / "run")
    checkpoints: list[int] = []
    starts: list[Start] = []
    for _ in range(pick.randint(1, 4)):
        # The newest checkpoint may be damaged: a start goes on from an older one.
        kept = checkpoints[: len(checkpoints) - pick.choice([0, 0, 1])]
        start = Start(run, kept[-1] if kept else 0, pick.randint(0, 45))
        starts.append(start)
        try:
            start.train()
        except Killed:
            _tear(run, pick)
        checkpoints = kept + [step for step in start.saved if step not in kept]
    for _ in range(2):  # to its end, and once more after it
        last = Start(run, checkpoints[-1] if checkpoints else 0, 1000)
        starts.append(last)
        last.train()
        checkpoints += [step for step in last.saved if step not in checkpoints]
    _check(run)
    for start in starts:
        start.logger.__exit__(None, None, None)
    _check(run)


def _tear(run, pick):
    """What a power cut leaves behind the last whole line."""
    if pick.random() < 0.5:
        with run.metrics.open("a") as file:
            file.write('{"step": 99, "lo')
        newest = max(run.tensorboard.glob("events*"), key=lambda path: path.stat().st_mtime)
        with newest.open("ab") as file:
            file.write(b"\x20\0\0\0\0\0\0\0torn")
        with run.csv.open("a") as file:
            file.write(pick.choice(["99,0.", '99,"', "7\n", "x,y\n"]))


def _check(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    points = Counter((line["step"], name) for line in lines for name in line if name != "step")
    assert set(points.values()) == {1}
    logged = {1, TOTAL, *range(LOG, TOTAL + 1, LOG)}
    assert {step for step, name in points if name == "loss"} == logged
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    with run.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in sorted({int(row["step"]) for row in rows})]
    cells = {(int(row["step"]), name): cell for row in rows for name, cell in row.items() if cell and name != "step"}
    assert {key for key in cells if key[1] == "load/1"} == {(step, "load/1") for step in logged}
    assert {key for key in cells if not key[1].startswith(("load", "checkpoint"))} == {
        key for key in points if key[1] != "load"
    }
    assert all(float(cells[step, "loss"]) == 1.0 / step for step in logged)
    for purge in (True, False):
        events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}, purge_orphaned_data=purge)
        events.Reload()
        for name in ("loss", "load/1", "validation/loss_at_4", "checkpoint/seconds"):
            steps = [event.step for event in events.Scalars(name)]
            assert len(steps) == len(set(steps)), (name, steps)
            wanted = {int(step) for step, key in points if key == name.split("/1")[0]}
            assert name == "checkpoint/seconds" or set(steps) == wanted, name
        samples = [event.step for event in events.Tensors("sample/0/text_summary")]
        assert len(samples) == len(set(samples))
        assert TOTAL in samples


def test_a_file_of_many_starts_is_mended(tmp_path):
    """What versions wrote that appended to the folder: the same steps again after each restart."""
    from torch.utils.tensorboard import SummaryWriter

    for start in (0, 3, 1):
        with SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=f".{start}") as writer:
            for step in range(start, 6):
                writer.add_scalar("loss", start, step)
    assert truncate_events(tmp_path / "tensorboard", 4) == {"loss"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(event.step for event in events.Scalars("loss")) == [0, 1, 2, 3, 4]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tensorboard").iterdir()}
    truncate_events(tmp_path / "tensorboard", 4)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "tensorboard").iterdir()}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "null\n",
        "[1]\n",
        '{"step": "x"}\n',
        '{"step": true, "loss": 1}\n',
        "[" * 100_000,
        '{"loss": 1}\n',
        "\udcff",
    ],
)
def test_what_is_no_line_of_metrics_is_dropped(tmp_path, text):
    run = RunDirectory(tmp_path)
    good = b'{"step": 1, "loss": 2.0}\n'
    run.metrics.write_bytes(good + text.encode(errors="surrogateescape"))
    MetricsLogger(run, MonitorConfig(tensorboard=False), True, 3, TOTAL).__exit__(None, None, None)
    assert run.metrics.read_bytes() == good
