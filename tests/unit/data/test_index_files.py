"""Damaged, exchanged and hostile index caches and token files: one message that names the file, and no code run."""

import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from mythos_ds.config.schema import DataConfig
from mythos_ds.data.batches import BatchStream
from mythos_ds.data.dataset_info import dataset_files
from mythos_ds.data.datasets import build_datasets, prepare_index_cache
from mythos_ds.data.parts import unfinished_folder
from mythos_ds.data.verification import data_faults
from mythos_ds.errors import DataError, RankError
from mythos_ds.weights.writer import checksum
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer

ARGUMENTS = {"seq_len": 32, "train_samples": 40, "valid_samples": 8, "seed": 5}


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of two datasets and the index of a blend of them."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = make_tokenizer(folder)
    for name, seed in (("a", 1), ("b", 2)):
        make_dataset(folder / name, tokenizer, make_texts(60, seed=seed))
    return folder, tokenizer


@pytest.fixture
def data(prepared, tmp_path):
    folder, tokenizer = prepared
    shutil.copytree(folder, tmp_path / "data")
    return tmp_path / "data", tokenizer


def config(folder, names="ab"):
    datasets = [{"prefix": str(folder / name), "weight": 1.0} for name in names]
    fields = {"datasets": datasets, "tokenizer": str(folder / "tokenizer.model"), "data_dir": str(folder)}
    return DataConfig.model_validate({**fields, "split": [80, 20, 0]})


def prepare(folder, tokenizer, names="ab"):
    return prepare_index_cache(config(folder, names), **ARGUMENTS, vocab_size=tokenizer.vocab_size)


def build(folder, tokenizer, names="ab"):
    return build_datasets(config(folder, names), **ARGUMENTS, vocab_size=tokenizer.vocab_size)


def object_array(path, mark):
    array = np.empty(1, dtype=object)
    array[0] = Evil(mark)
    np.save(path, array, allow_pickle=True)


def header(path, text):
    np.save(path, np.zeros(3, np.int32))
    path.write_bytes(path.read_bytes().replace(b"(3,)", text)[:400])


def other_links(path, mark):
    path.rename(mark.with_suffix(".moved"))
    path.symlink_to(mark.with_suffix(".moved"))


def hollow(path, mark):
    path.unlink()
    path.mkdir()


