"""What rows of vllm_parity.py leave and borrow: segments of shared memory, and folders of dequantised weights."""

import json
import os
import shutil
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_BLOCK = 128


def segments() -> set[Path]:
    """The segments that this process's descendants exchange tensors through; vLLM leaves them where they are."""
    found = set()
    for process in _descendants(os.getpid()):
        try:
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
        except OSError:
            continue
        paths = (line.split(maxsplit=5)[-1] for line in lines if f"{SHARED_MEMORY}/vllm_dist_" in line)
        found |= {Path(path) for path in paths}
    return found


def release(left: set[Path], seconds: float = 20) -> None:
    """Remove segments, once the processes that had them are gone or so many seconds are over."""
    deadline = time.monotonic() + seconds
    while segments() & left and time.monotonic() < deadline:
        time.sleep(0.2)
    for path in left:
        path.unlink(missing_ok=True)


def _descendants(process: int) -> list[int]:
    try:
        threads = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:
        return []
    own = [int(child) for text in threads for child in text.split()]
    return [*own, *(other for child in own for other in _descendants(child))]


def dequantised_folder(source: Path, target: Path) -> Path:
    """An fp8 folder's model in fp32: each scale times the 128 x 128 values that it is for, as the formula says."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    plain = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = tensor.shape
            scale = torch.kron(tensors[f"{name}_scale_inv"], torch.ones(_BLOCK, _BLOCK))
            plain[name] = tensor.float() * scale[:rows, :columns]
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor.float()
    save_file(plain, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    shutil.copy(source / "generation_config.json", target)
    return target
