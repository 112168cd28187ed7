"""What runs inside the processes of test_checkpoint_faults.py."""

import errno
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mythos_ds.checkpoint import files, torch_files
from mythos_ds.checkpoint.save import CheckpointWriter, TrainingState, layout_of
from mythos_ds.config.schema import CheckpointConfig
from mythos_ds.errors import MythosError
from tests.distributed.cases import opened


def full_disk(folder: str, asynchronous: bool) -> dict[str, Any]:
    """A save, one in which rank 1 finds no space left, and one after space came back."""
    with opened({"ep": 2, "stage": 3}) as (engine, groups):
        writer = CheckpointWriter(engine, groups, Path(folder), CheckpointConfig(keep=9, asynchronous=asynchronous))

        def save(step: int) -> None:
            layout, config = layout_of(engine.resolved), engine.resolved.config.model_dump(mode="json")
            writer.save(TrainingState(step, 8 * step, None, layout, config))
            writer.finish()

        def refuse(path: Path, content: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        save(1)
        failed, error = False, ""
        with patch.object(torch_files, "_write", refuse if groups.rank == 1 else torch_files._write):
            try:
                save(2)
            except MythosError as found:
                failed, error = True, str(found)
        tags = [tag.name for tag in files.list_tags(Path(folder))]
        groups.barrier()
        save(3)
        after = [tag.name for tag in files.list_tags(Path(folder))]
        groups.barrier()
    return {"failed": failed, "error": error, "tags": tags, "after": after}
