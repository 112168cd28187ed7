"""Every route asks for exactly the tensors that the configuration demands before it writes anything."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mythos_ds.checkpoint import manifest
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.hf_names import Names
from mythos_ds.mains import run_tool
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import save_model
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT
from tests.helpers.synthetic_checkpoint import write_synthetic

TOOLS = {name: load_main(f"tools/{name}_checkpoint.py") for name in ("merge", "reshard", "convert")}
AVERAGE = load_main("tools/average_checkpoints.py")
TINY = ROOT / "models" / "tiny"
Tensors = dict[str, Tensor]
Capture = pytest.CaptureFixture[str]


def _wider(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def _longer(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name][..., :1]], -1)


def _flat(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].reshape(1, -1)


def _missing(tensors: Tensors, name: str) -> None:
    del tensors[name]


def _whole_numbers(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


def _extra(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_of_another"] = tensors[name].clone()


DAMAGES: tuple[Callable[[Tensors, str], None], ...] = (_wider, _longer, _flat, _missing, _whole_numbers, _extra)
OPENMYTHOS = {
    "qk_norm": False, "rope_interleaved": True, "ffn_dim": 170, "shared_expert_dim": 128, "router_score": "softmax",
    "injection": "post", "discretisation": "direct", "initial_state": "embedding", "prelude_norm": False,
    "loop_embedding": "raw", "lora_target": "output", "halting": "act_openmythos", "tie_embeddings": True,
}  # fmt: skip
"""What makes tiny a model that OpenMythos can express."""
ROUTES = ("mythos to hf", "mythos to openmythos", "hf to mythos", "average")


def _refused(capsys: Capture, tool: object, *arguments: object) -> str:
    capsys.readouterr()
    code = run_tool(tool.parser(), tool.work, [str(each) for each in arguments])  # type: ignore[attr-defined]
    said = capsys.readouterr().err
    assert code == 2, said
    return said


def _ours(name: str) -> str:
    """What the message may call a tensor of a Hugging Face folder."""
    theirs = name.removesuffix("_of_another")
    return Names(latent=False).from_hf(theirs)[0] if theirs.startswith("model.") else theirs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in each format, without checksums."""
    folder = tmp_path_factory.mktemp("models")
    line = ["--from", "mythos", "--to", "hf", "--input", str(TINY), "--output", str(folder / "hf")]
    assert run_tool(TOOLS["convert"].parser(), TOOLS["convert"].work, line) == 0
    shutil.copytree(TINY, folder / "mythos")
    for kind in ("hf", "mythos"):
        (folder / kind / "checksums.json").unlink(missing_ok=True)
    fields = {**json.loads((TINY / "config.json").read_text())["model"], **OPENMYTHOS}
    save_model(MythosModel(ModelConfig.model_validate(fields)), folder / "old", {"seq_len": 32})
    return {"mythos": folder / "mythos", "hf": folder / "hf", "openmythos": folder / "old"}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
@pytest.mark.parametrize("route", ROUTES)
def test_a_model_that_is_not_whole_is_refused(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: Capture,
    route: str,
    damage: Callable[[Tensors, str], None],
    seed: int,
) -> None:
    source = models["hf" if route.startswith("hf") else "openmythos" if route.endswith("openmythos") else "mythos"]
    shutil.copytree(source, tmp_path / "model")
    weights, output = tmp_path / "model" / "model.safetensors", tmp_path / "out"
    tensors = load_file(weights)
    name = random.Random(f"{route}{damage.__name__}{seed}").choice(
        [name for name in sorted(tensors) if tensors[name].dim() > 1]
    )
    damage(tensors, name)
    save_file({each: value.contiguous() for each, value in tensors.items()}, weights, {"format": "pt"})
    if route == "average":
        said = _refused(capsys, AVERAGE, tmp_path / "model", tmp_path / "model", "--output", output)
    else:
        kinds = route.split(" to ")
        line = ("--from", kinds[0], "--to", kinds[1], "--input", tmp_path / "model", "--output", output)
        said = _refused(capsys, TOOLS["convert"], *line)
    assert any(part in said for part in (name, _ours(name), name.split(".experts.")[0])), said
    assert str(tmp_path / "model") in said
    assert not output.exists()


@pytest.mark.parametrize("key", ["dim", "ffn_dim", "n_experts", "prelude_layers", "max_loops", "vocab_size"])
@pytest.mark.parametrize("tool", ["convert", "average", "merge", "reshard"])
def test_a_configuration_that_contradicts_the_weights_is_refused(
    tmp_path: Path, capsys: Capture, tool: str, key: str
) -> None:
    output, path = tmp_path / "out", tmp_path / "model" / "config.json"
    if tool in ("merge", "reshard"):
        resolved = resolve(load_config("tiny", ["training.micro_batch_size=1"]).config, 1)
        tag = write_synthetic(resolved, tmp_path / "run" / "checkpoints")
        (tmp_path / "run" / "manifest.json").write_text("{}")
        path = tag / manifest.STATE
    else:
        shutil.copytree(TINY, tmp_path / "model")
        (tmp_path / "model" / "checksums.json").unlink(missing_ok=True)
    content = json.loads(path.read_text())
    model = content["model"] if tool in ("convert", "average") else content["config"]["model"]
    model[key] *= 2
    path.write_text(json.dumps(content))
    if tool in ("merge", "reshard"):
        records = {str(each.relative_to(tag)): vars(manifest.digest(each)) for each in manifest.data_files(tag)}
        (tag / manifest.MANIFEST).write_text(json.dumps({"format": 1, "files": records}))
        said = _refused(capsys, TOOLS[tool], tag, "--output", output)
    elif tool == "average":
        said = _refused(capsys, AVERAGE, tmp_path / "model", tmp_path / "model", "--output", output)
    else:
        line = ("--from", "mythos", "--to", "hf", "--input", tmp_path / "model", "--output", output)
        said = _refused(capsys, TOOLS["convert"], *line)
    assert "shape" in said or "not in the given weights" in said or "n_experts" in said or "demands" in said, said
    assert not output.exists() or not list(output.iterdir())
