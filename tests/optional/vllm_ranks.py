"""What each of two tensor-parallel ranks does with a folder's tensors, without an engine: two processes with vLLM's
groups build their part of the model and load it."""

import multiprocessing
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.optional.vllm_scratch import SHARED_MEMORY

RANKS = 2
SECONDS = 400
Tensors = dict[str, Any]
Stream = Iterable[tuple[str, Any]]
_DOWN = "model.recurrent.layers.0.mlp.experts.1.down_proj.weight"
_QUERY = "model.prelude.0.self_attn.q_proj.weight"
_SCALE = f"{_QUERY}_scale_inv"


def without(name: str) -> Callable[[Tensors], Stream]:
    """A folder that lacks a tensor."""
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}.items()


def beside(name: str, of: str) -> Callable[[Tensors], Stream]:
    """A folder with one tensor more, as another is; of the same name, the second of two."""
    return lambda tensors: [*tensors.items(), (name, tensors[of])]


def shorter(name: str) -> Callable[[Tensors], Stream]:
    """A folder with a tensor that lacks a row."""
    return lambda tensors: {**tensors, name: tensors[name][:-1]}.items()


def in_fp8(name: str) -> Callable[[Tensors], Stream]:
    """A folder with a matrix in fp8, as no request to dequantise announces."""
    import torch

    return lambda tensors: {**tensors, name: tensors[name].to(torch.float8_e4m3fn)}.items()


def in_fp32(tensors: Tensors) -> Stream:
    """A folder that is said to be fp8 and is not."""
    return ((name, value.float()) for name, value in tensors.items() if not name.endswith("_scale_inv"))


PLAIN: dict[str, tuple[Callable[[Tensors], Stream], str]] = {
    "missing expert": (without(_DOWN), f"{_DOWN}: not in the folder (1 tensors are missing)"),
    "missing part of a joined matrix": (without(_QUERY), f"{_QUERY}: not in the folder"),
    "missing buffer": (without("model.recurrent.layers.0.mlp.router.loop_updates"), "loop_updates: not in the folder"),
    "unknown": (beside("model.other.weight", "model.norm.weight"), "model.other.weight: not a tensor of this model"),
    "unknown expert": (beside(_DOWN.replace(".1.", ".99."), _DOWN), "experts.99.down_proj.weight: not a tensor"),
    "doubled": (beside("model.norm.weight", "model.norm.weight"), "model.norm.weight: twice in the folder"),
    "doubled expert": (beside(_DOWN, _DOWN), f"{_DOWN}: twice in the folder"),
    "other shape": (shorter(_QUERY), f"{_QUERY}: is ["),
    "scale without a request": (beside(_SCALE, "model.norm.weight"), '"dequantize": true'),
    "fp8 without a request": (in_fp8(_QUERY), "is torch.float8_e4m3fn; allowed: torch.float32"),
}
"""Wrong folders of a model in fp32, and what each rank says of them."""
FP8: dict[str, tuple[Callable[[Tensors], Stream], str]] = {
    "matrix without scale": (without(_SCALE), f"{_QUERY}: an fp8 matrix without its scales"),
    "scale without matrix": (without(_QUERY), f"{_QUERY}: not in the folder, but its scales are"),
    "doubled matrix": (beside(_QUERY, _QUERY), _QUERY),
    "other scales": (shorter(_SCALE), f"{_SCALE}: is [1, 2]; allowed: [2, 2]"),
    "missing pair": (lambda tensors: without(_QUERY)(dict(without(_SCALE)(tensors))), f"{_QUERY}: not in the folder"),
    "nothing in fp8": (in_fp32, "quantization_config.dequantize: given true, but no tensor"),
}
"""The same of an fp8 folder that is dequantised."""


