"""Call 1: kernels against plain formulas in fp32, on inputs that kernels have been wrong on."""

import inspect
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mythos_ds.bench.acceptance import Probe
from mythos_ds.kernels import attention as attention_kernels
from mythos_ds.kernels import grouped_mlp
from mythos_ds.kernels.attention import causal_attention
from mythos_ds.kernels.segments import DocumentBounds
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.initializer import Initializer
from tests.gpu.devices import poison, relative

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def facts(probe: Probe) -> None:
    """What this torch has for this device; kernels are chosen by it."""
    grouped = [name for name in ("_grouped_mm",) if hasattr(torch, name)]
    grouped += [name for name in ("grouped_mm",) if hasattr(functional, name)]
    probe.note("grouped products", grouped)
    try:
        from torch.nn.attention import varlen
    except ImportError:
        probe.note("varlen_attn", None)
    else:
        probe.note("varlen_attn", list(inspect.signature(varlen.varlen_attn).parameters))
    for widths in ((192, 192), (192, 128), (64, 64)):
        found = [name for name, backend in BACKENDS.items() if _accepts(probe, backend, *widths)]
        probe.note(f"attention in bf16, widths {widths}", found)
        fused = [name for name in found if name != "math"]
        if widths[0] == widths[1]:
            probe.number(f"fused back ends for widths {widths}", len(fused), at_least=1 if probe.on_gpu else 0)
        probe.number(f"back ends for widths {widths}", len(found), at_least=1)
    if probe.on_gpu:
        probe.number("compute capability", float("{}.{}".format(*torch.cuda.get_device_capability())), at_least=8.0)


