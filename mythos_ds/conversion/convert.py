"""From one format to another: the tensors to be written, what is written beside them, and what must be said."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.attention_sink import Sink, describe_sink, search_sink
from mythos_ds.conversion.dense_source import FAMILIES, hf_weights, unread_fields, unread_note
from mythos_ds.conversion.fp8 import BLOCK, Dequantised, Fp8Tensors, dequantised, quantization_config, unaligned
from mythos_ds.conversion.held_out_loss import comparison, evaluated_loops, held_out_text, losses
from mythos_ds.conversion.hf_card import source_metadata
from mythos_ds.conversion.huggingface import (
    hf_config,
    hf_metadata,
    hf_notes,
    hf_source,
    mythos_source,
    unread_by_mythos,
    write_side_files,
)
from mythos_ds.conversion.model_target import ROUTER_BUFFERS, WholeModel, check_tokenizer, write_config
from mythos_ds.conversion.openmythos import SEQ_LEN, OpenMythosTensors, openmythos_fields, read_openmythos
from mythos_ds.conversion.retrofit import Cut, Retrofitted, context_of, describe, retrofit_config
from mythos_ds.costs.serving import Kept, serving_notes
from mythos_ds.data.tokenizer_files import copy_tokenizer, has_tokenizer
from mythos_ds.errors import ConfigError, MythosError, OptionError, naming
from mythos_ds.io import read_json
from mythos_ds.weights.checksums import seal
from mythos_ds.weights.model_folder import CONFIG, read_config, read_metadata
from mythos_ds.weights.pickled import has_safetensors
from mythos_ds.weights.reader import TensorFolder, TensorSource

FORMATS = ("mythos", "hf", "openmythos")
DTYPES: tuple[Kept, ...] = ("bfloat16", "float32", "fp8")
CUT_FLAGS = {
    "prelude": "first source layers, run once",
    "recurrent": "source layers of the looped block",
    "coda": "last source layers, run once",
    "recurrent_from": "first source layer of the block; default: so that it ends where the coda begins",
    "experts": f"routed experts of a layer, a multiple of the granularity (default {Cut.n_experts})",
    "granularity": f"parts into which a feed-forward is split (default {Cut.granularity})",
    "experts_per_token": f"experts used by a token, whole copies (default {Cut.experts_per_token})",
    "mean_recurrence": f"mean loop count of the training to come (default {Cut.mean_recurrence})",
    "max_loops": f"largest loop count of the training to come (default {Cut.max_loops})",
    "decay": f"A, by which a loop multiplies the state, at the start of training (default {Cut.decay})",
    "seed": "draws the router (default 0)",
    "context_length": "longest text in tokens that the model is for (default: the source's longest)",
}
_TORCH = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Request:
    """What is asked for. cut: values by name in CUT_FLAGS, only those that were given. text: a file whose text is used
    to look for a dense source's attention sink. sink: what was found, where it was looked for before."""

    source: str
    target: str
    folder: Path
    dtype: Kept | None
    with_remote_code: bool = False
    allow_pickle: bool = False
    cut: Mapping[str, int | float] = field(default_factory=dict)
    text: Path | None = None
    sink: Sink | None = None


@dataclass(frozen=True)
class Route:
    """A planned conversion. `finish` writes what stands beside the weights, `evaluate` (output, data folder) gives the
    perplexities before and after, `inspect` runs the source to say more about the cut."""

    source: TensorSource
    dtype: str
    read_bytes: int
    finish: Callable[[Path], None]
    notes: list[str]
    evaluate: Callable[[Path, Path], list[dict[str, float]]] | None = None
    inspect: Callable[[], list[str]] | None = None


def made_from(request: Request, route: Route) -> str:
    """A conversion in words, for who finds its output."""
    return f"{request.folder.resolve().name} ({request.source} to {request.target}, {route.dtype})"


