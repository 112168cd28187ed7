"""The model, its mixture of experts and its loss beside others', on one thread, where all sides do the same work.

They compute the same numbers, which is checked first; then they run in turn, and the least time of each counts, by the
clock of the thread's own processor time, so that other work on the machine falls on all alike.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mythos_ds.conversion.openmythos import openmythos_config, openmythos_source
from mythos_ds.errors import LabError
from mythos_ds.kernels.cross_entropy import chunked_cross_entropy
from mythos_ds.model.context import ForwardContext
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.rope import Rotary
from mythos_ds.model.router import Router
from mythos_ds.plan.live_bytes import LiveBytes
from mythos_ds.weights.reader import InMemorySource

try:
    import open_mythos.main as open_mythos  # the oracle of the parity tests
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
except ImportError as error:
    raise LabError(f"{error}; needed: the packages of requirements.lock", code="MDS760") from error

OURS, THEIRS, FULL = "mythos-ds", "open-mythos", "full logits"
MODELS = {"mla-4": ("mla", 4), "gqa-4": ("gqa", 4), "mla-16": ("mla", 16)}
"""Attention and loops of a whole model, by name."""
DIM, EXPERTS, EXPERT_DIM, CHOSEN, VOCABULARY = 256, 64, 256, 4, 1024
BATCH, SEQ, MOE_TOKENS, LOSS_TOKENS, LOSS_VOCABULARY = 4, 256, 4096, 2048, 32768
_HALT_BIAS = -4.0
"""No position halts within 16 loops: open-mythos stops where all have, and would compute less."""
_FORCED = 1e4
"""Added to the scores of the experts that are to be chosen: more than scores differ by."""
_MAX_COPIED_BYTES = 1 << 30
"""transformers' batched_mm copies the weights for every row; it is left out where that is more."""


@dataclass(frozen=True)
class Side:
    """One implementation: computes everything once, and returns what has to be the same on all sides."""

    name: str
    run: Callable[[], Tensor]


def compare(name: str, repetitions: int) -> Iterator[dict[str, Any]]:
    """Compares a model of MODELS, with even and with an untrained router's routing, or "moe" or "cross-entropy", in
    fp32 and bf16. Raises LabError where sides compute other numbers."""
    if name in MODELS:
        for even in (True, False):
            yield _compare_models(name, even=even, repetitions=repetitions)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            yield (_compare_moe if name == "moe" else _compare_losses)(dtype, repetitions=repetitions)


def _compare_models(name: str, *, even: bool, repetitions: int) -> dict[str, Any]:
    """Forward and backward of a model in fp32 beside open-mythos's of the same weights; `even`: every expert is given
    as many tokens, else an untrained router chooses."""
    attention, loops = MODELS[name]
    with _one_thread():
        theirs, ours = _models(attention, loops)
        tokens = torch.randint(0, VOCABULARY, (BATCH, SEQ + 1))
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        if even:
            theirs.recurrent.block.ffn.router_bias = _even_scores(BATCH * SEQ)
            for layer in ours.moe_layers():
                _force(layer.router, BATCH * SEQ)

        def run_theirs() -> Tensor:
            logits = theirs(inputs, n_loops=loops)
            return _ended(theirs, functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))

        def run_ours() -> Tensor:
            return _ended(ours, ours(inputs, n_loops=loops, targets=targets))

        found = _measured([Side(OURS, run_ours), Side(THEIRS, run_theirs)], repetitions, 1e-5)
    return {"case": name, "routing": "even" if even else "untrained", **found}


def _compare_moe(dtype: torch.dtype, *, repetitions: int) -> dict[str, Any]:
    """Forward and backward of a mixture without shared experts, every expert given as many tokens, beside open-mythos's
    and transformers' ways of computing it."""
    with _one_thread():
        fields = _fields("gqa", 1, shared=0)
        ours = MoE(openmythos_config(fields), Initializer(0)).to(dtype)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.normal_(0.0, 0.05)
        _force(ours.router, MOE_TOKENS)
        context = ForwardContext(Rotary.at(torch.zeros(1, 1), 2, 1.0, False), None, None, 1, ForwardRecords.closed())
        others: dict[str, nn.Module] = {THEIRS: _open_mythos_layer(ours, fields)}
        for mode in ("eager", "batched_mm", "grouped_mm"):
            if mode != "batched_mm" or MOE_TOKENS * CHOSEN * 3 * DIM * EXPERT_DIM * dtype.itemsize < _MAX_COPIED_BYTES:
                others[f"transformers {mode}"] = _Mixtral(ours, mode)
        x, grad = (torch.randn(1, MOE_TOKENS, DIM).to(dtype) for _ in range(2))
        sides = [Side(OURS, lambda: _through(ours, lambda rows: ours(rows, 0, context), x, grad))]
        sides += [Side(name, partial(_through, other, other, x, grad)) for name, other in others.items()]
        found = _measured(sides, repetitions, 1e-5 if dtype == torch.float32 else 2e-2)
    return {"case": "moe", "dtype": str(dtype).removeprefix("torch."), **found}


