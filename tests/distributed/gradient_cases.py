"""What runs inside the processes of test_gradients.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.pipeline_executor import Pipeline, PipelineRun
from tests.distributed.cases import largest, opened, own_batches

BF16 = {"dtype": "bfloat16", "accumulation": 1}
LAYOUTS: list[dict[str, Any]] = [
    {**BF16, "ep": 1, "stage": 0},
    {**BF16, "ep": 2, "stage": 1},
    {**BF16, "ep": 2, "stage": 2},
    {**BF16, "ep": 2, "stage": 3},
]
RING: dict[str, Any] = {**BF16, "ep": 1, "stage": 3, "pp": 2, "accumulation": 2}
OWN_CHOICE = {**BF16, "ep": 2, "stage": 3, "deepspeed": {"communication_data_type": "bf16"}}
LOOPS = 8
STEPS = 10
REDUCTIONS = ("reduce_scatter_tensor", "all_reduce")
LEAST_ELEMENTS = 64
"""Of a reduced tensor that holds gradients: norms, losses and counts have fewer, or are no 16-bit floats."""


class Reductions:
    """Notes (operation, ranks of its group, dtype) of every reduction of floats. Must exist before DeepSpeed starts,
    whose backend keeps the functions that it finds."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, str]] = set()
        for name in REDUCTIONS:
            self._wrap(name)

    def _wrap(self, name: str) -> None:
        original: Callable[..., Any] = getattr(torch_distributed, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if tensor.numel() >= LEAST_ELEMENTS and tensor.is_floating_point():
                size = torch_distributed.get_world_size(kwargs.get("group"))
                self.seen.add((name, size, str(tensor.dtype)))
            return original(*args, **kwargs)

        setattr(torch_distributed, name, noted)


def precision() -> dict[str, Any]:
    """Types that gradients are added up and reduced in, by layout, and their error over many loops. Pipelines come
    last: DeepSpeed numbers modules per process, and compares the numbers over all ranks without one."""
    reductions = Reductions()
    own = {**BF16, "ep": 1, "stage": 3}
    out: dict[str, Any] = {"types": [_types(case, reductions) for case in LAYOUTS]}
    out["own_choice"] = _types(OWN_CHOICE, reductions)
    out["errors"] = [gradient_error({**own, "stage": stage}) for stage in range(4)]
    out["error_in_bf16"] = gradient_error({**own, "training": {"grad_dtype": "bfloat16"}})
    out["losses"] = losses({**BF16, "ep": 2, "stage": 3})
    out["types"].append(_types(RING, reductions))
    out["ring_losses"] = losses(RING)
    return out


def _types(case: dict[str, Any], reductions: Reductions) -> dict[str, Any]:
    with opened(case) as (engine, groups), _gathered(engine) as gradients:
        reductions.seen.clear()
        _step(engine, groups, case)
        return {"gradients": sorted(gradients), "reductions": sorted(reductions.seen)}


@contextmanager
def _gathered(engine: TrainingEngine) -> Iterator[set[str]]:
    """Types of gradients when they are whole, and in a pipeline when the schedule is through."""
    found: set[str] = set()
    run = Pipeline.train

    def watched(self: Pipeline, *args: Any, **kwargs: Any) -> PipelineRun:
        result = run(self, *args, **kwargs)
        found.update(str(p.grad.dtype) for p in self.model.parameters() if p.grad is not None)
        return result

    def note(parameter: Tensor) -> None:
        if parameter.grad is not None:
            found.add(str(parameter.grad.dtype))

    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in engine.module.parameters()]
    with patch.object(Pipeline, "train", watched):
        yield found
    for handle in handles:
        handle.remove()


def _step(engine: TrainingEngine, groups: ParallelGroups, case: dict[str, Any], **options: Any) -> float:
    batches = own_batches(0, case["accumulation"], groups)
    return engine.train_step(batches, n_loops=LOOPS, n_grad_loops=LOOPS, lr=1e-3, **options).loss


def gradient_error(case: dict[str, Any]) -> float:
    """The largest relative error that the engine's averaged gradient of a looped matrix has, against the sum in float64
    of what the loops of all ranks contribute."""
    with opened(case) as (engine, groups):
        exact = _exact_gradients(engine, groups, case)
        own: dict[str, Tensor] = {}

        def read(loss: float) -> None:
            for name, parameter in engine.module.named_parameters():
                gradient = engine.gradient(parameter)
                if name in exact and gradient is not None:
                    own[name] = gradient.double()

        _step(engine, groups, case, after_backward=read)
        assert own.keys() == exact.keys()
        return largest(((own[name] - value).norm() / value.norm()).item() for name, value in exact.items())


def _exact_gradients(engine: TrainingEngine, groups: ParallelGroups, case: dict[str, Any]) -> dict[str, Tensor]:
    """The same forward and backward without DeepSpeed, gradients added up in float64, of matrices of the loop."""
    config = engine.resolved.config
    model = MythosModel(config.model, seed=config.training.seed, activation_checkpointing="loop").to(torch.bfloat16)
    for router in (layer.router for layer in model.moe_layers()):
        for name, buffer in list(router.named_buffers(recurse=False)):
            setattr(router, name, buffer.float())
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float64
    (batch,) = own_batches(0, case["accumulation"], groups)
    aux = AuxLoss(balance=config.training.balance_loss, z=config.training.z_loss, ponder=0.0, scale=1.0)
    inputs = {name: batch[name] for name in ("targets", "positions")}
    model(batch["tokens"], n_loops=LOOPS, n_grad_loops=LOOPS, aux=aux, **inputs).backward()
    exact = {}
    for name, parameter in model.named_parameters():
        if name.startswith("recurrent.") and parameter.dim() > 1 and parameter.grad is not None:
            exact[name] = parameter.grad / groups.world_size
            torch_distributed.all_reduce(exact[name])
    return {name: value for name, value in exact.items() if value.any()}


def losses(case: dict[str, Any]) -> list[float]:
    """Of STEPS steps at changing depths; the same samples in every layout."""
    case = {**case, "accumulation": 2}
    with opened(case) as (engine, groups):
        return [
            engine.train_step(
                own_batches(step, 2, groups), n_loops=2 + step % 3, n_grad_loops=2, lr=3e-3, statistics=False
            ).loss
            for step in range(STEPS)
        ]


def losses_of_one() -> list[float]:
    """The same steps on one process, whole."""
    return losses({**BF16, "ep": 1, "stage": 1})
