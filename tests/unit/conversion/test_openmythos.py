"""OpenMythos weights converted to a model folder and back, and what may not be read or expressed."""

import dataclasses
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.model_target import ROUTER_BUFFERS, WholeModel, write_config
from mythos_ds.conversion.openmythos import (
    _ABSENT,
    _UNUSED,
    OpenMythosTensors,
    openmythos_fields,
    read_openmythos,
)
from mythos_ds.errors import CheckpointError, ConfigError
from mythos_ds.inference.generate import generate
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights import writer
from mythos_ds.weights.model_folder import load_model, save_model
from mythos_ds.weights.pickled import open_weights
from mythos_ds.weights.reader import TensorFolder
from mythos_ds.weights.writer import write_tensors
from tests.helpers.paths import ROOT

oracle = pytest.importorskip("open_mythos.main")
LOOPS = 4


def _theirs(attn_type: str = "gqa", n_shared: int = 2, **options: int) -> Any:
    torch.manual_seed(3)
    sizes = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, **options}
    config = oracle.MythosConfig(
        vocab_size=61, **sizes, max_seq_len=48, max_loop_iters=LOOPS, prelude_layers=2,
        coda_layers=1, attn_type=attn_type, kv_lora_rank=24, q_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=12,
        v_head_dim=10, n_experts=8, n_shared_experts=n_shared, n_experts_per_tok=3, expert_dim=16, lora_rank=4,
    )  # fmt: skip
    model = oracle.OpenMythos(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.recurrent.act.halt.bias.fill_(-1.0)
    return model


def _save(model: Any, folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True)
    fields = dataclasses.asdict(model.cfg)
    if kind == "checkpoint":
        torch.save({"model": model.state_dict(), "cfg": model.cfg, "step": 1}, folder / "step_1.pt")
        return folder
    (folder / "config.json").write_text(json.dumps(fields))
    if kind == "pt":
        torch.save(model.state_dict(), folder / "weights.pt")
    else:
        state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("freqs")}
        save_file(state, folder / "model.safetensors")
    return folder


def _import(source: Path, output: Path) -> Path:
    tensors, config, facts = read_openmythos(source)
    write_tensors(WholeModel(tensors, config, None, ROUTER_BUFFERS), output)
    write_config(output, config, facts, source / "tokenizer.model")
    return output


def _last_logits(model: MythosModel, n_loops: int, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, n_loops=n_loops)[0, -1]


@pytest.mark.parametrize(("attn_type", "kind"), [("mla", "pt"), ("gqa", "checkpoint"), ("mla", "safetensors")])
def test_the_converted_model_says_what_openmythos_says(tmp_path: Path, attn_type: str, kind: str) -> None:
    theirs = _theirs(attn_type)
    ours = load_model(_import(_save(theirs, tmp_path / "theirs", kind), tmp_path / "ours"))
    for seed, n_loops in ((0, LOOPS), (1, 2 * LOOPS), (2, 1)):
        prompt = torch.randint(61, (1, 7), generator=torch.Generator().manual_seed(seed))
        # top_k 1 leaves one token to draw from.
        expected = theirs.generate(prompt, max_new_tokens=24, n_loops=n_loops, top_k=1)[0, 7:].tolist()
        with torch.inference_mode():
            tokens = generate(
                partial(_last_logits, ours, n_loops),
                prompt[0].tolist(), new_tokens=24, vocab_size=61, eos_id=-1, context_length=48, temperature=0.0,
            )  # fmt: skip
        assert len(tokens) == 24
        assert tokens == expected


@pytest.mark.parametrize(("attn_type", "n_shared"), [("mla", 2), ("gqa", 0)])
@pytest.mark.parametrize("piece_bytes", [1 << 25, 700])
def test_the_way_back_gives_the_same_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attn_type: str, n_shared: int, piece_bytes: int
) -> None:
    """Also where tensors are read in pieces that do not fall on the borders of heads and parts."""
    pieces = writer.row_pieces
    monkeypatch.setattr(writer, "row_pieces", lambda spec: pieces(spec, piece_bytes))
    theirs = _theirs(attn_type, n_shared)
    folder = _import(_save(theirs, tmp_path / "theirs", "pt"), tmp_path / "ours")
    model = load_model(folder)
    write_tensors(OpenMythosTensors(TensorFolder(folder), model.config), tmp_path / "back")
    fields = openmythos_fields(model.config, 48)
    copy = oracle.OpenMythos(oracle.MythosConfig(**fields))
    assert fields == {name: getattr(copy.cfg, name) for name in fields}
    copy.load_state_dict({**dict(copy.named_buffers()), **load_file(tmp_path / "back" / "model.safetensors")})
    for name, value in theirs.named_parameters():
        assert torch.equal(copy.state_dict()[name], value), name
    tokens = torch.arange(20)[None]
    assert torch.equal(copy.eval()(tokens, n_loops=LOOPS), theirs(tokens, n_loops=LOOPS))


def test_bfloat16_folders_keep_in_fp32_what_is_computed_in_it(tmp_path: Path) -> None:
    source, config, _ = read_openmythos(_save(_theirs(), tmp_path / "theirs", "pt"))
    specs = WholeModel(source, config, torch.bfloat16, ROUTER_BUFFERS).specs()
    assert specs["prelude.0.attn.q.weight"].dtype == torch.bfloat16
    for name in ("norm.weight", "recurrent.injection.log_A", "recurrent.layers.0.moe.router.weight"):
        assert specs[name].dtype == torch.float32
    value = WholeModel(source, config, torch.bfloat16, ROUTER_BUFFERS).read("prelude.0.attn.q.weight")
    assert torch.equal(value, source.read("prelude.0.attn.q.weight").bfloat16())


