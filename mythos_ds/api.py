"""The public names of mythos_ds: what a program or a notebook uses. Nothing heavy is imported before it is needed."""

import importlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mythos_ds.errors import ConfigError
from mythos_ds.weights.built_in import find_model, model_path

if TYPE_CHECKING:
    from torch import Tensor

    from mythos_ds.checkpoint.training_state import TrainingState
    from mythos_ds.config.loader import LoadedConfig
    from mythos_ds.config.schema import ModelConfig as ModelConfig
    from mythos_ds.config.schema import RunConfig as RunConfig
    from mythos_ds.data.tokenizer import Tokenizer as Tokenizer
    from mythos_ds.data.tokenizer_files import ChatFormat
    from mythos_ds.model.mythos import MythosModel as MythosModel
    from mythos_ds.plan.run_plan import RunPlan
    from mythos_ds.train.callbacks import Callback as Callback

CONTEXT_LENGTH = 1024
_MOST_TOKENS, _HOTTEST = 1 << 30, 1e6
"""Tokens that are seen in generation where the model does not say how long its training's sequences were."""
_CLASSES = {
    "RunConfig": "mythos_ds.config.schema",
    "ModelConfig": "mythos_ds.config.schema",
    "MythosModel": "mythos_ds.model.mythos",
    "Tokenizer": "mythos_ds.data.tokenizer",
    "Callback": "mythos_ds.train.callbacks",
}
"""Public classes, by the module that each is written in."""
__all__ = ["load_config", "generate", "pretrain", "evaluate", "convert", "plan_run", *_CLASSES]

Format = Literal["mythos", "hf", "openmythos"]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> "RunConfig":
    """Read and check a configuration; of training stages the first one's.

    Args:
        name: a file, or a preset such as "tiny" or "1t".
        overrides: `section.key=value`, as on the command line.

    Raises:
        ConfigError: with every problem found.
    """
    from mythos_ds.config import loader

    return loader.load_config(str(name), overrides).config


def new_model(name: str | Path, overrides: Sequence[str] = (), *, seed: int = 0) -> "MythosModel":
    """What `MythosModel.from_preset` gives: a model with the configuration's initial weights. Raises ConfigError."""
    from mythos_ds.model.mythos import MythosModel

    return MythosModel(load_config(name, overrides).model, seed=seed)


def open_model(source: str | Path) -> "MythosModel":
    """What `MythosModel.from_pretrained` gives: the model of `source`, in evaluation mode, on the CPU.

    source: a model folder, a checkpoint, a run (its newest complete checkpoint), or "tiny", where no folder of that
    name is at hand. A checkpoint is merged in memory, tensor by tensor, whatever layout wrote it. Raises
    CheckpointError for anything else, and for damage.
    """
    return _opened(_place(source))


def _place(source: str | Path) -> Path:
    """The model folder, or the checkpoint, that `source` names. It reads all of a checkpoint once, to verify it."""
    place = find_model(source)
    if _is_model(place):
        return place
    from mythos_ds.conversion.merge import newest_tag

    return newest_tag(place)


def _is_model(place: Path) -> bool:
    """Whether a folder is a model's, and no run's or checkpoint's."""
    return (place / "config.json").is_file()


def _opened(place: Path) -> "MythosModel":
    """The model of a folder, whose files are compared with its checksums, or of a verified checkpoint."""
    if not _is_model(place):
        return _merged(place)
    from mythos_ds.weights.checksums import require_whole
    from mythos_ds.weights.model_folder import load_model

    require_whole(place)
    return load_model(place)


def _merged(tag: Path) -> "MythosModel":
    """The whole model of a verified checkpoint."""
    import torch

    from mythos_ds.conversion.merge import merged_source, model_of
    from mythos_ds.model.mythos import MythosModel

    config = model_of(_state(tag))
    source = merged_source(tag, config, "float32")
    model = MythosModel(config)
    own = model.state_dict()
    with torch.no_grad():
        for name in source.specs():
            own[name].copy_(source.read(name))
    return model.eval()


