"""Exit rules compared at equal mean depth: what a token loses by leaving the loop early, rule by rule.

A threshold rarely gives the mean depth that is asked for: a result is then the mix of the two nearest thresholds that
does, each token taking one of them by chance. Depth counts loops; what a rule itself costs (`kl`, `entropy` and
`agreement` need the coda and the head after every loop) is not in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mythos_ds.analysis.plots import new_panels, save
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.inference.exit_rules import exit_loops, scores, trace_loops
from mythos_ds.model.mythos import MythosModel

CLASSES = ("whitespace", "word start", "continuation", "digit", "punctuation")
ORACLE, RANDOM, FIXED = "oracle", "random", "fixed"
_BISECTIONS = 60


@dataclass(frozen=True)
class Exits:
    """Exit loops int64 [tokens], those of `deep` for a share of the tokens and of `shallow` for the rest."""

    shallow: Tensor
    deep: Tensor
    share: float
    threshold: float

    def mean(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """What `of` says of exit loops, in expectation."""
        return (1.0 - self.share) * of(self.shallow) + self.share * of(self.deep)


def exits_by_score(score: Tensor, depth: float) -> Exits | None:
    """A rule's exits at a mean depth, from its score [loops, tokens]; None where no threshold reaches so low (a score
    that is infinite after the first loop lets nobody leave there)."""
    levels = [*score[score.isfinite()].unique().tolist(), float("inf")]
    return _bracketed(lambda level: exit_loops(score, levels[level]), depth, len(levels) - 1, levels)


def oracle_exits(loss: Tensor, depth: float) -> Exits | None:
    """The exits of least mean loss among all of at most this mean depth, for one who knows the loss [loops, tokens].

    Each token takes the loop of least loss + price * loop; the price is what gives the mean depth (the linear program's
    dual). So no rule can be better at the same depth. Where leaving at the least loss is cheaper still, that is it.
    """
    loops = torch.arange(1, len(loss) + 1, dtype=loss.dtype)[:, None]

    def at(price: float) -> Tensor:
        return (loss + price * loops).argmin(0) + 1

    if _mean(at(0.0)) <= depth:
        return Exits(at(0.0), at(0.0), 0.0, 0.0)
    low, high = 0.0, (loss.max() - loss.min()).item() + 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean(at(middle)) > depth else (low, middle)
    return _mixed(at(high), at(low), depth, high)


def _bracketed(at: Callable[[int], Tensor], depth: float, last: int, levels: list[float]) -> Exits | None:
    """The mix at `depth` of neighbouring levels; the mean depth falls with the level, which ends at `last`."""
    low, high = 0, last
    if _mean(at(high)) > depth + 1e-9:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _mean(at(middle)) > depth else (low, middle)
    return _mixed(at(high), at(low), depth, levels[high])


def _mixed(shallow: Tensor, deep: Tensor, depth: float, threshold: float) -> Exits:
    low, high = _mean(shallow), _mean(deep)
    share = 0.0 if high <= low else min(max((depth - low) / (high - low), 0.0), 1.0)
    return Exits(shallow, deep, share, threshold)


def _mean(exits: Tensor) -> float:
    return exits.double().mean().item()


def measure(
    model: MythosModel,
    batches: Sequence[Mapping[str, Tensor]],
    n_loops: int,
    *,
    depths: Sequence[float] = (2, 3, 4, 6),
    seed: int = 0,
) -> dict[str, Any]:
    """Mean loss (nats per token) against mean depth of the exit rules, the oracle, chance (each token, each loop alike)
    and a fixed depth (linear between whole numbers), in JSON values.

    batches: tokens, targets, positions int64 [rows, seq], and where token classes are wanted `classes`, numbers of
    CLASSES. depths: mean depths for which the shares of tokens by class and exit loop are given; those beyond n_loops
    are left out. A loss is null where a rule cannot go so low. Raises ValueError for a model with ACT.
    """
    loss, found, classes = _collect(model, batches, n_loops)
    found[RANDOM] = torch.rand(loss.shape, generator=torch.Generator().manual_seed(seed))
    wanted = [float(depth) for depth in depths if 1 <= depth <= n_loops]
    grid = sorted({*wanted, *(float(loops) for loops in range(1, n_loops + 1))})
    by_loop = loss.mean(1).tolist()
    whole = range(1, n_loops + 1)
    rules: dict[str, Any] = {FIXED: {"loss": [float(np.interp(depth, whole, by_loop)) for depth in grid]}}
    for name in [*found, ORACLE]:
        losses, thresholds, shares = [], [], {}
        for depth in grid:
            exits = oracle_exits(loss, depth) if name == ORACLE else exits_by_score(found[name], depth)
            losses.append(None if exits is None else _loss(loss, exits))
            thresholds.append(None if exits is None or np.isinf(exits.threshold) else exits.threshold)
            if exits is not None and depth in wanted:
                shares[f"{depth:g}"] = _shares(exits, classes, n_loops)
        rules[name] = {"loss": losses, "threshold": thresholds, "exit_shares": shares}
    return {
        "n_loops": n_loops, "trained_depth": model.config.mean_recurrence, "tokens": loss.shape[1],
        "depths": grid, "rules": rules, "least_loss": loss.amin(0).mean().item(),
    }  # fmt: skip


def _collect(
    model: MythosModel, batches: Sequence[Mapping[str, Tensor]], n_loops: int
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Losses fp64 and scores fp32 [loops, tokens] of all batches, and the tokens' classes."""
    losses, by_rule = [], []
    for batch in batches:
        trace = trace_loops(model, batch["tokens"], n_loops, batch["positions"], batch["targets"])
        assert trace.loss is not None, "targets are given"
        losses.append(trace.loss.flatten(1).double().cpu())
        by_rule.append({name: score.flatten(1).cpu() for name, score in scores(trace).items()})
    classes = torch.cat([batch["classes"].flatten().cpu() for batch in batches]) if "classes" in batches[0] else None
    found = {name: torch.cat([rules[name] for rules in by_rule], 1) for name in by_rule[0]}
    return torch.cat(losses, 1), found, classes


