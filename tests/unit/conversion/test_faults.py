"""Checkpoints and folders that are not what they seem: nothing wrong is written, nothing of another run is touched."""

import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mythos_ds.checkpoint import manifest
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.conversion.average import similarity
from mythos_ds.io import write_json
from mythos_ds.mains import run_tool
from mythos_ds.weights.reader import TensorSpec
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT
from tests.helpers.synthetic_checkpoint import write_synthetic

average_checkpoints = load_main("tools/average_checkpoints.py")
convert_checkpoint = load_main("tools/convert_checkpoint.py")
inspect_checkpoint = load_main("tools/inspect_checkpoint.py")
merge_checkpoint = load_main("tools/merge_checkpoint.py")
reshard_checkpoint = load_main("tools/reshard_checkpoint.py")
verify_checkpoint = load_main("tools/verify_checkpoint.py")

TINY = ROOT / "models" / "tiny"
Capture = pytest.CaptureFixture[str]


def call(tool: ModuleType, *arguments: object) -> int:
    try:
        return run_tool(tool.parser(), tool.work, [str(each) for each in arguments])
    except SystemExit as end:
        return int(str(end.code))


def refused(capsys: Capture, tool: ModuleType, *arguments: object) -> str:
    """The one line with which a tool refuses."""
    capsys.readouterr()
    assert call(tool, *arguments) == 2
    bars = "merging", "resharding", "converting", "checking"
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(bars)]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with a checkpoint of random values."""
    resolved = resolve(load_config("tiny", ["parallel.ep_size=2", "training.micro_batch_size=1"]).config, 2)
    write_synthetic(resolved, tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "manifest.json").write_text('{"mine": 1}')
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return manifest.list_tags(run / "checkpoints")[0]


def seal(tag: Path) -> None:
    """A manifest for the files as they are."""
    records = {str(path.relative_to(tag)): manifest.digest(path) for path in manifest.data_files(tag)}
    content = {name: {"size": record.size, "crc32": record.crc32} for name, record in records.items()}
    write_json(tag / manifest.MANIFEST, {"format": 1, "files": content})


def alter(tag: Path) -> None:
    """Other values in the checkpoint of the same name."""
    file = sorted(tag.glob("*optim_states.pt"))[0]
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["fp32_flat_groups"][0].add_(1.0)
    torch.save(content, file)
    seal(tag)


def test_a_merge_does_not_go_on_with_another_checkpoint_of_the_same_name(run: Path, capsys: Capture) -> None:
    assert call(merge_checkpoint, run, "--output", run.parent / "merged") == 0
    assert call(merge_checkpoint, run, "--output", run.parent / "merged", "--jobs", 2) == 0
    before = load_file(run.parent / "merged" / "model.safetensors")
    alter(newest(run))
    assert "something else" in refused(capsys, merge_checkpoint, run, "--output", run.parent / "merged")
    assert call(merge_checkpoint, run, "--output", run.parent / "again") == 0
    after = load_file(run.parent / "again" / "model.safetensors")
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_resharding_touches_no_other_run(run: Path, capsys: Capture) -> None:
    other = run.parent / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"theirs": 2}')
    assert "another run's" in refused(capsys, reshard_checkpoint, run, "--output", other)
    assert (other / "manifest.json").read_text() == '{"theirs": 2}'
    assert "holds checkpoints" in refused(capsys, reshard_checkpoint, run, "--output", run)
    alone = run.parent / "alone" / newest(run).name
    shutil.copytree(newest(run), alone)
    assert "two folders above" in refused(capsys, reshard_checkpoint, alone, "--output", run.parent / "new")
    assert not (run.parent / "new").exists()
    assert call(reshard_checkpoint, run, "--output", run.parent / "new") == 0
    assert json.loads((run.parent / "new" / "manifest.json").read_text()) == {"mine": 1}


def test_a_router_that_is_missing_is_not_made_up(tmp_path: Path, capsys: Capture) -> None:
    assert call(convert_checkpoint, "--from", "mythos", "--to", "hf", "--input", TINY, "--output", tmp_path / "hf") == 0
    weights = tmp_path / "hf" / "model.safetensors"
    tensors = {name: value for name, value in load_file(weights).items() if "correction_bias" not in name}
    save_file(tensors, weights, {"format": "pt"})
    (tmp_path / "hf" / "checksums.json").unlink()
    arguments = ("--from", "hf", "--to", "mythos", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    assert "not in the given weights" in refused(capsys, convert_checkpoint, *arguments)


def test_a_latest_of_other_bytes_is_a_fault_and_no_obstacle(run: Path, capsys: Capture) -> None:
    (run / "checkpoints" / "latest").write_bytes(b"\xff\xfe\x00")
    assert call(verify_checkpoint, run) == 1
    assert "which is no checkpoint" in capsys.readouterr().out
    assert "no checkpoint" not in manifest.read_latest(run / "checkpoints")
    assert call(merge_checkpoint, run, "--output", run.parent / "merged") == 0


def test_lineage_is_judged_from_a_bounded_part() -> None:
    class Stack:
        def __init__(self, seed: int):
            self.seed, self.most = seed, 0

        def specs(self) -> dict[str, TensorSpec]:
            return {"w": TensorSpec(torch.float32, (64, 4_000_000)), "v": TensorSpec(torch.float32, (9, 3))}

        def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
            assert rows is not None
            shape = rows.stop - rows.start, *self.specs()[name].shape[1:]
            self.most = max(self.most, 4 * shape[0] * shape[1])
            return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    one, same, other = Stack(0), Stack(0), Stack(1)
    assert similarity(one, same) == pytest.approx(1.0)
    assert similarity(one, other) < 0.01
    assert one.most <= 1 << 25


def test_verification_sees_the_configuration_and_a_rerun_mends_bits(run: Path, capsys: Capture) -> None:
    merged = run.parent / "merged"
    assert call(merge_checkpoint, run, "--output", merged) == 0
    assert call(verify_checkpoint, merged) == 0
    weights, config = merged / "model.safetensors", merged / "config.json"
    good, text = weights.read_bytes(), config.read_text()
    config.write_text(text.replace('"dim": 128', '"dim": 256'))
    assert call(verify_checkpoint, merged) == 1
    config.unlink()
    assert call(verify_checkpoint, merged) == 1
    config.write_text(text)
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert call(verify_checkpoint, merged) == 1
    assert "config.json: missing" in capsys.readouterr().out
    arguments = ("--from", "mythos", "--to", "hf", "--input", merged, "--output", run.parent / "hf")
    assert "not what was written" in refused(capsys, convert_checkpoint, *arguments)
    assert call(merge_checkpoint, run, "--output", merged) == 0
    assert weights.read_bytes() == good
    assert call(verify_checkpoint, merged) == 0


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("jobs", [1, 2])
def test_pickles_are_executed_where_that_is_asked_for_and_nowhere_else(run: Path, capsys: Capture, jobs: int) -> None:
    file, proof = sorted(newest(run).glob("*optim_states.pt"))[0], run.parent / "proof"
    content = torch.load(file, weights_only=False)
    torch.save({**content, "more": Payload(proof)}, file)
    seal(newest(run))
    for tool, arguments in (
        (merge_checkpoint, ("--output", run.parent / "merged")),
        (reshard_checkpoint, ("--output", run.parent / "portable")),
        (inspect_checkpoint, ()),
    ):
        assert "--allow-pickle" in refused(capsys, tool, run, *arguments)
    assert not proof.exists()
    flags = ("--allow-pickle", "--max-file-bytes", 10**6, "--jobs", jobs)
    torch.save({**content, "more": Harmless()}, file)
    seal(newest(run))
    assert call(merge_checkpoint, run, "--output", run.parent / "merged", *flags) == 0


class Harmless:
    """Not a plain value."""


def test_disk_errors_are_one_line(run: Path, capsys: Capture) -> None:
    (run.parent / "file").write_text("x")
    for tool in (merge_checkpoint, reshard_checkpoint):
        assert "which is a file" in refused(capsys, tool, run, "--output", run.parent / "file")
        assert "/proc" in refused(capsys, tool, run, "--output", "/proc/nothing/here")
    inside = run / "checkpoints" / "merged"
    for wrong in (run, run / "checkpoints", inside, newest(run)):
        assert "is a run or lies in its checkpoints" in refused(capsys, merge_checkpoint, run, "--output", wrong)
    assert call(merge_checkpoint, run, "--output", run / "merged") == 0
    same = TINY.parent / "." / "tiny"
    assert "which is averaged" in refused(capsys, average_checkpoints, TINY, TINY, "--output", same)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"format": 1}', "not a model folder"),
        ("config.json", '{"format": 1, "model": {}, "facts": []}', "not a model folder"),
        ("config.json", None, "model.n_heads"),
        ("tokenizer.model", "x", "no sentencepiece model"),
        ("model.safetensors.index.json", "[1]", "no weight_map"),
    ],
)
def test_damaged_folders_are_named(
    tmp_path: Path, capsys: Capture, name: str, content: str | None, message: str
) -> None:
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    given = (folder / "config.json").read_text().replace('"n_heads": 4', '"n_heads": "four"')
    (folder / name).write_text(given if content is None else content)
    arguments = ("--from", "mythos", "--to", "hf", "--input", folder, "--output", tmp_path / "hf")
    assert message in refused(capsys, convert_checkpoint, *arguments)
    assert not (tmp_path / "hf").exists()


def test_options_without_effect_are_errors(run: Path, capsys: Capture) -> None:
    to_hf = ("--from", "mythos", "--to", "hf", "--input", TINY, "--output", run.parent / "hf")
    assert "--evaluate" in refused(capsys, convert_checkpoint, *to_hf, "--evaluate", "--dry-run")
    for tool in (merge_checkpoint, reshard_checkpoint):
        assert "--bandwidth" in refused(capsys, tool, run, "--output", run.parent / "m", "--bandwidth", 1e9)
    for count in (0, -3):
        assert f"given {count}" in refused(
            capsys, merge_checkpoint, "--config", "tiny", "--processes", count, "--dry-run"
        )
    other = run.parent / "SPM"
    other.write_text("not a tokenizer")
    assert "no sentencepiece model" in refused(
        capsys, merge_checkpoint, run, "--output", run.parent / "m", "--tokenizer", other
    )
    assert not (run.parent / "m").exists()
