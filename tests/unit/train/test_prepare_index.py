"""The index of a run can be built before it starts, and is then the one the run reads."""

from dataclasses import replace

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve, resolve_stages
from mythos_ds.data.datasets import build_datasets
from mythos_ds.errors import DataError
from mythos_ds.train.data_loader import dataset_arguments
from mythos_ds.train.run_manifest import new_manifest
from tests.helpers.mains import load_main
from tests.helpers.pretrain import SMALL, small_data
from tests.helpers.stages import changed, three_stages
from tests.unit.train.test_resume import made_run

main = load_main("tools/prepare_index.py").main


def test_the_index_is_the_one_a_run_reads(tmp_path, capsys):
    overrides = [*SMALL, *small_data(tmp_path), "training.max_steps=5"]
    resolved = resolve(load_config("tiny.json", overrides).config, 2)
    arguments = dataset_arguments(resolved, new_manifest(resolved), 0)
    with pytest.raises(DataError, match="no index"):
        build_datasets(resolved.config.data, **arguments)
    assert main(["--config", "tiny.json", *overrides]) == 0
    assert "40 training samples" in capsys.readouterr().out
    assert len(build_datasets(resolved.config.data, **arguments).train) >= 40


def test_a_wrong_configuration_is_one_message(capsys):
    assert main(["--config", "tiny.json", "model.n_expert=8"]) == 2
    assert "n_experts" in capsys.readouterr().err


def test_the_indices_of_every_training_stage_are_built(tmp_path, capsys):
    path = three_stages(tmp_path)
    stages = resolve_stages(load_config(str(path)).stages, 1)
    # The seed grows by one from stage to stage; sequences of 4 and of 3 steps, and of a ramp: 4, 4, 6, 8.
    sizes: dict[str | None, tuple[int, int, int, int]]
    sizes = {"base": (16, 32, 8, 0), "long": (64, 22, 8, 1), "anneal": (64, 18, 6, 2)}
    assert main(["--config", str(path)]) == 0
    printed = capsys.readouterr().out
    for stage in stages:
        seq_len, train, valid, seed = sizes[stage.name]
        assert f"{train} training samples of stage {stage.name} in" in printed
        config = stage.run.config
        built = build_datasets(
            config.data, seq_len=seq_len, train_samples=train, valid_samples=valid, seed=seed,
            vocab_size=config.model.vocab_size,
        )  # fmt: skip
        assert len(built.train) >= train


def own_files(folder):
    """The three stages' first, and their second as a file of its own."""
    three = three_stages(folder)

    def first(content):
        del content["stages"]

    def second(content):
        entry = content.pop("stages")[1]
        for section in ("model", "training", "data"):
            content[section].update(entry[section])

    return changed(three, "_first", first), changed(three, "_second", second)


def indexes(folder):
    return sorted(path.name for path in (folder / "index").iterdir())


def test_the_index_of_a_stage_of_its_own_file_is_the_one_of_the_list(tmp_path, capsys):
    first, second = own_files(tmp_path)
    base = resolve(load_config(str(first)).config, 1)
    made_run(tmp_path / "old", new_manifest(base), 2)  # not finished: the seed is the next one all the same
    command = ["--config", str(second), "--resume", str(tmp_path / "old"), "--stage", "long"]
    assert main(command) == 0
    assert "22 training samples of stage long in" in capsys.readouterr().out
    (built,) = indexes(tmp_path)
    assert main(["--config", str(tmp_path / "stages.json")]) == 0
    assert built in indexes(tmp_path)
    assert len(indexes(tmp_path)) == 3
    assert "22 training samples of stage long in" in capsys.readouterr().out


def test_the_index_of_a_run_that_is_made_longer_is_built(tmp_path, capsys):
    first, _ = own_files(tmp_path)
    made_run(tmp_path / "old", new_manifest(resolve(load_config(str(first)).config, 1)), 4)
    longer = ["--config", str(first), "--resume", str(tmp_path / "old"), "training.max_steps=6"]
    assert main(longer) == 0
    printed = capsys.readouterr().out
    assert "ready for 32 training samples" in printed
    assert "ready for 16 training samples" in printed
    config = load_config(str(first)).config
    added = build_datasets(
        config.data, seq_len=16, train_samples=16, valid_samples=0, seed=1, vocab_size=config.model.vocab_size
    )
    assert len(added.train) >= 16


def test_what_training_refuses_is_refused_with_its_words(tmp_path, capsys):
    first, second = own_files(tmp_path)
    base = resolve(load_config(str(first)).config, 1)
    run, tag = made_run(tmp_path / "old", replace(new_manifest(base), stage="long"), 4)
    resume = ["--resume", str(run.root)]
    for given, message in (
        (["--stage", "long"], "--stage long: there is no checkpoint to go on from; give --resume RUN as well"),
        (["--stage", "a b", *resume], "--stage: given 'a b'; allowed: "),
        (["--stage", "long", *resume], "is of a run that has had a stage of that name; give another name"),
        (["--stage", "more", *resume, "model.ffn_dim=64"], "stage 'more' cannot go on from"),
        (["--stage", "more", "--resume", "nowhere"], "no such folder"),
        (resume, "training.seq_len: 64 in"),
    ):
        assert main(["--config", str(second), *given]) == 2, given
        assert message in capsys.readouterr().err
    (tag / "weights.pt").write_bytes(b"tens")
    assert main(["--config", str(second), "--stage", "more", *resume]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
