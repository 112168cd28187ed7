"""Time of one optimizer step on DeepSpeed against plain torch, or of a pipeline against none, on the same cores.

Both sides train the same model on the same global batches and loop counts; runs alternate, and only their ratio is
quoted. With a pipeline the idle share of its processes is measured too, beside what its schedule's simulation says.

    mythos-ds bench-step --config tiny.json --processes 2
    mythos-ds bench-step --config tiny.json --processes 2 --against unpipelined parallel.pp_size=2 ...
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 3
TIME_LIMIT_S = 900


def main(argv: list[str] | None = None) -> int:
    """Runs both sides in turn and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny.json")
    parser.add_argument("--processes", type=int, default=2, help="processes of a DeepSpeed side, threads of torch's")
    parser.add_argument("--against", choices=("torch", "unpipelined"), default="torch")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of one run")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # both sides on the same cores
    role = os.environ.get("BENCH_ROLE")
    if role is not None:
        if role != "deepspeed":
            arguments.overrides.append("parallel.pp_size=1")
        timed = _time_torch(arguments) if role == "torch" else _time_deepspeed(arguments)
        if os.environ.get("RANK", "0") == "0":
            Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(timed))
        return 0
    medians: dict[str, list[float]] = {"deepspeed": [], arguments.against: []}
    idle: list[dict[str, float]] = []
    for _ in range(arguments.repetitions):
        for side in medians:
            timed = _run(side, arguments, sys.argv[1:] if argv is None else argv)
            medians[side].append(statistics.median(timed["seconds"]))
            idle += timed["idle"]
    best = {side: min(values) for side, values in medians.items()}
    result = {
        "config": arguments.config,
        "overrides": arguments.overrides,
        "processes": arguments.processes,
        "step_s": medians,
        f"ratio_deepspeed_to_{arguments.against}": best["deepspeed"] / best[arguments.against],
    }
    if idle:
        result["idle_share"] = {name: statistics.mean(step[name] for step in idle) for name in idle[0]}
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


def _run(side: str, arguments: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Seconds of each timed step of one fresh run, and the idle shares of a pipeline's."""
    processes = 1 if side == "torch" else arguments.processes
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        result = Path(folder) / "seconds.json"
        running = []
        for rank in range(processes):
            launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            added = {**launcher, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "BENCH_ROLE": side}
            added |= {"BENCH_RESULT": result, "OMP_NUM_THREADS": arguments.processes // processes}
            environment = os.environ | {key: str(value) for key, value in added.items()}
            running.append(subprocess.Popen([sys.executable, __file__, *argv], env=environment))
        try:
            failed = [process.args for process in running if process.wait(TIME_LIMIT_S)]
        finally:
            for process in running:
                process.kill()
        if failed:
            raise SystemExit(f"the {side} side failed")
        return json.loads(result.read_text())


def _resolve(arguments: argparse.Namespace, world_size: int) -> Any:
    from mythos_ds.config.loader import load_config
    from mythos_ds.config.resolve import resolve

    return resolve(load_config(arguments.config, arguments.overrides).config, world_size)


def _loops(resolved: Any, step: int) -> tuple[int, int]:
    from mythos_ds.model.sequence_depths import DepthSampler

    n_loops = DepthSampler.of(resolved.config).loops_at(step)
    return n_loops, min(n_loops, resolved.mean_backprop_depth)


def _batch(resolved: Any, step: int, rows: int, first: int) -> dict[str, Any]:
    """`rows` sequences of the step's random global batch, starting with row `first`."""
    import torch

    training = resolved.config.training
    generator = torch.Generator().manual_seed(step)
    shape = (training.global_batch_size, training.seq_len + 1)
    tokens = torch.randint(0, resolved.config.model.vocab_size, shape, generator=generator)[first : first + rows]
    positions = torch.arange(training.seq_len).repeat(rows, 1)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions}


def _time_deepspeed(arguments: argparse.Namespace) -> dict[str, Any]:
    from mythos_ds.costs.pipeline import predict
    from mythos_ds.engine.build import build_engine
    from mythos_ds.environment import ProcessEnvironment
    from mythos_ds.parallel.groups import init_parallel

    environment = ProcessEnvironment.detect(os.environ)
    resolved = _resolve(arguments, environment.world_size)
    groups = init_parallel(environment, resolved.ep_size, resolved.stages)
    engine = build_engine(resolved, groups)
    micro, seconds, idle = resolved.stages[groups.layout.stage].rows, [], []
    for step in range(WARM_UP_STEPS + arguments.steps):
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


def _time_torch(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from mythos_ds.engine.optimizer import make_optimizer, parameter_groups, set_learning_rate
    from mythos_ds.model.context import AuxLoss
    from mythos_ds.model.mythos import MythosModel

    torch.set_num_threads(arguments.processes)
    resolved = _resolve(arguments, 1)
    config, training = resolved.config, resolved.config.training
    checkpointing = config.parallel.activation_checkpointing == "loop"
    dtype = torch.bfloat16 if training.dtype == "bfloat16" else torch.float32
    model = MythosModel(config.model, seed=training.seed, checkpoint_loops=checkpointing)
    for parameter in model.parameters():  # buffers stay fp32, as under DeepSpeed
        parameter.data = parameter.data.to(dtype)
    groups = parameter_groups(model.named_parameters(), config)
    optimizer = make_optimizer(groups, training, offload=False, device=torch.device("cpu"))
    set_learning_rate(optimizer, 1e-3)
    aux, seconds = AuxLoss(training.balance_loss, training.z_loss, training.ponder_cost), []
    for step in range(WARM_UP_STEPS + arguments.steps):
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
    sys.exit(main())
