"""The plan from ranks' files to logical tensors: pure arithmetic, also at the size of the largest preset."""

import time

import pytest
import torch

from mythos_ds.checkpoint.deepspeed_format import RankFile, RankGroup, open_checkpoint, plan
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve
from mythos_ds.conversion.planned_checkpoint import planned_tensors
from mythos_ds.costs.params import count_parameters
from mythos_ds.errors import CheckpointError, ConfigError
from tests.helpers.synthetic_checkpoint import write_synthetic

DENSE, EXPERTS = "prelude.0.ffn.w1.weight", "recurrent.layers.0.moe.experts.w1"


def zero3(rank: int, ranks: int, ep_size: int) -> RankFile:
    """A rank's file under ZeRO-3: a 5 x 3 matrix over all ranks, and its share of 4 experts of 3 x 1."""
    dense = RankGroup(0, {DENSE: (5, 3)}, None, rank, ranks)
    experts = RankGroup(1, {EXPERTS: (4 // ep_size, 3, 1)}, None, rank // ep_size, ranks // ep_size)
    return RankFile(f"rank_{rank}", rank % ep_size, (dense, experts))


def test_zero3_cuts_with_padding_at_the_end():
    tensors = plan([[zero3(rank, 4, 2) for rank in range(4)]], 2)
    (tiling,) = tensors[DENSE].tilings
    assert tensors[DENSE].shape == (5, 3)
    assert [(p.file, p.offset, p.numel) for p in tiling] == [
        ("rank_0", 0, 4), ("rank_1", 4, 4), ("rank_2", 8, 4), ("rank_3", 12, 3)
    ]  # fmt: skip
    (tiling,) = tensors[EXPERTS].tilings
    assert tensors[EXPERTS].shape == (4, 3, 1)
    assert [(p.file, p.offset, p.numel) for p in tiling] == [
        ("rank_0", 0, 3), ("rank_2", 3, 3), ("rank_1", 6, 3), ("rank_3", 9, 3)
    ]  # fmt: skip


def test_zero1_slices_go_on_where_the_rank_before_stopped():
    files = [
        RankFile("rank_0", 0, (RankGroup(0, {"a": (4,), DENSE: (2, 3)}, {"a": (0, 4), DENSE: (4, 1)}, 0, 0),)),
        RankFile("rank_1", 0, (RankGroup(0, {"a": (4,), DENSE: (2, 3)}, {DENSE: (0, 5)}, 0, 0),)),
    ]
    tensors = plan([files], 1)
    assert [(p.file, p.offset, p.numel, p.start) for p in tensors[DENSE].tilings[0]] == [
        ("rank_0", 0, 1, 4), ("rank_1", 1, 5, 0)
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [[0, 1, 3], [0, 1, 2], [0, 1, 2, 3, 3]])
def test_a_missing_or_doubled_rank_is_noticed(kept):
    with pytest.raises(CheckpointError, match=r"in no file, or in two|of 15 elements"):
        plan([[zero3(rank, 4, 2) for rank in kept]], 2)


def test_stages_must_agree_on_tied_weights():
    one = RankFile("a", 0, (RankGroup(0, {"embed.weight": (4, 2)}, None, 0, 1),))
    two = RankFile("b", 0, (RankGroup(0, {"embed.weight": (8, 1)}, None, 0, 1),))
    with pytest.raises(CheckpointError, match="disagree"):
        plan([[one], [two]], 1)
    assert len(plan([[one], [one]], 1)["embed.weight"].tilings) == 2


@pytest.mark.parametrize("preset", ["1t", "100b", "1b"])
def test_the_plan_of_a_preset_has_every_parameter(preset):
    started = time.monotonic()
    config = load_config(preset, []).config
    tensors = planned_tensors(resolve(config, planned_world_size(config)))
    counted = 0
    for tensor in tensors.values():
        (tiling,) = tensor.tilings
        counted += sum(piece.numel for piece in tiling)
    assert counted == count_parameters(config.model).total
    assert time.monotonic() - started < 60


def test_a_plan_without_a_checkpoint_needs_zero3():
    config = load_config("tiny", ["parallel.zero_stage=1", "deepspeed.zero_optimization=null"]).config
    with pytest.raises(ConfigError, match="zero_stage"):
        planned_tensors(resolve(config, 2))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("optim", "optimizer_state_dict", 5),
        ("optim", "ds_zero_partition_groups", 5),
        ("optim", "ds_zero_partition_groups", [{}]),
        ("optim", "optimizer_state_dict", {"ds_zero_partition_groups": None}),
        ("model", "param_shapes", 5),
        ("model", "param_shapes", [5]),
        ("model", "param_shapes", [{"a": 5}]),
        ("model", "frozen_param_shapes", 5),
    ],
)
def test_the_file_that_holds_another_type_is_the_one_that_is_named(kind, key, value, tmp_path):
    tag = write_synthetic(resolve(load_config("tiny", ["parallel.zero_stage=3"]).config, 1), tmp_path)
    (path,) = tag.glob(f"*_{kind}_states.pt")
    content = torch.load(path, weights_only=False)
    inside = content["optimizer_state_dict"] if key == "ds_zero_partition_groups" else content
    inside[key] = value
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"_{kind}_states.pt: not of the form that DeepSpeed writes"):
        open_checkpoint(tag, 1, 1)