def _compare_losses(dtype: torch.dtype, *, repetitions: int) -> dict[str, Any]:
    """The loss in chunks beside that of all logits, with gradients: time, and the most bytes held beside what was
    there before."""
    with _one_thread():
        hidden = torch.randn(LOSS_TOKENS, DIM).to(dtype).requires_grad_()
        weight = torch.randn(LOSS_VOCABULARY, DIM).mul_(DIM**-0.5).to(dtype).requires_grad_()
        targets = torch.randint(0, LOSS_VOCABULARY, (LOSS_TOKENS,))

        def ended(loss: Tensor) -> Tensor:
            loss.backward()
            hidden.grad = weight.grad = None
            return loss.detach()

        sides = [
            Side(OURS, lambda: ended(chunked_cross_entropy(hidden, weight, targets))),
            Side(FULL, lambda: ended(functional.cross_entropy((hidden @ weight.t()).float(), targets))),
        ]
        peaks = {}
        for side in sides:
            live = LiveBytes(existing=False)
            with live:
                live.ignore(hidden, weight, targets)
                side.run()
            peaks[side.name] = live.peak
        found = _measured(sides, repetitions, 1e-5 if dtype == torch.float32 else 2e-2)
    ratio = {"memory_of_ours": peaks[OURS] / peaks[FULL], "time_of_ours": 1 / found["times_ours"][FULL]}
    return {"case": "cross-entropy", "dtype": str(dtype).removeprefix("torch."), **found, "peak_bytes": peaks, **ratio}


def _measured(sides: list[Side], repetitions: int, tolerance: float) -> dict[str, Any]:
    """The least seconds of each side, and how many times those of the first the others took. Raises LabError where a
    result differs from the first side's by more than `tolerance`, relative."""
    first, *others = [side.run().double() for side in sides]
    for side, other in zip(sides[1:], others, strict=True):
        error = float((other - first).norm() / first.norm())
        if not error <= tolerance:
            raise LabError(f"{side.name} computes other numbers: {error:.1e} > {tolerance:.0e}", code="MDS761")
    del first, others
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(repetitions):
        gc.collect()
        for side in sides:
            started = time.process_time()
            side.run()
            seconds[side.name].append(time.process_time() - started)
    least = {name: min(values) for name, values in seconds.items()}
    ours = least[sides[0].name]
    return {"seconds": least, "times_ours": {side.name: least[side.name] / ours for side in sides[1:]}}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fields(attention: str, loops: int, shared: int) -> Any:
    return open_mythos.MythosConfig(
        vocab_size=VOCABULARY, dim=DIM, n_heads=4, n_kv_heads=2, max_seq_len=SEQ, max_loop_iters=loops,
        prelude_layers=1, coda_layers=1, attn_type=attention, kv_lora_rank=64, q_lora_rank=128, qk_rope_head_dim=32,
        qk_nope_head_dim=32, v_head_dim=64, n_experts=EXPERTS, n_shared_experts=shared, n_experts_per_tok=CHOSEN,
        expert_dim=EXPERT_DIM, lora_rank=8,
    )  # fmt: skip


def _models(attention: str, loops: int) -> tuple[Any, MythosModel]:
    """open-mythos's untrained model, and ours of the same weights."""
    fields = _fields(attention, loops, shared=1)
    theirs = open_mythos.OpenMythos(fields)
    with torch.no_grad():
        theirs.recurrent.act.halt.bias.fill_(_HALT_BIAS)
    config = openmythos_config(fields)
    ours = MythosModel(config, seed=None)
    source = openmythos_source(InMemorySource(theirs.state_dict()), config)
    ours.load_state_dict({name: source.read(name).clone() for name in source.specs()}, strict=False)
    return theirs, ours


def _even_scores(tokens: int) -> Tensor:
    """Added to any scores, [tokens, EXPERTS], it gives each token CHOSEN experts and each expert as many tokens."""
    chosen = (CHOSEN * torch.arange(tokens)[:, None] + torch.arange(CHOSEN)) % EXPERTS
    return torch.zeros(tokens, EXPERTS).scatter_(1, chosen, _FORCED)


def _force(router: Router, tokens: int) -> None:
    """Lets the router choose evenly; it does all of its work."""
    choose, forced = router.choose, _even_scores(tokens)
    object.__setattr__(router, "choose", lambda scores, _loop: choose(scores + forced, None))


def _ended(module: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    module.zero_grad(set_to_none=True)
    return loss.detach()


def _through(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """Results and gradient of x, one after the other."""
    rows = x.detach().requires_grad_()
    out = call(rows)
    out.backward(grad)
    module.zero_grad(set_to_none=True)
    made = rows.grad
    assert made is not None
    return torch.stack([out.detach(), made])


def _open_mythos_layer(ours: MoE, fields: Any) -> nn.Module:
    layer = open_mythos.MoEFFN(fields).to(ours.router.weight.dtype)
    with torch.no_grad():
        layer.router.weight.copy_(ours.router.weight)
        for index, expert in enumerate(layer.routed_experts):
            expert.gate.weight.copy_(ours.experts.w1[index])
            expert.up.weight.copy_(ours.experts.w3[index])
            expert.down.weight.copy_(ours.experts.w2[index])
    layer.router_bias = _even_scores(MOE_TOKENS)
    return layer


class _Mixtral(nn.Module):
    """transformers' experts behind a router of the same choice."""

    def __init__(self, ours: MoE, mode: str):
        super().__init__()
        config = MixtralConfig(hidden_size=DIM, intermediate_size=EXPERT_DIM, num_local_experts=EXPERTS)
        config._experts_implementation = mode
        self.weight = nn.Parameter(ours.router.weight.detach().clone())
        self.experts = MixtralExperts(config).to(self.weight.dtype)
        self.forced = _even_scores(MOE_TOKENS)
        with torch.no_grad():
            self.experts.gate_up_proj.copy_(torch.cat([ours.experts.w1, ours.experts.w3], dim=1))
            self.experts.down_proj.copy_(ours.experts.w2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        logits = functional.linear(rows, self.weight).float()
        chosen = (logits.detach() + self.forced).topk(CHOSEN, dim=-1).indices
        weights = logits.softmax(-1).gather(-1, chosen)
        weights = (weights / weights.sum(-1, keepdim=True)).to(rows.dtype)
        out: Tensor = self.experts(rows, chosen, weights)
        return out.view_as(x)