def pipe(path, mark):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "pickle": lambda path, mark: path.write_bytes(pickle.dumps(Evil(mark))),
    "object array": object_array,
    "structured": lambda path, mark: np.save(path, np.zeros(3, [("a", "i4"), ("b", "f8")])),
    "floats": lambda path, mark: np.save(path, np.zeros(3)),
    "text": lambda path, mark: np.save(path, np.array(["a", "b"])),
    "three dimensions": lambda path, mark: np.save(path, np.zeros((2, 2, 2), np.int32)),
    "a huge shape": lambda path, mark: header(path, b"(9999999999,)"),
    "a negative shape": lambda path, mark: header(path, b"(-3,)"),
    "no shape": lambda path, mark: header(path, b"(os,)"),
    "npz": lambda path, mark: path.write_bytes(b"PK\x03\x04" + bytes(200)),
    "empty": lambda path, mark: path.write_bytes(b""),
    "cut in its header": lambda path, mark: os.truncate(path, 90),
    "cut at its end": lambda path, mark: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path, mark: path.write_bytes(path.read_bytes() + b"x"),
    "named pipe": pipe,
    "link": other_links,
    "folder": hollow,
    "missing": lambda path, mark: path.unlink(),
}
KINDS = ("document_index", "sample_index", "shuffle_index", "blend-dataset", "blend-sample")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_was_written_is_named_and_not_unpickled(damage, kind, data, tmp_path):
    folder, tokenizer = data
    cache, mark = prepare(folder, tokenizer), tmp_path / "executed"
    path = sorted(cache.glob(f"*{kind}.npy"))[0]
    DAMAGES[damage](path, mark)
    for read in (prepare, build):
        with pytest.raises(DataError, match=r"remove the folder to have it made anew") as told:
            read(folder, tokenizer)
        assert path.name in str(told.value)
    assert not mark.exists()
    assert any(data_faults(folder, full=False).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_digest_does_not_let_a_pickle_in(kind, data, tmp_path):
    folder, tokenizer = data
    cache, mark = prepare(folder, tokenizer), tmp_path / "executed"
    for path in cache.glob(f"*{kind}.npy"):
        object_array(path, mark)
    forge(cache)
    for read in (prepare, build):
        with pytest.raises(DataError, match=r"not a plain array"):
            read(folder, tokenizer)
    assert not mark.exists()


@pytest.mark.parametrize("named", [False, True])
def test_files_that_the_mark_does_not_name_are_refused(named, data, tmp_path):
    folder, tokenizer = data
    cache, mark = prepare(folder, tokenizer), tmp_path / "executed"
    content = json.loads((cache / "complete.json").read_text())
    name = content["files"][0] if named else "planted.npy"
    object_array(cache / name, mark)
    if named:
        (cache / "complete.json").write_text(json.dumps({**content, "files": [], "written": {}}))
    for read in (prepare, build):
        with pytest.raises(DataError, match=rf"{name}: not one of those that complete.json names"):
            read(folder, tokenizer)
    assert any(name in fault for faults in data_faults(folder, full=False).values() for fault in faults)
    assert not mark.exists()


def test_an_index_without_its_mark_is_no_whole_one(data):
    folder, tokenizer = data
    (prepare(folder, tokenizer) / "complete.json").unlink()
    assert any("complete.json" in fault for faults in data_faults(folder, full=False).values() for fault in faults)


@pytest.mark.parametrize("given", [{}, {"bytes": "many", "sha256": 3}, {"sha256": "00"}])
def test_a_mark_that_says_too_little_of_a_file_is_a_fault(given, data):
    folder, tokenizer = data
    cache = prepare(folder, tokenizer)
    content = json.loads((cache / "complete.json").read_text())
    name = content["files"][0]
    assert content["written"][name] == {
        "bytes": (cache / name).stat().st_size,
        "sha256": hashlib.sha256((cache / name).read_bytes()).hexdigest(),
    }
    content["written"][name] = given
    (cache / "complete.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"is damaged: {name}: .* given, .* written"):
        prepare(folder, tokenizer)


def forge(cache):
    """Make the mark agree with what lies there."""
    content = json.loads((cache / "complete.json").read_text())
    found = {name: checksum(cache / name) for name in content["files"]}
    content["written"] = {name: {"bytes": each.size, "sha256": each.sha256} for name, each in found.items()}
    (cache / "complete.json").write_text(json.dumps(content))


@pytest.mark.parametrize("seed", range(12))
def test_numbers_that_point_elsewhere_are_refused_also_with_forged_digests(seed, data):
    folder, tokenizer = data
    cache, generator = prepare(folder, tokenizer), random.Random(seed)
    path = sorted(cache.glob("*.npy"))[seed % len(list(cache.glob("*.npy")))]
    array = np.load(path)
    flat = array.reshape(-1)
    bad = [1 << 14, (1 << 15) - 1, -1] if array.dtype.kind == "i" else [1 << 14]
    flat[generator.randrange(len(flat))] = generator.choice(bad)
    np.save(path, array)
    with pytest.raises(DataError, match=r"content is not what was written"):
        prepare(folder, tokenizer)
    forge(cache)
    with pytest.raises(DataError, match=r"is damaged"):
        prepare(folder, tokenizer)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"files": 3}', "[" * 5000, '{"files": ["../a"], "arguments": {}, "written": {}}', "\0"],
)
def test_a_damaged_mark_is_named(text, data):
    folder, tokenizer = data
    (prepare(folder, tokenizer) / "complete.json").write_text(text)
    for read in (prepare, build):
        with pytest.raises(DataError, match=r"complete\.json.*remove the folder"):
            read(folder, tokenizer)


