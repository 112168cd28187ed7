"""Training that starts from a model's weights: the same model in every layout, parts of it frozen."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import load_model, save_model
from tests.distributed.cases import ACCUMULATION, LOOPS, global_batches
from tests.helpers.distributed import run_distributed
from tests.helpers.toy_model import toy_model

TIMEOUT_S = 500.0
WORK = "tests.distributed.init_from_cases:work"
RING = {"pp": 2, "accumulation": 2}
LAYOUTS: list[dict[str, Any]] = [
    *({"ep": 1, "stage": stage} for stage in (0, 1, 2, 3)),
    *({"ep": ep, "stage": stage} for ep in (2, 4) for stage in (1, 2, 3)),
    {"ep": 2, "stage": 3, "dtype": "bfloat16"},
    {"ep": 1, "stage": 3, **RING},
    {"ep": 2, "stage": 3, **RING},
]
"""On four processes; rings come last (see test_reshard.py)."""
LARGE: dict[str, Any] = {
    "vocab_size": 16384,
    "dim": 1024,
    "ffn_dim": 4096,
    "n_experts": 48,
    "expert_dim": 1536,
    "max_loops": 16,
}
PATTERNS = ["embed.*", "prelude.*", "recurrent.layers.0.attn.*"]
FROZEN: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"ep": 2, "stage": 1},
    "ZeRO 3": {"ep": 2, "stage": 3, "dtype": "bfloat16"},
    "ring": {"ep": 1, "stage": 3, **RING},
}
MORE_FROZEN: dict[str, dict[str, Any]] = {
    "whole": {"ep": 1, "stage": 0},
    "whole bf16": {"ep": 1, "stage": 0, "dtype": "bfloat16"},
    "ZeRO 2": {"ep": 1, "stage": 2, "dtype": "bfloat16"},
}
OTHER = {"ring": "ZeRO 1", "ZeRO 3": "ring", "whole": "ring", "whole bf16": "ZeRO 2", "ZeRO 2": "whole"}
"""The layout that goes on from each, with the first one's numbers."""


def _case(layout: dict[str, Any], folder: Path, **training: Any) -> dict[str, Any]:
    return {**layout, "training": {"init_from": str(folder), **training}}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which no tensor is what any seed gives, buffers included."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    model = MythosModel(toy_model(), seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    save_model(model, folder, {})
    return folder


@pytest.fixture(scope="module")
def reference_loss(model_folder: Path) -> float:
    """The first step's loss of the single-process model."""
    model = load_model(model_folder)
    with torch.no_grad():
        losses = [
            model(batch["tokens"], n_loops=LOOPS[0], positions=batch["positions"], targets=batch["targets"])
            for batch in global_batches(0, ACCUMULATION)
        ]
    return float(torch.stack(losses).double().mean())


def test_every_layout_starts_as_the_same_model(model_folder, reference_loss):
    tasks = [{"what": "start", "case": _case(layout, model_folder)} for layout in LAYOUTS]
    for layout, found in zip(LAYOUTS, run_distributed(WORK, 4, TIMEOUT_S, tasks=tasks)[0], strict=True):
        assert found["different"] == [], layout
        tolerance = 1e-2 if layout.get("dtype") == "bfloat16" else 1e-6
        assert abs(found["loss"] - reference_loss) <= tolerance * reference_loss, (layout, found["loss"])