def refuse_on_every_rank(say: Callable[[str], None], root: Path) -> bool:
    """Whether each rank refuses each wrong folder by its message, and loads the right one."""
    plain = on_ranks(_refusals, root / "tiny", {"enable_expert_parallel": True}, sorted(PLAIN))
    request = {"hf_overrides": {"quantization_config": {"quant_method": "fp8", "dequantize": True}}}
    fp8 = on_ranks(_refusals, root / "fp8", request, sorted(FP8))
    wrong = [f"rank {rank}: {line}" for rows in (plain, fp8) for rank, row in enumerate(rows) for line in row]
    say(f"{len(PLAIN) + len(FP8)} wrong folders x {RANKS} ranks" + "".join(f"; {line}" for line in wrong))
    return not wrong


def slices_of_fp8_blocks(say: Callable[[str], None], root: Path) -> bool:
    """Whether each rank's fp8 matrices and scales, as vLLM holds them, are its part of the folder's: where ranks divide
    matrices, where parts are joined, of experts, and what latent attention makes of them for all loops. No kernel
    computes with them here."""
    options = {"dtype": "bfloat16", "attention_backend": "CPU_MLA"}
    rows = on_ranks(_slices, root / "blocks", {"dtype": "bfloat16"}, [])
    rows += on_ranks(_slices, root / "latent_blocks", options, [])
    wrong = [f"rank {place % RANKS}: {line}" for place, row in enumerate(rows) for line in row]
    say("; ".join(wrong) or "all parts in place")
    return not wrong


def on_ranks(
    work: Callable[..., list[str]], folder: Path, options: dict[str, Any], names: list[str]
) -> list[list[str]]:
    """What `work` finds wrong on each of two ranks."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    name = f"vllm_dist_{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as scratch:
        given = (work, str(folder), options, names, name, f"file://{scratch}/store", results)
        processes = [context.Process(target=_rank, args=(rank, *given)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        try:
            rows = dict(results.get(timeout=SECONDS) for _ in processes)
        finally:
            for process in processes:
                process.join(10)
                process.kill()
            for path in SHARED_MEMORY.glob(f"{name}*"):
                path.unlink()
    return [rows[rank] for rank in range(RANKS)]


def _rank(
    rank: int,
    work: Callable[..., list[str]],
    folder: str,
    options: dict[str, Any],
    names: list[str],
    name: str,
    store: str,
    results: Any,
) -> None:
    try:
        os.environ["VLLM_DIST_IDENT"] = name
        results.put((rank, work(rank, folder, options, names, store)))
    except Exception as error:
        results.put((rank, [f"{type(error).__name__}: {error}"]))
        raise


def _built(rank: int, folder: str, options: dict[str, Any], store: str) -> tuple[Any, Tensors]:
    """One rank's part of the model, and the folder's tensors."""
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    sizes = {"tensor_parallel_size": RANKS, "distributed_executor_backend": "mp", "max_model_len": 64}
    given = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, **sizes, **options}
    config = EngineArgs(model=folder, **given).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(RANKS, rank, store, rank, "gloo")
        ensure_model_parallel_initialized(RANKS, 1)
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(config)
    return model, load_file(f"{folder}/model.safetensors")


def _refusals(rank: int, folder: str, options: dict[str, Any], names: list[str], store: str) -> list[str]:
    """The wrong folders that this rank takes, or refuses in other words, and the right one if it refuses that."""
    import torch

    wrong = []
    if "hf_overrides" in options and not torch.cpu._is_amx_tile_supported():
        try:
            _built(rank, folder, {"dtype": "bfloat16"}, store)
            wrong.append("fp8 without AMX: started")
        except ValueError as error:
            wrong += [] if "given fp8 on a CPU without AMX" in str(error) else [f"fp8 without AMX: {error}"]
    model, tensors = _built(rank, folder, options, store)
    if options.get("enable_expert_parallel"):
        own = model.model.recurrent.layers[0].mlp.experts.routed_experts.w13_weight
        if len(own) * RANKS != model.config.n_routed_experts:
            wrong.append(f"has {len(own)} of {model.config.n_routed_experts} experts")
    for name in names:
        change, message = {**PLAIN, **FP8}[name]
        try:
            model.load_weights(change(tensors))
            wrong.append(f"{name}: loaded")
        except ValueError as error:
            if message not in str(error):
                wrong.append(f"{name}: {error}")
    model.load_weights(tensors.items())
    return wrong


def _slices(rank: int, folder: str, options: dict[str, Any], names: list[str], store: str) -> list[str]:
    """The parts of fp8 matrices and scales that are not where this rank should have them."""
    import torch
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel

    # Only what says whether there is a kernel is replaced; none is called.
    torch.cpu._is_amx_tile_supported = lambda: True
    CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda cls, compute_capability=None: (True, None))
    model, tensors = _built(rank, folder, options, store)
    model.load_weights(tensors.items())
    held = dict(model.named_parameters())
    latent = model.config.attention_type == "mla"
    wrong = []
    for name, part in _parts(rank, model.config.n_routed_experts, latent, tensors).items():
        if held[name].shape != part.shape or not torch.equal(held[name].float(), part):
            wrong.append(name)
    attention = model.model.recurrent.layers[0].self_attn
    if latent and not _shares_one_matrix(attention, rank, tensors):
        wrong.append("absorbed matrices of fp8")
    return wrong


def _shares_one_matrix(attention: Any, rank: int, tensors: Tensors) -> bool:
    """Whether a layer's loops have one pair of absorbed matrices, and these are what kv_b_proj is."""
    import torch

    for loop in attention.attn:
        loop.process_weights_after_loading(torch.float32)
    first, name = attention.attn[0], "model.recurrent.layers.0.self_attn.kv_b_proj.weight"
    scale = torch.kron(tensors[f"{name}_scale_inv"], torch.ones(128, 128))
    whole = (tensors[name].float() * scale).chunk(RANKS)[rank].unflatten(0, (attention.heads, -1))
    keys, values = whole.split([attention.nope, attention.value], dim=1)  # [heads, width, rank]
    made = torch.allclose(first.W_UK_T, keys) and torch.allclose(first.W_UV, values.mT)
    return made and all(loop.W_UV is first.W_UV and loop.W_UK_T is first.W_UK_T for loop in attention.attn)


