"""The gate that says what one more loop is worth, trained on a frozen model (Ouro's second stage, arXiv 2510.25741).

Its target is what happened: the loss of a token after loop t less that after loop t + 1.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mythos_ds.data.batches import Batch
from mythos_ds.errors import ConfigError
from mythos_ds.inference.exit_rules import loop_steps
from mythos_ds.model.exit_gate import ExitGate
from mythos_ds.model.mythos import MythosModel


def with_exit_gate(model: MythosModel) -> MythosModel:
    """The same weights, frozen, and a new gate to train. Raises ConfigError for a model that has a halting unit."""
    if model.config.halting != "none":
        raise ConfigError(f'halting: the model has "{model.config.halting}"; allowed: "none"')
    gated = MythosModel(model.config.model_copy(update={"halting": "gate"})).to(next(model.parameters()).device)
    missing, unexpected = gated.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("recurrent.gate.") for name in missing), missing
    gated.requires_grad_(False)
    _exit_gate(gated).requires_grad_(True)
    return gated.eval()


def train_exit_gate(
    model: MythosModel,
    batches: Iterable[Batch],
    *,
    steps: int,
    n_loops: int,
    lr: float,
    on_step: Callable[[float], None] = lambda error: None,
) -> None:
    """Trains the gate of `with_exit_gate`'s model, a step for each of `steps` batches, by AdamW, its rate falling to 0.

    The error is squared: the gate is to expect the mean, and a token's improvement is mostly noise. n_loops (>= 2):
    loops run, each but the last a sample for every token. on_step: gets the mean squared error of each step.
    """
    gate = _exit_gate(model)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for step, batch in zip(range(steps), batches, strict=False):
        if step == 0:
            gate.scale.copy_(_improvements(model, batch, n_loops)[1].std().clamp_min(1e-6))
        expected, realised = _improvements(model, batch, n_loops)
        error = (expected - realised).square().mean()
        optimizer.zero_grad()
        (error / gate.scale[0] ** 2).backward()
        nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(error.item())


@torch.no_grad()
def explained_share(model: MythosModel, batches: Iterable[Batch], n_loops: int) -> float:
    """1 - (squared error of the gate) / (that of knowing each loop's mean improvement): above 0, the gate tells tokens
    apart."""
    pairs = [_improvements(model, batch, n_loops) for batch in batches]
    expected, realised = (torch.cat([pair[i].flatten(1) for pair in pairs], 1) for i in range(2))
    rest = (realised - realised.mean(1, keepdim=True)).square().sum()
    return 1.0 - ((expected - realised).square().sum() / rest.clamp_min(1e-30)).item()


def _improvements(model: MythosModel, batch: Batch, n_loops: int) -> tuple[Tensor, Tensor]:
    """What the gate expects after loops 1 .. n_loops - 1 and what the next loop then gave, fp32 [n_loops - 1, batch,
    seq] in nats; with gradient in the gate only."""
    gate, targets = _exit_gate(model), batch["targets"]
    losses, expected = [], []
    for loop, step in enumerate(loop_steps(model, batch["tokens"], n_loops, batch["positions"])):
        losses.append(nn.functional.cross_entropy(step.logits.transpose(1, 2), targets, reduction="none"))
        if loop < n_loops - 1:
            expected.append(gate(step.after, step.before, loop))
    by_loop = torch.stack(losses)
    return torch.stack(expected), by_loop[:-1] - by_loop[1:]


def _exit_gate(model: MythosModel) -> ExitGate:
    gate = model.recurrent.gate
    assert gate is not None, "with_exit_gate comes first"
    return gate
