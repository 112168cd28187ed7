"""What runs inside the processes of test_deepep.py."""

import functools
import os
import sys
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as torch_distributed
from deepspeed.module_inject.auto_ep_comm import destroy_exchanges
from torch import Tensor

from mythos_ds.config.dispatch import DispatchChoice
from mythos_ds.config.resolve import resolve
from mythos_ds.engine.build import build_engine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.dispatch import LocalDispatcher
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.dispatch_deepep import DeepEPDispatcher
from mythos_ds.parallel.expert_parallel import ExpertParallelMoE
from mythos_ds.parallel.groups import ParallelGroups, init_parallel, require_expert_group
from tests.distributed.cases import toy_model, toy_run
from tests.distributed.dispatch_cases import DRAWS, drawn, experts, gradients
from tests.helpers.recording_deep_ep import MADE, deep_ep

LOOPS, GRADED, LAYERS = 3, 2, 2


def everything() -> dict[str, Any]:
    """What a process found: errors of single calls, of a model, and what buffers were asked for."""
    environment = ProcessEnvironment.detect(os.environ)
    groups = replace(init_parallel(environment, environment.world_size), dispatch=DispatchChoice("deepep"))
    found: dict[str, Any] = {"refused": refused(groups)}
    with patch.dict(sys.modules, {"deep_ep": deep_ep()}):
        found |= {"calls": [single_call(draw) for draw in range(len(DRAWS))], "sizes": sizes(), "models": {}}
        for mode in ("none", "layer", "loop"):
            found["models"][mode] = model(groups, mode)
    return found


def refused(groups: ParallelGroups) -> str:
    """What an engine says on a CPU."""
    config = toy_run({"ep": 2, "stage": 1, "dispatch": "deepep", "dtype": "bfloat16"}, 2)
    try:
        build_engine(resolve(config, 2), groups)
    except ParallelError as error:
        return str(error)
    return ""


def single_call(draw: int) -> dict[str, float]:
    """Largest differences from a process with all experts, relative to the largest number."""
    rank = torch_distributed.get_rank()
    given = drawn(draw, torch.float32)
    dispatcher = DeepEPDispatcher(require_expert_group(2), scope=1000 + draw)
    found = gradients(dispatcher, experts(4 * rank, 4 * rank + 4, torch.float32), given)
    expected = gradients(LocalDispatcher(), experts(0, 8, torch.float32), given)
    for name in ("w1", "w2", "w3"):
        torch_distributed.all_reduce(expected[name])
        expected[name] = expected[name][4 * rank : 4 * rank + 4]
    return {name: far(found[name], value) for name, value in expected.items()}


def far(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    if not expected.numel():
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()


def sizes() -> str:
    """What is said of a micro-batch that the buffer was not made for."""
    dispatcher = DeepEPDispatcher(require_expert_group(2), scope=2000)
    held = experts(4 * torch_distributed.get_rank(), 4 * torch_distributed.get_rank() + 4, torch.float32)
    few, more = drawn(0, torch.float32), drawn(4, torch.float32)
    gradients(dispatcher, held, few)
    try:
        gradients(dispatcher, held, more)
    except ParallelError as error:
        return str(error)
    return ""


def model(groups: ParallelGroups, mode: Any) -> dict[str, Any]:
    """A model of two looped layers against one with all experts, on this process's own tokens, and the buffer."""
    groups = replace(groups, exchange_scope=3000 + len(MADE))
    config = toy_model(recurrent_layers=LAYERS)
    rank = torch_distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    text = torch.randint(0, config.vocab_size, (2, 17), generator=generator)
    batch = {"tokens": text[:, :-1].contiguous(), "targets": text[:, 1:].contiguous()}
    factory = functools.partial(ExpertParallelMoE, groups=groups)
    sides = [
        MythosModel(config, seed=1, moe_factory=factory, activation_checkpointing=mode),
        MythosModel(config, seed=1),
    ]
    before, losses = len(MADE), []
    for side in sides:
        loss = side(**batch, n_loops=LOOPS, n_grad_loops=GRADED, aux=AuxLoss(0.1, 0.1))
        loss.backward()
        losses.append(loss.item())
    errors = {"loss": abs(losses[0] - losses[1])}
    whole = dict(sides[1].named_parameters())
    for name, parameter in sides[0].named_parameters():
        expected = whole[name].grad
        assert expected is not None
        assert parameter.grad is not None
        if ".experts." in name and "shared" not in name:
            torch_distributed.all_reduce(expected)
            local = config.n_experts // 2
            expected = expected[rank * local : (rank + 1) * local]
        errors[name] = far(parameter.grad, expected)
    made = MADE[before:]
    destroy_exchanges(sides[0])
    return {"errors": errors, "buffers": len(made), "calls": made[0].calls, "freed": [each.destroyed for each in made]}
