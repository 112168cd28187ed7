"""Random number generator states of one process as JSON.

Training itself draws by keys (weights, depth, data order), not from these; they are kept so that whatever does draw
from them, also in user code, goes on as if there had been no stop.
"""

import base64
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mythos_ds.errors import CheckpointError
from mythos_ds.io import read_json


@dataclass(frozen=True)
class _Words:
    key: str
    pos: int


@dataclass(frozen=True)
class _Numpy:
    bit_generator: str
    state: _Words
    has_gauss: int
    gauss: float


@dataclass(frozen=True)
class RandomStates:
    """What `capture` gives."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: _Numpy
    torch: str
    device: str | None = None


def capture(device: torch.device) -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators, and of the accelerator's where there is one."""
    version, words, gauss = random.getstate()
    # numpy's global generator is what is meant, though new code should not use it.
    state = cast(dict[str, Any], np.random.get_state(legacy=False))  # noqa: NPY002
    inner = {"key": _encode(state["state"]["key"].tobytes()), "pos": int(state["state"]["pos"])}
    states = {
        "python": [version, list(words), gauss],
        "numpy": {**state, "state": inner},
        "torch": _encode(torch.get_rng_state().numpy().tobytes()),
    }
    if device.type != "cpu":
        states["device"] = _encode(torch.get_device_module(device).get_rng_state(device).cpu().numpy().tobytes())
    return states


def read_states(path: Path) -> RandomStates:
    """What `capture` gave, of a JSON file. Raises CheckpointError for another shape."""
    states: RandomStates = read_json(path, RandomStates)
    return states


def restore(path: Path, device: torch.device) -> None:
    """Set every generator to what `capture` saw, of which `path` is the JSON. Raises CheckpointError for anything
    else."""
    states = read_states(path)
    try:
        random.setstate(states.python)
        key = np.frombuffer(base64.b64decode(states.numpy.state.key), np.uint32)
        np.random.set_state({**asdict(states.numpy), "state": {"key": key, "pos": states.numpy.state.pos}})  # noqa: NPY002
        torch.set_rng_state(_decode(states.torch))
        if device.type != "cpu" and states.device is not None:
            torch.get_device_module(device).set_rng_state(_decode(states.device), device)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not states of random number generators ({error})") from error


def seed(key: tuple[int, ...]) -> None:
    """Start every generator from `key`."""
    python, numpy, torch_seed = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)  # noqa: NPY002
    torch.manual_seed(torch_seed)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