def generate(
    model: "MythosModel | str | Path",
    prompt: "str | Sequence[Mapping[str, Any]]",
    *,
    tokenizer: "Tokenizer | str | Path | None" = None,
    loops: int | None = None,
    new_tokens: int = 64,
    temperature: float = 0.7,
    seed: int = 0,
    context_length: int | None = None,
    on_text: Callable[[str], object] | None = None,
) -> str:
    """Continue `prompt`; returns the new text without the prompt. Special tokens in a text stay characters.

    Args:
        model: a model, or what `MythosModel.from_pretrained` takes.
        prompt: a text; or messages, as [{"role": "user", "content": "Hello"}], which the chat template beside the
            tokenizer makes a prompt of, and the answer to them is returned.
        tokenizer: a tokenizer, its file, or a model folder or "tiny", which has one; a source's own where None.
        loops: how often the block is run for every token; the mean of training where None.
        new_tokens: at most so many; the end of a document, or of an answer, comes earlier.
        temperature: logits are divided by it; 0 takes the likeliest token.
        seed: of the drawing; the same seed gives the same text.
        on_text: takes the new text, part by part, as it is made.
        context_length: tokens seen at once; that of training where None, where the model's folder says.

    Raises:
        MythosError: for a value that is not allowed, or a file that is missing.
    """
    check_generation(loops=loops, new_tokens=new_tokens, temperature=temperature, seed=seed)
    import torch

    from mythos_ds.data.chat import encode_chat
    from mythos_ds.inference import generate as inference

    place: Path | None = None
    if isinstance(model, (str, Path)):
        model = _opened(place := _place(model))
    pieces = _tokenizer(tokenizer, place)
    if pieces.vocab_size > model.config.vocab_size:
        allowed = f"at most the model's {model.config.vocab_size}"
        raise ConfigError(f"tokenizer: given {pieces.path} of {pieces.vocab_size} pieces; allowed: {allowed}")
    chat = None if place is None or _is_model(place) else _chat_of(place)
    template = None if chat is None else chat.template
    tokens = pieces.encode(prompt) if isinstance(prompt, str) else encode_chat(pieces, prompt, template=template)
    n_loops, device = loops or model.config.mean_recurrence, next(model.parameters()).device
    with torch.inference_mode():
        continuation = inference.generate(
            lambda seen: model(seen.to(device), n_loops=n_loops)[0, -1],
            tokens,
            new_tokens=new_tokens,
            vocab_size=pieces.vocab_size,
            eos_id=pieces.eos_id,
            ends=pieces.ends() | (frozenset() if chat is None else chat.ends),
            context_length=context_length or _trained_length(place) or CONTEXT_LENGTH,
            temperature=temperature,
            seed=seed,
            on_token=_shown(pieces, on_text) if on_text is not None else lambda new: None,
        )
    return pieces.decode(continuation)


def _shown(pieces: "Tokenizer", on_text: Callable[[str], object]) -> Callable[[list[int]], object]:
    """What takes all new ids after each, and hands on the text that is new. Decodes all each time: for readers."""
    shown = ""

    def show(new: list[int]) -> None:
        nonlocal shown
        text = pieces.decode(new).rstrip("\N{REPLACEMENT CHARACTER}")  # of a character that is not whole yet
        if len(text) > len(shown) and text.startswith(shown):
            on_text(text[len(shown) :])
            shown = text

    return show


def check_generation(prefix: str = "", **given: float | None) -> None:
    """Raises ConfigError for a number that generation cannot take; None is what is not given. prefix: of the names."""
    from mythos_ds.config.schema import LOOPS

    allowed: dict[str, tuple[float, float]] = {
        "loops": (1, LOOPS), "tokens": (1, _MOST_TOKENS), "new_tokens": (1, _MOST_TOKENS),
        "temperature": (0, _HOTTEST), "seed": (-(1 << 63), (1 << 63) - 1),
    }  # fmt: skip
    for name, value in given.items():
        least, most = allowed[name]
        if value is None or least <= value <= most:
            continue
        if value < least:
            raise ConfigError(f"{prefix}{name}: given {value}; allowed: {least} or more; nearest: {least}")
        raise ConfigError(f"{prefix}{name}: given {value}; allowed: {least} to {most}; nearest: {most}")


