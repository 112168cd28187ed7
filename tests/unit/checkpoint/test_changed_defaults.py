"""A run whose gradients were bf16 by default is told so as it goes on."""

from types import SimpleNamespace
from typing import Any

import pytest

from mythos_ds.checkpoint import load
from mythos_ds.checkpoint.changed_defaults import gradient_types_note
from mythos_ds.checkpoint.training_state import TrainingState
from mythos_ds.config.loader import load_config
from tests.helpers.listener import listening

LOOPS, RANKS = "training.grad_dtype=bfloat16", "deepspeed.communication_data_type=bf16"
BF16 = "training.dtype=bfloat16"
PIPELINE = [
    "parallel.pp_size=2", "parallel.ep_size=1", "model.recurrent_layers=2",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=null",
]  # fmt: skip


def saved(*overrides: str, older: bool = True, pp_size: int = 1) -> TrainingState:
    """The state of a checkpoint; `older`: of a version without the setting."""
    config = load_config("tiny", [BF16, *overrides]).config.model_dump(mode="json")
    if older:
        del config["training"]["grad_dtype"]
    return TrainingState(1, 8, None, {"ep_size": 1, "pp_size": pp_size}, config)


@pytest.mark.parametrize(
    ("state", "overrides", "settings"),
    [
        (saved(), [], [LOOPS, RANKS]),
        (saved(), ["training.grad_dtype=float32"], [RANKS]),
        (saved(), [LOOPS], [RANKS]),
        (saved(), [RANKS], [LOOPS]),
        (saved(), [LOOPS, RANKS], []),
        (saved(pp_size=2), [], [RANKS]),
        (saved(), PIPELINE, [RANKS]),
        (saved(older=False), [], []),
        (saved("training.dtype=float32"), [], []),
        (saved(), ["training.dtype=float32"], []),
    ],
)
def test_what_has_changed_and_what_keeps_it(state: TrainingState, overrides: list[str], settings: list[str]):
    note = gradient_types_note(state, load_config("tiny", [BF16, *overrides]).config)
    assert (note is None) == (not settings)
    if note is not None:
        assert note.partition("to keep that: ")[2].split() == settings
        assert "\n" not in note


def test_the_settings_that_are_named_silence_it():
    note = gradient_types_note(saved(), load_config("tiny", [BF16]).config)
    assert note is not None
    given = note.partition("to keep that: ")[2].split()
    assert gradient_types_note(saved(), load_config("tiny", [BF16, *given]).config) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_says_it_as_the_checkpoint_is_loaded(rank, monkeypatch, tmp_path):
    config = load_config("tiny", [BF16]).config
    engine: Any = SimpleNamespace(resolved=SimpleNamespace(config=config), deepspeed=SimpleNamespace())
    engine.deepspeed.optimizer = SimpleNamespace(param_groups=[])
    groups: Any = SimpleNamespace(rank=rank)
    monkeypatch.setattr(load, "read_state", lambda tag: saved())
    monkeypatch.setattr(load, "layout_of", lambda resolved: {"ep_size": 1, "pp_size": 1})
    for name in ("together", "_load_shards", "load_resharded"):
        monkeypatch.setattr(load, name, lambda *_: None)
    with listening("mythos_ds") as heard:
        load.load_checkpoint(engine, groups, tmp_path / "step_00000001")
    told = [line for line in heard if LOOPS in line]
    assert len(told) == (rank == 0)
    assert all(line.startswith("step_00000001: gradients of bf16 weights add up over loops and") for line in told)
