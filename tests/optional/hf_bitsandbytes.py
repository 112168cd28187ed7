"""Loading in 8 and 4 bits leaves the loop's small parts alone; needs bitsandbytes, accelerate and peft.

`make test-hf` runs it, on the CPU.
"""

from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mythos_ds.data.tokenizer import Tokenizer
from tests.helpers.paths import ROOT

SETTINGS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "8 bits, own list": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """Token ids [16, 128] of this project's documents."""
    tokenizer = Tokenizer.load(ROOT / "models" / "tiny" / "tokenizer.model")
    words = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    return torch.tensor(tokenizer.encode(words)[: 16 * 128]).view(16, 128)


def quantised(folder: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**SETTINGS[name]))


def loss(model: Any, text: torch.Tensor) -> float:
    with torch.no_grad():
        return model.eval()(text, labels=text).loss.item()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_stays_and_so_do_the_loop_s_own_parts(name, tiny, text, tmp_path):
    whole, small = AutoModelForCausalLM.from_pretrained(tiny), quantised(tiny, name)
    matrices = {n for n, module in small.named_modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)}
    matrices |= {n for n, module in small.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    kept = dict(whole.named_parameters())
    for n, parameter in small.named_parameters():
        if n.rpartition(".")[0] in matrices:
            assert not parameter.is_floating_point(), n
        else:
            assert torch.equal(parameter, kept[n]), n
    assert len(matrices) == 4 * 3 + 3 * 3  # of attention; dense and shared feed-forwards. Routed experts are none.
    assert loss(small, text) == pytest.approx(loss(whole, text), rel=0.05)
    assert small.get_memory_footprint() < 0.85 * whole.get_memory_footprint()
    small.save_pretrained(tmp_path)
    assert loss(AutoModelForCausalLM.from_pretrained(tmp_path), text) == loss(small, text)


def test_adapters_train_on_four_bits_with_checkpointing(tiny, text):
    prepared = peft.prepare_model_for_kbit_training(
        quantised(tiny, "4 bits"), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model: Any = peft.get_peft_model(prepared, peft.LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(4):
        out = model.train()(input_ids=text[:2], labels=text[:2]).loss
        out.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.item())
    assert losses[-1] < losses[0] - 0.05, losses
