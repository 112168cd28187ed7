"""The index of a run can be built before it starts, and is then the one the run reads."""

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve, resolve_stages
from mythos_ds.data.datasets import build_datasets
from mythos_ds.errors import DataError
from mythos_ds.train.data_loader import dataset_arguments
from mythos_ds.train.run_manifest import new_manifest
from tests.helpers.mains import load_main
from tests.helpers.pretrain import SMALL, small_data
from tests.helpers.stages import three_stages

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
