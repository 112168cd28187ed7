"""Does the model lose where a token's experts must lie in few groups, as node-limited routing asks?

At the ratio of the large presets: 64 experts in 16 groups of 4, 4 chosen, in any group, in 4 of them (a quarter) or in
2 (an eighth); on text and on permutation chains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any

from mythos_ds.lab.spec import Arm, RunSpec, make_spec
from mythos_ds.lab.studies import khop, language
from mythos_ds.lab.studies.language import MEAN, loss_at
from mythos_ds.lab.study import Report, Results, Study, spread
from mythos_ds.lab.tasks.chains import ChainTask

LIMITS: dict[str, int | None] = {"unlimited": None, "limit_4": 4, "limit_2": 2}
"""Arms, and how many of the groups a token may use."""
UNLIMITED = "unlimited"
_GROUPS = 16
_MIXTURE = {"model.n_experts": 64, "model.n_experts_per_tok": 4, "model.n_shared_experts": 1}
_SIZES = {"cpu": "S8 R6", "gpu": "S16 R8"}
"""Of the chains, by scale."""
_HOPS, _DEPTH = 10, 24
_MOST_NATS, _MOST_POINTS = 0.01, 2.0
"""What a limit may cost: nats of loss, and points of accuracy."""


def arms(task: str) -> list[Arm]:
    """The arms on "text" or on "khop"."""
    made = []
    for name, limit in LIMITS.items():
        grouped = {} if limit is None else {"model.n_expert_groups": _GROUPS, "model.n_limited_groups": limit}
        label = "any group" if limit is None else f"{limit} of {_GROUPS} groups"
        made.append(Arm(f"{task}/{name}", label, {**_MIXTURE, **grouped}))
    return made


def runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    """Each arm on text and on chains, with three seeds; the arms of a seed see the same data."""
    specs = language.runs(arms("text"), scale, data_dir)
    entities, relations, dim, batch, steps = khop.SIZES[scale][_SIZES[scale]]
    base = khop.base(dim, batch, steps)
    for arm in arms("khop"):
        for seed in khop.SEEDS:
            task = ChainTask(entities, relations, khop.TRAIN_HOPS, khop.TEST_HOPS, table_seed=seed)
            specs[arm.name, seed] = make_spec(base, arm, seed, loops=khop.LOOPS, data_dir=data_dir, chains=asdict(task))
    return specs


def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Loss and accuracy by limit, what each limit costs seed by seed, and whether that is within what it may."""
    rows = [["experts of a token in", "loss at T", "minus any group", "standard error", "largest expert load / mean",
             f"{_HOPS} hops, T={_DEPTH} (%)", "minus any group", "verdict"]]  # fmt: skip
    numbers: dict[str, Any] = language.numbers(results, arms("text"))
    loss = {name: _values(results, f"text/{name}", lambda result: loss_at(result, MEAN)) for name in LIMITS}
    share = {name: _values(results, f"khop/{name}", _accuracy) for name in LIMITS}
    for name, text in zip(LIMITS, arms("text"), strict=True):
        worse = _differences(loss[name], loss[UNLIMITED])
        error = _standard_error(worse)
        points = _differences(share[name], share[UNLIMITED])
        fine = _mean(worse) <= min(_MOST_NATS, 2 * error) and _mean(points) >= -_MOST_POINTS
        verdict = "" if name == UNLIMITED else "fine" if fine else "costs"
        rows.append([
            text.label, spread([*loss[name].values()], 4), spread(worse, 4), f"{error:.4f}",
            spread([result["last"]["router/load_max_mean"] for result in language.finished(results, text.name)], 2),
            spread([*share[name].values()], 1), spread(points, 1), verdict,
        ])  # fmt: skip
        numbers[f"verdict/{name}"] = {
            "loss": loss[name], "loss_minus_unlimited": worse, "standard_error": error,
            "accuracy": share[name], "accuracy_minus_unlimited": points, "fine": fine,
        }  # fmt: skip
    caption = (
        f"Text and chains: mean and deviation over {len(language.SEEDS)} seeds; fine: at most two standard errors, "
        f"{_MOST_NATS} nats and {_MOST_POINTS:.0f} points"
    )
    pictures = [("groups.png", lambda path: draw(results, path))]
    return Report(numbers, [(caption, rows)], pictures)


def _values(results: Results, arm: str, read: Any) -> dict[int, float]:
    return {
        seed: read(result)
        for (name, seed), result in sorted(results.items())
        if name == arm and "diverged" not in result
    }


def _accuracy(result: Mapping[str, Any]) -> float:
    return 100.0 * float(result["accuracy"][str(_DEPTH)][_HOPS - 1])


def _differences(own: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    return [value - reference[seed] for seed, value in own.items() if seed in reference]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _standard_error(values: Sequence[float]) -> float:
    """Computes the standard error of the mean; nan of fewer than two values."""
    if len(values) < 2:
        return float("nan")
    mean = _mean(values)
    return sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def draw(results: Results, path: Path) -> None:
    """Loss against loops on text, and accuracy against hops on chains at one depth: a line per limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for text, chains in zip(arms("text"), arms("khop"), strict=True):
        losses = [result["losses"] for result in language.finished(results, text.name)]
        if losses:
            loops = sorted(map(int, losses[0]))
            left.plot(loops, [_mean([own[str(n)] for own in losses]) for n in loops], "o-", ms=3, label=text.label)
        shares = [result["accuracy"][str(_DEPTH)] for result in language.finished(results, chains.name)]
        if shares:
            hops = range(1, khop.TEST_HOPS + 1)
            right.plot(hops, [100 * _mean([own[n - 1] for own in shares]) for n in hops], "o-", ms=3, label=text.label)
    left.set(xlabel="loops at evaluation", ylabel="held-out loss (nats per token)")
    left.set_xscale("log", base=2)
    right.set(xlabel="hops", ylabel=f"accuracy at {_DEPTH} loops (%)", ylim=(0, 104))
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)


STUDY = Study("groups", "What does it cost to limit a token's experts to few groups?", runs, analyse)
