"""The forms in which weights lie in a folder, and the names that wrappers give them."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mythos_ds.errors import CheckpointError
from mythos_ds.weights.pickled import PickledShards, has_safetensors, open_weights
from mythos_ds.weights.prefixes import without_prefix
from mythos_ds.weights.reader import TensorFolder

WEIGHTS = {f"layer.{i}.weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(6)}
HALVES = [dict(list(WEIGHTS.items())[:3]), dict(list(WEIGHTS.items())[3:])]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5000\n"


def same(folder: Path, expected: dict[str, Tensor] = WEIGHTS) -> bool:
    """Also after a trip to another process, as a conversion's workers take it."""
    found = pickle.loads(pickle.dumps(open_weights(folder)))
    specs = found.specs()
    assert {name: spec.shape for name, spec in specs.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    return all(
        torch.equal(found.read(name), value) and torch.equal(found.read(name, slice(1, 2)), value[1:2])
        for name, value in expected.items()
    )


def shards(folder: Path, kind: str, *, index: bool) -> None:
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    where: dict[str, str] = {}
    for i, half in enumerate(HALVES, 1):
        name = f"{stem}-{i:05d}-of-00002.{ending}"
        where |= dict.fromkeys(half, name)
        if kind == "safetensors":
            save_file(half, folder / name)
        else:
            torch.save(half, folder / name, _use_new_zipfile_serialization=kind == "bin")
    if index:
        text = json.dumps({"metadata": {}, "weight_map": where})
        (folder / f"{stem}.{ending}.index.json").write_text(text)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin of old versions"])
@pytest.mark.parametrize("index", [True, False])
def test_files_of_one_model_with_an_index_and_without(tmp_path: Path, kind: str, index: bool) -> None:
    shards(tmp_path, kind, index=index)
    assert same(tmp_path)
    assert has_safetensors(tmp_path) == (kind == "safetensors")
    second = next(tmp_path.glob("*-00002-of-*"))
    second.unlink()
    with pytest.raises(CheckpointError, match=second.name):
        open_weights(tmp_path).specs()


def test_one_file_of_several_is_open_at_a_time(tmp_path: Path) -> None:
    shards(tmp_path, "bin", index=True)
    found = open_weights(tmp_path)
    assert isinstance(found, PickledShards)
    opened = []
    for name in WEIGHTS:
        found.read(name)
        opened.append(vars(found)["_open"].path.name)
    assert opened == ["pytorch_model-00001-of-00002.bin"] * 3 + ["pytorch_model-00002-of-00002.bin"] * 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("model-00001-of-00002", "model-00001-of-00003"), "-of-00002 and -of-00003"),
        (("model-00002-of-00003",), "model-00001-of-00003.safetensors: missing; 2 of 00003"),
        (("first", "second"), "given files of weights: first.safetensors, second.safetensors"),
        ((), "given files of weights: none"),
    ],
)
def test_which_file_is_missing_or_too_much_is_said(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


def test_an_index_that_says_something_else_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, "bin", index=True)
    index = tmp_path / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["other.weight"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"other\.weight is in the index or the files, not in both"):
        open_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../a.bin"}}))
    with pytest.raises(CheckpointError, match="not a file of the folder"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "consolidated.00.pth"])
def test_what_trainers_leave_beside_the_weights_is_not_read(tmp_path: Path, name: str) -> None:
    torch.save(WEIGHTS, tmp_path / name)
    for other in ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"):
        (tmp_path / other).write_bytes(b"never opened")
    assert same(tmp_path)


def test_safetensors_are_taken_where_both_are(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert same(tmp_path)


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "consolidated.safetensors")
    assert same(tmp_path)
    assert has_safetensors(tmp_path)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "module"])
def test_a_state_dict_beside_other_things(tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: WEIGHTS, "step": 7}, tmp_path / "pytorch_model.bin")
    assert same(tmp_path)
    torch.save({wrapper: {**WEIGHTS, "step": 7}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="'step' is int"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00001.safetensors", "weights.pt"]
)
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name}: is a pointer of Git LFS.*git lfs pull"):
        open_weights(tmp_path)
    with pytest.raises(CheckpointError, match="is a pointer of Git LFS"):
        TensorFolder(tmp_path) if name.startswith("model.") else open_weights(tmp_path)


def test_an_adapter_is_named(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter; merge it"):
        open_weights(tmp_path)


NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")


@pytest.mark.parametrize(
    ("names", "anchor", "expected"),
    [
        (NAMES, "model.embed_tokens.weight", NAMES),
        ([f"module.{n}" for n in (*NAMES, "lm_head.weight")], NAMES[0], (*NAMES, "lm_head.weight")),
        ([f"_orig_mod.module.{n}" for n in NAMES], NAMES[0], NAMES),
        ([f"model.{n}" for n in (*NAMES, "lm_head.weight")], NAMES[0], (*NAMES, "lm_head.weight")),
        ([n.removeprefix("model.") for n in NAMES], NAMES[0], NAMES),
        ([f"module.{n.removeprefix('model.')}" for n in NAMES], NAMES[0], NAMES),
        ([*(n.removeprefix("model.") for n in NAMES), "lm_head.weight"], NAMES[0], (*NAMES, "lm_head.weight")),
        (["model._orig_mod." + n.removeprefix("model.") for n in NAMES], NAMES[0], NAMES),
        (["module.embed.weight", "module.norm.weight"], "embed.weight", ("embed.weight", "norm.weight")),
        # not all alike, or by no wrapper: left as they are, to be refused one by one
        ([f"module.{NAMES[0]}", NAMES[1]], NAMES[0], (f"module.{NAMES[0]}", NAMES[1])),
        ([f"encoder.{n}" for n in NAMES], NAMES[0], tuple(f"encoder.{n}" for n in NAMES)),
    ],
)
def test_prefixes_go_where_all_names_have_them(
    tmp_path: Path, names: list[str], anchor: str, expected: tuple[str, ...]
) -> None:
    save_file({name: torch.full((2,), float(i)) for i, name in enumerate(names)}, tmp_path / "model.safetensors")
    found = without_prefix(TensorFolder(tmp_path), anchor)
    assert set(found.specs()) == set(expected)
    for i, name in enumerate(expected):
        assert found.read(name)[0] == i


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    weights = {name: torch.ones(2) for name in (*NAMES, f"_orig_mod.{NAMES[1]}")}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is, without its prefix, the same as"):
        without_prefix(TensorFolder(tmp_path), NAMES[0])
