"""What a run needs at the least, against a machine's memory."""

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.costs.start import require_room
from mythos_ds.errors import ConfigError
from mythos_ds.hardware import host_memory_bytes


def needs(*overrides: str, world_size: int = 1, here: int = 1, memory: float = 16e9, on_cpu: bool = True) -> str:
    resolved = resolve(load_config("tiny", overrides).config, world_size)
    try:
        require_room(resolved, memory, here, on_cpu=on_cpu)
    except ConfigError as error:
        return str(error)
    return ""


def test_ordinary_runs_have_room():
    assert needs() == ""
    assert needs(memory=host_memory_bytes()) == ""
    assert 1e8 < host_memory_bytes() < 1e16


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["training.max_steps=1000000000"], "training.max_steps: the order of 8G samples of the run takes 96 GB"),
        (["training.max_tokens=1000000000000000"], "training.max_steps"),
        (["training.eval_batches=1000000000"], "training.eval_batches"),
        (["model.dim=1048576"], "model: 9.91T parameters"),
        (
            ["training.global_batch_size=1000000000", "training.micro_batch_size=1000000000"],
            "training.micro_batch_size",
        ),
    ],
)
def test_a_run_that_cannot_start_is_refused_with_its_figures(overrides, key):
    found = needs(*overrides)
    assert key in found
    assert "this machine has 16 GB" in found


def test_processes_elsewhere_and_gpus_take_their_share():
    large = ["model.dim=16384", "model.expert_dim=16384"]
    assert needs(*large).startswith("model: ")
    assert needs(*large, "training.micro_batch_size=1", "training.global_batch_size=64", world_size=64) == ""
    assert needs(*large, on_cpu=False) == ""
    assert "max_steps" in needs("training.max_steps=1000000000", on_cpu=False)
