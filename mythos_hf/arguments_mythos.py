"""What a forward is given, checked: loops, attention's arguments, records, and a cache under two names."""

import difflib
import inspect
import operator
from typing import Any

import torch
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.masking_utils import create_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_utils import PreTrainedModel

from .configuration_mythos import MythosConfig, filled

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What this version of transformers calls the cache: in its own calls, and in outputs."""
_ATTENTION = frozenset(FlashAttentionKwargs.__annotations__) | frozenset(PagedAttentionArgs.__annotations__)
"""What transformers declares for attention: of packed sequences, and of continuous batching."""
_NOT_KEPT = "output_router_logits"


def attention_keywords(module: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """Those of `given` that attention reads. Raises TypeError for an unknown one, which swallowed would go unnoticed,
    and ValueError for a record that the model does not keep."""
    wanted = given.pop(_NOT_KEPT, None)
    if wanted or (wanted is None and getattr(module.config, _NOT_KEPT, False)):
        raise ValueError(f"{type(module).__name__}: {_NOT_KEPT}: given True; allowed: False, the model keeps none")
    for name in given:
        if name not in _ATTENTION:
            known = sorted({*inspect.signature(module.forward).parameters, *_ATTENTION, _NOT_KEPT} - {"kwargs"})
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{type(module).__name__}: unknown argument {name!r}{meant} (allowed: {', '.join(known)})")
    return given


def loop_count(config: MythosConfig, given: Any) -> int:
    """How often the block runs: as given, or as the configuration says. Raises ValueError for anything but a whole
    number of 1 or more."""
    loops = filled(config.n_loops) if given is None else given
    try:
        count = 0 if isinstance(loops, bool) else operator.index(loops)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"n_loops: given {loops!r}; allowed: a whole number, 1 or more")
    return count


def wanted_outputs(module: PreTrainedModel, hidden_states: bool | None, attentions: bool | None) -> tuple[bool, bool]:
    """Whether hidden states and attentions are to be kept: as given, or as the configuration says. Raises ValueError
    where attention does not compute its weights."""
    config: Any = module.config
    hidden_states = bool(config.output_hidden_states if hidden_states is None else hidden_states)
    attentions = bool(config.output_attentions if attentions is None else attentions)
    if attentions and config._attn_implementation != "eager":
        raise ValueError(
            f"{type(module).__name__}: output_attentions: given True with attn_implementation "
            f"{config._attn_implementation!r}; allowed: with 'eager', others compute no weights"
        )
    return hidden_states, attentions


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, given by either name. Raises ValueError for two different ones."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values: given two caches; allowed: one, by either name")
    return past_key_values if cache is None else cache


def check_entries(cache: Any, needed: int, n_loops: int) -> None:
    """Raises ValueError for a cache without an entry for each layer of each loop, or in which some of them were left
    behind by calls with fewer loops: their keys would be missing, unnoticed."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return
    grows = cache.layer_class_to_replicate is not None
    if not grows and len(layers) < needed:
        raise ValueError(
            f"{CACHE}: given a {type(cache).__name__} with {len(layers)} entries; allowed: {needed} or more for "
            f"n_loops={n_loops}; it takes them from the configuration it is made with: config.n_loops = {n_loops}"
        )
    if torch.compiler.is_compiling():  # comparing lengths that are tensors would break the graph
        return
    first, last = int(cache.get_seq_length(0)), int(cache.get_seq_length(needed - 1))
    if first != last:
        raise ValueError(
            f"{CACHE}: given one with {first} tokens, and {last} in the entries of loop {n_loops}; allowed: one that "
            f"was filled with n_loops={n_loops} or more throughout"
        )
