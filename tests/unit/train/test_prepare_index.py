"""The index of a run can be built before it starts, and is then the one the run reads."""

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.data.datasets import build_datasets
from mythos_ds.errors import DataError
from mythos_ds.train.data_loader import dataset_arguments
from mythos_ds.train.run_manifest import new_manifest
from tests.helpers.mains import load_main
from tests.helpers.pretrain import SMALL, small_data

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
