"""What is compared in memory: the source with one loop of the looped model, and an export with what it was made of."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_ds.data.batches import Batch
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import load_model

QUESTION = "What is a river?"


@torch.inference_mode()
def source_difference(source: Path, looped: Path, batch: Batch) -> dict[str, float]:
    """The largest difference of an fp32 logit between the dense source and one loop of the model made of it, and the
    largest logit."""
    transformers = _transformers()
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    expected = dense(batch["tokens"], use_cache=False).logits
    found = load_model(looped)(batch["tokens"], n_loops=1)
    return {"difference": float((found - expected).abs().max()), "largest": float(expected.abs().max())}


def chat_tokens(looped: Path, export: Path, loops: int, count: int) -> dict[str, Any]:
    """The `count` likeliest next ids after a question in the chat template, from the looped model and from its export
    by transformers, and the text of them."""
    importlib.import_module("mythos_hf")
    transformers = _transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    exported = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = exported.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            n_loops=loops,
        )[0, prompt.shape[1] :].tolist()
        ends = exported.generation_config.eos_token_id
        ours = _likeliest(load_model(looped), prompt, loops, count, ends if isinstance(ends, list) else [ends])
    return {"loops": loops, "ours": ours, "export": theirs, "text": tokenizer.decode(ours)}


def _transformers() -> Any:
    """The library, without its progress bars."""
    library: Any = importlib.import_module("transformers")
    library.utils.logging.disable_progress_bar()
    return library


def _likeliest(model: MythosModel, tokens: Tensor, loops: int, count: int, never: list[int]) -> list[int]:
    """Greedy tokens without a cache, those that end an answer left out, as with min_new_tokens."""
    found: list[int] = []
    for _ in range(count):
        logits = model(tokens, n_loops=loops)[0, -1]
        logits[never] = -torch.inf
        found.append(int(logits.argmax()))
        tokens = torch.cat([tokens, torch.tensor([[found[-1]]])], 1)
    return found
