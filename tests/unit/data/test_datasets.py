"""Samples of a run: packing, positions, split, blend, index cache, checks."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from mythos_ds.config.schema import DataConfig
from mythos_ds.data.datasets import (
    TokenDatasets,
    build_datasets,
    check_sources,
    document_positions,
    prepare_index_cache,
)
from mythos_ds.errors import DataError
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer

SEQ, TRAIN, VALID = 64, 300, 20


class Workshop:
    """Two datasets of one tokenizer whose words can be told apart."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = make_tokenizer(folder)
        self.texts = {"a": make_texts(200, seed=1), "b": [t.upper() for t in make_texts(150, seed=2)]}
        for name, texts in self.texts.items():
            make_dataset(folder / name, self.tokenizer, texts)

    def config(self, data_dir, *weighted, **options):
        weighted = weighted or (("a", 1.0),)
        datasets = [{"prefix": str(self.folder / name), "weight": weight} for name, weight in weighted]
        fields = {"datasets": datasets, "tokenizer": str(self.tokenizer.path), "data_dir": str(data_dir)}
        return DataConfig.model_validate({**fields, **options})

    def arguments(self, **options):
        vocab_size = self.tokenizer.vocab_size
        fields = {
            "seq_len": SEQ,
            "train_samples": TRAIN,
            "valid_samples": VALID,
            "seed": 5,
            "vocab_size": vocab_size,
        }
        return {**fields, **options}

    def open(self, config, **options) -> TokenDatasets:
        prepare_index_cache(config, **self.arguments(**options))
        return build_datasets(config, **self.arguments(**options))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


def tokens_of(dataset):
    return np.stack([dataset[i]["tokens"] for i in range(len(dataset))])


def test_items(workshop, tmp_path):
    data = workshop.open(workshop.config(tmp_path))
    assert (len(data.train), len(data.valid)) == (TRAIN, VALID)
    for i in range(TRAIN):
        item = data.train[i]
        assert set(item) == {"tokens", "targets", "positions"}
        assert all(array.dtype == np.int64 and array.shape == (SEQ,) for array in item.values())
        assert (item["targets"][:-1] == item["tokens"][1:]).all()
        assert item["targets"].min() >= 0
    for index in (-1, TRAIN):
        with pytest.raises(IndexError):
            data.train[index]


def test_document_positions():
    eos = 2
    tokens = np.array([7, 8, eos, 7, eos, eos, 9, 9])
    assert document_positions(tokens, eos).tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert document_positions(np.array([eos, 5]), eos).tolist() == [0, 0]
    assert document_positions(np.array([5]), eos).tolist() == [0]


def test_positions_follow_document_mask(workshop, tmp_path):
    masked = workshop.open(workshop.config(tmp_path)).train
    plain = workshop.open(workshop.config(tmp_path, document_mask=False)).train
    restarts = 0
    for i in range(50):
        item = masked[i]
        ends = np.flatnonzero(item["tokens"][:-1] == workshop.tokenizer.eos_id)
        assert np.flatnonzero(item["positions"] == 0).tolist() == [0, *(ends + 1)]
        assert (np.diff(item["positions"])[np.diff(item["positions"]) != 1] <= 0).all()
        restarts += len(ends)
        assert (plain[i]["positions"] == np.arange(SEQ)).all()
        assert (plain[i]["tokens"] == item["tokens"]).all()
    assert restarts > 10


def test_split_cuts_the_document_list(workshop, tmp_path):
    data = workshop.open(workshop.config(tmp_path, split=[90, 10, 0]), train_samples=4000, valid_samples=400)
    cut = round(0.9 * len(workshop.texts["a"]))
    for dataset, texts in ((data.train, workshop.texts["a"][:cut]), (data.valid, workshop.texts["a"][cut:])):
        encoded = {tuple([*workshop.tokenizer.encode(text), workshop.tokenizer.eos_id]) for text in texts}
        found = {document for i in range(len(dataset)) for document in whole_documents(dataset[i])}
        assert found
        assert found <= encoded


def whole_documents(item):
    """Documents that neither begin before the sample nor go on after it."""
    starts = np.flatnonzero(item["positions"] == 0).tolist()
    tokens = item["tokens"].tolist()
    return [tuple(tokens[start:end]) for start, end in pairwise(starts[1:])]


def test_order_depends_on_seed_only(workshop, tmp_path):
    config = workshop.config(tmp_path / "one")
    first = tokens_of(workshop.open(config).train)
    assert (first == tokens_of(workshop.open(workshop.config(tmp_path / "two")).train)).all()
    assert (first != tokens_of(workshop.open(config, seed=6).train)).any()


def test_blend_fractions(workshop, tmp_path):
    data = workshop.open(workshop.config(tmp_path, ("a", 3.0), ("b", 7.0)), train_samples=1000)
    upper = sum(workshop.tokenizer.decode(data.train[i]["tokens"]).isupper() for i in range(1000))
    assert abs(upper / 1000 - 0.7) < 0.01
    assert data.identity["weights"] == [0.3, 0.7]


