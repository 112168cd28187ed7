"""A model's folder: what is written is what is read, and what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch

from mythos_ds.errors import CheckpointError
from mythos_ds.lab.studies.language import base, configuration
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import CONFIG, load_model, read_metadata, save_model
from mythos_ds.weights.reader import SINGLE

MODEL = configuration({**base("cpu"), "model.lora_rank": 4}).model
TOKENS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    model = MythosModel(MODEL.model_copy(update={"tie_embeddings": tied}), seed=3).eval()
    for layer in model.moe_layers():
        layer.router.bias.uniform_(-1, 1)
    save_model(model, tmp_path / "m", {"note": 1})
    loaded = load_model(tmp_path / "m")
    assert not loaded.training
    assert read_metadata(tmp_path / "m") == {"note": 1}
    for (name, old), (_, new) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(old, new), name
    with torch.no_grad():
        assert torch.equal(model(TOKENS, n_loops=3), loaded(TOKENS, n_loops=3))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)
    save_model(MythosModel(MODEL), folder, {})
    content = json.loads((folder / CONFIG).read_text())
    wider = {**content, "model": {**content["model"], "dim": 128}}
    (folder / CONFIG).write_text(json.dumps(wider))
    with pytest.raises(CheckpointError, match="has the shape"):
        load_model(folder)
    (folder / CONFIG).write_text(json.dumps({**content, "model": {**content["model"], "dim": "x"}}))
    with pytest.raises(CheckpointError, match="dim"):
        load_model(folder)
    (folder / CONFIG).write_text(json.dumps(content))
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not readable"):
        load_model(folder)


def test_a_missing_weight_is_refused_not_initialised(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    save_model(MythosModel(MODEL), folder, {})
    tensors = load_file(folder / SINGLE)
    tensors.pop("recurrent.layers.0.moe.experts.w1")
    save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"experts\.w1"):
        load_model(folder)
