"""Views of a run's metrics beside the record: what TensorBoard, CSV and Weights & Biases have in common."""

from collections.abc import Mapping
from typing import Protocol

Values = Mapping[str, float | list[float]]


class View(Protocol):
    """Shows the metrics of a run, every step once, wherever the run was killed and goes on."""

    def write(self, step: int, values: Values) -> None:
        """Show numbers of `step`; several calls for one step add up. A name that the step has is left as it is."""

    def text(self, step: int, name: str, text: str) -> None:
        """Show a piece of text, where the view has room for text."""

    def close(self) -> None:
        """Flush what is left and close."""


def flat(values: Values) -> dict[str, float]:
    """Return the numbers by name; entry i of a list is `name/i`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            found |= {f"{name}/{index}": each for index, each in enumerate(value)}
        else:
            found[name] = value
    return found
