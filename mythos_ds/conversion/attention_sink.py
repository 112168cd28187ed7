"""The layer of a dense model that makes its attention sink: the first token's state, which later layers attend to when
they have nothing else to attend to (arXiv 2309.17453), becomes many times as long as the others (arXiv 2402.17762).

Where a loop runs that layer it has to make the sink again each time, from a state that already has one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mythos_ds.config.layout import ModelChunk
from mythos_ds.conversion.dense_source import layer_problems
from mythos_ds.conversion.retrofit import Cut, Retrofitted, retrofit_config
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import DataError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.reader import TensorSource

JUMP = 20.0
"""A sink's state is longer than this many times the median of the others."""
TEXT = (
    "The river rises in the hills to the north, passes two small towns and an old mill, and reaches the sea after some "
    "forty miles. In dry summers one can cross it on foot almost anywhere above the second bridge."
)
_TOKENS = 32
_DIFFERENT = 3
"""Positions that hold one token all over have one state, whichever is first."""
_NOTHING = ModelChunk(prelude=(), recurrent=(), coda=(), embeds=False, loops=False, predicts=False)


@dataclass(frozen=True)
class Sink:
    """What was found.

    Attributes:
        layer: the source layer after which the first token's state is more than JUMP times as long as the median of
            the others; None where none of those that were run does that.
        ratio: that ratio after it, or the largest that was seen.
        layers: how many layers were run, from the first on, up to one that cannot be run here.
        note: what there is to say of the text.
    """

    layer: int | None
    ratio: float
    layers: int
    note: str | None = None


def search_sink(weights: TensorSource, hf: Mapping[str, Any], folder: Path, coda: int, text: Path | None) -> Sink:
    """The sink of the dense model in `folder` before its last `coda` layers, on the text of a file or a built-in one.
    Raises DataError for a file that cannot be used."""
    tokens, note = sink_tokens(folder, int(hf["vocab_size"]), text)
    layers = layers_to_run(int(hf["num_hidden_layers"]), coda)
    while layers and layer_problems(hf, range(layers + 1), len(tokens)):
        layers -= 1
    if not layers:
        return Sink(None, 0.0, 0, "its first layers compute what the layers here cannot")
    return replace(find_sink(weights, hf, tokens, layers), note=note)


def sink_tokens(folder: Path, vocab_size: int, text_file: Path | None) -> tuple[list[int], str | None]:
    """Ids of the first tokens of a text in the tokenizer of the model in `folder`; where it has none that is known,
    random ids, and a note that says so. Raises DataError for a text file that cannot be used."""
    try:
        tokenizer = Tokenizer.load(folder)
    except DataError as error:
        if text_file is not None:
            raise DataError(
                f"--text: given {text_file}, but the source has no tokenizer for it ({error})", code="MDS120"
            ) from None
        return _random_tokens(vocab_size), "random tokens: the source has no tokenizer that is known here"
    ids = tokenizer.encode(TEXT if text_file is None else _read_text(text_file))[:_TOKENS]
    if len(set(ids)) < _DIFFERENT:
        raise DataError(
            f"--text: given {text_file}, with {len(set(ids))} tokens; allowed: at least {_DIFFERENT}", code="MDS120"
        )
    if max(ids) >= vocab_size:
        return _random_tokens(vocab_size), "random tokens: the source's tokenizer has more pieces than its embedding"
    return ids, None


def _random_tokens(vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"--text: {path} is not readable as text ({error})", code="MDS120") from None


def layers_to_run(n_layers: int, coda: int) -> int:
    """Layers that the search runs: all before the coda, but never the last, which cannot be in a prelude."""
    return min(n_layers - 1, n_layers - coda)


def find_sink(
    weights: TensorSource,
    hf: Mapping[str, Any],
    tokens: Sequence[int],
    layers: int,
    progress: Callable[[int], object] = lambda count: None,
) -> Sink:
    """Runs `tokens` through the first `layers` layers of a dense source, in fp32 and one layer in memory at a time, up
    to the one that makes the sink. `progress` takes the bytes of a layer when it has been run."""
    cut = Cut(
        prelude=layers,
        recurrent=1,
        coda=0,
        recurrent_from=layers,
        n_experts=1,
        granularity=1,
        experts_per_token=1,
        context_length=len(tokens),
    )
    config, source = retrofit_config(hf, cut), Retrofitted(weights, hf, cut)
    specs = source.specs()
    ratio = 0.0
    with torch.inference_mode():
        x = torch.cat([source.read("embed.weight", slice(i, i + 1)) for i in tokens]).float()[None]
        for layer in range(layers):
            with torch.device("meta"):
                part = MythosModel(config, part=replace(_NOTHING, prelude=(layer,)))
            own = {name: source.read(name).float() for name in part.state_dict()}
            part.load_state_dict(own, strict=True, assign=True)
            x = part.run_prelude(x, part.make_context(torch.tensor([tokens]), None, None, 1))
            norms = x[0].norm(dim=-1)
            found = float(norms[0] / norms[1:].median().clamp_min(1e-30))
            progress(sum(specs[name].nbytes for name in own))
            if found > JUMP:
                return Sink(layer, found, layer + 1)
            ratio = max(ratio, found)
    return Sink(None, ratio, layers)


def describe_sink(sink: Sink, parts: Mapping[str, Sequence[int]]) -> str:
    """What a sink means for a cut, in words. parts: source layers by part, see `Cut.layers`."""
    return _meaning(sink, parts) + (f" ({sink.note})" if sink.note else "")


def _meaning(sink: Sink, parts: Mapping[str, Sequence[int]]) -> str:
    if not sink.layers:
        return "attention sink: not looked for"
    if sink.layer is None:
        return (
            f"attention sink: none made by source layers 0-{sink.layers - 1} (the first token's state is at most "
            f"{sink.ratio:.3g} times as long as the others')"
        )
    grown = f"the first token's state is {sink.ratio:.3g} times as long as the others' after it"
    if sink.layer in parts["prelude"]:
        return f"attention sink: made by source layer {sink.layer}, in the prelude ({grown})"
    place = (
        "in the recurrent block, where each loop has to make it anew: more loops will hurt"
        if sink.layer in parts["recurrent"]
        else "dropped: nothing will make it"
    )
    return (
        f"warning: source layer {sink.layer} makes the attention sink ({grown}) and is {place}; give --prelude at "
        f"least {sink.layer + 1}"
    )