@pytest.mark.parametrize("layouts", [FROZEN, pytest.param({**MORE_FROZEN, **FROZEN}, marks=pytest.mark.slow)])
def test_frozen_weights_stay_and_travel_with_checkpoints(layouts, model_folder, tmp_path):
    cases = {name: _case(layout, model_folder, frozen=PATTERNS, injection_lr=1e-1) for name, layout in layouts.items()}
    tasks = [{"what": "frozen", "case": case, "to": str(tmp_path / name)} for name, case in cases.items()]
    written = dict(zip(layouts, run_distributed(WORK, 4, TIMEOUT_S, tasks=tasks)[0], strict=True))
    for name, found in written.items():
        frozen = [n for n in found["names"] if n.startswith(("embed.", "prelude.", "recurrent.layers.0.attn."))]
        assert len(frozen) > 3
        assert sorted(set(found["names"]) - set(found["moved"])) == frozen, name
        assert found["different"] == [], name
        assert found["with_state"] == sorted(found["moved"]), name
    followed = [(first, second) for first in layouts for second in (first, OTHER.get(first)) if second in layouts]
    followed.sort(key=lambda pair: pair[1] == "ring")
    tasks = [
        {
            "what": "frozen",
            "case": {**cases[second], "dtype": cases[first].get("dtype", "float32")},
            "from": str(tmp_path / first / "step_00000003"),
        }
        for first, second in followed
    ]
    results = run_distributed(WORK, 4, TIMEOUT_S, tasks=tasks)[0]
    for (first, second), found in zip(followed, results, strict=True):
        tolerance = 2e-3 if cases[first].get("dtype") == "bfloat16" else 5e-6
        for loss, expected in zip(found["losses"], written[first]["losses"], strict=True):
            assert abs(loss / expected - 1) <= tolerance, (first, second, found["losses"], written[first]["losses"])


def test_the_injection_has_its_own_rate(model_folder):
    plain = {"grad_clip": 0.0, "weight_decay": 0.0}
    tasks = [
        {"what": "moves", "case": {**_case({"ep": 2, "stage": 3}, model_folder, **plain, **own), "optimizer": "sgd"}}
        for own in ({}, {"injection_lr": 0.1})
    ]
    shared, apart = run_distributed(WORK, 2, TIMEOUT_S, tasks=tasks)[0]
    # The scheduled rate is a hundredth of what the file's lr is multiplied to: lr 1e-2, injection 1e-1.
    for name, moves in shared.items():
        factor = 10.0 if name.startswith(("recurrent.injection.", "recurrent.loop_embedding.")) else 1.0
        given, wanted = torch.tensor(apart[name]), factor * torch.tensor(moves)
        assert torch.allclose(given, wanted, rtol=1e-3, atol=2e-6), name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_weights_takes_no_more_memory_than_drawing_them(dtype, tmp_path):
    """A model of 2 GB: at most the largest tensor and 100 MB more, up to the first step."""
    model = MythosModel(toy_model(**LARGE), seed=None)
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    assert sum(sizes) > 2e9
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::7].add_(0.01)
    save_model(model, tmp_path / "model", {})
    del model
    layout = {"ep": 2, "stage": 3, "dtype": dtype, "model": LARGE}
    peaks = []
    for case in ({**layout, "training": {}}, _case(layout, tmp_path / "model")):
        peaks.append(run_distributed(WORK, 2, TIMEOUT_S, tasks=[{"what": "memory", "case": case}]))
    drawn, read = (max(rank[0] for rank in peak) for peak in peaks)
    sys.stdout.write(
        f"{dtype}: {drawn / 1e6:.0f} MB drawn, {read / 1e6:.0f} MB read, largest {max(sizes) / 1e6:.0f} MB\n"
    )
    assert read <= drawn + max(sizes) + 100e6, (drawn, read, max(sizes))


def test_patterns_that_freeze_nothing_or_all_are_refused(model_folder):
    layout = {"ep": 2, "stage": 3}
    wrong = {
        "no parameter": ["prelud.*"],
        "nothing is left": ["*"],
        "ep_size 1": ["*.experts.*"],
    }
    tasks = [{"what": "refused", "case": _case(layout, model_folder, frozen=given)} for given in wrong.values()]
    for rank in run_distributed(WORK, 2, TIMEOUT_S, tasks=tasks):
        for message, wanted in zip(rank, wrong, strict=True):
            assert message.startswith("training.frozen")
            assert wanted in message
    assert "did you mean" in rank[0]


def test_a_stage_of_which_everything_is_frozen_is_refused(model_folder):
    layout = {"ep": 1, "stage": 3, "pp": [1, 1, 1], "accumulation": 3}
    task = {"what": "refused", "case": _case(layout, model_folder, frozen=["embed.*", "prelude.*"])}
    for (message,) in run_distributed(WORK, 3, TIMEOUT_S, tasks=[task]):
        assert "training.frozen" in message
        assert "stage 0 of parallel.pp_size [1, 1, 1]; nearest: parallel.pp_size=1" in message