def plan_route(request: Request) -> Route:
    """The conversion that is asked for. Raises ConfigError for one that there is not, or with options that have no
    effect in it, and CheckpointError for an input that does not fit."""
    routes = {
        ("mythos", "hf"): _to_hf,
        ("hf", "mythos"): _from_hf,
        ("openmythos", "mythos"): _from_openmythos,
        ("mythos", "openmythos"): _to_openmythos,
    }
    pair = request.source, request.target
    if pair not in routes:
        allowed = ", ".join(f"{source} to {target}" for source, target in routes)
        raise OptionError(f"--from {pair[0]} --to {pair[1]}: given; allowed: {allowed}; others go through mythos")
    _refuse_without_effect(request)
    with naming(request.folder):
        return routes[pair](request)


def _refuse_without_effect(request: Request) -> None:
    if request.with_remote_code and request.target != "hf":
        raise OptionError(f"--with-remote-code: given with --to {request.target}; allowed: with --to hf")
    if request.dtype == "fp8" and request.target != "hf":
        raise OptionError(f"--dtype: given fp8 with --to {request.target}; allowed: with --to hf; nearest: bfloat16")
    if request.dtype is not None and request.target == "openmythos":
        raise OptionError("--dtype: given with --to openmythos; allowed: none (its code runs in fp32 only)")
    if (request.cut or request.text is not None) and (request.source, request.target) != ("hf", "mythos"):
        flag = next(iter(request.cut), "text").replace("_", "-")
        raise OptionError(f"--{flag}: given with --from {request.source} --to {request.target}; allowed: hf to mythos")
    pickled = request.folder.is_file() or not has_safetensors(request.folder)
    if request.allow_pickle and (request.source == "mythos" or not pickled):
        raise OptionError(f"--allow-pickle: given for {request.folder}, whose weights are not pickled")


def _from_hf(request: Request) -> Route:
    hf = read_json(request.folder / CONFIG)
    kind = hf.get("model_type") if isinstance(hf, dict) else None
    if kind in FAMILIES:
        return _retrofit(request, hf)
    if kind != "mythos":
        allowed = ", ".join(("mythos", *FAMILIES))
        raise ConfigError(f"{request.folder / CONFIG}: given model_type {kind!r}; allowed: {allowed}")
    if request.cut or request.text is not None:
        flag = next(iter(request.cut), "text").replace("_", "-")
        raise OptionError(f"--{flag}: given for a mythos model; allowed: for a dense one ({', '.join(FAMILIES)})")
    method = (hf.get("quantization_config") or {"quant_method": "fp8"}).get("quant_method")
    if method != "fp8":
        field = f"{request.folder / CONFIG}: quantization_config"
        raise ConfigError(f"{field}: given {method!r}; allowed: none, or fp8; give the folder that was quantised")
    weights = hf_weights(request.folder, allow_pickle=request.allow_pickle)
    given = Dequantised(weights) if "quantization_config" in hf else weights
    tensors, config = mythos_source(given, hf)
    notes = ["the matrices were fp8: what quantisation took away does not come back"] if given is not weights else []
    notes += unread_note(unread_by_mythos(hf))
    if not has_tokenizer(request.folder):
        notes.append(f"no tokenizer is written: {request.folder} has none")
    return _to_mythos(request, tensors, config, hf_metadata(hf) or {"source": "hf"}, notes)


def _to_hf(request: Request) -> Route:
    config, _ = _read_model(request.folder)
    check_tokenizer(request.folder, config)
    dtype: Kept = request.dtype or "bfloat16"
    kept = "bfloat16" if dtype == "fp8" else dtype
    source, hf, notes = hf_source(request.folder, kept), hf_config(request.folder, kept), hf_notes(request.folder)
    if dtype == "fp8":
        source = Fp8Tensors(hf_source(request.folder, "float32"), source)
        specs = source.specs()
        hf = {**hf, "quantization_config": quantization_config(specs)}
        if odd := unaligned(specs):
            notes.append(
                f"{odd[0]} and {len(odd) - 1} others: their heights are not multiples of {BLOCK}; servers that join "
                "query, key and value, or gate and up, cannot use these scales"
            )
    notes += serving_notes(config, hf["n_loops"], dtype)

    def finish(output: Path) -> None:
        write_side_files(request.folder, output, hf, with_remote_code=request.with_remote_code)

    def evaluate(output: Path, data_dir: Path) -> list[dict[str, float]]:
        batches = held_out_text(request.folder, config, data_dir)
        loops = evaluated_loops(config)
        written = dequantised(output) if dtype == "fp8" else TensorFolder(output)
        after = losses(mythos_source(written, hf)[0], config, batches, loops)
        return comparison(loops, losses(TensorFolder(request.folder), config, batches, loops), after)

    return Route(source, dtype, _size(TensorFolder(request.folder)), finish, notes, evaluate)


