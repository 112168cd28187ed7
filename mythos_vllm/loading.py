"""Loading an exported folder: each tensor once, none missing, none unknown, of its shape, on every rank alike."""

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

import mythos_hf
from mythos_hf.configuration_mythos import MythosConfig
from mythos_vllm.checks import BLOCK, DEQUANTISE

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""Matrices that vLLM has as one, and what the folder calls the parts."""
_SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
_STACKS = {"gate": ("w13", "w1"), "up": ("w13", "w3"), "down": ("w2", "w2")}
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight(?:_scale_inv)?)")
_SCALE = "_scale_inv"
_FP8 = torch.float8_e4m3fn


def load(model: nn.Module, config: MythosConfig, weights: Iterable[tuple[str, Tensor]], dequantise: bool) -> set[str]:
    """Copy a folder's tensors, or a rank's part of them, into vLLM's parameters, and return these parameters' names.

    Raises ValueError for a tensor that is unknown, doubled, missing or of another shape or type, and for `dequantise`
    where nothing is fp8.
    """
    places = dict((*model.named_parameters(), *model.named_buffers()))
    shapes = expected(config)
    for name in list(shapes):
        if _place(places, name)[0].dtype == _FP8:
            shapes[name + _SCALE] = _blocks(shapes[name])
    seen: set[str] = set()
    loaded: set[str] = set()
    for name, value in dequantised(weights) if dequantise else weights:
        if name not in shapes:
            raise ValueError(f"{name}: not a tensor of this model{_hint(name)}")
        if name in seen:
            raise ValueError(f"{name}: twice in the folder")
        if value.shape != shapes[name]:
            raise ValueError(f"{name}: is {list(value.shape)}; allowed: {list(shapes[name])}")
        seen.add(name)
        place, target, own = _place(places, name)
        if (value.dtype == _FP8) != (place.dtype == _FP8):
            raise ValueError(f"{name}: is {value.dtype}; allowed: {place.dtype}{_hint(name + _SCALE)}")
        getattr(place, "weight_loader", default_weight_loader)(place, value, **own)
        loaded.add(target)
    if missing := sorted(set(shapes) - seen):
        raise ValueError(f"{missing[0]}: not in the folder ({len(missing)} tensors are missing)")
    return loaded


def expected(config: MythosConfig) -> dict[str, torch.Size]:
    """The tensors of an exported folder and their shapes, as transformers' model has them; experts one by one."""
    with torch.device("meta"):
        tensors = mythos_hf.MythosForCausalLM(copy.deepcopy(config)).state_dict()
    shapes = {}
    for name, tensor in tensors.items():
        stack, mark, kind = name.partition(".mlp.experts.")
        if not mark:
            shapes[name] = tensor.shape
            continue
        for expert, matrix in enumerate(tensor):
            parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                shapes[f"{stack}.mlp.experts.{expert}.{part}_proj.weight"] = rows.shape
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def dequantised(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors with fp8 matrices as fp32, q * scale of its block; a matrix and its scales may come in any order.

    Raises ValueError for one without the other, and where there is none.
    """
    waiting: dict[str, Tensor] = {}
    found = False
    for name, value in weights:
        matrix = name.removesuffix(_SCALE)
        if matrix == name and value.dtype != _FP8:
            yield name, value
            continue
        found = True
        if matrix not in waiting:
            waiting[matrix] = value
            continue
        pair = (waiting.pop(matrix), value)
        if (pair[0].dtype == _FP8) == (pair[1].dtype == _FP8):
            raise ValueError(f"{name}: twice in the folder")
        quantised, scale = pair if pair[0].dtype == _FP8 else pair[::-1]
        if scale.shape != _blocks(quantised.shape):
            raise ValueError(
                f"{matrix}{_SCALE}: is {list(scale.shape)}; allowed: {list(_blocks(quantised.shape))}, one for "
                f"{BLOCK} x {BLOCK} values"
            )
        spread = scale.float().repeat_interleave(BLOCK, 0)[: len(quantised)].repeat_interleave(BLOCK, 1)
        yield matrix, quantised.float() * spread[:, : quantised.shape[1]]
    if waiting:
        name, value = min(waiting.items())
        lacks = "an fp8 matrix without its scales" if value.dtype == _FP8 else "not in the folder, but its scales are"
        raise ValueError(f"{name}: {lacks} ({len(waiting)} such)")
    if not found:
        raise ValueError("quantization_config.dequantize: given true, but no tensor of the folder is fp8")


def _blocks(shape: torch.Size) -> torch.Size:
    return torch.Size(-(-size // BLOCK) for size in shape)


def _hint(name: str) -> str:
    return f"; of an fp8 folder without quantization_config: {DEQUANTISE}" if name.endswith(_SCALE) else ""


def _place(places: dict[str, Any], name: str) -> tuple[Any, str, dict[str, Any]]:
    """The parameter that a tensor of the folder is or is part of, its name, and what its loader needs to know."""
    if expert := _EXPERT.fullmatch(name):
        stack, number, part, kind = expert.groups()
        joined, shard = _STACKS[part]
        target = f"{stack}.routed_experts.{joined}_{kind}"
        own = {"weight_name": target, "shard_id": shard, "expert_id": int(number)}
        return places[target], target, own
    if name not in places:
        module, part, kind = name.rsplit(".", 2)
        joined = next(joined for joined, parts in PACKED.items() if part in parts)
        target = f"{module}.{joined}.{kind}"
        return places[target], target, {"loaded_shard_id": _SHARDS[part]}
    return places[name], name, {}
