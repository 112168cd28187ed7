"""What the checks do on a GPU alone, as far as it can be tried without one."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos_ds.bench.acceptance import Probe
from mythos_ds.config.resolve import resolve
from tests.gpu.benchmarks import training_run
from tests.gpu.model_checks import counted_syncs
from tests.gpu.ranks import check_order


@pytest.mark.parametrize(("micro", "checkpointing"), [(1, "loop"), (2, "loop"), (4, "none")])
def test_the_runs_of_a_gpu_resolve(micro: int, checkpointing: str, tmp_path: Path) -> None:
    resolved = resolve(training_run(Probe("cuda", tmp_path, lambda entry: None), micro, checkpointing), 1)
    assert (resolved.ep_size, resolved.gradient_accumulation_steps) == (1, 1)
    assert resolved.config.training.seq_len == 4096


def test_waits_are_counted_without_the_notice_of_the_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_mode(mode: str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all ...", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with counted_syncs() as waits:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
    assert waits == ["called a synchronizing CUDA operation"]


@pytest.mark.parametrize(("dtype", "wrong"), [("torch.uint8", 0), ("torch.float32", 2)])
def test_tensors_of_the_host_are_found_and_pickled_objects_are_none(dtype: str, wrong: int, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    entry = {"group": [0, 1], "kind": "all_gather", "numel": 5000, "dtype": dtype, "device": "cpu", "peer": None}
    check_order(Probe("cuda", tmp_path, found.append), [[entry], [entry]], "two ranks")
    numbers = {each["number"]["name"]: each["number"] for each in found}
    assert numbers["two ranks: larger tensors that are not on the device"]["value"] == wrong