def _tokenizer(given: "Tokenizer | str | Path | None", place: Path | None) -> "Tokenizer":
    """The tokenizer that is given, or else that of the model's place."""
    from mythos_ds.data.tokenizer import Tokenizer
    from mythos_ds.data.tokenizer_files import has_tokenizer

    if isinstance(given, Tokenizer):
        return given
    if given is not None:
        path = model_path(given)
        if not path.is_dir() or has_tokenizer(path):
            return Tokenizer.load(path)
        place = _place(path)
    if place is None:
        raise ConfigError(
            "tokenizer: not given, and the model is not named; allowed: a Tokenizer, a file, a model folder"
        )
    if _is_model(place):
        return Tokenizer.load(place)
    from mythos_ds.conversion.merge import tokenizer_of

    return Tokenizer.load(tokenizer_of(_state(place)))


def _chat_of(tag: Path) -> "ChatFormat | None":
    """The form of the conversations that a checkpoint's run learnt from."""
    from mythos_ds.conversion.merge import chat_of

    return chat_of(_state(tag))


def _state(tag: Path) -> "TrainingState":
    from mythos_ds.checkpoint.training_state import read_state

    return read_state(tag)


def _trained_length(place: Path | None) -> int | None:
    """Tokens of a sequence in training, where the folder says."""
    if place is None:
        return None
    if _is_model(place):
        from mythos_ds.weights.model_folder import read_metadata

        length = read_metadata(place).get("seq_len")
        if length is not None and (type(length) is not int or length < 1):
            raise ConfigError(
                f"{place / 'config.json'}: facts.seq_len: {length!r} given; allowed: a whole number of 1 or more"
            )
        return length
    from mythos_ds.conversion.merge import metadata_of

    return int(metadata_of(_state(place))["seq_len"])


def evaluate(
    model: "MythosModel", data: "Iterable[Tensor | Mapping[str, Tensor]]", loops: Sequence[int] | None = None
) -> dict[int, float]:
    """Measure the mean loss on `data`; returns nats per token by loop count.

    Args:
        model: in either mode, which it has again afterwards; on its own device.
        data: batches, each tokens int64 [batch, seq], of which each predicts the next, or {tokens, targets, positions}
            as the trainer reads them: targets are the tokens after each, -100 where none counts. It is read once; all
            counts see the same.
        loops: the mean of training where None.

    Raises:
        ConfigError: for a loop count below 1, or data without a token to predict.
    """
    import torch

    from mythos_ds.config.schema import IGNORED_LABEL

    counts = [model.config.mean_recurrence] if loops is None else sorted(set(loops))
    if not counts or counts[0] < 1:
        raise ConfigError(f"loops: given {loops}; allowed: whole numbers of 1 or more; nearest: [1]")
    check_generation(loops=counts[-1])
    device, training = next(model.parameters()).device, model.training
    sums: dict[int, list[float]] = {count: [] for count in counts}
    predicted = 0
    model.eval()
    try:
        with torch.inference_mode():
            for batch in data:
                tokens, targets, positions = _parts(batch, device)
                predicted += int((targets != IGNORED_LABEL).sum())
                for count in counts:
                    logits = model(tokens, n_loops=count, positions=positions)[:, : targets.shape[1]]
                    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                    sums[count].append(float(loss))
    finally:
        model.train(training)
    if not predicted:
        raise ConfigError("data: no token to predict; allowed: batches of two tokens or more")
    return {count: math.fsum(values) / predicted for count, values in sums.items()}


def _parts(batch: "Tensor | Mapping[str, Tensor]", device: Any) -> "tuple[Tensor, Tensor, Tensor | None]":
    """Tokens, what they are to predict, and their positions."""
    if isinstance(batch, Mapping):
        positions = batch.get("positions")
        placed = None if positions is None else positions.to(device)
        return batch["tokens"].to(device), batch["targets"].to(device), placed
    tokens = batch.to(device)
    return tokens, tokens[:, 1:], None


