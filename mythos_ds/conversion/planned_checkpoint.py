"""The checkpoint that a configuration will write on a cluster, as the plan that merging follows; no files needed."""

from collections.abc import Iterator, Mapping

import torch

from mythos_ds.checkpoint.deepspeed_format import LogicalTensor, RankFile, RankGroup, plan
from mythos_ds.config.layout import Stage
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.errors import ConfigError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.parameter_roles import is_expert, role_of


def planned_tensors(resolved: ResolvedRun) -> dict[str, LogicalTensor]:
    """Where every weight of a ZeRO-3 run's checkpoint will be. Raises ConfigError for other ZeRO stages, whose flat
    groups DeepSpeed aligns as it builds them."""
    stage = resolved.config.parallel.zero_stage
    if stage != 3:
        raise ConfigError(f"parallel.zero_stage: given {stage}; a plan without a checkpoint needs 3")
    stages = [list(rank_files(resolved, index, stage)) for index, stage in enumerate(resolved.stages)]
    return plan(stages, resolved.ep_size)


def rank_files(resolved: ResolvedRun, index: int, stage: Stage) -> Iterator[RankFile]:
    """What each rank of a pipeline stage will write under ZeRO-3."""
    with torch.device("meta"):
        model = MythosModel(resolved.config.model, part=stage.part)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    folder = f"stage_{index}/" if len(resolved.stages) > 1 else ""
    groups = _groups(shapes, resolved.layout(stage.first_rank).ep_size)
    for rank in range(stage.size):
        layout = resolved.layout(stage.first_rank + rank)
        placed = []
        for number, (experts, names) in enumerate(groups):
            ranks, own = (
                (len(layout.expert_copies), layout.expert_copy) if experts else (layout.dp_size, layout.dp_rank)
            )
            placed.append(RankGroup(number, names, None, own, ranks))
        file = f"{folder}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        yield RankFile(file, layout.ep_rank, tuple(placed))


def _groups(shapes: Mapping[str, tuple[int, ...]], ep_size: int) -> list[tuple[bool, dict[str, tuple[int, ...]]]]:
    """Flat groups: one per role, and one for expert-parallel weights, with the shapes that a rank sees."""
    found: dict[tuple[str, bool], dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        cut = is_expert(name) and ep_size > 1
        local = (shape[0] // ep_size, *shape[1:]) if cut else shape
        found.setdefault((role_of(name, len(shape)).name, cut), {})[name] = local
    return [(cut, names) for (_, cut), names in found.items()]
