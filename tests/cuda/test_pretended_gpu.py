"""The model's forward and backward on fake tensors of device "cuda", on a torch without CUDA: nothing is computed, but
every operator is asked for its device, and none may wait."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from mythos_ds.config.loader import load_config
from tests.helpers.paths import ROOT

FOLDER = Path(__file__).parent
TIMEOUT_S = 600.0
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
BATCH, SEQ = 2, 32
"""Of what runs on the pretended GPU."""
EP_SIZE = {"tiny": 1, "1b": 1, "1t": 256}

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the pretended GPU with"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA of its own"),
]


def case(preset: str, **changes: Any) -> dict[str, Any]:
    """A preset with loop checkpointing, several documents per sequence, and no statistics, unless changed."""
    options = {"checkpointing": "loop", "documents": True, "details": False}
    return {"preset": preset, "ep_size": EP_SIZE[preset], **options, **changes}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library that stands for a GPU."""
    built = tmp_path_factory.mktemp("gpu") / "pretended_gpu.so"
    (libraries,) = library_paths()
    command = [
        str(COMPILER), "-std=c++20", "-O0", "-shared", "-fPIC",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{folder}" for folder in include_paths()), str(FOLDER / "pretended_gpu.cpp"),
        f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}", "-o", str(built),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return built


def run(library: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was found in each case."""
    command = [sys.executable, "-m", "tests.cuda.model_on_pretended_gpu", str(library), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [each["case"] for each in found] == cases
    return found


def test_no_operator_waits_or_leaves_the_device(library: Path) -> None:
    cases = [case(preset, checkpointing=unit) for preset in EP_SIZE for unit in ("loop", "layer", "none")]
    cases += [case("1b", details=True), case("1b", documents=False)]
    for found in run(library, cases):
        assert found["findings"] == [], found["case"]
        assert found["without_gradient"] == [], found["case"]
        assert found["operators"] > 5000


def test_the_kernels_that_are_called(library: Path) -> None:
    """Values of latent attention go to cuDNN as they are, else padded to flash; only Blackwell has groups padded."""
    plain = {"checkpointing": False, "documents": False}
    cudnn, flash, blackwell = run(
        library, [case("1b", cudnn=True, **plain), case("1b", **plain), case("1b", capability=[10, 0], **plain)]
    )
    assert cudnn["attention"] == ["CUDNN_ATTENTION 192 128"]
    assert flash["attention"] == ["flash 192 192"]
    for found in (cudnn, flash, blackwell):
        assert (found["findings"], found["without_gradient"]) == ([], [])
    model = load_config("1b.json", []).config.model
    rows = BATCH * SEQ * model.n_experts_per_tok
    assert flash["groups"] == [rows]
    assert blackwell["groups"] == [rows + 8 * (model.n_experts + 1)]


def test_faults_are_found(library: Path) -> None:
    faults = ("wait", "processor", "gradient")
    waits, processor, gradient = run(library, [case("tiny", fault=fault) for fault in faults])
    assert waits["findings"] == ["aten._local_scalar_dense.default waits for the device"]
    assert any("'cpu', 'cuda'" in finding for finding in processor["findings"])
    assert {name.rpartition(".")[2] for name in gradient["without_gradient"]} == {"w1", "w2", "w3"}