def _accepts(probe: Probe, backend: SDPBackend, width: int, v_width: int) -> bool:
    q, k = (torch.randn(1, 2, 64, width, device=probe.device_type, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(1, 2, 64, v_width, device=probe.device_type, dtype=torch.bfloat16)
    try:
        with sdpa_kernel(backend):
            functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    except RuntimeError:
        return False
    return True


def two_widths(probe: Probe) -> None:
    """Values of 128 channels to queries of 192, by each way that there is for them: results, gradients and leaks."""
    seq, documents = (2048, 28) if probe.on_gpu else (128, 9)
    make: dict[str, Any] = {"device": probe.device_type, "dtype": torch.bfloat16}
    torch.manual_seed(3)
    tensors = [torch.randn(2, seq, 8, width, **make) for width in (192, 192, 128)]
    grad, scale = torch.randn(2, seq, 8, 128, **make), 192**-0.5
    positions = document_positions(seq, documents, probe.device_type, 2)
    bounds = DocumentBounds.from_positions(positions)
    assert bounds is not None
    probe.note("back end for values as they are", str(attention_kernels._backend_of_two_widths(*tensors)))
    ways: dict[str, tuple[Any, Tensor | None]] = {
        "padded": (lambda q, k, v: attention_kernels._sdpa(q, k, v, scale), None),
        "documents one after the other": (
            lambda q, k, v: attention_kernels._sdpa_by_document(q, k, v, scale, bounds),
            positions,
        ),
    }
    for name, backend in BACKENDS.items():
        if _accepts(probe, backend, 192, 128):
            ways[f"{name}, as they are"] = partial(attention_kernels._sdpa, scale=scale, backend=backend), None
    if probe.on_gpu and attention_kernels._torch_varlen() is not None:
        ways["torch's documents"] = (lambda q, k, v: attention_kernels._varlen(q, k, v, scale, bounds)), positions
    for name, (way, own_positions) in ways.items():
        _compare(probe, name, tensors, grad, scale, own_positions, way)


def _compare(
    probe: Probe, name: str, tensors: list[Tensor], grad: Tensor, scale: float, positions: Tensor | None, way: Any
) -> None:
    """Hold results and gradients of one way to attend to the formula in fp32."""
    own = [tensor.clone().requires_grad_() for tensor in tensors]
    poison(probe.device_type)
    out = way(*own)
    out.backward(grad)
    plain = [tensor.float().requires_grad_() for tensor in tensors]
    q, k, v = plain
    wanted = plain_attention(q, k, v, scale, positions)
    wanted.backward(grad.float())
    errors = [relative(out, wanted), *(relative(a.grad, b.grad) for a, b in zip(own, plain, strict=True))]
    for what, error in zip(("result", "dq", "dk", "dv"), errors, strict=True):
        probe.number(f"{name}: {what}, relative", error, at_most=2e-2)


def counts_of(experts: int, rows: int) -> dict[str, list[int]]:
    """Rows by expert: evenly, all to one, few experts with many, odd numbers, none."""
    even = [rows // experts] * experts
    one = [0] * experts
    one[experts // 2] = rows
    few = [rows // 4 if index % max(1, experts // 4) == 1 else 0 for index in range(experts)]
    odd = [(7 * index + 3) % 13 for index in range(experts)]
    return {"even": even, "one expert": one, "few experts": few, "odd": odd, "none": [0] * experts}


def experts(probe: Probe) -> None:
    """The experts' products as the model calls them, in bf16: results and every gradient."""
    shapes = [(count, 1024, 512) for count in (4, 17, 136, 1023, 1024)] + [(4, 9728, 4096)]
    if not probe.on_gpu:
        shapes = [(count, 32, 16) for count in (4, 17, 136, 1023, 1024)]
    sample = torch.empty(8, 32, device=probe.device_type, dtype=torch.bfloat16)
    probe.note("groups of experts are padded", not grouped_mlp.takes_any_groups(sample))
    for count, dim, hidden in shapes:
        patterns = counts_of(count, 8 * count).values()
        found = [_experts_once(probe, count, dim, hidden, pattern) for pattern in patterns]
        # torch's maximum, which is NaN where any value is.
        output, gradient, unused, _ = torch.tensor(found, dtype=torch.float64).amax(0).tolist()
        unfinite = sum(values[3] for values in found)
        name = f"{count} experts of {dim} x {hidden}"
        probe.number(f"{name}: results, relative", output, at_most=1e-2)
        probe.number(f"{name}: gradients, relative", gradient, at_most=1e-2)
        probe.number(f"{name}: gradient of experts without rows", unused, equals=0)
        probe.number(f"{name}: values that are not finite", unfinite, equals=0)


def _experts_once(
    probe: Probe, count: int, dim: int, hidden: int, pattern: list[int]
) -> tuple[float, float, float, int]:
    """Largest relative error of results and of gradients, largest gradient of unused experts, and values not finite."""
    device, n = probe.device_type, sum(pattern)
    with torch.device(device):
        layer = Experts(count, dim, hidden, Initializer(None), 0.02)
        counts = torch.tensor(pattern)
        x = torch.randn(n, dim).bfloat16()
        grad = torch.randn(n, dim).bfloat16()
    weights: dict[str, Tensor] = dict(layer.named_parameters())
    for parameter in weights.values():
        parameter.data = torch.randn_like(parameter.data).mul_(parameter.shape[-1] ** -0.5).bfloat16()
    poison(device)
    rows = x.clone().requires_grad_()
    out = layer(rows, counts)
    out.backward(grad)
    wanted, wanted_gradients = _plain_experts(x, pattern, weights, grad)
    made = {"rows": rows.grad, **{name: parameter.grad for name, parameter in weights.items()}}
    gradients = {name: torch.zeros_like(wanted_gradients[name]) if g is None else g for name, g in made.items()}
    idle = [index for index, rows_of_it in enumerate(pattern) if not rows_of_it]
    unused = max((gradients[name][idle].abs().max().item() for name in weights if idle), default=0.0)
    unfinite = sum(int((~value.isfinite()).sum()) for value in (out.detach(), *gradients.values()))
    errors = [relative(gradients[name], wanted_gradients[name]) for name in gradients]
    return relative(out, wanted), torch.tensor(errors).max().item(), unused, unfinite


def _plain_experts(
    x: Tensor, pattern: list[int], weights: dict[str, Tensor], grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """w2(silu(w1 x) * w3 x), expert by expert in fp32, and its gradients written out."""
    gradients = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in weights.items()}
    gradients["rows"] = torch.zeros_like(x, dtype=torch.float32)
    out, start = torch.zeros_like(x, dtype=torch.float32), 0
    for index, rows in enumerate(pattern):
        if rows:
            own = slice(start, start + rows)
            w1, w2, w3 = (weights[name].detach()[index].float() for name in ("w1", "w2", "w3"))
            v, g = x[own].float(), grad[own].float()
            a, b = v @ w1.t(), v @ w3.t()
            sigmoid = a.sigmoid()
            middle = a * sigmoid * b
            out[own] = middle @ w2.t()
            d_middle = g @ w2
            d_a, d_b = d_middle * b * sigmoid * (1 + a * (1 - sigmoid)), d_middle * a * sigmoid
            gradients["rows"][own] = d_a @ w1 + d_b @ w3
            gradients["w1"][index], gradients["w3"][index] = d_a.t() @ v, d_b.t() @ v
            gradients["w2"][index] = g.t() @ middle
            start += rows
    return out, gradients


def document_positions(seq: int, documents: int, device: str, batch: int = 1) -> Tensor:
    """Positions int64 [batch, seq] of so many documents of random lengths in each sequence."""
    generator = torch.Generator().manual_seed(seq + documents)
    positions = []
    for _ in range(batch):
        cuts = (torch.randperm(seq - 1, generator=generator)[: documents - 1] + 1).sort().values.tolist()
        bounds = [0, *cuts, seq]
        positions.append(torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)]))
    return torch.stack(positions).to(device)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor | None) -> Tensor:
    """softmax(scale q k^T) v in fp32 with the whole mask written out."""
    seq, repeats = q.shape[1], q.shape[2] // k.shape[2]
    order = torch.arange(seq, device=q.device)
    mask = (order[:, None] >= order[None, :])[None]
    if positions is not None:
        document = (positions == 0).cumsum(1)
        mask = mask & (document[:, :, None] == document[:, None, :])
    keys, values = (x.float().repeat_interleave(repeats, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), keys) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1), values)