@pytest.mark.parametrize("weighted", [(("a", 1.0),), (("a", 0.3), ("b", 0.7))])
def test_same_samples_as_megatrons_own_builder(workshop, tmp_path, weighted):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from mythos_ds.data.megatron import _PlainTokenizer, packing_plan

    ours = workshop.open(workshop.config(tmp_path, *weighted))
    plan = packing_plan(workshop.tokenizer, seq_len=SEQ, seed=5, split=(98, 2, 0))
    prefixes = [str(workshop.folder / name) for name, _ in weighted]
    theirs = GPTDatasetConfig(
        random_seed=5,
        sequence_length=SEQ,
        tokenizer=_PlainTokenizer(plan),
        blend=(prefixes, [weight for _, weight in weighted] if len(weighted) > 1 else None),
        split="98,2,0",
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, [TRAIN, VALID, 0], lambda: True, theirs).build()
    for dataset, expected in ((ours.train, built[0]), (ours.valid, built[1])):
        for i in range(len(dataset)):
            for mine, its in (("tokens", "tokens"), ("targets", "labels"), ("positions", "position_ids")):
                assert (dataset[i][mine] == expected[i][its].numpy()).all()


def test_no_validation_samples_asked(workshop, tmp_path):
    assert len(workshop.open(workshop.config(tmp_path, split=[1, 0, 0]), valid_samples=0).valid) == 0


def test_split_without_validation_text(workshop, tmp_path):
    with pytest.raises(DataError, match=r"data\.split .* leaves no valid text of its 200 documents"):
        workshop.open(workshop.config(tmp_path, split=[9999, 1, 0]))
    assert len(workshop.open(workshop.config(tmp_path, split=[1, 0, 0])).valid) == 0


def test_index_is_made_once_and_whole(workshop, tmp_path):
    config = workshop.config(tmp_path, ("a", 1.0), ("b", 1.0))
    with pytest.raises(DataError, match="every node sees"):
        build_datasets(config, **workshop.arguments())
    cache = prepare_index_cache(config, **workshop.arguments())
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert prepare_index_cache(config, **workshop.arguments()) == cache
    build_datasets(config, **workshop.arguments())
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    next(cache.glob("*shuffle_index.npy")).unlink()
    with pytest.raises(DataError, match="is damaged"):
        build_datasets(config, **workshop.arguments())


def test_remade_data_never_meet_the_old_index(workshop, tmp_path):
    make_dataset(tmp_path / "a", workshop.tokenizer, workshop.texts["a"])
    config = workshop.config(tmp_path, datasets=[{"prefix": str(tmp_path / "a")}])
    cache = prepare_index_cache(config, **workshop.arguments())
    for path in tmp_path.glob("a.*"):
        path.unlink()
    make_dataset(tmp_path / "a", workshop.tokenizer, workshop.texts["b"])
    assert prepare_index_cache(config, **workshop.arguments()) != cache


def test_vocabulary_mismatch(workshop, tmp_path):
    config = workshop.config(tmp_path)
    size = workshop.tokenizer.vocab_size
    with pytest.raises(DataError, match=rf"model\.vocab_size {size - 1} given.*allowed: at least {size}"):
        build_datasets(config, **workshop.arguments(vocab_size=size - 1))
    other = make_tokenizer(tmp_path, vocab_size=390)
    config = config.model_copy(update={"tokenizer": str(other.path)})
    with pytest.raises(DataError, match="made with another tokenizer"):
        prepare_index_cache(config, **workshop.arguments())


def test_missing_dataset_names_the_command(workshop, tmp_path):
    with pytest.raises(DataError, match=r"no dataset at .*none.*mythos-ds prepare-data"):
        prepare_index_cache(workshop.config(tmp_path, ("none", 1.0)), **workshop.arguments())


RANK = """
import hashlib, json, sys, datetime
import torch.distributed as dist
from mythos_ds.config.schema import DataConfig
from mythos_ds.data.datasets import build_datasets, prepare_index_cache
rank, store, config, arguments = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
limit = datetime.timedelta(seconds=60)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=limit)
config = DataConfig.model_validate(config)
if rank == 0:
    prepare_index_cache(config, **arguments)
dist.barrier()
train = build_datasets(config, **arguments).train
digest = hashlib.sha256(b"".join(train[i]["tokens"].tobytes() for i in range(len(train))))
print(digest.hexdigest())
dist.destroy_process_group()
"""


def test_one_rank_prepares_and_all_read(workshop, tmp_path):
    config = workshop.config(tmp_path / "group", ("a", 0.5), ("b", 0.5))
    arguments = workshop.arguments()
    common = [str(tmp_path / "store"), config.model_dump_json(), json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), *common],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=300) for process in ranks]
    outputs = [out.strip() for out, _ in results]
    assert [process.returncode for process in ranks] == [0, 0], results
    assert len(outputs[0]) == 64
    assert outputs[0] == outputs[1]
    assert not any("Apex" in errors or "Transformer Engine" in errors for _, errors in results)
    alone = workshop.open(workshop.config(tmp_path / "alone", ("a", 0.5), ("b", 0.5)))
    assert outputs[0] == digest_of(alone.train)


def digest_of(dataset):
    return hashlib.sha256(b"".join(dataset[i]["tokens"].tobytes() for i in range(len(dataset)))).hexdigest()


def test_megatron_is_imported_late():
    code = "import sys, mythos_ds.data.datasets, mythos_ds.data.batches; sys.exit('megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_sources_are_looked_at_without_an_index(tmp_path):
    """What a later training stage will read is told when the run starts."""
    workshop = Workshop(tmp_path)
    vocab_size = workshop.tokenizer.vocab_size
    check_sources(workshop.config(tmp_path / "cache", ("a", 1.0), ("b", 2.0)), vocab_size)
    check_sources(DataConfig(corpus="builtin", data_dir=str(tmp_path / "none")), vocab_size)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="missing"):
        check_sources(workshop.config(tmp_path, ("missing", 1.0)), vocab_size)
    with pytest.raises(DataError, match="vocab_size"):
        check_sources(workshop.config(tmp_path), vocab_size - 1)
