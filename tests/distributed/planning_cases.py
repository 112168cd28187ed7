"""What runs inside the processes of test_planned_states.py."""

from dataclasses import asdict
from typing import Any

import torch.distributed as torch_distributed

from mythos_ds.bench.calibration_worker import held_states
from mythos_ds.parallel.groups import require_expert_group
from mythos_ds.plan.memory import states
from tests.distributed.cases import numel, opened


def work(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each layout what DeepSpeed keeps, what the planner says, and the ranks of the expert group."""
    found = []
    for case in cases:
        with opened(case) as (engine, groups):
            ranks = []
            if groups.layout.ep_size > 1:
                ranks = torch_distributed.get_process_group_ranks(require_expert_group(groups.layout.ep_size))
            shapes = {name: tuple(vars(p)["ds_shape"]) for name, p in engine.module.named_parameters()}
            found.append(
                {
                    "kept": held_states(engine),
                    "planned": asdict(states(engine.resolved, groups.layout.stage)),
                    "expert_group": ranks,
                    "parameters": numel(engine.module.parameters()),
                    "experts": [list(shape) for name, shape in shapes.items() if name.endswith("experts.w1")],
                }
            )
    return found
