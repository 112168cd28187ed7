"""No forward swallows an argument: what is unknown is named, what is known does something."""

import ast
from typing import Any

import pytest
import torch
from torch.nn import functional

transformers = pytest.importorskip("transformers")
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

import mythos_hf
from mythos_ds.weights.model_folder import load_model
from tests.helpers.paths import ROOT

CHECKED = {"mythos_hf.modeling_mythos.MythosModel", "mythos_hf.modeling_mythos.MythosForCausalLM"}
"""The classes whose forward takes more than it names; each compares it with a list."""
HANDED_ON = {"mythos_ds.plan.moved_bytes._OneKernel"}
"""Those that take tensors only, by place, for a function that names each."""
TOKENS = torch.tensor([[5, 77, 312, 2044]])


@pytest.fixture(scope="module")
def model(tiny):
    return mythos_hf.MythosForCausalLM.from_pretrained(tiny).eval()


def forwards() -> dict[str, ast.FunctionDef]:
    """Every forward of ours, by module and class."""
    found = {}
    for package in ("mythos_hf", "mythos_ds", "mythos_vllm"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for kind in ast.walk(ast.parse(path.read_text())):
                if isinstance(kind, ast.ClassDef):
                    own = [f for f in kind.body if isinstance(f, ast.FunctionDef) and f.name == "forward"]
                    found.update({f"{module}.{kind.name}": function for function in own})
    return found


def test_no_forward_takes_what_it_does_not_name_but_those_that_check_it():
    found = forwards()
    some = {
        "mythos_ds.model.mythos.MythosModel",
        "mythos_ds.model.pipeline_stage.StageModel",
        "mythos_vllm.model.MythosForCausalLM",
        "mythos_hf.recurrent_mythos.MythosLayer",
    }
    assert some | CHECKED <= set(found)
    open_ended = {name for name, function in found.items() if function.args.kwarg or function.args.vararg}
    assert open_ended == CHECKED | HANDED_ON
    assert not any(found[name].args.kwarg for name in HANDED_ON)


@pytest.mark.parametrize("value", [1, None, False])
def test_an_unknown_argument_is_an_error_that_names_it(value, model, tiny):
    ours = load_model(ROOT / "models" / "tiny")
    base = transformers.AutoModel.from_pretrained(tiny)
    for call in (model, model.model, base, ours):
        with pytest.raises(TypeError, match="past_key_value'"):
            call(TOKENS, past_key_value=value)
    with pytest.raises((TypeError, ValueError), match="past_key_value'"):
        model.generate(TOKENS, max_new_tokens=2, past_key_value=value)
    with pytest.raises((TypeError, ValueError), match="n_loop'"):
        model.generate(TOKENS, max_new_tokens=2, n_loop=value)


@pytest.mark.parametrize("name", ["cache_position", "token_type_ids", "seq_idx", "kwargs", "attention", "keywords"])
def test_names_that_other_models_know_are_unknown_here(name, model):
    for call in (model, model.model):
        with pytest.raises(TypeError, match=f"unknown argument '{name}'"):
            call(TOKENS, **{name: torch.zeros(1, 4, dtype=torch.long)})
    with pytest.raises((TypeError, ValueError), match=name):
        model.generate(TOKENS, max_new_tokens=2, **{name: torch.zeros(1, 4, dtype=torch.long)})


def test_the_error_says_what_was_probably_meant(model):
    with pytest.raises(TypeError, match=r"MythosForCausalLM: unknown argument 'n_loop'; did you mean 'n_loops'\?"):
        model(TOKENS, n_loop=3)


def test_what_transformers_declares_for_attention_is_taken(model):
    ends = torch.tensor([0, 4], dtype=torch.int32)
    values = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    assert set(values) == set(FlashAttentionKwargs.__annotations__)
    expected = model(TOKENS).logits
    positions = torch.arange(4)[None]
    assert torch.equal(model(TOKENS, position_ids=positions, **values).logits, expected)
    with pytest.raises(ValueError, match="position_ids: not given"):
        model(TOKENS, **values)


def test_records_that_are_not_kept_are_refused(model, tiny):
    name = "output_router_logits"
    expected = model(TOKENS).logits
    assert torch.equal(model(TOKENS, **{name: False}).logits, expected)
    for call in (model, model.model):
        with pytest.raises(ValueError, match=f"{name}: given True"):
            call(TOKENS, **{name: True})
    with pytest.raises(ValueError, match=f"{name}: given True"):
        model.generate(TOKENS, max_new_tokens=2, **{name: True})
    asked = mythos_hf.MythosForCausalLM.from_pretrained(tiny)
    setattr(asked.config, name, True)
    with pytest.raises(ValueError, match=f"{name}: given True"):
        asked(TOKENS)


@pytest.mark.parametrize("given", [0, -1, 2.5, "3", True, torch.tensor(2.0)])
def test_loops_are_a_whole_number(given, model):
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=r"n_loops: given .+; allowed: a whole number"):
            call(TOKENS, n_loops=given)
    assert torch.equal(model(TOKENS, n_loops=torch.tensor(2)).logits, model(TOKENS, n_loops=2).logits)


def test_one_input_is_asked_for(model):
    with pytest.raises(ValueError, match="none given"):
        model()
    with pytest.raises(ValueError, match="both given"):
        model(TOKENS, inputs_embeds=model.get_input_embeddings()(TOKENS))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_four_accumulated_parts_are_one_batch(tiny):
    model = mythos_hf.MythosForCausalLM.from_pretrained(tiny)
    assert model.accepts_loss_kwargs is True
    tokens = torch.randint(10, 4000, (4, 12), generator=torch.Generator().manual_seed(6))
    labels = tokens.clone()
    for row, ignored in enumerate((0, 3, 9, 6)):  # parts of unlike weight: a mean of means would be another loss
        labels[row, :ignored] = -100
    items = (labels[:, 1:] != -100).sum()

    whole = model(tokens, labels=labels)
    shifted = functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert whole.loss.item() == pytest.approx(shifted.item(), rel=1e-5)
    whole.loss.backward()
    expected = gradients(model)

    total, means = 0.0, 0.0
    for row in range(4):
        part = slice(row, row + 1)
        loss = model(tokens[part], labels=labels[part], num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
        with torch.no_grad():
            means += model(tokens[part], labels=labels[part]).loss.item() / 4
    assert total == pytest.approx(whole.loss.item(), rel=1e-5)
    assert abs(means - whole.loss.item()) > 1e-3
    accumulated = gradients(model)
    assert accumulated.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (accumulated[name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name
