"""Call 1: the model on the device against the reference that is written from the formulas, and against itself."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mythos_ds.api import generate, load_config
from mythos_ds.bench.acceptance import Probe
from mythos_ds.config.proxy import make_proxy
from mythos_ds.config.schema import ModelConfig
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.router import Router
from mythos_ds.weights.built_in import find_model
from tests.gpu.devices import exact, filled_model, gradients, relative
from tests.gpu.kernel_checks import document_positions
from tests.helpers.reference import forward, losses
from tests.helpers.toy_model import randomise, toy_model

AUX = AuxLoss(balance=0.3, z=0.02, scale=1.0)


def batch_of(config: ModelConfig, device: str, rows: int, seq: int, seed: int = 0) -> dict[str, Tensor]:
    """Tokens, targets and positions of a few documents."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, config.vocab_size, (rows, seq + 1), generator=generator).to(device)
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "positions": document_positions(seq, 3, device, rows)}


def parity(probe: Probe) -> None:
    """fp32 on the device against the reference in fp64 on the CPU: loss, every gradient, and who was routed where."""
    proxy = make_proxy(load_config("1b"), 1)[0].model
    tiny = load_config("tiny").model
    for name, config, seq in (("toy", toy_model(), 24), ("tiny", tiny, 24), ("1b's proxy", proxy, 32)):
        with exact():
            _parity(probe, name, config, seq)


def _parity(probe: Probe, name: str, config: ModelConfig, seq: int) -> None:
    model = randomise(MythosModel(config, seed=3))
    params = {key: value.detach().double().requires_grad_() for key, value in model.named_parameters()}
    buffers = {key: value.double() for key, value in model.named_buffers()}
    batch = batch_of(config, "cpu", 2, seq)
    logits, out = forward(params, config, batch["tokens"], 3, 2, batch["positions"], buffers)
    wanted, total = losses(config, logits, batch["targets"], out, AUX.balance, AUX.z, 0.0)
    total.backward()
    model.to(probe.device_type)
    placed, records = {key: value.to(probe.device_type) for key, value in batch.items()}, ForwardRecords()
    loss = model(**placed, n_loops=3, n_grad_loops=2, aux=AUX, records=records)
    loss.backward()
    probe.number(f"{name}: loss, relative", abs(loss.item() - wanted.item()) / wanted.item(), at_most=1e-5)
    moved = sum(
        int((records.routing[layer][loop].counts.cpu() != counts).sum())
        for layer, by_loop in out.counts.items()
        for loop, counts in enumerate(by_loop)
    )
    probe.number(f"{name}: experts with other loads than the reference's", moved, equals=0)
    made = gradients(model)
    errors = {key: _gradient_error(made.get(key), value.grad) for key, value in params.items()}
    key = max(errors, key=lambda each: math.inf if math.isnan(errors[each]) else errors[each])
    probe.note(f"{name}: worst gradient", key)
    probe.number(f"{name}: worst gradient, relative", errors[key], at_most=1e-4)
    model.bfloat16()
    for buffer in model.buffers():
        buffer.data = buffer.data.float()
    with torch.no_grad():
        rounded = model(**placed, n_loops=3).item()
    probe.number(f"{name}: loss in bf16, relative", abs(rounded - wanted.item()) / wanted.item(), at_most=0.02)


def _gradient_error(got: Tensor | None, wanted: Tensor | None) -> float:
    """Relative, where the gradient is not all but zero."""
    if got is None or wanted is None:
        return float("nan") if got is not None or wanted is not None else 0.0
    return (got.cpu().double() - wanted).norm().item() / (wanted.norm().item() + 1e-5)


def routing_precision(probe: Probe) -> None:
    """Weights and inputs of bf16 are exact in TF32: the faster products choose the same experts."""
    config = load_config("1b").model if probe.on_gpu else toy_model()
    model = filled_model(config, probe.device_type, torch.bfloat16)
    batch = batch_of(config, probe.device_type, 1, 1024 if probe.on_gpu else 32)
    chosen, former = {}, torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        records = ForwardRecords(details=True)
        with torch.no_grad():
            model(batch["tokens"], n_loops=1, records=records)
        chosen[precision] = [records.routing[layer][0].indices for layer in sorted(records.routing)]
    torch.set_float32_matmul_precision(former)
    first = [pair[0] for pair in chosen.values()]
    assert first[0] is not None
    assert first[1] is not None
    changed = (first[0].sort(-1).values != first[1].sort(-1).values).any(-1)
    probe.number("tokens of the first layer that go elsewhere with TF32", int(changed.sum()), equals=0)
    probe.number("tokens", changed.numel(), at_least=32)


