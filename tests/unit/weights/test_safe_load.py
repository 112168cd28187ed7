"""Reading without executing: members of enums however Python pickles them, and nothing else that getattr could give."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from mythos_ds.checkpoint.deepspeed_format import load_deepspeed_file
from mythos_ds.errors import CheckpointError
from mythos_ds.weights.safe_load import safe_load


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 pickle the members of an enum: by getattr."""

    def __init__(self, owner: Any, name: str):
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("pickled", [ZeroStageEnum.weights, ByName(ZeroStageEnum, "weights")])
def test_members_of_the_known_enum_are_read(tmp_path: Path, pickled: Any) -> None:
    torch.save({"zero_stage": pickled, "x": torch.ones(2)}, tmp_path / "file.pt")
    assert load_deepspeed_file(tmp_path / "file.pt")["zero_stage"] is ZeroStageEnum.weights


@pytest.mark.parametrize(
    "pickled", [ByName(ZeroStageEnum, "__class__"), ByName(LossScaler, "__init__"), ByName(int, "real")]
)
def test_getattr_gives_nothing_else(tmp_path: Path, pickled: Any) -> None:
    torch.save({"x": pickled}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="nothing was executed"):
        load_deepspeed_file(tmp_path / "file.pt")


def test_deepspeeds_classes_are_for_its_own_files(tmp_path: Path) -> None:
    torch.save({"zero_stage": ZeroStageEnum.weights}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="nothing was executed"):
        safe_load(tmp_path / "file.pt")
    assert safe_load(tmp_path / "file.pt", allow_pickle=True)["zero_stage"] is ZeroStageEnum.weights


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(CheckpointError, match=path.name):
            safe_load(path)
