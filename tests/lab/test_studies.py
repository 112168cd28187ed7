"""Every study's runs are valid configurations, and its analysis makes tables and pictures of any results."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mythos_ds.analysis.position_losses import position_parts
from mythos_ds.config.resolve import resolve
from mythos_ds.config.schema import RunConfig
from mythos_ds.lab import trained_models
from mythos_ds.lab.spec import RunSpec
from mythos_ds.lab.studies import context, inspections, retrofit
from mythos_ds.lab.studies.grokking import WORKER
from mythos_ds.lab.studies.registry import STUDIES
from mythos_ds.lab.study import write_report
from mythos_ds.lab.summary_page import write_summary
from mythos_ds.lab.tasks.facts import SPLITS
from mythos_ds.lab.variants import CONTROLS
from mythos_ds.lab.worker import MODEL, SPEC
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import save_model

INSPECTIONS = ("routing", "stability", "halting")
CASES = [(name, scale) for name, study in STUDIES.items() for scale in study.scales]


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_runs_resolve_and_differ(name: str, scale: str) -> None:
    specs = STUDIES[name].runs(scale, "data")
    assert len({spec.key for spec in specs.values()}) == len(specs)
    for (_, seed), spec in specs.items():
        resolved = resolve(RunConfig.model_validate(spec.config), 1)
        assert resolved.config.training.seed == seed
        assert spec.control is None or spec.control in CONTROLS


def _made_up(spec: RunSpec, draw: random.Random) -> dict:
    """A result of the right form."""
    loops = max(2, RunConfig.model_validate(spec.config).model.mean_recurrence)
    per_loop = [draw.uniform(1, 2) for _ in range(loops)]
    result = {
        "seconds": draw.uniform(50, 60),
        "losses": {str(count): draw.uniform(4, 5) for count in {1, *spec.loops}},
        "curve": [[step, draw.uniform(4, 8)] for step in range(10, 160, 10)],
        "last": {
            "router/load_max_mean": 1.5,
            "router/load_max_mean_per_loop": per_loop,
            "router/overlap_per_loop": per_loop[1:],
            "router/prebias_max_share_per_loop": per_loop,
            "router/entropy_per_loop": per_loop,
            "state/rms_per_loop": per_loop,
        },
        "parameters": 1000,
        "trained_depth": spec.config["model"]["mean_recurrence"],
        "training_flops": 1e15,
        "tokens": 1e6,
    }
    if spec.worker == WORKER:
        result["history"] = [[step, {name: draw.random() for name in SPLITS}] for step in (10, 30, 100)]
        result["final"] = {str(count): {name: draw.random() for name in SPLITS} for count in spec.loops}
    elif spec.worker == retrofit.WORKER:
        result["sequences"] = {str(count): [draw.uniform(2, 3) for _ in range(4)] for count in spec.loops}
        result |= {
            "loss": {n: sum(own) / 4 for n, own in result["sequences"].items()},
            "core_seconds": 9.0,
            "decay": [0.1],
        }
    elif spec.worker == context.WORKER:
        documents = spec.chains["documents"] if spec.chains is not None else 0
        result["parts"] = position_parts(context.LONG)
        result["arms"] = {
            arm: [[draw.uniform(2, 3) for _ in result["parts"]] for _ in range(documents)] for arm in context.LABELS
        }
    elif spec.chains is not None:
        hops = spec.chains["test_hops"]
        result["accuracy"] = {str(count): [draw.random() for _ in range(hops)] for count in spec.loops}
    return result


def _made_up_text(folder: Path, *, batches: int, training: bool = False) -> list[dict[str, Tensor]]:
    tokens = torch.randint(4096, (batches, 2, 9), generator=torch.Generator().manual_seed(batches))
    positions = torch.arange(8).expand(2, -1)
    return [
        {"tokens": rows[:, :-1], "targets": rows[:, 1:], "positions": positions, "classes": rows[:, 1:] % 5}
        for rows in tokens
    ]


def _folder(spec: RunSpec, root: Path) -> Path:
    """A run's folder with an untrained model."""
    folder = root / spec.key
    model = MythosModel(RunConfig.model_validate(spec.config).model)
    if spec.control is not None:
        CONTROLS[spec.control](model)
    save_model(model, folder / MODEL, {})
    (folder / SPEC).write_text(spec.to_json())
    return folder


@pytest.mark.parametrize(("name", "scale"), [case for case in CASES if case[0] not in INSPECTIONS or case[1] == "cpu"])
def test_analysis_makes_a_page(name: str, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, draw = STUDIES[name], random.Random(0)
    specs = study.runs(scale, "data")
    folders = dict.fromkeys(specs, tmp_path)
    if name in INSPECTIONS:
        monkeypatch.setattr(trained_models, "text", _made_up_text)
        monkeypatch.setattr(inspections, "text", _made_up_text)
        monkeypatch.setattr(inspections, "_GATE_STEPS", 2)
        specs = {key: spec for key, spec in specs.items() if key[1] < 2}
        folders = {key: _folder(spec, tmp_path) for key, spec in specs.items()}
    results = {key: _made_up(spec, draw) for key, spec in specs.items()}
    diverged = next(iter(results))
    if name == "stress":  # a run that diverged has no losses
        results[diverged] = {"diverged": "step 9: loss is nan", "curve": [[1, 8.0]], "last": {}, "trained_depth": 4}
    report = study.analyse(results, folders, scale)
    write_report(study, report, tmp_path / name, {"command": "c"})
    page = (tmp_path / name / "results.md").read_text()
    assert page.count("| --- |") == len(report.tables)
    pictures = list((tmp_path / name).glob("*.png"))
    assert len(pictures) == len(report.pictures) > 0
    assert "<table>" in write_summary(tmp_path).read_text()
