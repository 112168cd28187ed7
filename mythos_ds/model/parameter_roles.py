"""What a parameter is, by its name: how it is trained, and whether it is a stack of experts. No torch."""

from dataclasses import dataclass

_ROUTER_SUFFIX = "router.weight"
_LOOP_TABLE_SUFFIX = "lora.scale"
_EMBEDDING = "embed.weight"
_READOUTS = ("lm_head.weight", "lora.down.weight", "lora.up.weight")


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


def role_of(name: str, dimensions: int) -> Role:
    """The role of the parameter with this logical name and number of dimensions."""
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
