"""Studies that look into trained models: where the state goes, which experts loops choose, and who may leave early."""

from collections.abc import Callable
from typing import Any

from mythos_ds.analysis import exit_rule_comparison, stability
from mythos_ds.lab.spec import RunSpec
from mythos_ds.lab.studies import language, stress
from mythos_ds.lab.studies.language import BASELINE, MEAN
from mythos_ds.lab.studies.language_studies import LOOPS_ARMS
from mythos_ds.lab.study import Report, Results, Study, spread
from mythos_ds.lab.trained_models import Folders, measured, text, trained_model
from mythos_ds.train.exit_gate import train_exit_gate, with_exit_gate

_STABILITY_ARMS = [arm for arm in LOOPS_ARMS if arm.name in ("looped", "fixed", "full_gradient", "post")]
_STRESSED = [arm for arm in stress.arms() if arm.name in ("lti/1", "penalty/1", "addition/1", "concat/1")]
_GATE_STEPS = 200
_EXIT_LOOPS = 2 * MEAN
_EXIT_DEPTHS = (2.0, 3.0, 4.0, 6.0)


def _stability_runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    return {
        **language.runs(_STABILITY_ARMS, scale, data_dir, equal_flops=True),
        **language.runs(_STRESSED, scale, data_dir),
    }


def _analyse_stability(results: Results, folders: Folders, scale: str) -> Report:
    arms = [*_STABILITY_ARMS, *_STRESSED]
    found = measured(results, folders, arms, lambda model, batches: stability.measure(model, batches, iterations=10))
    rows = [["arm", "rho(A)", "||J|| at loop 1", "at T", "at 8T", "growth of a perturbation", "median residual at T",
             "at 8T", "state rms at T", "at 8T", "settle", "cycle", "drift"]]  # fmt: skip
    for arm in arms:
        own = found.get(arm.name, [])
        if not own:
            rows.append([arm.label, "diverged", *[""] * 11])
            continue
        rows.append([arm.label, *(_mean(own, read) for read in _STABILITY_COLUMNS)])
    first = {arm.label: found[arm.name][0] for arm in arms if arm.name in found}
    return Report(
        {name: [_without_orbits(one) for one in own] for name, own in found.items()},
        [("State over 8T loops: mean and deviation over seeds, 2 batches of 8 held-out sequences", rows)],
        [("stability.png", lambda path: stability.draw(first, path))],
    )


def _without_orbits(one: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name != "orbits"}


_STABILITY_COLUMNS: list[Callable[[dict[str, Any]], float]] = [
    lambda own: own["spectral_radius_A"],
    lambda own: own["jacobian"]["norm"][0],
    lambda own: own["jacobian"]["norm"][1],
    lambda own: own["jacobian"]["norm"][-1],
    lambda own: own["growth"]["rate"],
    lambda own: own["residual"]["0.5"][MEAN - 1],
    lambda own: own["residual"]["0.5"][-1],
    lambda own: own["state_rms"][MEAN - 1],
    lambda own: own["state_rms"][-1],
    lambda own: own["shares"]["settle"],
    lambda own: own["shares"]["cycle"],
    lambda own: own["shares"]["drift"],
]


def _mean(own: list[dict[str, Any]], read: Callable[[dict[str, Any]], float]) -> str:
    values = [read(one) for one in own]
    return spread(values, 3) if max(map(abs, values)) < 1000 else f"{max(values):.1e}"


def _analyse_halting(results: Results, folders: Folders, scale: str) -> Report:
    """Trains a gate on each seed's frozen model, then compares the rules."""
    found, names = [], []
    for key, folder in sorted(folders.items()):
        if "diverged" in results[key]:
            continue
        gated = with_exit_gate(trained_model(folder))
        batches = text(folder, batches=_GATE_STEPS, training=True)
        train_exit_gate(gated, batches, steps=_GATE_STEPS, n_loops=_EXIT_LOOPS, lr=1e-3)
        found.append(exit_rule_comparison.measure(gated, text(folder, batches=8), _EXIT_LOOPS, depths=_EXIT_DEPTHS))
        names.append(f"{key[0]}/{key[1]}")
    rows = [["rule", *(f"mean depth {depth:g}" for depth in _EXIT_DEPTHS), "against fixed at 3 (same seed)"]]
    at = [found[0]["depths"].index(depth) for depth in _EXIT_DEPTHS]
    for name in found[0]["rules"]:
        losses = [one["rules"][name]["loss"] for one in found]
        fixed = [one["rules"][exit_rule_comparison.FIXED]["loss"] for one in found]
        cells = [spread([own[i] for own in losses], 4) if losses[0][i] is not None else "" for i in at]
        gain = [own[at[1]] - other[at[1]] for own, other in zip(losses, fixed, strict=True) if own[at[1]] is not None]
        rows.append([name.replace("_", " "), *cells, spread(gain, 4)])
    return Report(
        dict(zip(names, found, strict=True)),
        [(f"Held-out loss at equal mean depth, at most {_EXIT_LOOPS} loops", rows)],
        [("halting.png", lambda path: exit_rule_comparison.draw(found[0], path))],
    )


STABILITY = Study("stability", "Does the state settle, and how far does a loop stretch it?", _stability_runs,
                  _analyse_stability)  # fmt: skip
HALTING = Study("halting", "Which exit rule loses least at equal mean depth?",
                lambda scale, data_dir: language.runs([BASELINE], scale, data_dir), _analyse_halting)  # fmt: skip
