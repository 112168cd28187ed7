"""TensorBoard as a view of the metrics; the record is metrics.jsonl."""

from collections.abc import Mapping
from pathlib import Path


class TensorBoardWriter:
    """Scalars under the metrics' own names; entry i of a list is `name/i`."""

    def __init__(self, directory: Path):
        # Imported here: it takes a second, and only one rank writes.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, values: Mapping[str, float | list[float]]) -> None:
        """One point per number."""
        for name, value in values.items():
            if isinstance(value, list):
                for index, each in enumerate(value):
                    self._writer.add_scalar(f"{name}/{index}", each, step)
            else:
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A piece of text, shown as written."""
        self._writer.add_text(name, f"<pre>{_escape(text)}</pre>", step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
