"""TensorBoard as a view of the metrics; the record is metrics.jsonl."""

import struct
from collections.abc import Iterator
from html import escape
from pathlib import Path

from mythos_ds.io import partial_path, sync
from mythos_ds.monitor.views import Values, flat

_EVENT_FILES = "events.out.tfevents.*"
_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = 4
_MAX_EVENT_BYTES = 1 << 28


class TensorBoardWriter:
    """Scalars under the metrics' own names; entry i of a list is `name/i`.

    A run that goes on at `start_step` shows every step once: what former starts wrote of later steps is dropped, and
    what they wrote of `start_step` stays.
    """

    def __init__(self, directory: Path, start_step: int = -1):
        # Imported here: it takes a second, and only one rank writes.
        from torch.utils.tensorboard import SummaryWriter

        self._shown = dict.fromkeys(truncate_events(directory, start_step), start_step)
        """The last step of each tag."""
        # A TensorBoard that has the former files open drops the same events when it sees this.
        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1)

    def write(self, step: int, values: Values) -> None:
        """One point per number; flushed, so that a killed run keeps them."""
        for name, value in flat(values).items():
            if self._is_new(name, step):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """A piece of text, shown as written."""
        if self._is_new(f"{name}/text_summary", step):
            self._writer.add_text(name, f"<pre>{escape(text, quote=False)}</pre>", step)
            self._writer.flush()

    def _is_new(self, tag: str, step: int) -> bool:
        former, self._shown[tag] = self._shown.get(tag), step
        return former != step

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


def truncate_events(directory: Path, step: int) -> set[str]:
    """Drop the events of later steps from a folder's files, torn ends, and what is there twice; the tags of `step`.

    Files that need no change are not touched.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    # Under construction beside the folder: TensorBoard reads whatever is called so in it.
    for left in directory.parent.glob(f".{_EVENT_FILES}.partial-*"):
        left.unlink()
    seen: set[tuple[int, str]] = set()
    for path in sorted(directory.glob(_EVENT_FILES)):
        content = path.read_bytes()
        kept = []
        for record, data in _records(content):
            event = Event.FromString(data)
            points = {(event.step, value.tag) for value in event.summary.value}
            if points and (event.step > step or points <= seen):
                continue
            seen |= points
            kept.append(record)
        if sum(map(len, kept)) < len(content):
            temporary = partial_path(directory.parent / path.name)
            temporary.write_bytes(b"".join(kept))
            sync(temporary)
            temporary.replace(path)
    return {tag for at, tag in seen if at == step}


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each whole record of an event file, and the event in it: length, checksum, event, checksum."""
    start = 0
    head = _LENGTH.size + _CHECKSUM_BYTES
    while start + head <= len(content):
        size = _LENGTH.unpack_from(content, start)[0]
        end = start + head + size + _CHECKSUM_BYTES
        if size > _MAX_EVENT_BYTES or end > len(content):
            return
        yield content[start:end], content[start + head : start + head + size]
        start = end
