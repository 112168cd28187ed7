"""JSON files of checkpoints and model folders whose checksums are right and whose content is not: one message with file
and key, in every tool."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mythos_ds.checkpoint import manifest, random_state
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.errors import CheckpointError
from mythos_ds.mains import run_tool
from mythos_ds.weights.checksums import seal
from mythos_ds.weights.writer import CHECKSUMS, checksum
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT
from tests.helpers.synthetic_checkpoint import write_synthetic

TOOLS = {
    name: load_main(f"tools/{name}_checkpoint.py") for name in ("merge", "reshard", "inspect", "verify", "convert")
} | {"average": load_main("tools/average_checkpoints.py")}
TINY = ROOT / "models" / "tiny"
VALUES: tuple[Any, ...] = (None, True, 0, -1, 3.5, 10**30, "x", "", [], [[]], {}, {"a": []}, ["x"] * 3, float("nan"))
Capture = pytest.CaptureFixture[str]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested JSON, itself first."""
    yield path
    if isinstance(content, list):
        content = dict(enumerate(content[:2]))
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from places(value, (*path, key))


def mutations(content: Any, seed: int, count: int) -> Iterator[tuple[str, Any]]:
    """Copies of JSON with one value replaced or left out, and what was done."""
    generator, every = random.Random(seed), list(places(content))
    for _ in range(count):
        path = generator.choice(every)
        value = generator.choice((*VALUES, "drop"))
        if not path:
            yield f"all = {value!r}", value
            continue
        changed = copy.deepcopy(content)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if value == "drop":
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        yield f"{'.'.join(map(str, path))} = {value!r}", changed


def sign(tag: Path) -> None:
    """Write the manifest that fits the files."""
    (tag / manifest.MANIFEST).unlink(missing_ok=True)
    records = {str(path.relative_to(tag)): asdict(manifest.digest(path)) for path in manifest.data_files(tag)}
    (tag / manifest.MANIFEST).write_text(json.dumps({"format": 1, "files": records}))


def call(tool: ModuleType, *arguments: object) -> int:
    try:
        return run_tool(tool.parser(), tool.work, [str(each) for each in arguments])
    except SystemExit as end:
        return int(str(end.code))


def check(capsys: Capture, what: str, path: Path, output: Path, codes: dict[str, int]) -> None:
    """Each tool either did its work or said, in one message, which file is wrong."""
    said = capsys.readouterr()
    for name, code in codes.items():
        assert code in (0, 1, 2), f"{what}: {name} ends with {code}"
    assert "Traceback" not in said.err, what
    if set(codes.values()) - {0}:
        assert path.name in said.err + said.out or str(path.parent) in said.err + said.out, f"{what}: {said.err}"
    assert 2 not in codes.values() or not output.exists(), what


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with a checkpoint of random values."""
    folder = tmp_path_factory.mktemp("run")
    resolved = resolve(load_config("tiny", ["parallel.ep_size=2", "training.micro_batch_size=1"]).config, 2)
    write_synthetic(resolved, folder / "checkpoints")
    (folder / "manifest.json").write_text('{"mine": 1}')
    return folder


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [manifest.STATE, manifest.MANIFEST])
def test_states_and_manifests_of_other_shapes(run: Path, tmp_path: Path, capsys: Capture, name: str, seed: int) -> None:
    folder, output = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, folder)
    tag = manifest.list_tags(folder / "checkpoints")[0]
    whole = json.loads((tag / name).read_text())
    for what, changed in mutations(whole, seed, 25):
        (tag / name).write_text(json.dumps(changed))
        if name == manifest.STATE:
            sign(tag)
        capsys.readouterr()
        codes = {
            "merge": call(TOOLS["merge"], tag, "--dry-run", "--output", output),
            "reshard": call(TOOLS["reshard"], tag, "--dry-run", "--output", output),
            "verify": call(TOOLS["verify"], tag),
        }
        check(capsys, f"{name}: {what}", tag / name, output, codes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["config.json", CHECKSUMS])
def test_model_folders_of_other_shapes(tmp_path: Path, capsys: Capture, name: str, seed: int) -> None:
    folder, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(TINY, folder)
    (folder / CHECKSUMS).write_text(
        json.dumps(
            {"format": 1, "job": "", "files": {"model.safetensors": asdict(checksum(TINY / "model.safetensors"))}}
        )
    )
    seal(folder, json.loads((TINY / "config.json").read_text()))
    whole = json.loads((folder / name).read_text())
    for what, changed in mutations(whole, seed, 12):
        (folder / name).write_text(json.dumps(changed))
        if name != CHECKSUMS:
            (folder / CHECKSUMS).unlink(missing_ok=True)
        capsys.readouterr()
        codes = {
            "convert": call(
                TOOLS["convert"], "--from", "mythos", "--to", "hf", "--input", folder, "--output", output, "--dry-run"
            ),
            "average": call(TOOLS["average"], folder, TINY, "--output", output, "--dry-run"),
            "verify": call(TOOLS["verify"], folder) if name == CHECKSUMS else 0,
        }
        check(capsys, f"{name}: {what}", folder / name, output, codes)


@pytest.mark.parametrize("seed", range(3))
def test_hugging_face_configurations_of_other_shapes(tmp_path: Path, capsys: Capture, seed: int) -> None:
    folder, output = tmp_path / "hf", tmp_path / "out"
    assert call(TOOLS["convert"], "--from", "mythos", "--to", "hf", "--input", TINY, "--output", folder) == 0
    (folder / CHECKSUMS).unlink()
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    for what, changed in mutations(whole, seed, 15):
        path.write_text(json.dumps(changed))
        capsys.readouterr()
        line = ("--from", "hf", "--to", "mythos", "--input", folder, "--output", output, "--dry-run")
        check(capsys, what, path, output, {"convert": call(TOOLS["convert"], *line)})


@pytest.mark.parametrize("seed", range(3))
def test_random_states_of_other_shapes(tmp_path: Path, seed: int) -> None:
    path, device = tmp_path / "random_state_rank_00000.json", torch.device("cpu")
    whole = random_state.capture(device)
    for what, changed in mutations(whole, seed, 60):
        path.write_text(json.dumps(changed))
        said = ""
        try:
            random_state.restore(path, device)
        except CheckpointError as error:
            said = str(error)
        assert not said or str(path) in said, what
    path.write_text(json.dumps(whole))
    random_state.restore(path, device)