def test_an_index_without_its_mark_is_named(data):
    folder, tokenizer = data
    (prepare(folder, tokenizer) / "complete.json").unlink()
    with pytest.raises(DataError, match=r"no complete\.json; remove the folder"):
        prepare(folder, tokenizer)


def flip(path, place, value):
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)


IDX_DAMAGES = {
    "magic": (0, b"X"), "version": (9, b"\x02"), "type": (17, b"\x07"), "type without a name": (17, b"\xff"),
    "count": (18, b"\x01"), "huge count": (18, b"\xff" * 8), "ends": (26, b"\x01"), "length 0": (34, bytes(4)),
    "negative length": (34, b"\xff" * 4), "huge length": (34, b"\xff\xff\xff\x7f"),
    "place": (34 + 60 * 4 + 8, b"\x05"), "end": (34 + 60 * 12 + 8, b"\x09"), "last end": (-8, b"\x01"),
}  # fmt: skip


@pytest.mark.parametrize("damage", IDX_DAMAGES)
def test_a_damaged_idx_of_the_right_size_is_named(damage, data):
    folder, tokenizer = data
    place, value = IDX_DAMAGES[damage]
    path = folder / "a.idx"
    flip(path, place % path.stat().st_size, value)
    with pytest.raises(DataError, match=r"a\.idx"):
        prepare(folder, tokenizer, "a")
    assert not prepared_index(folder)
    assert data_faults(folder / "a", full=False)[str(folder / "a")]


def prepared_index(folder):
    return list(folder.glob("index/*"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("made_before", [False, True])
def test_a_damaged_bin_of_the_right_size_is_never_trained_on(seed, made_before, data):
    """Any changed bytes: other ids of the vocabulary, and ids outside of it."""
    folder, tokenizer = data
    if made_before:
        prepare(folder, tokenizer, "a")
    generator, path = random.Random(seed), folder / "a.bin"
    place = generator.randrange(path.stat().st_size - 8)
    flip(path, place, bytes(byte ^ generator.randint(1, 255) for byte in path.read_bytes()[place : place + 4]))
    with pytest.raises(DataError, match=r"a\.bin.*prepare the data again"):
        prepare(folder, tokenizer, "a")
    assert data_faults(folder / "a.bin", full=True)[str(folder / "a")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_id_outside_the_vocabulary_that_a_batch_meets_is_one_message(num_workers, data):
    folder, tokenizer = data
    prepare(folder, tokenizer, "a")
    flip(folder / "a.bin", 0, b"\xff\xff" * 2000)  # after the check of process 0
    train = build(folder, tokenizer, "a").train
    stream = BatchStream(train, start_sample=0, micro_batch_size=4, dp_rank=0, dp_size=1, num_workers=num_workers)
    with pytest.raises(DataError, match=r"sample \d+: id 65535 given; allowed: 0 \.\. \d+.*verify") as told:
        list(stream)
    assert isinstance(told.value, RankError)  # also a rank other than 0 says so
    assert "Traceback" not in str(told.value)


def test_a_whole_set_has_no_faults(data):
    folder, tokenizer = data
    prepare(folder, tokenizer)
    for full in (False, True):
        found = data_faults(folder, full=full)
        assert len(found) == 3
        assert not any(found.values())
    assert data_faults(folder / "none", full=True) == {}


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "[" * 5000, '{"documents": "x"}', '{"documents": -1}', "\0", "{]"]
)
def test_a_damaged_sidecar_is_named(text, data):
    folder, tokenizer = data
    (folder / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json"):
        prepare(folder, tokenizer, "a")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/.."])
@pytest.mark.parametrize("work", [dataset_files, unfinished_folder])
def test_a_folder_is_no_prefix(work, name):
    with pytest.raises(DataError, match="a folder given; allowed: a prefix"):
        work(Path(name))


@pytest.mark.parametrize("ending", ["bin", "idx", "json"])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(ending, data):
    folder, tokenizer = data
    (folder / f"a.{ending}").unlink()
    os.mkfifo(folder / f"a.{ending}")
    with pytest.raises(DataError, match=rf"a\.{ending}"):
        prepare(folder, tokenizer, "a")
