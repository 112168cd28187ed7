"""Validation text: of its own, none, or too little, over made splits and sizes; told from sidecars, before training."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mythos_ds.analysis.loop_losses import held_out_sequences
from mythos_ds.config.loader import load_config
from mythos_ds.data.datasets import build_datasets, prepare_index_cache
from mythos_ds.data.megatron import open_tokens
from mythos_ds.data.validation import held_out, validation_notes
from mythos_ds.errors import ConfigError, DataError
from tests.helpers.pretrain import ROOT, SMALL, environment, metrics
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer

SEQUENCE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two datasets of one tokenizer, one of another, and a very small one."""
    made = tmp_path_factory.mktemp("data")
    tokenizer = make_tokenizer(made)
    for seed, name in enumerate(("train", "valid", "more")):
        make_dataset(made / name, tokenizer, make_texts(120, seed=seed + 1))
    make_dataset(made / "small", tokenizer, make_texts(1, seed=9, longest=3))
    make_dataset(made / "odd", tokenizer, make_texts(30, seed=8))
    other = make_tokenizer(_made(made / "other"), seed=5)
    make_dataset(made / "foreign", other, make_texts(50))
    return made


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def _config(folder: Path, *overrides: str):
    data = [f'data.datasets=[{{"prefix": "{folder / "train"}"}}]', f"data.tokenizer={folder / 'tokenizer.model'}"]
    data += [f"data.data_dir={folder}", "model.vocab_size=400", f"training.seq_len={SEQUENCE}"]
    return load_config("tiny.json", [*SMALL, *data, f"training.seq_len={SEQUENCE}", *overrides]).config


def _open(config, train=40, valid=8):
    request = {"seq_len": SEQUENCE, "train_samples": train, "valid_samples": valid, "seed": 3, "vocab_size": 400}
    prepare_index_cache(config.data, **request)
    return build_datasets(config.data, **request)


def _tokens(dataset):
    return {tuple(dataset[index]["tokens"]) for index in range(len(dataset))}


def _windows(prefix: Path) -> str:
    """All tokens of a dataset's documents, as text to look in."""
    tokens = open_tokens(prefix)
    return "|".join(" ".join(map(str, tokens[index])) for index in range(len(tokens.sequence_lengths)))


def test_a_set_of_its_own_is_read_whole_and_nothing_of_it_is_trained_on(folder):
    data = _open(_config(folder, f"data.validation={folder / 'valid'}"), valid=40)
    assert len(data.valid) == 40
    own, trained = _windows(folder / "valid"), _windows(folder / "train")
    first = " ".join(map(str, data.valid[0]["tokens"][:4]))
    assert first in own.replace("|", " ")
    assert _tokens(data.train).isdisjoint(_tokens(data.valid))
    assert first not in trained.replace("|", " ")
    assert data.identity["split"] == [100.0, 0.0, 0.0]
    assert data.identity["validation"]["weights"] == [1.0]


def test_the_valid_share_is_trained_on_where_a_set_of_its_own_is_given(folder):
    own = f"data.validation={folder / 'valid'}"
    whole = _open(_config(folder, own, "data.split=[100,0,0]"))
    shared = _open(_config(folder, own, "data.split=[60,40,0]"))
    apart = _open(_config(folder, own, "data.split=[60,20,20]"))
    assert _tokens(whole.train) == _tokens(shared.train)
    assert _tokens(whole.train) != _tokens(apart.train)
    assert apart.identity["split"] == [80.0, 0.0, 20.0]


def test_a_blend_of_held_out_sets(folder):
    blend = json.dumps(
        [{"prefix": str(folder / name), "weight": weight} for name, weight in (("valid", 3), ("more", 1))]
    )
    data = _open(_config(folder, f"data.validation={blend}"), valid=40)
    assert data.identity["validation"]["weights"] == [0.75, 0.25]
    assert len(_tokens(data.valid)) > 1


@pytest.mark.parametrize("overrides", [["data.validation=none"], ["data.split=[100,0,0]"], ["data.split=[1,0,2]"]])
def test_none(folder, overrides):
    config = _config(folder, *overrides)
    assert not config.data.validates
    data = _open(config)
    assert len(data.valid) == 0
    assert "validation" not in data.identity
    assert held_out(config.data, config.training) is None
    assert validation_notes(config.data, config.training)[0].startswith("no validation (")
    with pytest.raises(ConfigError, match="has no held-out text"):
        held_out_sequences(config, 4)


def test_what_is_held_out_by_a_share_keeps_its_identity(folder):
    """As written before there was `data.validation`: such runs go on."""
    assert set(_open(_config(folder)).identity) == {"tokenizer", "content", "weights", "split", "document_mask"}


