"""A = 0.05 at the start, which a model cut from a dense one needs, beside the default from random weights.

On permutation chains (see khop.py) and on text (see language.py): the defaults' runs are those of these studies.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_ds.lab.spec import Arm, RunSpec, make_spec
from mythos_ds.lab.studies import khop, language
from mythos_ds.lab.study import Report, Results, Study, by_arm, spread
from mythos_ds.lab.tasks.chains import ChainTask, frontier

CONTROL = "decay_0.05"
ARMS = [Arm("looped", "A = 0.447, the default"), Arm("small", "A = 0.05", control=CONTROL)]
_TASKS = ("khop", "text")
_SHOWN = ((6, 5), (12, 10), (24, 20))
"""(loops, hops) of the table."""


def runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    """The runs by (task/arm, seed)."""
    size, (entities, relations, dim, batch, steps) = next(iter(khop.SIZES[scale].items()))
    chosen = khop.runs(scale, data_dir)
    specs = {("khop/looped", seed): chosen[f"{size}/looped", seed] for seed in khop.seeds(scale)}
    for seed in khop.seeds(scale):
        task = ChainTask(entities, relations, khop.TRAIN_HOPS, khop.TEST_HOPS, table_seed=seed)
        base = khop.base(dim, batch, steps)
        specs["khop/small", seed] = make_spec(
            base, ARMS[1], seed, loops=khop.LOOPS, data_dir=data_dir, chains=asdict(task)
        )
    text = language.runs([language.BASELINE, ARMS[1]], scale, data_dir)
    return {**specs, **{(f"text/{arm}", seed): spec for (arm, seed), spec in text.items()}}


def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Accuracy on chains and loss on text, each beside the default's."""
    hops = [["A at the start", *(f"{n} hops, T={loops} (%)" for loops, n in _SHOWN), "frontier at T=24"]]
    for arm in ARMS:
        own = [_accuracies(result) for result in by_arm(results, f"khop/{arm.name}")]
        cells = [spread([100 * table[loops][n - 1] for table in own], 0) for loops, n in _SHOWN]
        hops.append([arm.label, *cells, spread([frontier(table)[24] for table in own], 1)])
    text = {
        (arm.removeprefix("text/"), seed): result for (arm, seed), result in results.items() if arm.startswith("text/")
    }
    numbers = {task: {arm.name: [_kept(r) for r in by_arm(results, f"{task}/{arm.name}")] for arm in ARMS}
               for task in _TASKS}  # fmt: skip
    tables = [
        ("Chains: accuracy, mean and standard deviation over the seeds", hops),
        ("Text: held-out loss", language.table(text, ARMS, ARMS[0].name)),
    ]
    return Report(numbers, tables, [("decay.png", lambda path: draw(results, text, path))])


def _accuracies(result: Mapping[str, Any]) -> dict[int, list[float]]:
    return {int(loops): values for loops, values in result["accuracy"].items()}


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("accuracy", "losses", "seconds", "tokens") if name in result}


def draw(results: Results, text: Results, path: Path) -> None:
    """Accuracy at 10 hops, and loss on text, against the loop count."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, arm in enumerate(ARMS):
        curves = [{n: 100 * values[9] for n, values in _accuracies(result).items()}
                  for result in by_arm(results, f"khop/{arm.name}")]  # fmt: skip
        losses = [{int(n): loss for n, loss in result["losses"].items()} for result in by_arm(text, arm.name)]
        for axes, own in ((left, curves), (right, losses)):
            loops = sorted(own[0])
            columns = [[curve[n] for curve in own] for n in loops]
            low, high = ([edge(column) for column in columns] for edge in (min, max))
            axes.fill_between(loops, low, high, alpha=0.15, lw=0, color=f"C{index}")
            means = [sum(column) / len(column) for column in columns]
            axes.plot(loops, means, "o-", ms=3, color=f"C{index}", label=arm.label)
    left.set(ylabel="accuracy at 10 hops (%)", title="chains, trained on 5 hops")
    right.set(ylabel="held-out loss (nats per token)", title="text")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="loops (mean and range of the seeds)")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


STUDY = Study("decay", "Does a small A at the start also serve models from random weights?", runs, analyse)
