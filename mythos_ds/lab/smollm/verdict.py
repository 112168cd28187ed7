"""What the recipe on SmolLM2-135M is held to: a line for each figure, held or not, and a picture of the losses."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mythos_ds.analysis.loop_losses import paired

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A figure. most: what it may be at most; None where it is only reported."""

    name: str
    measured: float
    error: float | None
    most: float | None

    @property
    def held(self) -> bool | None:
        """Whether the figure is what is asked; None where nothing is."""
        return None if self.most is None else self.measured <= self.most

    def cells(self) -> list[str]:
        """The row of a table."""
        error = "" if self.error is None else f" ± {self.error:.4f}"
        form = f"{self.measured:.1e}" if self.error is None and 0 < self.measured < 1e-3 else f"{self.measured:+.4f}"
        verdict = {None: "reported", True: "held", False: "NOT HELD"}[self.held]
        return [self.name, form + error, "" if self.most is None else f"<= {self.most:g}", verdict]

    def as_json(self) -> dict[str, Any]:
        """All of it, with the verdict."""
        return {**asdict(self), "held": self.held}


_CONTROL = "the source trained on equal tokens"
HEAD = ["figure (losses in nats per token)", "measured", "asked", ""]


def difference(name: str, own: tuple[Results, int], other: tuple[Results, int], most: float | None) -> Claim:
    """One loss less another, on the same text; each an evaluation and a loop count."""
    (first, loops), (second, others) = own, other
    assert first["text"] == second["text"], "losses of different texts"
    mean, error = paired(first["sequences"][str(loops)], second["sequences"][str(others)])
    return Claim(name, mean, error, most)


def lines(results: Results) -> list[Claim]:
    """The figures of the recipe itself."""
    untrained, trained = results["untrained"], results["trained"]
    found = [Claim("untrained, 1 loop: largest difference to the source's logits", results["source"]["difference"],
                  None, 1e-3)]  # fmt: skip
    for loops in (2, 4):
        name = f"untrained: {loops} loops less 1 loop"
        found.append(difference(name, (untrained, loops), (untrained, 1), 0.0))
    for loops in (2, 3, 4, 8):
        name = f"trained: {loops} loops less its own 1 loop"
        found.append(difference(name, (trained, loops), (trained, 1), -0.003))
    found.append(difference("trained: 2 loops less the untrained source", (trained, 2), (untrained, 1), None))
    return [*found, *_exports(results["chat"])]


def full_lines(results: Results) -> list[Claim]:
    """The figures of the comparisons: seeds, controls, and what not to do."""
    pairs = [("trained", "control"), ("trained_1", "control_1")]
    seeds = [
        difference(f"seed {seed}: 2 loops less {_CONTROL}", (results[a], 2), (results[b], 1), None)
        for seed, (a, b) in enumerate(pairs)
    ]
    mean = sum(line.measured for line in seeds) / len(seeds)
    error = sum((line.error or 0.0) ** 2 for line in seeds) ** 0.5 / len(seeds)
    negative, untrained = results["negative"], results["negative_untrained"]
    return [
        *seeds,
        Claim(f"mean of the seeds: 2 loops less {_CONTROL}", mean, error, 0.0),
        difference("2 loops less the source trained at equal compute (the loop is expected to lose)",
                   (results["trained"], 2), (results["control_compute"], 1), None),
        difference("10 + 10 + 10, A 0.447, untrained: 4 loops less 1 loop", (untrained, 4), (untrained, 1), None),
        difference("10 + 10 + 10, A 0.447, trained: 4 loops less its own 1 loop", (negative, 4), (negative, 1), None),
    ]  # fmt: skip


def tuned_lines(results: Results) -> list[Claim]:
    """The figures of tuning on questions and answers."""
    untuned, tuned = results["untuned"], results["tuned"]
    found = [
        difference(f"held-out answers, {loops} loops: tuned less untuned", (tuned, loops), (untuned, loops), -0.05)
        for loops in (1, 2)
    ]
    found.append(difference("held-out answers, tuned: 2 loops less 1 loop", (tuned, 2), (tuned, 1), None))
    for own in results["answers"]:
        name = f"answers of the tuned model at {own['loops']} loops that do not end as a turn does, share"
        found.append(Claim(name, 1 - own["ended"] / own["asked"], None, 0.1))
    return [*found, *_exports(results["tuned_chat"])]


def _exports(chats: Sequence[Results]) -> list[Claim]:
    """Tokens of answers in the chat template, of a model and its export."""
    found = []
    for chat in chats:
        differ = sum(a != b for a, b in zip(chat["ours"], chat["export"], strict=True))
        found.append(Claim(f"chat, {chat['loops']} loops: tokens of the export that differ", differ, None, 0.0))
    return found


def draw(results: Results, path: Path) -> None:
    """Loss against loops, less that of the untrained source."""
    from matplotlib.figure import Figure

    shown: Sequence[tuple[str, str]] = (
        ("untrained", "12 + 10 + 8, A 0.05, untrained"),
        ("trained", "the same, trained, seed 0"),
        ("trained_1", "the same, trained, seed 1"),
        ("negative_untrained", "10 + 10 + 10, A 0.447, untrained"),
        ("negative", "the same, trained"),
    )
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    base = results["untrained"]["loss"]["1"]
    for index, (name, label) in enumerate(shown):
        if name in results:
            losses = {int(loops): loss - base for loops, loss in results[name]["loss"].items()}
            axes.plot(list(losses), list(losses.values()), "o-", ms=4, lw=1.2, color=f"C{index}", label=label)
    for name, label in (("control", "the source, trained on equal tokens"), ("control_compute", "at equal compute")):
        if name in results:
            axes.axhline(results[name]["loss"]["1"] - base, lw=0.9, ls="--", color="grey" if name == "control" else "k")
            axes.text(8, results[name]["loss"]["1"] - base, label, fontsize=7, ha="right", va="bottom")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="loops", ylabel="loss less the source's (nats per token)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
