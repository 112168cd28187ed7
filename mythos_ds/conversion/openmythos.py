"""OpenMythos weights (open-mythos 0.5.0) as a mythos model and back: the configuration and the state_dict.

The map is data: each row names the source tensors of one target and how they are joined. All joins are linear, so the
same map carries gradients over.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.tensor_joins import (
    Flat,
    InHeads,
    Join,
    Joined,
    OnColumns,
    OnRows,
    Parted,
    Row,
    Same,
    Stacked,
    Transposed,
)
from mythos_ds.errors import CheckpointError, ConfigError, TensorMismatchError
from mythos_ds.weights.pickled import PickledTensors, open_weights
from mythos_ds.weights.prefixes import without_prefix
from mythos_ds.weights.reader import TensorSource, TensorSpec
from mythos_ds.weights.whole_model import expected_specs
from mythos_ds.weights.writer import same_values

SEQ_LEN = 4096
"""max_seq_len of an export whose folder says no context length (their default)."""

_TABLES = ("freqs_cis", "freqs_cis_mla")
_BIAS, _HEAD, _EMBED = "recurrent.block.ffn.router_bias", "head.weight", "embed.weight"
_NO_COMPUTATION = {"embedding_std", "init_std", "mean_recurrence"}
_ABSENT: dict[str, Any] = {
    "vocab_size": 32000, "dim": 2048, "n_heads": 16, "n_kv_heads": 4, "max_seq_len": SEQ_LEN, "max_loop_iters": 16,
    "prelude_layers": 2, "coda_layers": 2, "attn_type": "mla", "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_experts": 64, "n_shared_experts": 2,
    "n_experts_per_tok": 4, "expert_dim": 512, "act_threshold": 0.99, "rope_theta": 500000.0, "lora_rank": 16,
}  # fmt: skip
"""What their MythosConfig takes for a field that is not given: files of older versions lack some."""
_UNUSED = {"max_output_tokens", "dropout"}
_LEAST = ("vocab_size", "dim")
"""Without these it is some other file."""

_NORMS: tuple[tuple[str, str], ...] = (("attn_norm", "attn_norm"), ("ffn_norm", "ffn_norm"))
_ATTENTION: dict[str, tuple[tuple[str, str], ...]] = {
    "mla": (
        ("attn.q_down", "attn.q_down"),
        ("attn.q_norm", "attn.q_norm"),
        ("attn.q_up", "attn.q_up_nope attn.q_up_rope"),
        ("attn.kv_down", "attn.kv_down"),
        ("attn.kv_norm", "attn.kv_norm"),
        ("attn.kv_up", "attn.kv_up"),
        ("attn.o", "attn.wo"),
    ),
    "gqa": (("attn.q", "attn.wq"), ("attn.k", "attn.wk"), ("attn.v", "attn.wv"), ("attn.o", "attn.wo")),
}
_FEED_FORWARD = (("w1", "gate"), ("w3", "up"), ("w2", "down"))
_LOOP: tuple[tuple[str, str, Join], ...] = (
    ("recurrent.injection.log_A", "recurrent.injection.log_A", Same()),
    ("recurrent.injection.log_dt", "recurrent.injection.log_dt", Same()),
    ("recurrent.injection.B", "recurrent.injection.B", Same()),
    ("recurrent.halting.weight", "recurrent.act.halt.weight", Flat()),
    ("recurrent.halting.bias", "recurrent.act.halt.bias", Same()),
    ("recurrent.lora.down.weight", "recurrent.lora.down.weight", Same()),
    ("recurrent.lora.up.weight", "recurrent.lora.B", Transposed()),
    ("recurrent.lora.scale", "recurrent.lora.scale.weight", Same()),
    ("recurrent.norm.weight", "recurrent.norm.weight", Same()),
    (_EMBED, _EMBED, Same()),
    ("norm.weight", "norm.weight", Same()),
)


def openmythos_config(source: Any) -> ModelConfig:
    """The configuration that computes what an open-mythos `MythosConfig` computes (dropout aside)."""
    mla = source.attn_type == "mla"
    attention: dict[str, Any] = {"n_kv_heads": source.n_kv_heads}
    if source.dim % source.n_heads:  # their heads share out what n_heads divides of the width
        attention["head_dim"] = source.dim // source.n_heads
    if mla:
        names = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        attention = {name: getattr(source, name) for name in names}
    return ModelConfig(
        **attention,
        attn_type="mla" if mla else "gqa",
        vocab_size=source.vocab_size,
        dim=source.dim,
        n_heads=source.n_heads,
        prelude_layers=source.prelude_layers,
        recurrent_layers=1,
        coda_layers=source.coda_layers,
        max_loops=source.max_loop_iters,
        mean_recurrence=source.max_loop_iters,
        rope_theta=float(source.rope_theta),
        rope_interleaved=True,
        ffn_dim=source.dim * 4 // 3,
        n_experts=source.n_experts,
        n_experts_per_tok=source.n_experts_per_tok,
        expert_dim=source.expert_dim,
        n_shared_experts=source.n_shared_experts,
        shared_expert_dim=source.expert_dim * source.n_experts_per_tok,
        router_score="softmax",
        injection="post",
        discretisation="direct",
        initial_state="embedding",
        prelude_norm=False,
        loop_embedding="raw",
        lora_rank=source.lora_rank,
        lora_target="output",
        halting="act_openmythos",
        act_threshold=source.act_threshold,
        tie_embeddings=True,
        norm_eps=1e-6,
    )


def openmythos_fields(config: ModelConfig, max_seq_len: int) -> dict[str, Any]:
    """The fields of the `MythosConfig` that computes what `config` says. Raises ConfigError, with every reason, where
    OpenMythos has none."""
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "dim": config.dim,
        "n_heads": config.n_heads,
        "n_kv_heads": config.resolved_kv_heads,
        "max_seq_len": max_seq_len,
        "max_loop_iters": config.max_loops,
        "prelude_layers": config.prelude_layers,
        "coda_layers": config.coda_layers,
        "attn_type": config.attn_type,
        "kv_lora_rank": config.kv_lora_rank or 512,
        "q_lora_rank": config.q_lora_rank or 1536,
        "qk_rope_head_dim": config.qk_rope_head_dim or 64,
        "qk_nope_head_dim": config.qk_nope_head_dim or 128,
        "v_head_dim": config.v_head_dim or 128,
        "n_experts": config.n_experts,
        "n_shared_experts": config.n_shared_experts,
        "n_experts_per_tok": config.n_experts_per_tok,
        "expert_dim": config.expert_dim,
        "act_threshold": config.act_threshold,
        "rope_theta": config.rope_theta,
        "lora_rank": config.lora_rank or 1,
        "dropout": 0.0,
    }
    able, wanted = _resolved(openmythos_config(SimpleNamespace(**fields))), _resolved(config)
    reasons = [
        f"model.{key}: given {json.dumps(wanted[key])}; OpenMythos computes {json.dumps(able[key])} only"
        for key in wanted
        if wanted[key] != able[key]
    ]
    if reasons:
        raise ConfigError("\n".join(["OpenMythos cannot express this model:", *reasons]), code="MDS172")
    return fields


def _resolved(config: ModelConfig) -> dict[str, Any]:
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in _NO_COMPUTATION}
    if config.attn_type == "gqa":
        values |= {"n_kv_heads": config.resolved_kv_heads, "head_dim": config.resolved_head_dim}
    values["shared_expert_dim"] = config.resolved_shared_dim if config.n_shared_experts else None
    return values


def openmythos_rows(config: ModelConfig) -> list[Row]:
    """How each of our tensors is made of theirs; `lm_head.weight` is the tied `embed.weight` and is not listed."""
    rows = []
    names = (*_NORMS, *_ATTENTION[config.attn_type])
    layers = [(f"{part}.{i}",) * 2 for part in ("prelude", "coda") for i in range(getattr(config, f"{part}_layers"))]
    for ours, theirs in [*layers, ("recurrent.layers.0", "recurrent.block")]:
        for target, sources in names:
            parts = tuple(f"{theirs}.{name}.weight" for name in sources.split())
            join: Join = InHeads(config.n_heads) if len(parts) > 1 else Same()
            rows.append(Row(f"{ours}.{target}.weight", parts, join))
    for prefix, _ in layers:
        for ours, theirs in _FEED_FORWARD:
            rows.append(Row(f"{prefix}.ffn.{ours}.weight", (f"{prefix}.ffn.{theirs}.weight",), Same()))
    moe, ffn = "recurrent.layers.0.moe", "recurrent.block.ffn"
    rows.append(Row(f"{moe}.router.weight", (f"{ffn}.router.weight",), Same()))
    for ours, theirs in _FEED_FORWARD:
        experts = tuple(f"{ffn}.routed_experts.{i}.{theirs}.weight" for i in range(config.n_experts))
        rows.append(Row(f"{moe}.experts.{ours}", experts, Stacked()))
        shared = tuple(f"{ffn}.shared_experts.{i}.{theirs}.weight" for i in range(config.n_shared_experts))
        if shared:
            beside: Join = OnColumns() if ours == "w2" else OnRows()
            rows.append(Row(f"{moe}.shared_experts.{ours}.weight", shared, beside))
    loop = [row for row in _LOOP if config.lora_rank or ".lora." not in row[0]]
    return rows + [Row(target, (source,), join) for target, source, join in loop]


def openmythos_source(source: TensorSource, config: ModelConfig) -> TensorSource:
    """Our tensors, read from theirs. Raises CheckpointError where a tensor is missing or unknown, where the head is not
    the embedding, and where a router bias is set: theirs shifts logits, ours scores (their training never moves it from
    zero)."""
    rows = openmythos_rows(config)
    known = {name for row in rows for name in row.sources} | {*_TABLES, _BIAS, _HEAD}
    specs = source.specs()
    unknown = sorted(set(specs) - known)
    if unknown:
        raise TensorMismatchError(f"{unknown[0]}: not a tensor of this OpenMythos configuration")
    if _HEAD in specs and _EMBED in specs and not same_values(source, _HEAD, _EMBED):
        raise CheckpointError(f"{_HEAD}: is not the embedding, to which OpenMythos ties it")
    return Joined(_refuse_bias(source), rows)


def read_openmythos(
    path: Path, *, fields_file: Path | None = None, allow_pickle: bool = False
) -> tuple[TensorSource, ModelConfig, dict[str, Any]]:
    """Our tensors, configuration and metadata of OpenMythos weights: a file of torch.save, or a folder with one or with
    safetensors. `MythosConfig`'s fields are in `fields_file`, else in config.json beside the weights, or in the file as
    "cfg". Raises CheckpointError or ConfigError."""
    found = None if fields_file is None else _fields_in(fields_file)
    weights = open_weights(path, allow_pickle=allow_pickle)
    if found is None and isinstance(weights, PickledTensors) and (inside := weights.config_fields()) is not None:
        found = inside, _config_of(inside, path)
    fields, config = found or _fields_in((path if path.is_dir() else path.parent) / "config.json")
    metadata: dict[str, Any] = {"source": "open-mythos", "seq_len": int(fields.get("max_seq_len", SEQ_LEN))}
    if unread := sorted(set(fields) - set(_ABSENT) - _UNUSED):
        metadata["unread"] = unread
    return openmythos_source(without_prefix(weights, _EMBED), config), config, metadata


def _fields_in(file: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The fields of a MythosConfig in a JSON file, and our configuration."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: missing; the fields of OpenMythos's MythosConfig as JSON ({error})", code="MDS172"
        ) from None
    return fields, _config_of(fields, file)


def _config_of(fields: dict[str, Any], where: Path) -> ModelConfig:
    if not isinstance(fields, dict) or (missing := [name for name in _LEAST if name not in fields]):
        says = f"{missing[0]} is missing" if isinstance(fields, dict) else "not an object"
        raise ConfigError(f"{where}: not an OpenMythos configuration ({says})", code="MDS172")
    try:
        return openmythos_config(SimpleNamespace(**{**_ABSENT, **fields}))
    except (TypeError, AttributeError, ValidationError) as error:
        raise ConfigError(f"{where}: not an OpenMythos configuration ({error})", code="MDS172") from None


class OpenMythosTensors:
    """Their state_dict, read from a mythos model's tensors; all of it but the tables of RoPE, which follow from the
    configuration. Raises CheckpointError where a router bias is set, or a tensor is missing or unknown."""

    def __init__(self, source: TensorSource, config: ModelConfig):
        expected = expected_specs(config)
        unknown = sorted(set(source.specs()) - set(expected))
        if unknown:
            raise TensorMismatchError(f"{unknown[0]}: not a tensor of this configuration")
        prefix = "recurrent.layers.0.moe.router"
        for name in (f"{prefix}.bias", f"{prefix}.loop_bias"):
            if bool(source.read(name).any()):
                raise CheckpointError(
                    f"{name}: is not zero; it acts on scores here, OpenMythos's on logits: only a model trained with "
                    "training.router_bias_rate 0, or an imported one, can be converted"
                )
        rows = openmythos_rows(config)
        self.source, self.parts = source, Parted(source, rows, _part_shapes(config, rows, expected))
        self._n_experts = config.n_experts

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the state_dict, sorted by name."""
        specs = self.parts.specs()
        own = {_HEAD: specs[_EMBED], _BIAS: TensorSpec(torch.float32, (self._n_experts,))}
        return dict(sorted({**specs, **own}.items()))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows."""
        if name == _BIAS:
            return torch.zeros(self._n_experts)[rows or slice(None)]
        return self.parts.read(_EMBED if name == _HEAD else name, rows)


def _part_shapes(
    config: ModelConfig, rows: list[Row], expected: Mapping[str, TensorSpec]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        whole, n = expected[row.target].shape, len(row.sources)
        own: list[tuple[int, ...]] = [whole]
        if isinstance(row.join, InHeads):
            widths = (config.qk_nope_head_dim or 0, config.qk_rope_head_dim or 0)
            own = [(config.n_heads * width, whole[1]) for width in widths]
        elif isinstance(row.join, Stacked):
            own = [whole[1:]] * n
        elif isinstance(row.join, OnRows):
            own = [(whole[0] // n, *whole[1:])] * n
        elif isinstance(row.join, OnColumns):
            own = [(whole[0], whole[1] // n)] * n
        elif isinstance(row.join, Flat):
            own = [(1, *whole)]
        elif isinstance(row.join, Transposed):
            own = [whole[::-1]]
        shapes |= dict(zip(row.sources, own, strict=True))
    return shapes


def _refuse_bias(source: TensorSource) -> TensorSource:
    if _BIAS in source.specs() and bool(source.read(_BIAS).any()):
        raise CheckpointError(
            f"{_BIAS}: nonzero values act on logits in OpenMythos and on scores here; "
            "only a zero bias (what OpenMythos trains) can be converted"
        )
    return source
