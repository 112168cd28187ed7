"""What runs inside the processes of test_muon.py: every layout against Muon written from its formulas."""

from typing import Any

import torch
from torch import Tensor

from tests.distributed.cases import GRAD_LOOPS, LOOPS, full_weights, global_batches, largest, opened, own_batches
from tests.helpers.reference import ReferenceTrainer

LEARNING_RATE = 3e-3
MUON_LR = 2e-2
MOMENTUM = 0.9
TRAINING = {
    "optimizer": "muon",
    "muon_lr": MUON_LR,
    "muon_momentum": MOMENTUM,
    "grad_clip": 0.0,
    "router_bias_rate": 0.0,
}
ADAM_NAMES = ("embed.weight", "lm_head.weight", "router.weight")


def trained_by_muon(name: str, value: Tensor) -> bool:
    """Matrices and stacked experts; not embedding, head, router or LoRA."""
    return value.dim() >= 2 and not name.endswith(ADAM_NAMES) and ".lora." not in name


def newton_schulz(update: Tensor) -> Tensor:
    """Five quintic steps towards the nearest orthogonal matrix (Jordan et al. 2024), for [..., rows, columns]."""
    rows, columns = update.shape[-2:]
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if rows > columns:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if rows > columns else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix, scaled by sqrt(max(1, rows / columns)); decoupled decay."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.mul_(MOMENTUM).add_(weight.grad, alpha=1 - MOMENTUM)
                blended = (1 - MOMENTUM) * weight.grad + MOMENTUM * momentum
                scale = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(group["lr"] * scale * newton_schulz(blended))


class Both:
    """Muon and Adam as one optimizer for the reference trainer."""

    def __init__(self, trainer: ReferenceTrainer, adam_options: dict[str, Any]):
        halves: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in trainer._optimizer.param_groups:
            own = {key: group[key] for key in ("params", "name", "weight_decay")}
            halves[trained_by_muon(group["name"], group["params"][0])].append(own)
        self.optimizers = [Muon(halves[True]), torch.optim.AdamW(halves[False], lr=0.0, **adam_options)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def compare(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each layout the largest deviation of losses (relative) and weights, and how far weights moved."""
    from deepspeed.runtime.zero.muon import original_muon

    torch._dynamo.config.disable = True  # the kernels' compilation is not what is tested
    original_muon.ns_compute_dtype = lambda method="gram": torch.float32
    return [_compare(case) for case in cases]


def _compare(case: dict[str, Any]) -> dict[str, Any]:
    with opened({**case, "training": TRAINING}) as (engine, groups):
        config = engine.resolved.config
        start = {name: value.clone() for name, value in full_weights(engine, groups).items()}
        losses = [
            engine.train_step(own_batches(step, 2, groups), n_loops=t, n_grad_loops=GRAD_LOOPS, lr=LEARNING_RATE).loss
            for step, t in enumerate(LOOPS)
        ]
        weights = full_weights(engine, groups)
    training = config.training
    plain = ("norm.weight", "embed.weight", "router.weight", "lora.scale")

    def lr_scale(name: str) -> float:
        if trained_by_muon(name, start[name]):
            return MUON_LR / training.lr
        vector = start[name].dim() < 2 or name.endswith(plain)
        return 1.0 if vector else training.lr_reference_dim / config.model.dim

    trainer = ReferenceTrainer(
        start,
        config.model,
        weight_decay=training.weight_decay,
        decays=lambda name: start[name].dim() >= 2 and not name.endswith(plain),
        lr_scale=lr_scale,
        balance=training.balance_loss,
        z=training.z_loss,
    )
    both: Any = Both(trainer, {"betas": (training.beta1, training.beta2), "eps": training.eps})
    trainer._optimizer = both
    expected = [trainer.step(global_batches(step, 2), t, GRAD_LOOPS, LEARNING_RATE)[0] for step, t in enumerate(LOOPS)]
    return {
        "loss": largest(abs(a - b) / b for a, b in zip(losses, expected, strict=True)),
        "weight": {name: (weights[name] - value).abs().max().item() for name, value in trainer.params.items()},
        "moved": {name: (weights[name] - value).abs().max().item() for name, value in start.items()},
    }