def _parts(rank: int, experts: int, latent: bool, tensors: Tensors) -> Tensors:
    """vLLM's fp8 matrices and scales of some layers of this rank, in fp32, made up from the folder's."""
    import torch

    def cut(name: str, dim: int) -> Any:
        return tensors[name].float().chunk(RANKS, dim)[rank]

    def rows(module: str, names: tuple[str, ...], kind: str) -> Any:
        return torch.cat([cut(f"{module}.{name}_proj.{kind}", 0) for name in names])

    parts: Tensors = {}
    layer = "model.recurrent.layers.0"
    for kind in ("weight", "weight_scale_inv"):
        for module in ("model.prelude.0.self_attn", f"{layer}.self_attn"):
            if latent:
                whole = ("q_a_proj", "kv_a_proj_with_mqa")
                parts |= {f"{module}.{name}.{kind}": tensors[f"{module}.{name}.{kind}"].float() for name in whole}
                parts |= {f"{module}.{name}_proj.{kind}": rows(module, (name,), kind) for name in ("q_b", "kv_b")}
            else:
                parts[f"{module}.qkv_proj.{kind}"] = rows(module, ("q", "k", "v"), kind)
            parts[f"{module}.o_proj.{kind}"] = cut(f"{module}.o_proj.{kind}", 1)
        for module in ("model.coda.0.mlp", f"{layer}.mlp.shared_experts"):
            parts[f"{module}.gate_up_proj.{kind}"] = rows(module, ("gate", "up"), kind)
            parts[f"{module}.down_proj.{kind}"] = cut(f"{module}.down_proj.{kind}", 1)
        stack, own = f"{layer}.mlp.experts.routed_experts", [f"{layer}.mlp.experts.{e}" for e in range(experts)]
        parts[f"{stack}.w13_{kind}"] = torch.stack([rows(module, ("gate", "up"), kind) for module in own])
        parts[f"{stack}.w2_{kind}"] = torch.stack([cut(f"{module}.down_proj.{kind}", 1) for module in own])
    return parts