def attention(probe: Probe) -> None:
    """Attention as the model calls it, in bf16: results and gradients; another document's text changes nothing."""
    seq, documents = (2048, 28) if probe.on_gpu else (128, 9)
    for name, heads, kv_heads, width, v_width in (
        ("equal widths", 8, 8, 64, 64),
        ("GQA 8/2", 8, 2, 128, 128),
        ("MLA 192/128", 8, 8, 192, 128),
    ):
        torch.manual_seed(1)
        make: dict[str, Any] = {"device": probe.device_type, "dtype": torch.bfloat16}
        tensors = [
            torch.randn(2, seq, h, w, **make) for h, w in ((heads, width), (kv_heads, width), (kv_heads, v_width))
        ]
        grad, scale = torch.randn(2, seq, heads, v_width, **make), width**-0.5
        for kind, positions in (
            ("one document", None),
            (f"{documents} documents", document_positions(seq, documents, probe.device_type, 2)),
        ):
            bounds = None if positions is None else DocumentBounds.from_positions(positions)
            attend = partial(causal_attention, scale=scale, documents=bounds)
            _compare(probe, f"{name}, {kind}", tensors, grad, scale, positions, attend)
            if positions is not None:
                _leaks(probe, f"{name}, {kind}", tensors, scale, positions, bounds)


def _leaks(
    probe: Probe, name: str, tensors: list[Tensor], scale: float, positions: Tensor, bounds: DocumentBounds | None
) -> None:
    """Change the text of each sequence's second document: what the others compute stays as it is, bit for bit."""
    document = (positions == 0).cumsum(1)
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[document == 2] += 1.0
    before, after = (causal_attention(*each, scale=scale, documents=bounds) for each in (tensors, changed))
    different = (before != after).flatten(2).any(-1)
    probe.number(f"{name}: other documents' positions that change", int((different & (document != 2)).sum()), equals=0)
    probe.number(f"{name}: own positions that change", int((different & (document == 2)).sum()), at_least=1)
