"""Checkpoints that were damaged, cannot be written, or hold what they should not: found, named, and gone around."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos_ds.checkpoint import files
from mythos_ds.checkpoint.torch_files import to_host
from mythos_ds.checkpoint.trusted import load_trusted
from mythos_ds.errors import CheckpointError
from tests.distributed.reshard_cases import compare
from tests.helpers.distributed import run_distributed
from tests.helpers.pretrain import SMALL, metrics, run_pretrain, small_data


def _train(root: Path, data: list[str], name: str, *settings: str, flags: tuple[str, ...] = ()) -> Any:
    arguments = ["--config", "tiny.json", "--run-dir", str(root / name), *flags, *SMALL, *data]
    arguments += ["training.max_steps=6", "checkpoint.interval=2", "checkpoint.keep=9", *settings]
    return run_pretrain(arguments, nprocs=2, folder=root / f"{name}_logs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The same run with checkpoints written beside it, and while it waits."""
    root = tmp_path_factory.mktemp("faults")
    data = small_data(root)
    _train(root, data, "waiting").check()
    _train(root, data, "beside", "checkpoint.asynchronous=true").check()
    return root, data


def test_asynchronous_checkpoints_are_those_of_their_step(runs):
    root, _ = runs
    waiting, beside = (files.list_tags(root / name / "checkpoints") for name in ("waiting", "beside"))
    assert [tag.name for tag in waiting] == [tag.name for tag in beside] == [files.tag_name(n) for n in (6, 4, 2)]
    for one, two in zip(waiting, beside, strict=True):
        files.verify(two, 0, 1)
        assert compare(one, two) == []
    losses = [[line["loss"] for line in metrics(root / name) if "loss" in line] for name in ("waiting", "beside")]
    assert losses[0] == losses[1]


def test_training_goes_on_bitwise_from_an_asynchronous_checkpoint(runs):
    root, data = runs
    copied = root / "continued" / "checkpoints" / files.tag_name(4)
    shutil.copytree(root / "beside" / "checkpoints" / files.tag_name(4), copied)
    shutil.copy(root / "beside" / "manifest.json", root / "continued" / "manifest.json")
    _train(root, data, "continued").check()
    expected = {line["step"]: line["loss"] for line in metrics(root / "waiting") if "loss" in line}
    found = {line["step"]: line["loss"] for line in metrics(root / "continued") if "loss" in line}
    assert found == {step: expected[step] for step in (5, 6)}


def _flip(tag: Path) -> str:
    path = max(tag.glob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def _truncate(tag: Path) -> str:
    path = max(tag.glob("*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def _remove(tag: Path) -> str:
    path = max(tag.glob("*model_states.pt"))
    path.unlink()
    return path.name


def _empty_latest(tag: Path) -> str:
    (tag.parent / "latest").write_text("")
    return ""


_SLOW = pytest.mark.slow  # each starts two processes twice; test_checkpoint_files.py has the arithmetic


@pytest.mark.parametrize(
    "damage", [_flip, pytest.param(_truncate, marks=_SLOW), pytest.param(_remove, marks=_SLOW), _empty_latest]
)
def test_damage_is_named_and_the_good_checkpoint_before_it_used(damage: Callable[[Path], str], runs):
    root, data = runs
    name = damage.__name__
    for tag in (2, 4):
        source = root / "waiting" / "checkpoints" / files.tag_name(tag)
        shutil.copytree(source, root / name / "checkpoints" / files.tag_name(tag))
    shutil.copy(root / "waiting" / "manifest.json", root / name / "manifest.json")
    (root / name / "checkpoints" / "latest").write_text(files.tag_name(4))
    damaged = damage(root / name / "checkpoints" / files.tag_name(4))
    outputs = _train(root, data, name).check().outputs
    steps = [line["step"] for line in metrics(root / name) if "loss" in line]
    if damaged:
        assert any("skipping checkpoint step_00000004" in output and damaged in output for output in outputs)
    assert steps[0] == (3 if damaged else 5)
    expected = {line["step"]: line["loss"] for line in metrics(root / "waiting") if "loss" in line}
    assert all(line["loss"] == expected[line["step"]] for line in metrics(root / name) if "loss" in line)


class _Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_payload_in_a_shard_is_refused_and_not_executed(runs):
    root, data = runs
    tag = root / "payload" / "checkpoints" / files.tag_name(4)
    shutil.copytree(root / "waiting" / "checkpoints" / files.tag_name(4), tag)
    shutil.copy(root / "waiting" / "manifest.json", root / "payload" / "manifest.json")
    path = max(tag.glob("*optim_states.pt"))
    content = torch.load(path, weights_only=False)
    content["extra"] = _Payload(root / "executed")
    torch.save(content, path)
    manifest = json.loads((tag / files.MANIFEST).read_text())
    record = files.digest(path)
    manifest["files"][path.name] = {"size": record.size, "crc32": record.crc32}
    (tag / files.MANIFEST).write_text(json.dumps(manifest))
    finished = _train(root, data, "payload")
    assert set(finished.codes) == {2}
    lines = [line for output in finished.outputs for line in output.splitlines()]
    messages = [line for line in lines if "tensors and plain values" in line]
    assert len(messages) == 1
    assert path.name in messages[0]
    assert not (root / "executed").exists()
    with pytest.raises(CheckpointError, match="allow-pickle"):
        load_trusted(path)
    load_trusted(path, mapped=False, allow_pickle=True)
    assert (root / "executed").exists()


def test_a_snapshot_shares_nothing_with_what_it_was_taken_of():
    tensor = torch.arange(4.0)
    original = {"a": tensor, "b": [tensor[1:], {"c": (tensor, 3)}]}
    copied = to_host(original)
    tensor.zero_()
    assert copied["a"].tolist() == [0, 1, 2, 3]
    assert copied["b"][0].tolist() == [1, 2, 3]
    assert copied["b"][1]["c"][0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=_SLOW), True])
def test_a_full_disk_on_one_rank_ends_all_and_keeps_the_former_checkpoint(asynchronous, tmp_path):
    results = run_distributed(
        "tests.faults.checkpoint_fault_cases:full_disk", 2, 120.0, folder=str(tmp_path), asynchronous=asynchronous
    )
    for found in results:
        assert found["failed"], "every rank must learn of it"
        assert found["tags"] == [files.tag_name(1)]
        assert found["after"] == [files.tag_name(3), files.tag_name(1)]
    assert sum("No space left" in found["error"] for found in results) == 1


def test_every_so_many_steps_stay_for_good(tmp_path):
    for step in range(1, 8):
        (tmp_path / files.tag_name(step)).mkdir()
    files.prune(tmp_path, 2, 7, keep_every=3)
    assert [files.tag_step(tag) for tag in files.list_tags(tmp_path)] == [7, 6, 3]
