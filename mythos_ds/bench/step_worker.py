"""One process of a side of bench/step.py: trains on DeepSpeed or in plain torch and times each step."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.costs.pipeline import predict
from mythos_ds.engine.build import build_engine
from mythos_ds.engine.optimizer import make_optimizer, parameter_groups, set_learning_rate
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.groups import init_parallel
from mythos_ds.train.depth_sampler import DepthSampler

WARM_UP_STEPS = 3


def main(case_file: str, result_file: str) -> None:
    """Time the steps of the case in `case_file`; rank 0 writes them to `result_file`."""
    case = json.loads(Path(case_file).read_text(encoding="utf-8"))
    timed = _time_torch(case) if case["side"] == "torch" else _time_deepspeed(case)
    if os.environ["RANK"] == "0":
        Path(result_file).write_text(json.dumps(timed), encoding="utf-8")


def _loops(resolved: ResolvedRun, step: int) -> tuple[int, int]:
    n_loops = DepthSampler.of(resolved.config).loops_at(step)
    return n_loops, min(n_loops, resolved.mean_backprop_depth)


def _batch(resolved: ResolvedRun, step: int, rows: int, first: int) -> dict[str, Any]:
    """`rows` sequences of the step's random global batch, starting with row `first`."""
    training = resolved.config.training
    generator = torch.Generator().manual_seed(step)
    shape = (training.global_batch_size, training.seq_len + 1)
    tokens = torch.randint(0, resolved.config.model.vocab_size, shape, generator=generator)[first : first + rows]
    positions = torch.arange(training.seq_len).repeat(rows, 1)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions}


def _time_deepspeed(case: dict[str, Any]) -> dict[str, Any]:
    environment = ProcessEnvironment.detect(os.environ)
    resolved = resolve(load_config(case["config"], case["overrides"]).config, environment.world_size)
    config = resolved.config
    groups = init_parallel(
        environment,
        resolved.ep_size,
        resolved.stages,
        tied=config.model.tie_embeddings,
        dispatch=config.parallel.dispatch,
        rows_in_fp8=config.parallel.dispatch_dtype == "fp8",
    )
    engine = build_engine(resolved, groups)
    micro, seconds, idle = resolved.stages[groups.layout.stage].rows, [], []
    for step in range(WARM_UP_STEPS + case["steps"]):
        stride = micro * groups.layout.dp_size
        own = groups.layout.rows_of(stride).start
        firsts = [m * stride + own for m in range(resolved.gradient_accumulation_steps)]
        batches = [_batch(resolved, step, micro, first) for first in firsts]
        n_loops, n_grad_loops = _loops(resolved, step)
        groups.barrier()
        start = time.perf_counter()
        result = engine.train_step(
            batches, n_loops=n_loops, n_grad_loops=n_grad_loops, lr=1e-3, statistics=groups.pipelined
        )
        seconds.append(time.perf_counter() - start)
        if result.pipeline:
            measured = result.pipeline["pipeline/idle_share"]
            idle.append({"measured": measured, "predicted": predict(resolved, n_loops).bubble})
    groups.close()
    return {"seconds": seconds[WARM_UP_STEPS:], "idle": idle[WARM_UP_STEPS:]}


def _time_torch(case: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(case["processes"])
    resolved = resolve(load_config(case["config"], case["overrides"]).config, 1)
    config, training = resolved.config, resolved.config.training
    checkpointing = config.parallel.activation_checkpointing
    dtype = torch.bfloat16 if training.dtype == "bfloat16" else torch.float32
    model = MythosModel(config.model, seed=training.seed, activation_checkpointing=checkpointing)
    for parameter in model.parameters():  # buffers stay fp32, as under DeepSpeed
        parameter.data = parameter.data.to(dtype)
    groups = parameter_groups(model.named_parameters(), config)
    optimizer = make_optimizer(groups, training, offload=False, device=torch.device("cpu"))
    set_learning_rate(optimizer, 1e-3)
    aux, seconds = AuxLoss(training.balance_loss, training.z_loss, training.ponder_cost), []
    for step in range(WARM_UP_STEPS + case["steps"]):
        batch = _batch(resolved, step, training.global_batch_size, 0)
        n_loops, n_grad_loops = _loops(resolved, step)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(
            batch["tokens"],
            n_loops=n_loops,
            n_grad_loops=n_grad_loops,
            positions=batch["positions"],
            targets=batch["targets"],
            aux=aux,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip or float("inf"))
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[WARM_UP_STEPS:], "idle": []}


if __name__ == "__main__":
    main(*sys.argv[1:])
