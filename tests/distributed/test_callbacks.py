"""Callbacks of a training run: when they are called, what they can read, and that they change nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.callback_cases import STEPS
from tests.helpers.distributed import run_distributed
from tests.helpers.pretrain import SMALL, metrics, small_data

ONE_PROCESS = ("deepspeed.zero_optimization=null", "parallel.zero_stage=0", "parallel.ep_size=1")


def _train(folder: Path, *overrides: str, nprocs: int = 1, callbacks: bool = True) -> list[dict[str, Any]]:
    if not (folder.parent / "words.bin").is_file():
        small_data(folder.parent)
    tokenizer, words = folder.parent / "tokenizer.model", folder.parent / "words"
    data = [f'data.datasets=[{{"prefix": "{words}"}}]', f"data.tokenizer={tokenizer}", f"data.data_dir={folder.parent}"]
    given = [*SMALL, *data, "model.vocab_size=400", f"training.max_steps={STEPS}", *overrides]
    function = "tests.distributed.callback_cases:run"
    return run_distributed(function, nprocs, 300, folder=str(folder), overrides=given, with_callbacks=callbacks)


def _weights(folder: Path) -> dict[str, Tensor]:
    (file,) = (folder / "checkpoints" / f"step_{STEPS:08d}").rglob("mp_rank_00_model_states.pt")
    return torch.load(file, weights_only=False)["module"]


def test_calls_come_in_the_documented_order_and_change_nothing(tmp_path: Path) -> None:
    options = (*ONE_PROCESS, "checkpoint.interval=2", "checkpoint.asynchronous=false")
    (seen,) = _train(tmp_path / "with", *options)
    (plain,) = _train(tmp_path / "without", *options, callbacks=False)
    before, loss, done = ["n_loops", "lr"], ["n_loops", "lr", "loss"], ["n_loops", "lr", "loss", "grad_norm"]
    steps = [
        [["before_step", step, before], ["after_backward", step, loss], ["after_step", step + 1, done]]
        for step in range(STEPS)
    ]
    saved = [["on_save", step, done, f"step_{step:08d}", True] for step in (2, 3)]
    assert seen["calls"] == [*steps[0], *steps[1], saved[0], *steps[2], saved[1], ["on_end", 3, done, True]]
    assert seen["same"]
    assert not plain["calls"]
    names = ("loss", "grad_norm", "lr", "n_loops")
    curves = [
        [[line[name] for name in names] for line in metrics(tmp_path / run) if "loss" in line]
        for run in ("with", "without")
    ]
    assert curves[0] == curves[1]
    assert [row[:2] for row in curves[0]] == seen["results"]
    assert seen["losses"] == plain["losses"]
    weights = [_weights(tmp_path / run) for run in ("with", "without")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.ep_size=2",),
        *(
            pytest.param(
                ("parallel.ep_size=1", f"parallel.zero_stage={stage}", "deepspeed.zero_optimization=null"),
                marks=pytest.mark.slow,
            )
            for stage in (1, 2)
        ),
        (
            "parallel.ep_size=1",
            "parallel.pp_size=2",
            "model.recurrent_layers=2",
            "deepspeed.zero_optimization.stage3_param_persistence_threshold=null",
        ),
    ],
    ids=["zero3-ep2", "zero1", "zero2", "ring"],
)
def test_whole_gradients_can_be_read_after_backward(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    ranks = _train(tmp_path / "run", *overrides, nprocs=2)
    assert ranks[0]["calls"] == ranks[1]["calls"]
    assert ranks[0]["norms"] == pytest.approx([norm for _, norm in ranks[0]["results"]], rel=1e-5)
    assert len(ranks[0]["norms"]) == STEPS


def test_an_anomaly_is_called_before_the_run_ends_with_its_error(tmp_path: Path) -> None:
    (seen,) = _train(tmp_path / "run", *ONE_PROCESS, "training.lr=1e6", "training.warmup_steps=0")
    names = [call[0] for call in seen["calls"]]
    assert names[-3:] == ["before_step", "after_backward", "on_anomaly"]
    assert "on_end" not in names
    loss, norm = seen["results"][-1]
    assert not (math.isfinite(loss) and math.isfinite(norm or 0.0))
    assert "not applied" in seen["error"] or "gradient norm" in seen["error"]
