"""The plan of a file with training stages: each stage's is that of a file of its own, and the run is their sum."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mythos_ds
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve_stages, starts_of
from mythos_ds.costs.dry_run import dry_run_report
from mythos_ds.costs.flops import mean_training_depth
from mythos_ds.errors import ConfigError
from mythos_ds.mains import run_tool
from mythos_ds.plan.report import print_run
from mythos_ds.train.depth_sampler import DepthSampler
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT

PLAN = load_main("tools/plan.py")
REHEARSE = load_main("tools/rehearse.py")
RAMP = {"start": 64, "increment": 64, "samples": 3000}
LONG = {"seq_len": 8192, "micro_batch_size": 1, "global_batch_size": 64, "max_tokens": 400_000_000, "warmup_steps": 0}
PRETRAIN_SAMPLES = 16 * 64 + 8 * 128 + 5 * 192 + 86 * 256
"""Of the ramp: the size grows once 1,000, 2,000 and 3,000 sequences are read, which is after 16, 24 and 29 steps."""


def staged(folder: Path, long: dict[str, Any] | None = None) -> Path:
    """1b of few layers at short length: pre-training with a ramp, longer sequences, annealing."""
    content = json.loads((ROOT / "ds_configs" / "1b.json").read_text())
    content["model"] |= {"prelude_layers": 1, "recurrent_layers": 1, "coda_layers": 0}
    content["training"] |= {"global_batch_size": 256, "global_batch_ramp": RAMP, "decay_fraction": 0.0}
    content["training"] |= {"warmup_steps": 10, "micro_batch_size": 2, "max_tokens": PRETRAIN_SAMPLES * 4096}
    content["stages"] = [
        {"name": "pretrain"},
        {"name": "long", "model": {"rope_theta": 5e6}, "training": {**LONG, **(long or {})}},
        {"name": "anneal", "training": {"max_steps": 50, "decay_fraction": 1.0, "min_lr_ratio": 0.0}},
    ]
    path = folder / "staged.json"
    path.write_text(json.dumps(content))
    return path


def alone(path: Path, number: int) -> Path:
    """A stage as a file of its own, merged by hand."""
    content = json.loads(path.read_text())
    _, long, anneal = content.pop("stages")
    if number:
        del content["training"]["global_batch_ramp"]
        content["training"] |= long["training"]
        content["model"] |= long["model"]
    if number == 2:
        del content["training"]["max_tokens"]
        content["training"] |= anneal["training"]
    file = path.with_name(f"{number}.json")
    file.write_text(json.dumps(content))
    return file


def test_a_run_is_the_sum_of_its_stages(tmp_path):
    path = staged(tmp_path)
    plan = mythos_ds.plan_run(path)
    singles = [mythos_ds.plan_run(alone(path, number)).numbers for number in range(3)]
    parts = plan.numbers["stages"]
    assert [part["name"] for part in parts] == ["pretrain", "long", "anneal"]
    for part, single in zip(parts, singles, strict=True):
        assert {key: part[key] for key in single if key in part} == {key: single[key] for key in single if key in part}
        assert set(single) - set(part) == {"remedy", "layouts"}
    tokens = [PRETRAIN_SAMPLES * 4096, 763 * 64 * 8192, 50 * 64 * 8192]
    assert [part["tokens"] for part in parts] == tokens
    assert [part["steps"] for part in parts] == [16 + 8 + 5 + 86, 763, 50]
    assert (plan.numbers["tokens"], plan.numbers["steps"]) == (sum(tokens), 115 + 763 + 50)
    for number, cost in enumerate(plan.numbers["costs"]):
        of_stages = [single["costs"][number] for single in singles]
        assert {one["at"] for one in of_stages} == {cost["at"]}
        assert cost["days"] == pytest.approx(sum(one["days"] for one in of_stages))
        assert cost["dollars"] == pytest.approx(sum(one["dollars"] for one in of_stages))
    fullest = max(single["memory_total_bytes"] for single in singles)
    assert (plan.fits, plan.numbers["memory_total_bytes"]) == (True, fullest)
    assert plan.numbers["binding_stage"] == "long"
    assert "3 training stages: fits: at most" in str(plan)
    assert "training stage 2 of 3: long on 8 h100: fits" in str(plan)


def test_no_figure_is_cut_at_80_columns_and_no_table_is_shown_twice(tmp_path):
    numbers = mythos_ds.plan_run(staged(tmp_path)).numbers
    numbers["stages"][2] = {**numbers["stages"][0], "name": "anneal"}
    # Figures as long as those of 1t, which takes longer to plan.
    for part in (numbers, *numbers["stages"]):
        part["costs"] = [{**cost, "days": 1443.7, "dollars": 20_326_746.0} for cost in part["costs"]]
        part["steps"] += 894_070
    text = io.StringIO()
    print_run(Console(file=text, width=80), "1t", numbers)
    shown = text.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    together = shown[shown.index("Cost of all stages") : shown.index("training stage 1 of 3")]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in together.splitlines() if "│" in line]
    assert [row[0] for row in rows[:2]] == ["as built", "bound"]
    assert all(row[0].startswith("target ") for row in rows[2:])
    assert all(row[1:] == ["1,443.7", "$20.3M"] for row in rows)
    assert shown.count("Memory of the fullest GPU") == 2
    last = " ".join(shown[shown.index("training stage 3 of 3") :].split())
    assert "as in stage pretrain: parameters, memory, a mean step, assumptions, cost" in last
    assert "┃" not in last


def test_a_long_stage_that_does_not_fit_is_named_and_the_remedy_mends_it(tmp_path, capsys):
    path = staged(tmp_path, {"seq_len": 131072, "micro_batch_size": 2, "global_batch_size": 16})
    command = ["--config", str(path)]
    assert run_tool(PLAN.parser(), PLAN.work, [*command, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["fits"], numbers["binding_stage"], numbers["binding"]) == (False, "long", "activations")
    assert [part["fits"] for part in numbers["stages"]] == [True, False, False]
    assert numbers["remedy"]
    assert numbers["remedy"]["stages.pretrain.training.micro_batch_size"] == 2
    overrides = [f"{key}={json.dumps(value)}" for key, value in numbers["remedy"].items()]
    mended = mythos_ds.plan_run(path, overrides=overrides)
    assert mended.fits
    assert run_tool(PLAN.parser(), PLAN.work, [*command, "--write", str(tmp_path / "mended.json")]) == 0
    assert "does not fit in long, anneal" in capsys.readouterr().out.replace("\n", " ")
    assert mythos_ds.plan_run(tmp_path / "mended.json").numbers == mended.numbers


def test_what_is_written_keeps_the_stages_with_one_layout_that_fits_all(tmp_path, capsys):
    path, chosen, picture = staged(tmp_path), tmp_path / "chosen.json", tmp_path / "plan.png"
    command = ["--config", str(path), "--objective", "time", "--layouts", "2", "--write", str(chosen)]
    command += ["--picture", str(picture), "--compare", "--json"]
    assert run_tool(PLAN.parser(), PLAN.work, command) == 0
    numbers = json.loads(capsys.readouterr().out)
    best, second = numbers["layouts"]
    assert best["days_as_built"] <= second["days_as_built"]
    written, given = load_config(str(chosen)), load_config(str(path))
    assert [stage.name for stage in written.stages] == [stage.name for stage in given.stages]
    assert len({stage.config.parallel for stage in written.stages}) == 1
    for stage, before in zip(written.stages, given.stages, strict=True):
        rows = best["changes"][f"stages.{stage.name}.training.micro_batch_size"]
        assert stage.config.training == before.config.training.model_copy(update={"micro_batch_size": rows})
        assert (stage.config.model, stage.config.data) == (before.config.model, before.config.data)
    found = mythos_ds.plan_run(chosen)
    assert found.fits
    assert found.numbers["memory_total_bytes"] == best["memory_total_bytes"]
    assert {key for key in best["changes"] if key.startswith("parallel.")} == {
        f"parallel.{name}" for name in ("ep_size", "pp_size", "activation_checkpointing", "dispatch", "overlap")
    }  # fmt: skip
    contexts = [part["comparison"][0]["serving_flops_per_token"] for part in numbers["stages"]]
    assert contexts[0] < contexts[1] == contexts[2]
    assert picture.stat().st_size > 10_000


def test_the_tokens_of_a_run_with_stages_are_those_of_its_stages(tmp_path, capsys):
    path = staged(tmp_path)
    assert run_tool(PLAN.parser(), PLAN.work, ["--config", str(path), "--tokens", "10T"]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    assert "stages.pretrain.training.max_tokens" in refused
    with pytest.raises(ConfigError, match=r"stages\.pretrain\.training\.max_tokens"):
        mythos_ds.plan_run(path, tokens=1e12)


def test_a_step_is_rehearsed_in_the_stage_that_has_it(tmp_path):
    loaded = load_config(str(staged(tmp_path)))
    stages = resolve_stages(loaded.stages, planned_world_size(loaded.config))
    assert [start.step for start in starts_of(stages)] == [0, 115, 878]
    assert starts_of(stages)[1].sample == PRETRAIN_SAMPLES
    cases: dict[tuple[int | None, int | None], tuple[int, int]]
    cases = {(None, None): (0, 0), (None, 114): (0, 114), (None, 115): (1, 115), (None, 9999): (2, 9999)}
    cases |= {(1, None): (1, 115), (2, 900): (2, 900)}
    assert {case: REHEARSE.place(stages, *case) for case in cases} == cases
    for step, nearest in ((114, 115), (878, 877)):
        with pytest.raises(ConfigError, match=rf"115 \.\. 877 in --stage long; nearest: {nearest}"):
            REHEARSE.place(stages, 1, step)


def test_a_later_stages_curriculum_grows_from_the_mean_before_it(tmp_path):
    """Planned FLOPs, time and what a dry run says; where the mean does not change, nothing grows."""
    path = staged(tmp_path)
    content = json.loads(path.read_text())
    plain = mythos_ds.plan_run(path).numbers["stages"][1]
    content["stages"][1]["training"]["depth_curriculum_steps"] = 400
    content["stages"][2]["training"]["depth_curriculum_steps"] = None
    path.write_text(json.dumps(content))
    own = mythos_ds.plan_run(path).numbers["stages"][1]
    for key in ("mean_loops", "training_flops_per_token"):
        assert own["flops"][key] == pytest.approx(plain["flops"][key])
    assert own["compute_s"] == pytest.approx(plain["compute_s"])
    mean = content["model"]["mean_recurrence"]
    content["stages"][1]["model"]["mean_recurrence"] = mean + 4
    path.write_text(json.dumps(content))
    stages = resolve_stages(load_config(str(path)).stages, 32)
    long, start = stages[1].run, starts_of(stages)[1]
    sampler = DepthSampler.of(long.config, start)
    drawn = [sampler.loops_at(start.step + step) for step in range(long.max_steps)]
    assert mean_training_depth(long.config, long.grows_from) == pytest.approx(sum(drawn) / long.max_steps, rel=0.04)
    assert f"its mean grows from {mean} over 400 steps" in dry_run_report(long)