def pretrain(
    config: "str | Path | RunConfig",
    *,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str | Path = "auto",
    callbacks: "Sequence[Callback]" = (),
    share: bool = False,
) -> Path:
    """Train in this process, alone or as one of a launcher's; returns the run's directory.

    Reading data takes worker processes, which import the calling script again: call it below
    `if __name__ == "__main__"`.

    Args:
        config: a file, a preset, or a configuration made in Python.
        run_dir: needed for one made in Python; the same default as on the command line for others.
        overrides: `section.key=value`, as on the command line.
        resume: "auto" goes on from the directory's newest checkpoint, "never" refuses one, a path goes on from there.
        callbacks: called on every rank, in this order; `mythos_ds/train/callbacks.py` says when.
        share: the run's files are for all whom the umask lets read them, not for the owner's group at most.

    Raises:
        MythosError: for what a user can mend. Another error ends the process, as other ranks would wait for it.
    """
    from mythos_ds.config.resolve import resolve_stages
    from mythos_ds.environment import ProcessEnvironment
    from mythos_ds.train.run_directory import default_run_directory

    loaded = _loaded(config, overrides)
    environment = ProcessEnvironment.detect(os.environ)
    stages = resolve_stages(loaded.stages, environment.world_size)
    if run_dir is None and not isinstance(config, (str, Path)):
        raise ConfigError("run_dir: not given; needed for a configuration made in Python")
    folder = default_run_directory(loaded) if run_dir is None else Path(run_dir)
    from mythos_ds.train.run import RunRequest, train

    argv = ("mythos_ds.pretrain", *overrides)
    request = RunRequest(stages, loaded.text, folder, str(resume), argv, share=share, config_file=str(loaded.path))
    from mythos_ds.conversion.starting_weights import open_starting_weights

    train(request, environment, open_weights=open_starting_weights, callbacks=callbacks)
    return folder


def _loaded(config: "str | Path | RunConfig", overrides: Sequence[str]) -> "LoadedConfig":
    from mythos_ds.config import loader

    if isinstance(config, (str, Path)):
        return loader.load_config(str(config), overrides)
    return loader.check_config(config, overrides)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    from_format: Format = "mythos",
    to_format: Format = "hf",
    dtype: Literal["bfloat16", "float32", "fp8"] | None = None,
    with_remote_code: bool = False,
    allow_pickle: bool = False,
    jobs: int = 1,
    **cut: float,
) -> list[str]:
    """Write the model of `source` to the new folder `destination` in another format; returns notes for the user.

    Args:
        source: a model folder ("tiny" is the built-in one); of OpenMythos also a file.
        from_format: of the source.
        to_format: of what is written; one of the two formats is mythos.
        dtype: of matrices; bfloat16 to hf, else as in the source, where None.
        with_remote_code: put the model's code into an hf folder, for users without this package.
        allow_pickle: let a pickled source run the code it names.
        jobs: files written at once.
        cut: how a dense model (hf) becomes a looped one (mythos): prelude, recurrent, coda and so on.

    Raises:
        MythosError: for a conversion that there is not, an option without effect in it, or damaged files.
    """
    from mythos_ds.conversion.convert import CUT_FLAGS, Request, made_from, plan_route
    from mythos_ds.conversion.written_model import refuse_input, write_model
    from mythos_ds.weights.checksums import require_whole

    if unknown := sorted(set(cut) - set(CUT_FLAGS)):
        raise ConfigError(f"{unknown[0]}: not an option of a conversion; allowed: {', '.join(CUT_FLAGS)}")
    folder = model_path(source)
    output = Path(destination)
    refuse_input(output, [folder], "destination", "the source")
    request = Request(from_format, to_format, folder, dtype, with_remote_code, allow_pickle, cut)
    route = plan_route(request)
    if folder.is_dir():
        require_whole(folder)
    found = [] if route.inspect is None else route.inspect()
    write_model(route.source, output, route.finish, command="convert", made_from=made_from(request, route), jobs=jobs)
    return [*route.notes, *found]


def plan_run(
    config: "str | Path | RunConfig",
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    tokens: float | None = None,
    overrides: Sequence[str] = (),
) -> "RunPlan":
    """Plan a run: the memory, traffic, time and money it needs. `.numbers` has it all, `print` shows it.

    Args:
        config: a file, a preset, or a configuration made in Python.
        gpus: how many; those of the configuration's cluster where None, as is the next.
        gpu: h100, h200, b200, mi300x or a JSON file.
        tokens: of the run; the configuration's where None. Not with training stages, which have lengths of their own.
        overrides: `section.key=value`, as on the command line.

    Raises:
        ConfigError: where the layout does not fit the GPUs' number, or neither is known.
    """
    from mythos_ds.plan.run_plan import plan_config

    loaded = _loaded(config, overrides)
    return plan_config(loaded.path.stem, loaded.stages, gpus, gpu, tokens)
