"""Outputs of the tools where links lie in wait, where the disk is full, and where another job is at work."""

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mythos_ds import io, output_lock
from mythos_ds.errors import OutputError
from mythos_ds.io import copy_file, new_file, real_folder, write_atomic, write_json
from mythos_ds.output_lock import locked_output
from mythos_ds.weights import model_folder, writer
from tests.torture.jobs import Job, differences, make_jobs, tree
from tests.torture.trials import Torture

NAMES = ("merge fp32", "convert hf", "convert fp8", "average", "reshard")
PLANTED = (
    "model.safetensors", ".model.safetensors.tmp", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    "config.json", ".config.json.checked", "checksums.json", "README.md", "generation_config.json",
    "configuration_mythos.py", "manifest.json", "special_tokens_map.json",
)  # fmt: skip
FOLDERS = (".written", "checkpoints/.partial_step_00000001", "additional_chat_templates")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> Torture:
    """The jobs, and what each writes when left alone."""
    folder = tmp_path_factory.mktemp("torture")
    return Torture(folder / "trials", make_jobs(folder / "inputs"))


@pytest.fixture(scope="module")
def jobs(torture: Torture) -> dict[str, Job]:
    """By name."""
    return torture.jobs


@pytest.fixture(scope="module")
def whole(jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What each job writes."""
    found = {}
    for name in NAMES:
        place = tmp_path_factory.mktemp("whole")
        assert jobs[name].run(place) == 0
        found[name] = tree(place)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_link_at_an_output_is_replaced_or_refused_and_never_followed(
    jobs: dict[str, Job], whole: dict[str, dict[str, str]], tmp_path: Path, name: str
) -> None:
    ours = [planted for planted in PLANTED if planted.startswith(".") or f"out/{planted}" in whole[name]]
    for number, planted in enumerate((*ours, *FOLDERS)):
        place, victim = tmp_path / f"place_{number}", tmp_path / f"victim_{number}"
        link = place / "out" / planted
        link.parent.mkdir(parents=True)
        if planted in FOLDERS:
            victim.mkdir()
        else:
            victim.write_text("precious")
        link.symlink_to(victim)
        code = jobs[name].run(place)
        assert code in (0, 2), planted
        assert (victim.read_text() if victim.is_file() else list(victim.iterdir())) in ("precious", []), planted
        if code == 0:  # done, whatever stands beside that is not ours
            others = {f"out/{planted}", "out/checkpoints", "out/checksums.json"}
            found = {path: digest for path, digest in tree(place).items() if path not in others}
            expected = {path: digest for path, digest in whole[name].items() if path not in others}
            assert not differences(found, expected), planted
        else:
            assert link.is_symlink(), planted


class Disk:
    """A disk that takes so many bytes of new files."""

    def __init__(self, room: int):
        self.room = room
        self._open = io.open_new

    @contextmanager
    def open_new(self, path: Path) -> Iterator[Any]:
        with self._open(path) as file:
            self._file = file
            yield self

    def write(self, data: Any) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(1))
def test_a_full_disk_is_one_message_and_a_rerun_goes_on(
    jobs: dict[str, Job],
    whole: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    name: str,
    seed: int,
) -> None:
    generator, room = random.Random(f"{name}{seed}"), 8_500_000 if "fp32" in name or "reshard" in name else 4_200_000
    for number in range(4):
        place = tmp_path / str(number)
        place.mkdir()
        disk = Disk(int(room * generator.random() ** 2))
        with monkeypatch.context() as patch:
            for module in (io, writer, model_folder, output_lock):
                patch.setattr(module, "open_new", disk.open_new)
            capsys.readouterr()
            code = jobs[name].run(place)
        said = capsys.readouterr().err
        if disk.room < 0:
            assert code == 2
            assert "No space left" in said
            assert str(place / "out") in said
            assert "Traceback" not in said
            assert not [path for path in tree(place) if ".mythos_ds" in path]
        assert jobs[name].run(place) == 0
        assert not differences(tree(place), whole[name])


def test_a_full_disk_keeps_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(io, "open_new", Disk(3).open_new)
    for write in (lambda: write_json(path, {"new": 2}), lambda: write_atomic(path, "new" * 9)):
        with pytest.raises(OutputError, match=r"state\.json: not written \(No space left.*what was there before"):
            write()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"]


def test_what_is_read_is_not_blamed_on_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), new_file(tmp_path / "new"):
        (tmp_path / "elsewhere" / "deep" / "absent").read_text()
    assert not list(tmp_path.iterdir())


def test_files_are_never_written_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for number, write in enumerate((lambda path: write_atomic(path, "x"), lambda path: copy_file(victim, path))):
        for target in (victim, tmp_path / "nowhere", Path("/dev/null")):
            link = tmp_path / f"link_{number}"
            link.unlink(missing_ok=True)
            link.symlink_to(target)
            write(link)
            assert not link.is_symlink()
    os.link(victim, tmp_path / "second_name")
    write_atomic(tmp_path / "second_name", "x")
    assert victim.read_text() == "precious"
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="is a link"):
        real_folder(tmp_path / "folder")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        write_atomic(tmp_path / "there", "x")


@pytest.mark.parametrize("name", NAMES)
def test_a_job_that_finds_another_at_work_writes_nothing(
    jobs: dict[str, Job], tmp_path: Path, capsys: Capture, name: str
) -> None:
    with locked_output(tmp_path / "out", "another job"):
        before = tree(tmp_path)
        assert jobs[name].run(tmp_path) == 2
        said = capsys.readouterr().err
        told = (str(os.getpid()), os.uname().nodename, "another job", str(tmp_path / "out"))
        assert all(part in said for part in told)
        assert tree(tmp_path) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "pair",
    [
        ("merge fp32", "merge bf16"),
        ("convert hf", "convert fp8"),
        ("reshard", "reshard large"),
        ("average", "merge fp32"),
        ("prepare a", "prepare b"),
    ],
    ids=" and ".join,
)
def test_of_two_jobs_one_writes_and_one_is_refused(torture: Torture, pair: tuple[str, str]) -> None:
    trial = torture.pair(*pair, random.Random(0))
    assert trial.faults == [], trial.what


@pytest.mark.parametrize("name", ["merge fp32", "convert hf", "reshard", "average", "prepare a"])
def test_a_killed_job_goes_on_and_nothing_is_left(torture: Torture, name: str) -> None:
    for seed in range(2):
        trial = torture.kill(name, random.Random(seed))
        assert trial.faults == [], trial.what


def test_what_a_killed_reshard_left_is_not_taken_for_the_users(torture: Torture) -> None:
    """Neither by one that cuts files elsewhere: it begins anew, and leaves nothing of the other."""
    expected = torture.undisturbed("reshard large").files
    changes = torture.undisturbed("reshard").changes
    place = torture.scratch / "other"
    for share in (0.05, 0.3, 0.6, 0.9):
        place.mkdir()
        torture.kill_at("reshard", place, int(share * changes))
        assert torture.jobs["reshard large"].run(place) == 0
        assert not differences(tree(place), expected)
        shutil.rmtree(place)


def test_a_reshard_that_was_killed_in_its_third_kind_goes_on(torture: Torture) -> None:
    known = torture.undisturbed("reshard")
    place = torture.scratch / "third"
    for at in range(known.changes // 2, known.changes * 9 // 10, known.changes // 8):
        place.mkdir()
        torture.kill_at("reshard", place, at)
        assert torture.jobs["reshard"].run(place) == 0
        assert not differences(tree(place), known.files)
        shutil.rmtree(place)
