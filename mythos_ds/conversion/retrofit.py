"""A pretrained dense model of the Llama family as the start of a recurrent-depth one (arXiv 2511.07384).

Its first layers become the prelude, its last ones the coda, layers before those the recurrent block; what lies between
is dropped. The block's feed-forwards become mixtures of experts: each is split in `granularity` parts, and copies of
the parts are the experts (granular upcycling, arXiv 2410.07524). Parts of a copy share a router row and so are chosen
together, and the routing weights sum to `granularity`: the mixture computes what the feed-forward did, whatever the
router says. The state starts at zero and A only multiplies it, B is one: the first loop is the source's cut stack. From
the second on A h is added, which the source never saw: a small A keeps more loops close to it.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from mythos_ds.config.divisors import nearest_divisors
from mythos_ds.config.rules.model import head_dim, kv_heads, loop_embedding_width
from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.dense_source import layer_problems, model_fields, source_problems, value_of
from mythos_ds.conversion.hf_names import LAYER_NORMS
from mythos_ds.errors import CheckpointError, Coded, ConfigError, OptionError, TensorMismatchError
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.injection import INITIAL_DT
from mythos_ds.weights.reader import TensorSource, TensorSpec
from mythos_ds.weights.whole_model import expected_specs
from mythos_ds.weights.writer import all_finite, same_values

_ATTENTION = {
    "attn.q.weight": "self_attn.q_proj.weight",
    "attn.k.weight": "self_attn.k_proj.weight",
    "attn.v.weight": "self_attn.v_proj.weight",
    "attn.o.weight": "self_attn.o_proj.weight",
}
_QK_NORM = {"attn.q_norm.weight": "self_attn.q_norm.weight", "attn.k_norm.weight": "self_attn.k_norm.weight"}
_BIASES = {f"attn.{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkvo"}
_FEED_FORWARD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_WHOLE = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_HEAD = {"lm_head.weight": "lm_head.weight"}
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST_DECAY = 0.9998
"""Just below what the injection caps A at."""


@dataclass(frozen=True)
class Cut:
    """Which layers are taken and how they are upcycled."""

    prelude: int
    recurrent: int
    coda: int
    recurrent_from: int | None = None
    """First source layer of the recurrent block; None: the block ends where the coda begins."""
    n_experts: int = 8
    granularity: int = 4
    experts_per_token: int = 4
    mean_recurrence: int = 4
    max_loops: int = 16
    decay: float = 0.05
    """A of every channel at the start."""
    seed: int = 0
    """Draws the router."""
    context_length: int | None = None
    """Longest text that the model is for; None: the source's longest."""

    def layers(self, n_layers: int) -> dict[str, list[int]]:
        """Source layers by part, and the dropped ones. Raises ConfigError for a cut the source is too short for."""
        for name, least in (("prelude", 1), ("recurrent", 1), ("coda", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"--{name}: given {getattr(self, name)}; allowed: at least {least}; nearest: {least}")
        room = n_layers - self.prelude - self.coda
        if self.recurrent > room:
            raise OptionError(
                f"--prelude {self.prelude} --recurrent {self.recurrent} --coda {self.coda}: given "
                f"{self.prelude + self.recurrent + self.coda} layers; allowed: at most the {n_layers} of the source; "
                f"nearest: --recurrent {max(room, 0)}"
            )
        last = n_layers - self.coda - self.recurrent
        start = last if self.recurrent_from is None else self.recurrent_from
        if not self.prelude <= start <= last:
            nearest = min(max(start, self.prelude), last)
            raise OptionError(
                f"--recurrent-from: given {start}; allowed: {self.prelude} to {last} (after the prelude, before the "
                f"coda); nearest: {nearest}"
            )
        parts = {
            "prelude": list(range(self.prelude)),
            "recurrent": list(range(start, start + self.recurrent)),
            "coda": list(range(n_layers - self.coda, n_layers)),
        }
        taken = {layer for part in parts.values() for layer in part}
        return {**parts, "dropped": [layer for layer in range(n_layers) if layer not in taken]}


def retrofit_config(source: Mapping[str, Any], cut: Cut) -> ModelConfig:
    """The configuration of the model that `cut` makes of a Hugging Face config.json. Raises ConfigError, with every
    reason, for a source that cannot be expressed exactly."""
    problems, taken = source_problems(source), list[int]()
    if not problems:
        parts = cut.layers(int(source["num_hidden_layers"]))
        taken = [layer for part in ("prelude", "recurrent", "coda") for layer in parts[part]]
        problems = layer_problems(source, taken, context_of(source, cut))
    if problems:
        raise ConfigError("\n".join(["this source cannot be retrofitted:", *problems]), code="MDS170")
    hidden = int(source["intermediate_size"])
    g, n, k = cut.granularity, cut.n_experts, cut.experts_per_token
    if g < 1 or hidden % g:
        near = nearest_divisors(max(g, 1), hidden)
        problems.append(f"--granularity: given {g}; allowed: divisors of intermediate_size = {hidden}; nearest: {near}")
    elif n < g or n % g:
        near = str(max(n // g, 1) * g)
        problems.append(f"--experts: given {n}; allowed: multiples of --granularity = {g}; nearest: {near}")
    elif k < g or k % g or k > n:
        nearest = min(max(k // g, 1) * g, n)
        problems.append(
            f"--experts-per-token: given {k}; allowed: multiples of --granularity = {g} up to {n} (whole copies of the "
            f"feed-forward); nearest: {nearest}"
        )
    if not 0 < cut.decay <= _LARGEST_DECAY:
        least = _LARGEST_DECAY if cut.decay > _LARGEST_DECAY else Cut.decay
        problems.append(f"--decay: given {cut.decay}; allowed: above 0, up to {_LARGEST_DECAY}; nearest: {least}")
    if not 1 <= cut.mean_recurrence <= cut.max_loops:
        problems.append(f"--mean-recurrence: given {cut.mean_recurrence}; allowed: 1 to --max-loops = {cut.max_loops}")
    if problems:
        raise ConfigError([Coded("MDS171", problem) for problem in problems])
    try:
        config = ModelConfig(
            **model_fields(source, taken),
            prelude_layers=cut.prelude,
            recurrent_layers=cut.recurrent,
            coda_layers=cut.coda,
            max_loops=cut.max_loops,
            mean_recurrence=cut.mean_recurrence,
            n_experts=n,
            n_experts_per_tok=k,
            expert_dim=hidden // g,
            route_scale=float(g),
            prelude_norm=False,
        )
    except ValidationError as error:
        wrong = [f"model.{item['loc'][0]}: {item['msg']}, given {item['input']!r}" for item in error.errors()]
        message = "\n".join(["config.json: not a model that can be made here:", *wrong])
        raise ConfigError(message, code="MDS170") from None
    broken = {"head_dim": head_dim(config), "num_key_value_heads": kv_heads(config)}
    broken["hidden_size"] = loop_embedding_width(config)
    if found := [message.after(f"config.json: {key}: ") for key, message in broken.items() if message is not None]:
        raise ConfigError(found)
    return config


def context_of(source: Mapping[str, Any], cut: Cut) -> int:
    """Tokens that the model is for. Raises ConfigError where more are asked for than the source is for."""
    longest = int(value_of(source, "max_position_embeddings"))
    given = longest if cut.context_length is None else cut.context_length
    if not 1 <= given <= longest:
        nearest = min(max(given, 1), longest)
        raise OptionError(
            f"--context-length: given {given}; allowed: 1 to the source's max_position_embeddings = {longest}; "
            f"nearest: {nearest}"
        )
    return given


class Retrofitted:
    """The tensors of the model of `retrofit_config`, from those of the source. Raises CheckpointError for a tensor of
    the source that is missing, of another shape, not finite, or of which nothing is known (a bias, say), and for a head
    that is not the embedding though config.json ties them."""

    def __init__(self, source: TensorSource, hf: Mapping[str, Any], cut: Cut):
        config = retrofit_config(hf, cut)
        self.source, self.cut = source, cut
        self.n_layers = int(hf["num_hidden_layers"])
        self._names = self._copied(config)
        self._drawn = (config.n_experts, config.dim, config.resolved_init_std)
        specs = source.specs()
        self._check(specs, config)
        self._hidden = config.expert_dim
        self._specs = {ours: specs[theirs] for ours, theirs in self._names.items()}
        for layer in range(config.recurrent_layers):
            moe = f"recurrent.layers.{layer}.moe"
            self._specs[f"{moe}.router.weight"] = TensorSpec(torch.float32, (config.n_experts, config.dim))
            for part in _FEED_FORWARD:
                shape = (config.dim, config.expert_dim) if part == "w2" else (config.expert_dim, config.dim)
                dtype = specs[self._dense_name(layer, part)].dtype
                self._specs[f"{moe}.experts.{part}"] = TensorSpec(dtype, (config.n_experts, *shape))
        for name in ("log_A", "dt_bias", "B"):
            self._specs[f"recurrent.injection.{name}"] = TensorSpec(torch.float32, (config.dim,))
        self._specs["recurrent.loop_embedding.gain"] = TensorSpec(torch.float32, (config.dim,))

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the model but the router's counters, which are zero."""
        return dict(self._specs)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows."""
        if name in self._names:
            return self._finite(self._names[name], rows)
        if ".experts." in name:
            return self._expert_stack(name, rows or slice(0, self._specs[name].shape[0]))
        value = self._router(name) if name.endswith("router.weight") else self._loop_part(name)
        return value if rows is None else value[rows]

    def _expert_stack(self, name: str, experts: slice) -> Tensor:
        """Expert i is part i % granularity of the feed-forward's hidden channels."""
        layer, part = int(name.split(".")[2]), name.rsplit(".", 1)[1]
        theirs = self._dense_name(layer, part)
        starts = [i % self.cut.granularity * self._hidden for i in range(experts.start, experts.stop)]
        channels = [slice(start, start + self._hidden) for start in starts]
        if part != "w2":
            return torch.stack([self._finite(theirs, own) for own in channels])
        whole = self._finite(theirs)
        return torch.stack([whole[:, own] for own in channels])

    def _dense_name(self, layer: int, part: str) -> str:
        """The source's matrix of the feed-forward that recurrent layer `layer` is made of."""
        number = self.cut.layers(self.n_layers)["recurrent"][layer]
        return f"model.layers.{number}.mlp.{_FEED_FORWARD[part]}.weight"

    def _finite(self, theirs: str, rows: slice | None = None) -> Tensor:
        value = self.source.read(theirs, rows)
        if not all_finite(value):
            raise CheckpointError(f"{theirs}: has values that are not finite, in the given weights", code="MDS515")
        return value

    def _router(self, name: str) -> Tensor:
        """A row per copy of the feed-forward, repeated for its parts."""
        n_experts, dim, std = self._drawn
        drawn = torch.zeros(n_experts // self.cut.granularity, dim)
        Initializer(self.cut.seed).normal_(drawn, name, std)
        return drawn.repeat_interleave(self.cut.granularity, 0)

    def _loop_part(self, name: str) -> Tensor:
        """Of the injection and of the loop embedding, which starts at zero."""
        dt_bias = torch.full(self._specs[name].shape, math.log(math.expm1(INITIAL_DT)))
        dt = functional.softplus(dt_bias)  # as the module computes it in fp32
        values = {
            "log_A": (-math.log(self.cut.decay) / dt).log(),  # A = exp(-dt exp(log_A))
            "dt_bias": dt_bias,
            "B": 1.0 / dt,  # Euler's rule: dt B e is added
            "gain": torch.zeros_like(dt),
        }
        return values[name.rsplit(".", 1)[1]]

    def _copied(self, config: ModelConfig) -> dict[str, str]:
        names = {**_WHOLE, **({} if config.tie_embeddings else _HEAD)}
        layers = self.cut.layers(self.n_layers)
        attention = {**_ATTENTION, **dict(LAYER_NORMS[config.norm_placement]), **(_QK_NORM if config.qk_norm else {})}
        biased = {"none": "", "qkv": "qkv", "all": "qkvo"}[config.attention_biases]
        attention |= {ours: theirs for ours, theirs in _BIASES.items() if ours.split(".")[1] in biased}
        for part in ("prelude", "recurrent", "coda"):
            for i, number in enumerate(layers[part]):
                ours = f"recurrent.layers.{i}" if part == "recurrent" else f"{part}.{i}"
                theirs = f"model.layers.{number}"
                names |= {f"{ours}.{own}": f"{theirs}.{their}" for own, their in attention.items()}
                if part != "recurrent":
                    dense = _FEED_FORWARD.items()
                    names |= {f"{ours}.ffn.{own}.weight": f"{theirs}.mlp.{their}.weight" for own, their in dense}
        return names

    def _check(self, specs: Mapping[str, TensorSpec], config: ModelConfig) -> None:
        layers, expected = self.cut.layers(self.n_layers), expected_specs(config)
        wanted: dict[str, tuple[int, ...]] = {theirs: expected[ours].shape for ours, theirs in self._names.items()}
        for layer in range(config.recurrent_layers):
            for part in _FEED_FORWARD:
                sizes = (config.dim, config.ffn_dim) if part == "w2" else (config.ffn_dim, config.dim)
                wanted[self._dense_name(layer, part)] = sizes
        for name, shape in wanted.items():
            if name not in specs:
                raise TensorMismatchError(f"{name}: not in the given weights{self._absent_head(name)}")
            if specs[name].shape != shape:
                raise TensorMismatchError(f"{name}: has the shape {specs[name].shape}, config.json says {shape}")
            if specs[name].dtype not in _TYPES:
                raise TensorMismatchError(
                    f"{name}: is {specs[name].dtype}; allowed: float16, bfloat16, float32, float64"
                )
        dropped = tuple(f"model.layers.{number}." for number in layers["dropped"])
        known = {*wanted, *_HEAD.values()}
        for name in specs:
            if name not in known and not name.startswith(dropped) and not name.endswith("rotary_emb.inv_freq"):
                raise TensorMismatchError(f"{name}: nothing here stands for it; the model would not be the source's")
        self._check_tied(specs, config)

    @staticmethod
    def _absent_head(name: str) -> str:
        says = "; if the head is the embedding, write tie_word_embeddings true in config.json"
        return says if name in _HEAD.values() else ""

    def _check_tied(self, specs: Mapping[str, TensorSpec], config: ModelConfig) -> None:
        (head,), embedding = _HEAD.values(), _WHOLE["embed.weight"]
        if config.tie_embeddings and head in specs and not same_values(self.source, head, embedding):
            raise CheckpointError(
                f"{head}: differs from {embedding}, to which tie_word_embeddings ties it; write tie_word_embeddings "
                "false in config.json to keep this head, or leave the tensor out to drop it"
            )


def check_dense(source: TensorSource, hf: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a dense model's tensors are not those that its config.json demands. One whose layers
    cannot be expressed here is not looked at."""
    layers = hf.get("num_hidden_layers")
    if not isinstance(layers, int) or layers < len(("prelude", "recurrent")):
        return
    every = Cut(1, layers - 1, 0, n_experts=1, granularity=1, experts_per_token=1, mean_recurrence=1, max_loops=1)
    with suppress(ConfigError):
        Retrofitted(source, hf, every)


def describe(cut: Cut, n_layers: int) -> list[str]:
    """Which source layers go where, in words."""
    parts = cut.layers(n_layers)
    return [
        *(f"{part}: source layers {_ranges(parts[part])}" for part in ("prelude", "recurrent", "coda")),
        f"dropped: {'source layers ' + _ranges(parts['dropped']) if parts['dropped'] else 'none'}",
        f"experts: {cut.n_experts // cut.granularity} copies of each feed-forward in {cut.granularity} parts, "
        f"{cut.experts_per_token // cut.granularity} copies used by a token",
    ]


def _ranges(layers: list[int]) -> str:
    if not layers:
        return "none"
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
