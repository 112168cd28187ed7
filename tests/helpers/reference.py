"""The model and its training step once more, in plain PyTorch, as the oracle of the parity tests.

Written from the formulas of the architecture, not from the package's code: one function per formula, explicit
softmax and masks, experts as a loop over boolean masks, autograd alone. It runs in the dtype of the parameters
(float32 or float64). Parameters are keyed by logical names, experts whole: [n_experts, ...].
"""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.config.schema import ModelConfig
from tests.helpers.reference_layers import Inputs, Loop, Params, Pass, attention, branch, dense_layer, moe, rms_norm


def sinusoid(index: int, dim: int) -> Tensor:
    """[sin(t w_i), cos(t w_i)] with w_i = 10000^(-2i/dim); float64 [dim]."""
    angle = index * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.cat([angle.sin(), angle.cos()])


def lora(params: Params, config: ModelConfig, x: Tensor, loop: int) -> Tensor:
    """up(scale[t] * down(x)); the last row holds beyond the trained range."""
    scale = params["recurrent.lora.scale"][min(loop, config.max_loops - 1)]
    return (scale * (x @ params["recurrent.lora.down.weight"].T)) @ params["recurrent.lora.up.weight"].T


def injection(params: Params, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """A and B_bar, both [dim]."""
    log_a, b = params["recurrent.injection.log_A"], params["recurrent.injection.B"]
    dt = functional.softplus(params["recurrent.injection.dt_bias"])
    a = torch.exp(-dt * torch.exp(log_a)).clamp(max=1 - 1e-4)
    if config.discretisation == "euler":
        return a, dt * b
    return a, (1 - a) / torch.exp(log_a) * b


def recurrent_layers(
    params: Params, config: ModelConfig, x: Tensor, inputs: Inputs, loop: Loop, router_bias: Params | None, out: Pass
) -> Tensor:
    """The shared layers, once."""
    for j in range(config.recurrent_layers):
        prefix = f"recurrent.layers.{j}"

        def attended(x: Tensor, j: int = j, prefix: str = prefix) -> Tensor:
            return attention(params, f"{prefix}.attn", config, x, inputs, j, loop)

        def mixed(x: Tensor, j: int = j, prefix: str = prefix) -> Tensor:
            return moe(params, f"{prefix}.moe", config, x, j, loop, router_bias, out)

        x = branch(params, f"{prefix}.attn_norm", config, x, attended)
        x = branch(params, f"{prefix}.ffn_norm", config, x, mixed)
    return x


def one_loop(
    params: Params,
    config: ModelConfig,
    h: Tensor,
    e: Tensor,
    inputs: Inputs,
    loop: Loop,
    router_bias: Params | None,
    out: Pass,
) -> Tensor:
    """h_{t+1} of h_t and e."""
    a, b_bar = injection(params, config)
    identity = torch.zeros_like(a)
    if config.loop_embedding == "scaled":
        wave = sinusoid(min(loop.index, config.mean_recurrence - 1), config.dim).to(a)
        identity = params["recurrent.loop_embedding.gain"] * wave
    if config.injection == "pre":
        x = a * h + b_bar * e + identity
    else:
        x = rms_norm(h + e + identity, config.norm_eps, params["recurrent.norm.weight"])
    if config.lora_rank and config.lora_target == "input":
        x = x + lora(params, config, rms_norm(x, config.norm_eps), loop.index)
    x = recurrent_layers(params, config, x, inputs, loop, router_bias, out)
    if config.lora_rank and config.lora_target == "output":
        x = x + lora(params, config, x, loop.index)
    return x if config.injection == "pre" else a * h + b_bar * e + x


class Act:
    """Adaptive computation time (Graves 2016) with frozen halted positions."""

    def __init__(self, params: Params, config: ModelConfig, h: Tensor, n_loops: int) -> None:
        self.weight, self.bias = params["recurrent.halting.weight"], params["recurrent.halting.bias"]
        self.threshold, self.n_loops = config.act_threshold, n_loops
        self.cumulative = torch.zeros_like(h[..., 0])
        self.remainder = torch.zeros_like(h[..., 0])
        self.loops = torch.zeros_like(h[..., 0])
        self.output = torch.zeros_like(h)

    def after_loop(self, h: Tensor, loop: Loop) -> Tensor:
        """Adds w_t h_t to the output; returns the positions that go on."""
        p = torch.sigmoid(h @ self.weight + self.bias)
        halts = (self.cumulative + p >= self.threshold) | (loop.index == self.n_loops - 1)
        rest = 1 - self.cumulative
        weight = torch.where(loop.alive, torch.where(halts, rest, p), 0.0)
        self.output = self.output + weight[..., None] * h
        self.remainder = torch.where(loop.alive & halts, rest, self.remainder)
        self.loops = self.loops + loop.alive
        self.cumulative = self.cumulative + weight
        return loop.alive & ~halts

    def ponder(self) -> Tensor:
        """Mean over positions of loops run plus remainder."""
        return (self.loops + self.remainder).mean()


def recur(
    params: Params,
    config: ModelConfig,
    e: Tensor,
    inputs: Inputs,
    n_loops: int,
    n_grad_loops: int | None,
    router_bias: Params | None,
    out: Pass,
) -> Tensor:
    """All loops; the first n_loops - n_grad_loops of them without gradient."""
    h = torch.zeros_like(e) if config.initial_state == "zeros" else e
    alive = torch.ones_like(inputs.positions, dtype=torch.bool)
    act = Act(params, config, h, n_loops) if config.halting == "act" else None
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    first = 0 if n_grad_loops is None else max(0, n_loops - n_grad_loops)
    for index in range(n_loops):
        loop = Loop(index, alive, kept, has_gradient=index >= first)
        with contextlib.nullcontext() if loop.has_gradient else torch.no_grad():
            new = one_loop(params, config, h, e, inputs, loop, router_bias, out)
            h = torch.where(alive[..., None], new, h)
            if act is not None:
                alive = act.after_loop(h, loop)
    if act is None:
        return h
    out.ponder = act.ponder()
    return act.output


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Tensor,
    n_loops: int,
    n_grad_loops: int | None = None,
    positions: Tensor | None = None,
    router_bias: Params | None = None,
) -> tuple[Tensor, Pass]:
    """Logits [batch, seq, vocab] and what the pass collected."""
    unsupported = {config.discretisation, config.halting, config.loop_embedding} & {"direct", "act_openmythos", "raw"}
    assert not unsupported, "not covered by the reference"
    assert config.state_dtype == "float32", "not covered by the reference"
    batch, seq = tokens.shape
    if positions is None:
        positions = torch.arange(seq).expand(batch, seq)
    document = (positions == 0).cumsum(dim=1)
    order = torch.arange(seq)
    visible = (order[:, None] >= order[None, :]) & (document[:, :, None] == document[:, None, :])
    inputs = Inputs(positions, visible[:, None])
    out = Pass()
    x = params["embed.weight"][tokens]
    for i in range(config.prelude_layers):
        x = dense_layer(params, f"prelude.{i}", config, x, inputs)
    e = rms_norm(x, config.norm_eps, params["prelude_norm.weight"]) if config.prelude_norm else x
    x = recur(params, config, e, inputs, n_loops, n_grad_loops, router_bias, out)
    for i in range(config.coda_layers):
        x = dense_layer(params, f"coda.{i}", config, x, inputs)
    x = rms_norm(x, config.norm_eps, params["norm.weight"])
    head = params["embed.weight"] if config.tie_embeddings else params["lm_head.weight"]
    return x @ head.T, out


