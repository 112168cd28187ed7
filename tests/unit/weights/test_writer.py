"""The streaming writer: planned files, bounded pieces, and the same bytes whenever it is killed."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mythos_ds.errors import CheckpointError
from mythos_ds.weights import writer
from mythos_ds.weights.reader import TensorFolder, TensorSpec
from mythos_ds.weights.writer import CHECKSUMS, plan_files, row_pieces, write_tensors


class Numbers:
    """Tensors whose values follow from their names; reading takes `delay` seconds."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], delay: float = 0.0, dtype: torch.dtype = torch.float32):
        self.shapes, self.delay, self.dtype = shapes, delay, dtype

    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(self.dtype, shape) for name, shape in self.shapes.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        time.sleep(self.delay)
        seed = list(self.shapes).index(name)
        whole = torch.randn(self.shapes[name], generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        return whole if rows is None else whole[rows]


class Broken(Numbers):
    def read(self, name: str, rows: slice | None = None) -> Tensor:
        values = super().read(name, rows)
        return values * float("nan") if name == "experts" else values


class Short(Numbers):
    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return super().read(name, rows)[:-1] if name == "b.weight" else super().read(name, rows)


SHAPES = {"a.weight": (40, 30), "b.weight": (500,), "experts": (6, 20, 10), "scalar": (), "c.weight": (7, 100)}


def checksums(folder: Path) -> dict:
    return json.loads((folder / CHECKSUMS).read_text())["files"]


@pytest.mark.parametrize(
    ("jobs", "dtype"),
    [(1, torch.float32), (1, torch.bfloat16), (1, torch.float8_e4m3fn), (1, torch.int64), (2, torch.float32)],
)
def test_what_is_written_is_what_was_read(tmp_path, monkeypatch, jobs, dtype):
    if jobs == 1:
        monkeypatch.setattr(writer, "PIECE_BYTES", 256)  # other processes have the default
    source = Numbers(SHAPES, dtype=dtype)
    write_tensors(source, tmp_path / "out", max_file_bytes=6000, jobs=jobs)
    found = TensorFolder(tmp_path / "out")
    assert set(found.specs()) == set(SHAPES)
    for name in SHAPES:
        read, expected = (kept.read(name).reshape(-1).view(torch.uint8) for kept in (found, source))
        assert torch.equal(read, expected), name
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == sorted(checksums(tmp_path / "out"))
    assert {name for file in files for name in load_file(file)} == set(SHAPES)


def test_files_are_filled_in_order_and_no_tensor_is_split():
    files = plan_files(Numbers(SHAPES).specs(), 6000)
    assert [list(file.tensors) for file in files] == [["a.weight"], ["b.weight"], ["experts", "scalar"], ["c.weight"]]
    assert [file.nbytes for file in files] == [4800, 2000, 4804, 2800]
    assert [file.name for file in plan_files(Numbers(SHAPES).specs())] == ["model.safetensors"]


def test_pieces_cover_every_row_once():
    assert row_pieces(TensorSpec(torch.float32, (10, 100)), 1200) == [
        slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)
    ]  # fmt: skip
    assert row_pieces(TensorSpec(torch.float32, (3, 100)), 100) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert row_pieces(TensorSpec(torch.float32, ()), 1) == [None]


def _write(folder: str) -> None:
    os.setsid()
    write_tensors(Numbers({f"t{i}": (50, 20) for i in range(12)}, delay=0.008), Path(folder), max_file_bytes=9000)


def test_killed_at_any_point_and_started_again_it_writes_the_same_bytes(tmp_path):
    shapes: dict[str, tuple[int, ...]] = {f"t{i}": (50, 20) for i in range(12)}
    write_tensors(Numbers(shapes, delay=0.008), tmp_path / "whole", max_file_bytes=9000)
    context = multiprocessing.get_context("fork")
    dice = random.Random(1)
    kills = 0
    for attempt in range(20):
        folder = tmp_path / f"killed_{attempt}"
        process = context.Process(target=_write, args=(str(folder),))
        process.start()
        time.sleep(dice.uniform(0.002, 0.09))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        kills += not (folder / CHECKSUMS).exists()
        write_tensors(Numbers(shapes, delay=0.008), folder, max_file_bytes=9000)
        assert checksums(folder) == checksums(tmp_path / "whole")
        leftovers = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert leftovers == []
    assert kills >= 15, "most kills must hit a conversion at work"


def test_finished_files_are_not_written_again(tmp_path):
    source = Numbers(SHAPES)
    write_tensors(source, tmp_path, max_file_bytes=6000)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    done: list[int] = []
    write_tensors(source, tmp_path, max_file_bytes=6000, progress=done.append)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == before
    assert sum(done) == sum(spec.nbytes for spec in source.specs().values())


def test_another_jobs_files_are_not_touched(tmp_path):
    write_tensors(Numbers(SHAPES), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="something else"):
        write_tensors(Numbers({"other": (3,)}), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_value_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="experts"):
        write_tensors(Broken(SHAPES), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_source_that_breaks_its_promise_is_caught(tmp_path):
    with pytest.raises(CheckpointError, match="announced"):
        write_tensors(Short(SHAPES), tmp_path)


def test_an_index_must_stay_in_its_folder_and_agree_with_the_files(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a file of the folder"):
        TensorFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {n: "model-00001-of-00001.safetensors" for n in ("a", "b")}}))
    with pytest.raises(CheckpointError, match="b is in the index or the files"):
        TensorFolder(tmp_path).specs()
