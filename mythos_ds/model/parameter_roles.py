"""What a parameter is, by its name: whether and how it is trained, and whether it is a stack of experts. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

_ROUTER_SUFFIX = "router.weight"
_LOOP_TABLE_SUFFIX = "lora.scale"
_EMBEDDING = "embed.weight"
_READOUTS = ("lm_head.weight", "lora.down.weight", "lora.up.weight")
_INJECTION = ("recurrent.injection.", "recurrent.loop_embedding.")


@dataclass(frozen=True)
class Role:
    """How parameters of one kind are trained."""

    name: str
    decays: bool
    width_scaled: bool
    orthogonal: bool = False
    """Whether Muon trains them, where it is the optimizer; the rest gets Adam."""


MATRIX = Role("matrix", decays=True, width_scaled=True, orthogonal=True)
READOUT = Role("readout", decays=True, width_scaled=True)
"""The head and the low-rank branches."""
EMBEDDING = Role("embedding", decays=False, width_scaled=False)
ROUTER = Role("router", decays=False, width_scaled=False)
VECTOR = Role("vector", decays=False, width_scaled=False)
"""Norms, A, B, dt, biases, gains, per-loop LoRA scales, halting."""
INJECTION = Role("injection", decays=False, width_scaled=False)
"""A, B, dt and the loop embedding, where they have a learning rate of their own."""


def role_of(name: str, dimensions: int, *, injection_apart: bool = False) -> Role:
    """The role of the parameter with this logical name and number of dimensions. injection_apart: the injection has a
    learning rate of its own."""
    if injection_apart and name.startswith(_INJECTION):
        return INJECTION
    if name.endswith(_EMBEDDING):
        return EMBEDDING
    if name.endswith(_ROUTER_SUFFIX):
        return ROUTER
    if name.endswith(_LOOP_TABLE_SUFFIX) or dimensions < 2:
        return VECTOR
    return READOUT if name.endswith(_READOUTS) else MATRIX


def is_expert(name: str) -> bool:
    """Whether a parameter is a stack of routed experts, cut over the expert-parallel ranks."""
    return ".moe.experts." in name


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter is not trained, by the configuration's name patterns (`*`, `?` and `[...]` as in a shell)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
