"""Composed facts: the split leaks nothing, every fact is seen alone, and a run measures while it trains."""

import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from mythos_ds.lab.spec import RunSpec
from mythos_ds.lab.studies.grokking import ARMS, SIZES, WORKER, reached, runs
from mythos_ds.lab.sweep import run_all, run_folder, start_run
from mythos_ds.lab.tasks.facts import SPLITS, FactTask, Repeated, guesses, measured_steps

TASK = FactTask(entities=30, relations=8, degree=5, ood_share=0.3, held_out_share=0.2, graph_seed=1)


def _queries(task: FactTask) -> dict[str, set[tuple[int, ...]]]:
    return {name: set(map(tuple, tokens.tolist())) for name, (tokens, _) in task.splits().items()}


def _facts(task: FactTask) -> dict[tuple[int, int], int]:
    """(h, r) -> t, read from the atomic samples."""
    tokens, labels = task.splits()["atomic"]
    return {(int(h), int(r)): int(t) for (h, r, _), (_, t, _) in zip(tokens, labels, strict=True)}


def _used(name: str) -> set[tuple[int, int]]:
    """The facts that the queries of a split follow."""
    tokens, labels = TASK.splits()[name]
    firsts = {(int(h), int(r)) for h, r, _ in tokens}
    return firsts | {(int(b), int(r)) for (_, b, _), (_, _, r) in zip(labels, tokens, strict=True)}


def test_answers_follow_from_the_facts() -> None:
    facts, splits = _facts(TASK), TASK.splits()
    assert len(facts) == TASK.entities * TASK.degree
    for name in SPLITS[1:]:
        tokens, labels = splits[name]
        assert len(tokens) > 50
        for (h, first, second), answers in zip(tokens.tolist(), labels.tolist(), strict=True):
            bridge = facts[h, first]
            assert answers == [h, bridge, facts[bridge, second]]


def test_no_test_query_and_no_fact_apart_is_in_a_training_query() -> None:
    queries = _queries(TASK)
    trained = queries["train"] | queries["atomic"]
    assert not trained & (queries["held_out"] | queries["ood"])
    assert not queries["held_out"] & queries["ood"]
    # No fact of an out-of-distribution query is part of any training query, at either place ...
    assert not _used("ood") & (_used("train") | _used("held_out"))
    # ... but each is trained on alone, as all facts are.
    assert _used("ood") | _used("held_out") | _used("train") <= _facts(TASK).keys()


def test_the_split_has_the_shares_asked_for_and_depends_on_the_seed() -> None:
    queries = _queries(TASK)
    inside = len(queries["train"]) + len(queries["held_out"])
    assert len(queries["held_out"]) == round(0.2 * inside)
    assert 0.3 < inside / (30 * 5 * 5) < 0.7  # both facts of 70 %
    assert _queries(TASK) == queries
    assert _queries(replace(TASK, graph_seed=2))["atomic"] != queries["atomic"]


@pytest.mark.parametrize("scale", SIZES)
def test_the_sizes_have_queries_of_each_kind(scale: str) -> None:
    task = FactTask(*SIZES[scale][0], graph_seed=0)
    splits = task.splits()
    assert all(len(splits[name][0]) >= 100 for name in SPLITS)
    assert max(int(np.max(tokens)) for tokens, _ in splits.values()) < task.entities + task.relations
    assert {arm for arm, _ in runs(scale, "data")} <= {arm.name for arm in ARMS}


def test_training_data_are_the_facts_and_the_training_queries_once_an_epoch() -> None:
    splits = TASK.splits()
    seen = np.concatenate([splits["atomic"][0], splits["train"][0]])
    samples = Repeated((splits["atomic"], splits["train"]), seed=0, samples=10**6)
    epochs = [[tuple(samples[index]["tokens"]) for index in range(n * len(seen), (n + 1) * len(seen))] for n in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(tuple, seen))
    assert epochs[0] != epochs[1]
    late = 3 * len(seen) + 7
    assert tuple(Repeated((splits["atomic"], splits["train"]), 0, 10**6)[late]["tokens"]) == epochs[1][7]


def test_the_guesses_know_the_last_relation_only() -> None:
    facts, splits = _facts(TASK), TASK.splits()
    tails = {relation: [t for (_, r), t in facts.items() if r == relation] for _, relation in facts}
    at_random, best = (guesses(splits, commonest=flag) for flag in (False, True))
    assert best["atomic"] == pytest.approx(sum(max(map(own.count, own)) for own in tails.values()) / len(facts))
    asked = zip(*(part[:, 2].tolist() for part in splits["ood"]), strict=True)
    chances = [tails[r].count(t) / len(tails[r]) for r, t in asked]
    assert at_random["ood"] == pytest.approx(sum(chances) / len(chances))
    assert at_random["atomic"] < best["atomic"] < 1


def test_a_stage_is_reached_at_the_first_step_over_the_line() -> None:
    history = [(10, {"ood": 0.2}), (20, {"ood": 0.9}), (30, {"ood": 0.5})]
    assert reached(history, "ood") == 20
    assert reached(history[:1], "ood") is None
    assert measured_steps(25) == [10, 12, 15, 18, 22, 25]


def _tiny(tmp_path: Path) -> RunSpec:
    spec = runs("cpu", str(tmp_path))["looped", 0]
    task = FactTask(entities=6, relations=3, degree=3, ood_share=0.3, held_out_share=0.2, graph_seed=0)
    spec.config["model"] |= {"vocab_size": 9, "dim": 16, "ffn_dim": 32, "expert_dim": 64}
    spec.config["training"] |= {
        "lr_reference_dim": 16, "micro_batch_size": 16, "global_batch_size": 16, "max_steps": 40, "warmup_steps": 5,
    }  # fmt: skip
    spec.config["monitor"] |= {"log_interval": 1}
    return replace(spec, chains={"worker": WORKER, **asdict(task)}, loops=(1, 4))


def test_a_run_measures_while_it_trains_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    spec = _tiny(tmp_path)
    folder = run_folder(tmp_path, spec)
    process = start_run(folder, spec)
    metrics, limit = folder / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_text().count("grad_norm") > 12):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 0
    assert not (folder / "result.json").exists()
    result = run_all({"x": spec}, tmp_path, jobs=1, limit_s=100)["x"]
    assert [step for step, _ in result["history"]] == measured_steps(40)
    assert result["history"][-1][1] == result["final"]["4"]
    assert result["final"].keys() == {"1", "4"}
    assert all(0 <= share <= 1 for _, shares in result["history"] for share in shares.values())
    assert [step for step, _ in result["curve"]] == list(range(1, 41))
    assert result["curve"][-1][1] < 0.8 * result["curve"][0][1]