@pytest.mark.parametrize("seed", range(20))
def test_too_little_is_told_with_the_tokens_there_and_needed(folder, seed):
    """For made splits and lengths of evaluation: the count is that of the documents that evaluation reads."""
    pick = random.Random(seed)
    split = [pick.randint(1, 99), pick.randint(1, 30), pick.choice([0, 5])]
    batches = pick.choice([1, 3, 20, 400])
    config = _config(folder, f"data.split={json.dumps(split)}", f"training.eval_batches={batches}")
    tokens = open_tokens(folder / "train")
    total = len(tokens.sequence_lengths)
    bounds = [round(share / sum(split) * total) for share in (split[0], split[0] + split[1])]
    there = int(tokens.sequence_lengths[bounds[0] : bounds[1]].sum())
    needed = batches * config.training.global_batch_size * SEQUENCE + 1
    found = held_out(config.data, config.training, exact=True)
    assert found is not None
    assert (found.tokens, found.needed) == (there, needed)
    notes = validation_notes(config.data, config.training, exact=True)
    assert bool(notes) == (there < needed)
    if notes:
        assert f"{there:,} tokens there, {needed:,} needed" in notes[0]
    estimate = held_out(config.data, config.training)
    assert estimate is not None
    assert not estimate.exact


@pytest.mark.parametrize("exact", [False, True])
def test_a_share_without_a_document_is_refused(folder, exact):
    config = _config(folder, "data.split=[99.9,0.1,0]")
    with pytest.raises(DataError, match=r"leaves no valid text of its 120 documents, and [\d,]+ tokens are needed"):
        held_out(config.data, config.training, exact=exact)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ('""', "data.validation"),
        ("[]", "at least one"),
        ("3", "data.validation"),
        ('[{"weight": 1}]', "prefix"),
        ('[{"prefix": "a"}, {"prefix": "a"}]', "a is listed twice"),
        ("TRAIN", "is also in data.datasets"),
    ],
)
def test_a_wrong_setting_is_told(folder, validation, message):
    with pytest.raises(ConfigError, match=r"data\.validation") as caught:
        _config(folder, f"data.validation={validation.replace('TRAIN', str(folder / 'train'))}")
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("nowhere", "no dataset at"), ("foreign", "another tokenizer")])
def test_a_set_that_does_not_fit_is_refused_before_training(folder, name, message):
    with pytest.raises(DataError, match=message):
        _open(_config(folder, f"data.validation={folder / name}"))


def test_evaluation_of_a_model_reads_no_sequence_twice(folder):
    config = _config(folder, f"data.validation={folder / 'small'}")
    with pytest.raises(ConfigError, match=r"sequences: given 8; the held-out text has \d+ of training.seq_len 16"):
        held_out_sequences(config, 8)
    batches = held_out_sequences(_config(folder, f"data.validation={folder / 'valid'}"), 8)
    rows = [tuple(row.tolist()) for batch in batches for row in batch["tokens"]]
    assert len(set(rows)) == 8


@pytest.mark.parametrize("kind", ["little", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("none", "own"))])
def test_a_run_says_it_before_its_first_step_and_shows_no_figure_it_has_not(folder, tmp_path, kind):
    overrides = {
        "none": "data.validation=none",
        "own": f"data.validation={folder / 'valid'}",
        "little": "data.split=[99,1,0]",
    }
    data = [f'data.datasets=[{{"prefix": "{folder / "train"}"}}]', f"data.tokenizer={folder / 'tokenizer.model'}"]
    arguments = ["--config", "tiny.json", "--run-dir", "run", *SMALL, *data, f"data.data_dir={tmp_path}"]
    arguments += ["model.vocab_size=400", overrides[kind], "training.max_steps=3", "training.eval_batches=2"]
    said = _said([*arguments, "--dry-run"], tmp_path)
    assert "validation  " in said
    text = _said(arguments, tmp_path)
    before, _, _ = text.partition("step 1/3")
    there = ("no validation" in before, "little validation text" in before)
    assert there == {"none": (True, False), "own": (False, False), "little": (False, True)}[kind]
    assert ("little validation text" in said, "no validation" in said) == there[::-1]
    figures = {name for line in metrics(tmp_path / "run") for name in line if name.startswith("validation")}
    assert bool(figures) == (kind != "none")
    assert ("before training" in text) == (kind != "none")
    assert ("no validation: no held-out loss was computed" in text) == (kind == "none")


def _said(arguments: list[str], folder: Path) -> str:
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *arguments]
    done = subprocess.run(
        command,
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