def test_what_openmythos_has_not_is_refused_with_every_reason() -> None:
    tiny = json.loads((ROOT / "models" / "tiny" / "config.json").read_text())["model"]
    with pytest.raises(ConfigError) as error:
        openmythos_fields(ModelConfig.model_validate(tiny), 256)
    for reason in ('injection: given "pre"', "qk_norm: given true", 'halting: given "none"', "ffn_dim: given 384"):
        assert f"model.{reason}" in str(error.value)


def test_a_trained_router_bias_cannot_go_back(tmp_path: Path) -> None:
    _, config, _ = read_openmythos(_save(_theirs(), tmp_path / "theirs", "pt"))
    model = MythosModel(config)
    model.moe_layers()[0].router.loop_bias[1, 2] = 0.5
    save_model(model, tmp_path / "m", {})
    with pytest.raises(CheckpointError, match="loop_bias: is not zero"):
        OpenMythosTensors(TensorFolder(tmp_path / "m"), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("recurrent.lora.B"), r"recurrent\.lora\.B: not in"),
        (lambda state: state.update({"extra.weight": torch.zeros(2)}), r"extra\.weight: not a tensor"),
        (lambda state: state.update({"head.weight": torch.zeros(61, 64)}), "is not the embedding"),
        (lambda state: state.update({"norm.weight": torch.zeros(63)}), "has the shape"),
        (lambda state: state["recurrent.block.ffn.router_bias"].fill_(1.0), "router_bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    folder = _save(_theirs(), tmp_path / "theirs", "pt")
    state = dict(_theirs().state_dict())
    change(state)
    torch.save(state, folder / "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        _import(folder, tmp_path / "ours")


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
@pytest.mark.parametrize("dim", [8, 60, 72, 88, 120])
def test_every_width_that_openmythos_accepts(tmp_path: Path, dim: int, attn_type: str) -> None:
    """Also where an eighth of it, the channels that tell the loop, is odd; and back."""
    theirs = _theirs(attn_type, dim=dim, n_heads=2)
    ours = load_model(_import(_save(theirs, tmp_path / "theirs", "safetensors"), tmp_path / "ours"))
    tokens = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for loops in (1, 3, 6):
            expected = theirs(tokens, n_loops=loops)
            assert (ours(tokens, n_loops=loops) - expected).abs().max() <= 1e-5 * expected.abs().max(), loops
    assert openmythos_fields(ours.config, 48)["dim"] == dim


def test_heads_that_do_not_divide_the_width(tmp_path: Path) -> None:
    theirs = _theirs(dim=50, n_heads=4)
    ours = load_model(_import(_save(theirs, tmp_path / "theirs", "pt"), tmp_path / "ours"))
    assert ours.config.head_dim == 12
    tokens = torch.randint(0, 61, (2, 17))
    with torch.inference_mode():
        assert (ours(tokens, n_loops=3) - theirs(tokens, n_loops=3)).abs().max() <= 1e-5


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", ""])
def test_wrapped_and_prefixed_weights(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    theirs = _theirs("mla")
    folder = _save(theirs, tmp_path / "theirs", "pt")
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    torch.save({wrapper: state, "step": 3} if wrapper else state, folder / "weights.pt")
    ours = load_model(_import(folder, tmp_path / "ours"))
    tokens = torch.randint(0, 61, (1, 9))
    with torch.inference_mode():
        assert (ours(tokens, n_loops=2) - theirs(tokens, n_loops=2)).abs().max() <= 1e-5


def test_a_configuration_of_an_older_version_lacks_fields(tmp_path: Path) -> None:
    """They mean what MythosConfig takes for them; those that nothing knows are said."""
    theirs = _theirs()
    folder = _save(theirs, tmp_path / "theirs", "safetensors")
    fields = dataclasses.asdict(theirs.cfg)
    for name in ("max_output_tokens", "dropout", "act_threshold", "rope_theta"):
        assert fields.pop(name) == getattr(oracle.MythosConfig(), name)
    (folder / "config.json").write_text(json.dumps({**fields, "speculative": True}))
    _, config, metadata = read_openmythos(folder)
    assert config == read_openmythos(_save(theirs, tmp_path / "whole", "safetensors"))[1]
    assert metadata["unread"] == ["speculative"]
    assert {name: getattr(oracle.MythosConfig(), name) for name in _ABSENT} == _ABSENT
    assert set(dataclasses.asdict(oracle.MythosConfig())) == set(_ABSENT) | _UNUSED
    del fields["dim"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="dim is missing"):
        read_openmythos(folder)


class _Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run_unless_allowed(tmp_path: Path) -> None:
    ran, file = tmp_path / "ran", tmp_path / "w.pt"
    torch.save({"model": {"embed.weight": torch.zeros(2, 2)}, "cfg": _Payload(ran)}, file)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_weights(file)
    assert not ran.exists()
    open_weights(file, allow_pickle=True)
    assert ran.exists()


def test_which_weights_are_meant_must_be_clear(tmp_path: Path) -> None:
    for name in ("a.pt", "b.bin"):
        torch.save({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a\.pt, b\.bin"):
        open_weights(tmp_path)
    (tmp_path / "c.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="damaged, or not a file"):
        open_weights(tmp_path / "c.pt")