def recompute(probe: Probe) -> None:
    """A loop that is recomputed in backward routes as it did, and gives the gradients of one that was kept."""
    config = load_config("1b").model if probe.on_gpu else toy_model()
    seeds, seq = (20, 1024) if probe.on_gpu else (3, 32)
    models = [
        filled_model(config, probe.device_type, torch.bfloat16, activation_checkpointing=unit)
        for unit in ("loop", "none")
    ]
    models[1].load_state_dict(models[0].state_dict())
    seen: list[Tensor] = []
    for module in models[0].modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing.indices))
    recomputed: list[float] = []
    varies: list[float] = []
    rerouted, unlike_losses, calls, again = 0, 0, 0, 0
    with exact(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(seeds):
            batch = batch_of(config, probe.device_type, 1, seq, seed)
            seen.clear()
            found = []
            for model in (*models, models[1]):
                loss = model(**batch, n_loops=4, n_grad_loops=3, aux=AUX)
                forward_calls = len(seen)
                loss.backward()
                if model is models[0]:
                    rerouted += _rerouted(seen, forward_calls, config.recurrent_layers, 3)
                    calls, again = calls + forward_calls, again + len(seen) - forward_calls
                found.append((loss.detach(), gradients(model)))
            unlike_losses += int(not torch.equal(found[0][0], found[1][0]))
            recomputed.append(_apart(found[0][1], found[1][1]))
            varies.append(_apart(found[2][1], found[1][1]))
    probe.number("seeds", seeds, at_least=1)
    probe.number("router calls of forwards", calls, equals=seeds * 4 * config.recurrent_layers)
    probe.number("router calls of recomputes", again, equals=seeds * 3 * config.recurrent_layers)
    probe.number("router calls that chose otherwise when recomputed", rerouted, equals=0)
    probe.number("losses that differ, bit for bit", unlike_losses, equals=0)
    # Flash attention's backward adds in no fixed order on GPUs: where nothing varies by itself, the bar is 0.
    equal, other = (torch.tensor(differences).max().item() for differences in (varies, recomputed))
    probe.number("gradients of two equal backwards, relative difference", equal, at_most=1e-2 if probe.on_gpu else 0)
    probe.number("gradients of a recomputed backward, relative difference", other, at_most=4 * equal)


def _apart(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest relative difference of gradients of the same weight; NaN where the weights are not the same."""
    if some.keys() != others.keys():
        return float("nan")
    return torch.tensor([relative(value, others[name]) for name, value in some.items()]).max().item()


def _rerouted(seen: list[Tensor], forward_calls: int, layers: int, grad_loops: int) -> int:
    """Recomputed calls whose choice is none of the same layer's and loop's; loops are recomputed from the last on."""
    again = seen[forward_calls:]
    wrong = 0
    for number in range(len(again) // layers):
        loop = forward_calls // layers - 1 - number % grad_loops
        for layer in range(layers):
            wrong += int(not torch.equal(again[number * layers + layer], seen[loop * layers + layer]))
    return wrong


def syncs(probe: Probe) -> None:
    """Waits of the host for the device in a forward and backward, without documents and with."""
    config = load_config("1b").model
    model = filled_model(config, probe.device_type, torch.bfloat16, activation_checkpointing="loop")
    batch = batch_of(config, probe.device_type, 1, 1024)
    plain = {name: batch[name] for name in ("tokens", "targets")}
    for name, inputs, bar in (("one document", plain, 0.0), ("documents", batch, None)):
        model(**inputs, n_loops=4, n_grad_loops=2, aux=AUX).backward()
        with counted_syncs() as waits:
            model(**inputs, n_loops=4, n_grad_loops=2, aux=AUX).backward()
        probe.number(f"{name}: waits of the host in 4 loops of 4 layers", len(waits), at_most=bar)
        probe.note(f"{name}: first wait", waits[0] if waits else None)


@contextmanager
def counted_syncs() -> Iterator[list[str]]:
    """What torch's detector of synchronisation warned of in the block, as texts, once the block is over."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # Not its notice, at its first use in a process, that the detector itself is a prototype.
        found += [str(each.message) for each in caught if "called a synchronizing" in str(each.message)]


def generation(probe: Probe) -> None:
    """The built-in model continues a text on the device as a plain greedy loop does on the CPU, token by token."""
    prompt, length = "def main(", 64 if probe.on_gpu else 16
    with exact():
        model, tokenizer = MythosModel.from_pretrained("tiny"), Tokenizer.load(find_model("tiny"))
        seen = tokenizer.encode(prompt)
        written: list[int] = []
        with torch.inference_mode():
            while len(written) < length:
                logits = model(torch.tensor([seen + written]), n_loops=4)[0, -1]
                written.append(int(logits[: tokenizer.vocab_size].argmax()))
                if written[-1] == tokenizer.eos_id:
                    written.pop()
                    break
        text = generate(
            model.to(probe.device_type), prompt, tokenizer=tokenizer, loops=4, new_tokens=length, temperature=0.0
        )
    probe.note("text", text)
    probe.number("characters as on the CPU", _common(text, tokenizer.decode(written)), at_least=len(text))
    probe.number("characters", len(text), at_least=1)


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def optimizer(probe: Probe) -> None:
    """AdamW as the engine makes it, five steps in fp32, against its formula in fp64."""
    from mythos_ds.engine.optimizer import make_optimizer, parameter_groups, set_learning_rate
    from tests.distributed.cases import toy_run

    run = toy_run({"ep": 1, "stage": 1}, 1)
    model = randomise(MythosModel(run.model, seed=0)).to(probe.device_type)
    made = make_optimizer(
        parameter_groups(model.named_parameters(), run),
        run.training,
        offload=False,
        device=torch.device(probe.device_type),
    )
    state: dict[str, list[Any]] = {name: [p.detach().double().cpu(), 0.0, 0.0] for name, p in model.named_parameters()}
    places = {id(p): name for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    beta1, beta2, eps = run.training.beta1, run.training.beta2, run.training.eps
    for step in range(1, 6):
        own = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = own[name].to(probe.device_type)
        set_learning_rate(made, 1e-3 * step)
        for group in made.param_groups:
            for parameter in group["params"]:
                name = places[id(parameter)]
                weight, mean, square = state[name]
                mean = beta1 * mean + (1 - beta1) * own[name].double()
                square = beta2 * square + (1 - beta2) * own[name].double() ** 2
                update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
                weight = weight * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
                state[name] = [weight, mean, square]
        made.step()
    errors = [relative(p.detach().cpu(), state[name][0]) for name, p in model.named_parameters()]
    probe.number("weights after five steps, relative", torch.tensor(errors).max().item(), at_most=1e-6)
    probe.number("fused", float(bool(made.param_groups[0].get("fused"))), equals=float(probe.on_gpu))