def _from_openmythos(request: Request) -> Route:
    tensors, config, metadata = read_openmythos(request.folder, allow_pickle=request.allow_pickle)
    notes = unread_note(metadata.get("unread", []))
    return _to_mythos(request, tensors, config, metadata, notes, may_lack=ROUTER_BUFFERS)


def _to_openmythos(request: Request) -> Route:
    config, metadata = _read_model(request.folder)
    check_tokenizer(request.folder, config)
    fields = openmythos_fields(config, metadata.get("seq_len", SEQ_LEN))
    weights = WholeModel(TensorFolder(request.folder), config, None)
    source = OpenMythosTensors(weights, config)

    def finish(output: Path) -> None:
        copy_tokenizer(request.folder, output)
        seal(output, fields)

    return Route(source, "as in the input", _size(weights), finish, [])


def _retrofit(request: Request, hf: Mapping[str, Any]) -> Route:
    missing = [name for name in ("prelude", "recurrent", "coda") if name not in request.cut]
    if missing:
        raise OptionError(f"--{missing[0]}: not given; needed for a dense model ({hf['model_type']})")
    given = {"n_experts" if name == "experts" else name: value for name, value in request.cut.items()}
    cut = Cut(**given)  # type: ignore[arg-type]
    config = retrofit_config(hf, cut)
    weights = hf_weights(request.folder, allow_pickle=request.allow_pickle)
    notes = describe(cut, int(hf["num_hidden_layers"]))
    notes += unread_note(unread_fields(hf))
    lost = _tokenizer_fault(request.folder, config)
    if lost is not None:
        notes.append(f"no tokenizer is written: {lost}")
    n_layers = int(hf["num_hidden_layers"])
    found: dict[str, int | float | None] = {}
    metadata = {
        "source": hf["model_type"],
        "layers": cut.layers(n_layers),
        "context_length": context_of(hf, cut),
        "decay": cut.decay,
        "attention_sink": found,
    }
    tensors = Retrofitted(weights, hf, cut)

    def inspect() -> list[str]:
        sink = request.sink or search_sink(weights, hf, request.folder, cut.coda, request.text)
        found.update(layer=sink.layer, ratio=sink.ratio)
        return [describe_sink(sink, cut.layers(n_layers))]

    own = request.folder if lost is None else request.folder / "none"
    route = _to_mythos(request, tensors, config, metadata, notes, own, may_lack=ROUTER_BUFFERS)
    return replace(route, inspect=inspect)


def _tokenizer_fault(folder: Path, config: ModelConfig) -> str | None:
    """Why a folder's tokenizer cannot go along; None where it can."""
    if not has_tokenizer(folder):
        return f"{folder} has none"
    try:
        check_tokenizer(folder, config)
    except MythosError as error:
        return str(error)
    return None


def _to_mythos(
    request: Request,
    tensors: TensorSource,
    config: ModelConfig,
    metadata: dict[str, Any],
    notes: list[str],
    tokenizer: Path | None = None,
    may_lack: tuple[str, ...] = (),
) -> Route:
    source = WholeModel(tensors, config, _TORCH.get(request.dtype or ""), may_lack)
    beside = request.folder if request.folder.is_dir() else request.folder.parent
    own = tokenizer or beside
    check_tokenizer(own, config)
    metadata = {**source_metadata(beside), **metadata}

    def finish(output: Path) -> None:
        write_config(output, config, metadata, own)

    return Route(source, request.dtype or "as in the input", _size(tensors), finish, notes)


def _read_model(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    return read_config(folder), read_metadata(folder)


def _size(source: TensorSource) -> int:
    return sum(spec.nbytes for spec in source.specs().values())