def reference_logits(
    params: Params,
    config: ModelConfig,
    tokens: Tensor,
    n_loops: int,
    n_grad_loops: int | None = None,
    positions: Tensor | None = None,
    router_bias: Params | None = None,
) -> Tensor:
    """Logits [batch, seq, vocab]; `router_bias` holds the routers' buffers by logical name (absent: zero)."""
    return forward(params, config, tokens, n_loops, n_grad_loops, positions, router_bias)[0]


def reference_loss(
    params: Params,
    config: ModelConfig,
    tokens: Tensor,
    targets: Tensor,
    n_loops: int,
    n_grad_loops: int | None = None,
    positions: Tensor | None = None,
    router_bias: Params | None = None,
    *,
    balance: float = 0.0,
    z: float = 0.0,
    ponder: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and the same plus the weighted auxiliary losses."""
    logits, out = forward(params, config, tokens, n_loops, n_grad_loops, positions, router_bias)
    return losses(config, logits, targets, out, balance, z, ponder)


def losses(
    config: ModelConfig, logits: Tensor, targets: Tensor, out: Pass, balance: float, z: float, ponder: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and total; balance and z are means over the loops with gradient, summed over layers."""
    cross_entropy = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    total = cross_entropy
    grad_loops = len(out.balance) / config.recurrent_layers
    if grad_loops:
        total = total + (balance * torch.stack(out.balance).sum() + z * torch.stack(out.z).sum()) / grad_loops
    if out.ponder is not None:
        total = total + ponder * out.ponder
    return cross_entropy, total


class ReferenceTrainer:
    """One process, whole tensors, torch.optim: what every layout has to reproduce."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        *,
        optimizer: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decays: Callable[[str], bool] = lambda name: True,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
        grad_clip: float = 0.0,
        balance: float = 0.0,
        z: float = 0.0,
        ponder: float = 0.0,
        router_bias: Params | None = None,
        frozen: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.params = {name: value.detach().clone().requires_grad_(not frozen(name)) for name, value in params.items()}
        self.config = config
        self.router_bias = router_bias
        self.counts: dict[int, Tensor] = {}
        self._weights = (balance, z, ponder)
        self._clip = grad_clip
        self._lr_scale = lr_scale
        groups = [
            {"params": [value], "name": name, "weight_decay": weight_decay if decays(name) else 0.0}
            for name, value in self.params.items()
            if value.requires_grad
        ]
        if optimizer == "adamw":
            self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)
        else:
            self._optimizer = torch.optim.SGD(groups, lr=0.0)

    def step(
        self, micro_batches: list[dict[str, Tensor]], n_loops: int | list[int], n_grad_loops: int | None, lr: float
    ) -> tuple[float, float]:
        """Mean cross-entropy of the targets of all micro-batches that are not -100, and the gradient's norm before
        clipping (0 = no clipping). n_loops: one for all micro-batches, or one for each."""
        depths = [n_loops] * len(micro_batches) if isinstance(n_loops, int) else n_loops
        self._optimizer.zero_grad(set_to_none=True)
        self.counts = {}
        loss = 0.0
        counted = sum(int((batch["targets"] != -100).sum()) for batch in micro_batches)
        whole = all(bool((batch["targets"] != -100).all()) for batch in micro_batches)
        for batch, loops in zip(micro_batches, depths, strict=True):
            logits, out = forward(
                self.params,
                self.config,
                batch["tokens"],
                loops,
                n_grad_loops,
                batch.get("positions"),
                self.router_bias,
            )
            cross_entropy, total = losses(self.config, logits, batch["targets"].clamp_min(0), out, *self._weights)
            if not whole:
                summed = functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
                own = summed * len(micro_batches) / counted
                cross_entropy, total = own, total - cross_entropy + own
            (total / len(micro_batches)).backward()
            loss += cross_entropy.item() / len(micro_batches)
            for layer, counts in out.counts.items():
                own = functional.pad(torch.stack(counts), (0, 0, 0, max(depths) - loops))
                self.counts[layer] = self.counts.get(layer, 0) + own
        norm = self._clip_gradients()
        for group in self._optimizer.param_groups:
            group["lr"] = lr * self._lr_scale(group["name"])
        self._optimizer.step()
        return loss, norm

    def _clip_gradients(self) -> float:
        gradients = [value.grad for value in self.params.values() if value.grad is not None]
        norm = math.sqrt(sum(gradient.double().pow(2).sum().item() for gradient in gradients))
        if self._clip > 0:
            factor = min(1.0, self._clip / (norm + 1e-6))
            for gradient in gradients:
                gradient.mul_(factor)
        return norm