def _loss(loss: Tensor, exits: Exits) -> float:
    return exits.mean(lambda loops: loss.gather(0, loops[None] - 1).mean()).item()


def _shares(exits: Exits, classes: Tensor | None, n_loops: int) -> dict[str, list[float]]:
    """By class, the share of its tokens that leaves after loop 1 .. n_loops; a class without tokens is left out."""
    groups = {"all": torch.ones_like(exits.deep, dtype=torch.bool)}
    if classes is not None:
        groups |= {name: classes == number for number, name in enumerate(CLASSES)}
    return {
        name: exits.mean(lambda loops, own=own: _histogram(loops[own], n_loops)).tolist()  # type: ignore[misc]
        for name, own in groups.items()
        if own.any()
    }


def _histogram(loops: Tensor, n_loops: int) -> Tensor:
    return torch.bincount(loops - 1, minlength=n_loops) / len(loops)


def token_classes(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """int64 like `tokens` [rows, seq]: numbers of CLASSES. A piece of letters continues a word where it has no space
    before it and the piece before it in the row ends in a letter, a digit or an underscore."""
    ids = tokens.unique().tolist()
    texts = [tokenizer.decode([token]) for token in ids]
    place = torch.searchsorted(torch.tensor(ids), tokens.cpu())
    kind = torch.tensor([_kind(text) for text in texts])[place]
    spaced = torch.tensor([text[:1].isspace() for text in texts])[place]
    ends_in_word = torch.tensor([_in_word(text[-1:]) for text in texts])[place]
    follows = torch.nn.functional.pad(ends_in_word[:, :-1], (1, 0))
    return torch.where((kind == 1) & follows & ~spaced, 2, kind)


def _kind(text: str) -> int:
    first = text.strip()[:1]
    if not first:
        return 0
    return 3 if first.isdigit() else 1 if _in_word(first) else 4


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Loss against mean depth by rule, and by token class who leaves when, as a PNG."""
    figure, [[left, right]] = new_panels(1, 2)
    for name, rule in results["rules"].items():
        points = [(x, y) for x, y in zip(results["depths"], rule["loss"], strict=True) if y is not None]
        style = {FIXED: "k-", RANDOM: "k:", ORACLE: "k--"}.get(name, ".-")
        left.plot(*zip(*points, strict=True), style, lw=1.2, label=name.replace("_", " "))
    left.axvline(results["trained_depth"], color="grey", lw=0.8)
    left.set(xlabel="mean loops per token (grey: mean of training)", ylabel="loss (nats per token)")
    left.legend(fontsize=8)
    rule = "gate" if "gate" in results["rules"] else "kl"
    shares = results["rules"][rule]["exit_shares"]
    if shares:
        depth = min(shares, key=lambda given: abs(float(given) - results["trained_depth"]))
        for name, values in shares[depth].items():
            right.plot(range(1, len(values) + 1), values, "k-" if name == "all" else ".-", lw=1.2, label=name)
        right.set(title=f"{rule}, mean depth {depth}", xlabel="exit after loop", ylabel="share of tokens")
        right.legend(fontsize=8)
    save(figure, path)
