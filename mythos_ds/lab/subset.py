"""A part of a study: some of its arms and seeds, and the table of what these runs measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from mythos_ds.config.error_messages import did_you_mean
from mythos_ds.errors import LabError
from mythos_ds.lab.spec import RunSpec
from mythos_ds.lab.study import Report, Results
from mythos_ds.lab.sweep import Result

Specs = Mapping[tuple[str, int], RunSpec]
_MEASURES = {
    "losses": "loss in nats per token",
    "loss": "loss in nats per token",
    "accuracy": "accuracy, mean over hops",
    "final": "share answered",
}
"""What workers measure by loop count, and what a table calls it."""


def select(specs: Specs, arms: Sequence[str] | None, seeds: Sequence[int] | None) -> dict[tuple[str, int], RunSpec]:
    """Return the runs of the arms and seeds that are named; None stands for all.

    `looped` names every arm `SIZE/looped` and `SIZE` all arms of a size. Raises LabError for a name or seed that the
    study does not have, and where no run has both.
    """
    known_arms = dict.fromkeys(arm for arm, _ in specs)
    known_seeds = sorted({seed for _, seed in specs})
    problems = []
    for word in arms or ():
        if not any(_names(word, arm) for arm in known_arms):
            parts = dict.fromkeys([*known_arms, *(part for arm in known_arms for part in arm.split("/"))])
            allowed = ", ".join(dict.fromkeys(arm.rpartition("/")[2] for arm in known_arms))
            problems.append(f"--arms: given {word}; allowed: {allowed}{did_you_mean(word, parts)}")
    for seed in seeds or ():
        if seed not in known_seeds:
            nearest = min(known_seeds, key=lambda known: abs(known - seed))
            allowed = ", ".join(map(str, known_seeds))
            problems.append(f"--seeds: given {seed}; allowed: {allowed}; nearest: {nearest}")
    if problems:
        raise LabError("\n".join(problems))
    chosen = {
        (arm, seed): spec
        for (arm, seed), spec in specs.items()
        if (arms is None or any(_names(word, arm) for word in arms)) and (seeds is None or seed in seeds)
    }
    if not chosen:
        raise LabError("--arms and --seeds: given arms do not have the given seeds; leave one of them out")
    return chosen


def _names(word: str, arm: str) -> bool:
    return arm == word or arm.startswith(f"{word}/") or arm.endswith(f"/{word}")


def subset_report(results: Results) -> Report:
    """Return a row for each run: size, time, and what it measured by loop count (T)."""
    rows = [["arm", "seed", "parameters", "seconds", "ended"]]
    for (arm, seed), result in sorted(results.items()):
        parameters = f"{result['parameters']:,}" if "parameters" in result else ""
        seconds = f"{result['seconds']:.0f}" if "seconds" in result else ""
        rows.append([arm, str(seed), parameters, seconds, result.get("diverged", "as planned")])
    tables = [("Runs", rows)]
    for measure, caption in _MEASURES.items():
        own = {key: _numbers(result[measure]) for key, result in sorted(results.items()) if measure in result}
        if own:
            columns = sorted({column for numbers in own.values() for column in numbers})
            head = ["arm", "seed", *(f"T={loops} {split}".strip() for loops, split in columns)]
            cells = {
                key: [f"{row[column]:.4f}" if column in row else "" for column in columns] for key, row in own.items()
            }
            tables.append((caption, [head, *([arm, str(seed), *line] for (arm, seed), line in cells.items())]))
    numbers = {f"{arm}, seed {seed}": _kept(result) for (arm, seed), result in sorted(results.items())}
    return Report(numbers, tables)


def _numbers(measured: Mapping[str, Any]) -> dict[tuple[int, str], float]:
    """By loop count, and by split where there are several; hops become their mean."""
    found: dict[tuple[int, str], float] = {}
    for loops, value in measured.items():
        for split, number in (value if isinstance(value, dict) else {"": value}).items():
            found[int(loops), split] = sum(number) / len(number) if isinstance(number, list) else number
    return found


def _kept(result: Result) -> Result:
    """Everything but what a run says of each of its steps."""
    return {name: value for name, value in result.items() if name not in ("curve", "last", "history")}
