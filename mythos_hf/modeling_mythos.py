"""The recurrent-depth mixture-of-experts model in Hugging Face transformers; needs torch and transformers only."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .arguments_mythos import CACHE, attention_keywords, check_entries, loop_count, one_cache, wanted_outputs
from .attention_mythos import MythosContext, MythosRMSNorm
from .configuration_mythos import MythosConfig
from .experts_mythos import MythosExperts, MythosRouter
from .recurrent_mythos import MythosLayer, MythosRecord, MythosRecurrentBlock, checkpoints, run_part
from .rotary_mythos import rotary_tables


@dataclass
class MythosModelOutput(BaseModelOutputWithPast):
    """Adds `loop_states`: h after each loop, fp32 [batch, seq, dim], with `output_hidden_states`."""

    loop_states: tuple[Tensor, ...] | None = None


@dataclass
class MythosCausalLMOutput(CausalLMOutputWithPast):
    """Adds `loop_states`, as MythosModelOutput."""

    loop_states: tuple[Tensor, ...] | None = None


class MythosPreTrainedModel(PreTrainedModel):
    """What both classes share: loading that refuses incomplete files, and which parts are computed again."""

    config: MythosConfig
    config_class = MythosConfig
    base_model_prefix = "model"
    _no_split_modules = ["MythosLayer", "MythosRecurrentBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict = ["router", "injection", "loop_embedding"]
    # To quantisers, which leave them alone: this LoRA is small, part of the model, and its errors add up over loops.
    _keep_in_fp32_modules = ["recurrent.lora.down", "recurrent.lora.up"]
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers looks for the experts in this file, and would choose the slow implementation."""
        return True

    def _grouped_mm_can_dispatch(self) -> bool:
        """torch's grouped matmul wants rows of whole 16-byte units; experts of other widths are computed one by one."""
        if self.config.hidden_size % 8 or self.config.moe_intermediate_size % 8:
            raise ValueError("grouped_mm: needs hidden_size and moe_intermediate_size to be multiples of 8")
        return super()._grouped_mm_can_dispatch()

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """The types of what is loaded: `_keep_in_fp32_modules` changes none."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kind for name, kind in plan.items() if name not in (self._keep_in_fp32_modules or ())}

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, every_n_layers=1):
        """The parts that are computed again: a layer of prelude and coda, or one whole loop."""
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)
        options = getattr(gradient_checkpointing_func, "keywords", {})
        for module in self.modules():
            if isinstance(module, (MythosModel, MythosRecurrentBlock)):
                module.reentrant = options.get("use_reentrant", True)
                module.checkpoint_every = every_n_layers

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MythosExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MythosRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            for buffer in (module.e_score_correction_bias, module.loop_correction_bias, module.loop_updates):
                init.zeros_(buffer)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a tensor that is missing, unknown or of another shape is an error: transformers would
        leave it random and print a report."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        faults = {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}
        if faults:
            shown = "; ".join(f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in faults.items())
            raise ValueError(f"{args[0] if args else cls.__name__}: not a whole model: {shown}")
        return (model, info) if output_loading_info else model


class MythosModel(MythosPreTrainedModel):
    """The model without its head."""

    gradient_checkpointing = reentrant = False
    checkpoint_every = 1
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, dim)
        prelude, coda = config.num_prelude_layers, config.num_coda_layers
        self.prelude = nn.ModuleList([MythosLayer(config, looped=False, index=i) for i in range(prelude)])
        self.prelude_norm = MythosRMSNorm(dim, eps) if config.prelude_norm else None
        self.recurrent = MythosRecurrentBlock(config)
        last = prelude + config.num_recurrent_layers
        self.coda = nn.ModuleList([MythosLayer(config, looped=False, index=last + i) for i in range(coda)])
        self.norm = MythosRMSNorm(dim, eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        n_loops: int | None = None,
        return_dict: bool | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> MythosModelOutput | tuple:
        """input_ids int64 [batch, seq], or inputs_embeds [batch, seq, dim] -> the last hidden state [batch, seq, dim].

        n_loops: how often the block runs (None: the configuration's). cache and past_key_values: one thing by the names
        of all versions. output_hidden_states: the embedding and the stream after each layer, of prelude, every loop and
        coda, the last of them normed, num_hidden_layers + 1 in all, and h after each loop. output_attentions: the
        weights of each layer in the same order. kwargs: what transformers declares for attention. Raises ValueError for
        n_loops that is no whole number of 1 or more, for two caches, for one without the entries of n_loops or beside
        gradient checkpointing, and for anything but one input, TypeError for an unknown argument.
        """
        config, keywords = self.config, attention_keywords(self, kwargs)
        keeps = wanted_outputs(self, output_hidden_states, output_attentions)
        entries = one_cache(cache, past_key_values)
        n_loops = loop_count(config, n_loops)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"input_ids, inputs_embeds: {'none' if input_ids is None else 'both'} given; allowed: one")
        if keywords.get("cu_seq_lens_q") is not None and position_ids is None:
            raise ValueError("position_ids: not given; cu_seq_lens_q needs those of each sequence")
        if keywords.get("is_causal") is False and getattr(attention_mask, "ndim", 0) != 4:
            raise ValueError("is_causal: given False; allowed: True, unless attention_mask has 4 dimensions")
        if checkpoints(self):
            if entries is not None or use_cache:
                raise ValueError(f"{CACHE}: given with gradient checkpointing; allowed: none, and use_cache=False")
            use_cache = False
        looped = n_loops * config.num_recurrent_layers
        check_entries(entries, len(self.prelude) + looped + len(self.coda), n_loops)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if isinstance(entries, PagedAttentionCache) and CACHE != "cache":
            # Up to 5.23 the attention itself writes continuous batching's cache.
            keywords["cache"], entries = entries, None
            use_cache = False
        if position_ids is None:
            seen = entries.get_seq_length() if entries is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
        mask = create_causal_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: entries},  # not the empty one below, with which packed sequences would see each other
        )
        if entries is None and (config.use_cache if use_cache is None else use_cache):
            entries = DynamicCache()  # made without the configuration, it grows with the loops
        tables = rotary_tables(position_ids, config)
        context, record = MythosContext(tables, mask, entries, keywords, *keeps), MythosRecord()
        record.hidden_states.append(x)
        x = self._run_dense(self.prelude, x, context, record, first=0, slot=0)
        e = x if self.prelude_norm is None else self.prelude_norm(x)
        x = self.recurrent(e, n_loops, context, record).to(e.dtype)
        first = len(self.prelude) + n_loops
        x = self.norm(self._run_dense(self.coda, x, context, record, first=first, slot=len(self.prelude)))
        out = MythosModelOutput(
            last_hidden_state=x,
            hidden_states=(*record.hidden_states[:-1], x) if context.hidden_states else None,
            attentions=tuple(record.attentions) if context.attentions else None,
            loop_states=tuple(record.loop_states) if context.hidden_states else None,
            **{CACHE: entries},
        )
        return out if _as_mapping(self, return_dict) else out.to_tuple()

    def _run_dense(
        self, layers: Any, x: Tensor, context: MythosContext, record: MythosRecord, *, first: int, slot: int
    ):
        """Layers that run once. first: the number of the first among the parts that checkpointing counts."""
        for index, layer in enumerate(layers):
            x, weights = run_part(self, first + index, layer, x, context, slot + index)
            record.add([x] if context.hidden_states else [], [weights] if context.attentions else [])
        return x


def _as_mapping(module: PreTrainedModel, return_dict: bool | None) -> bool:
    return bool(module.config.return_dict if return_dict is None else return_dict)


class MythosForCausalLM(MythosPreTrainedModel, GenerationMixin):
    """The language model; `generate(..., n_loops=8)` runs the block eight times per token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True
    """To trainers that accumulate: the loss of a part is over the items of the whole batch (num_items_in_batch)."""

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        self.model = MythosModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        n_loops: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> MythosCausalLMOutput | tuple:
        """fp32 logits [batch, seq, vocab], or those of logits_to_keep; with labels int64 [batch, seq] also the mean
        loss of the next tokens, or their sum over num_items_in_batch, with which trainers accumulate. The rest is as in
        MythosModel."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            n_loops=n_loops,
            return_dict=True,
            cache=one_cache(cache, past_key_values),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **attention_keywords(self, kwargs),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept, :]).float()
        loss = None
        if labels is not None:
            sizes = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, **sizes)
        kept_too = {name: out.get(name) for name in (CACHE, "hidden_states", "attentions", "loop_states")}
        whole = MythosCausalLMOutput(loss=loss, logits=logits, **kept_too)
        return whole if _as_mapping(self, return_dict) else whole.to_tuple()

    def generate(self, *args, n_loops: int | None = None, cache=None, past_key_values=None, **kwargs):
        """As in transformers, at any loop count, with any kind of cache. A cache may be given by either name."""
        given = {"n_loops": n_loops, CACHE: one_cache(cache, past_key_values)}
        return super().generate(*args, **kwargs, **{name: value for name, value in given.items() if value is not None})

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Makes the cache, with the entries of the loops that are asked for: transformers counts the configuration's.
        A copy of the model's attributes carries another configuration there, so that no other thread sees it."""
        loops = loop_count(self.config, model_kwargs.get("n_loops"))
        asked = self
        if loops != self.config.n_loops:
            asked = copy.copy(self)
            asked.config = copy.deepcopy(self.config)
            asked.config.n_loops = loops
        above: Any = super(MythosForCausalLM, asked)
        return above._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


# Files hold experts one by one. Registered here, where loading needs it: without it experts would stay random.
register_checkpoint_conversion_mapping("mythos", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)

__all__ = ["MythosForCausalLM", "MythosModel", "MythosPreTrainedModel"]
