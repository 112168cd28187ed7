"""When a token may leave the loop at inference: what is read after every loop, and the rules that read it.

Leaving is reading out early. The loop goes on for all positions, so the keys and values that later positions see in it
keep evolving; nothing is frozen (compare `act` in model/halting.py). The coda too reads all positions at the same
loop: where positions leave at different loops, the loss of a trace is that of a coda whose other positions left at the
same one.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mythos_ds.model.mythos import MythosModel


@dataclass(frozen=True)
class LoopStep:
    """One loop of a forward: the state before and after it, fp32 [batch, seq, dim], and what would be predicted from
    the latter, fp32 logits [batch, seq, vocab]."""

    before: Tensor
    after: Tensor
    logits: Tensor


@dataclass(frozen=True)
class LoopTrace:
    """What each loop says of each position; all [loops, batch, seq], entry t is after loop t + 1."""

    latent_difference: Tensor
    """fp32 ||h_t - h_{t-1}|| / ||h_t||."""
    entropy: Tensor
    """fp32, of the prediction p_t, in nats."""
    kl: Tensor
    """fp32 KL(p_t || p_{t-1}) in nats; infinite after the first loop, which has none before it."""
    argmax: Tensor
    """int64, the likeliest token."""
    loss: Tensor | None
    """fp32 -log p_t(target) in nats; None without targets."""
    gate: Tensor | None
    """fp32, what the gate expects of one more loop, in nats; None for a model without one."""


@torch.no_grad()
def loop_steps(model: MythosModel, tokens: Tensor, n_loops: int, positions: Tensor | None = None) -> Iterator[LoopStep]:
    """Runs a forward of n_loops loops, loop by loop; the last logits are those of `model.forward`.

    tokens, positions: int64 [batch, seq]. Costs a coda and a head per loop; holds one loop at a time. Raises ValueError
    for a loop count below 1 or a model with ACT, whose output is not the state of one loop.
    """
    if n_loops < 1 or model.recurrent.halting is not None:
        raise ValueError(f"n_loops {n_loops}, halting {model.config.halting!r}; allowed: 1 or more, and no ACT")
    e, context = model.encode(tokens, positions=positions)
    h, _ = model.start_loop(e, context=context)
    for loop in range(n_loops):
        before = h
        h, _ = model.step_loop(h, e, loop=loop, last=loop == n_loops - 1, context=context)
        yield LoopStep(before.float(), h.float(), model.decode(h, context=context))


@torch.no_grad()
def trace_loops(
    model: MythosModel,
    tokens: Tensor,
    n_loops: int,
    positions: Tensor | None = None,
    targets: Tensor | None = None,
) -> LoopTrace:
    """Measures what the rules read of tokens int64 [batch, seq]; holds two loops' logits. `targets`: the next tokens,
    int64 [batch, seq], for the losses. Errors: see `loop_steps`."""
    gate, notes = model.recurrent.gate, defaultdict(list)
    previous: Tensor | None = None
    for loop, step in enumerate(loop_steps(model, tokens, n_loops, positions)):
        log_p = torch.log_softmax(step.logits, -1)
        p = log_p.exp()
        size = step.after.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        notes["latent_difference"].append((step.after - step.before).norm(dim=-1) / size)
        notes["entropy"].append(-(p * log_p).sum(-1))
        # Rounding makes the divergence of nearly equal predictions negative now and then.
        kl = torch.full_like(size, torch.inf) if previous is None else (p * (log_p - previous)).sum(-1).clamp_min(0)
        notes["kl"].append(kl)
        notes["argmax"].append(step.logits.argmax(-1))
        if targets is not None:
            notes["loss"].append(-log_p.gather(-1, targets[..., None])[..., 0])
        if gate is not None:
            notes["gate"].append(gate(step.after, step.before, loop))
        previous = log_p
    stacked: dict[str, Any] = {name: torch.stack(values) for name, values in notes.items()}
    return LoopTrace(**{"loss": None, "gate": None, **stacked})


def agreement(argmax: Tensor) -> Tensor:
    """Counts, negated, the loops for which a position's likeliest token [loops, batch, seq] has not changed: below
    0.5 - n it held for n loops."""
    runs = [torch.zeros_like(argmax[0])]
    for now, before in zip(argmax[1:], argmax[:-1], strict=True):
        runs.append(torch.where(now == before, runs[-1] + 1, 0))
    return -torch.stack(runs).float()


def scores(trace: LoopTrace) -> dict[str, Tensor]:
    """Gives by rule what has to fall below a threshold: fp32 [loops, batch, seq]. All but `gate`, which only a model
    that has one gives, need no training."""
    found = {
        "latent_difference": trace.latent_difference,
        "kl": trace.kl,
        "entropy": trace.entropy,
        "agreement": agreement(trace.argmax),
    }
    return found if trace.gate is None else {**found, "gate": trace.gate}


def exit_loops(score: Tensor, threshold: float) -> Tensor:
    """Finds the first loop, from 1, whose score [loops, ...] is below `threshold`, else the last: int64 [...]."""
    below = score < threshold
    below[-1] = True
    return below.int().argmax(0) + 1
