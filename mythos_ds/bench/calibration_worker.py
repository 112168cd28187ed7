"""One process of a real engine that counts what it holds and sends, or measures how long it waits; started by
mythos-ds calibrate, one per rank."""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mythos_ds.bench.collective_bytes import CollectiveBytes
from mythos_ds.bench.paced_pipeline import paced_step
from mythos_ds.bench.paced_rows import paced_loop
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.engine.build import build_engine
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.parallel.groups import ParallelGroups, init_parallel
from mythos_ds.plan.live_bytes import LiveBytes


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Two steps to get going, then one that is counted, or a pipeline's that is paced; of case["n_loops"] loops. Or one
    paced loop, where case["paced"] is "rows"."""
    traffic = CollectiveBytes()
    environment = ProcessEnvironment.detect(os.environ)
    if case["node"] is not None:
        place = {"local_rank": environment.rank % case["node"], "local_world_size": case["node"]}
        environment = replace(environment, **place)
    resolved = resolve(load_config(case["config"], case["overrides"]).config, environment.world_size)
    groups = init_parallel(
        environment,
        resolved.ep_size,
        resolved.stages,
        tied=resolved.config.model.tie_embeddings,
        dispatch=resolved.config.parallel.dispatch,
        rows_in_fp8=resolved.config.parallel.dispatch_dtype == "fp8",
        timeout_s=120.0,
    )
    if case["paced"] == "rows":
        return paced_loop(resolved, groups, environment.local_world_size)
    engine = build_engine(resolved, groups)
    n_loops, grad_loops = case["n_loops"], min(resolved.mean_backprop_depth, case["n_loops"])
    for step in range(2):
        _step(engine, resolved, groups, step, 2, min(2, grad_loops))
    if case["paced"] == "stages":
        batches = _batches(resolved, groups, 2)
        waited = paced_step(engine, resolved, groups.layout.stage, batches, n_loops)
        groups.barrier()
        return waited
    found: dict[str, Any] = {"states": held_states(engine), "stage": groups.layout.stage}
    traffic.take()
    gc.collect()
    live = LiveBytes(existing=True)
    before = live.now
    with live:
        result = _step(engine, resolved, groups, 2, n_loops, grad_loops)
    found |= {"steady": before, "peak": live.peak, "traffic": traffic.take(), "pipeline": result.pipeline}
    groups.barrier()
    return found


def held_states(engine: TrainingEngine) -> dict[str, int]:
    """Bytes of weights, masters, optimizer state and gradients that a ZeRO-3 optimizer of DeepSpeed keeps."""
    zero = engine.deepspeed.optimizer
    kept = [state for flat in zero.fp32_partitioned_groups_flat for state in zero.optimizer.state[flat].values()]
    return {
        "weights": sum(parameter.ds_tensor.nbytes for group in zero.fp16_groups for parameter in group),
        "masters": sum(flat.nbytes for flat in zero.fp32_partitioned_groups_flat),
        "optimizer": sum(value.nbytes for value in kept if isinstance(value, torch.Tensor) and value.numel() > 1),
        "gradients": zero.grad_partitions_flat_buffer.nbytes,
    }


def _step(
    engine: TrainingEngine, resolved: ResolvedRun, groups: ParallelGroups, step: int, n_loops: int, grad_loops: int
) -> Any:
    return engine.train_step(_batches(resolved, groups, step), n_loops=n_loops, n_grad_loops=grad_loops, lr=1e-3)


def _batches(resolved: ResolvedRun, groups: ParallelGroups, step: int) -> list[dict[str, torch.Tensor]]:
    stage = resolved.stages[groups.layout.stage]
    training = resolved.config.training
    generator = torch.Generator().manual_seed(1000 * step + groups.layout.dp_rank)
    batches = []
    for _ in range(resolved.gradient_accumulation_steps):
        text = torch.randint(
            0, resolved.config.model.vocab_size, (stage.rows, training.seq_len + 1), generator=generator
        )
        batches.append({"tokens": text[:, :-1].contiguous(), "targets": text[:, 1:].contiguous()})
    return batches


def main() -> None:
    """Read the case, write what was found."""
    case, output = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    found = run(case)
    (output / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
