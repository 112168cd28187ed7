"""PEFT's adapters on the exported model; needs peft, and accelerate. `make test-hf` runs it."""

from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import mythos_ds
import mythos_hf
from mythos_ds.weights.model_folder import load_model

TOKENS = torch.randint(10, 4000, (2, 48), generator=torch.Generator().manual_seed(0))
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all linear modules": {"target_modules": "all-linear"},
    "routed experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


def adapted(folder: Any, targets: str) -> Any:
    """The model with adapters that already do something."""
    settings = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **TARGETS[targets])
    torch.manual_seed(1)
    return peft.get_peft_model(mythos_hf.MythosForCausalLM.from_pretrained(folder), settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS, n_loops=5).logits


def step(model: Any) -> dict[str, torch.Tensor]:
    """One step of plain descent; the gradients of what is trained."""
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    with torch.no_grad():
        for p in trained.values():
            p -= 0.01 * p.grad
            p.grad = None
    return gradients


@pytest.mark.parametrize("targets", TARGETS)
def test_training_changes_adapters_only_and_they_merge_and_come_back(targets, tiny, tmp_path):
    model = adapted(tiny, targets)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = step(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(gradients)
    assert all(".lora_" in name for name in changed)
    expected = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    assert (expected - plain).abs().max() > 0.1
    assert torch.equal(plain, logits(AutoModelForCausalLM.from_pretrained(tiny)))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    merged = model.merge_and_unload()
    scale = expected.abs().max()
    assert (logits(merged) - expected).abs().max() <= 1e-5 * scale
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))
    mythos_ds.convert(tmp_path / "merged", tmp_path / "back", from_format="hf", to_format="mythos")
    with torch.no_grad():
        back = load_model(tmp_path / "back")(TOKENS, n_loops=5)
    assert (back - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_gradients_of_adapters_are_those_without_checkpointing(targets, reentrant, tiny):
    expected = step(adapted(tiny, targets))
    model = adapted(tiny, targets)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = step(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name
