"""The folders that vllm_parity.py and vllm_request_loops.py read: models/tiny, with and without its code, and small
random models with latent attention of two widths, in fp8, with all that families of dense models add, with another
injection and adapters, and with a chat template."""

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import mythos_ds
from mythos_ds.data.chat import encode_chat
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.tokenizer_files import ChatFormat, copy_tokenizer, write_chat_format
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import load_model, read_metadata, save_model
from tests.helpers.chats import CHATML
from tests.helpers.tokenizers import byte_level_folder
from tests.optional.vllm_parity import ANSWER_TOKENS, CHAT_LENGTH, MESSAGES
from tests.parity.test_hf import GQA, TINY, make_folder

LATENT = {
    "dim": 64, "vocab_size": 512, "n_heads": 4, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "q_lora_rank": 32, "kv_lora_rank": 32, "n_experts": 16,
}  # fmt: skip
WIDE = {**LATENT, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "kv_lora_rank": 512}
"""Latent attention of the widths that vLLM's cache of latents has on a CPU."""
BLOCKS = {**GQA, "dim": 192, "vocab_size": 512, "head_dim": 64, "n_experts": 8, "expert_dim": 192, "ffn_dim": 320}
"""Matrices of several fp8 blocks, of which the last ones are not whole."""
WHOLE_BLOCKS = {**BLOCKS, "head_dim": 128, "expert_dim": 256, "ffn_dim": 512}
"""Matrices that two ranks cut between fp8 blocks."""
DENSE = {
    **GQA, "dim": 64, "vocab_size": 512, "head_dim": 32, "n_experts": 16, "attention_biases": "all", "qk_norm": True,
    "qk_norm_span": "all", "norm_placement": "after", "rope_theta": 500.0, "no_rope_layers": [1],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
FORMS = {
    **GQA, "dim": 64, "vocab_size": 512, "head_dim": 32, "n_experts": 16, "injection": "post", "discretisation": "zoh",
    "initial_state": "embedding", "loop_embedding": "raw", "lora_rank": 4, "lora_target": "output",
}  # fmt: skip


def main(output: Path) -> None:
    """Write all, unless they are there."""
    if not (output / "tiny").exists():
        mythos_ds.convert(TINY, output / "tiny", dtype="float32")
    if not (output / "tiny_remote").exists():
        mythos_ds.convert(TINY, output / "tiny_remote", dtype="float32", with_remote_code=True)
    small: tuple[tuple[str, dict[str, Any], Literal["float32", "fp8"]], ...] = (
        ("latent", LATENT, "float32"),
        ("dense", DENSE, "float32"),
        ("forms", FORMS, "float32"),
        ("wide", WIDE, "float32"),
        ("fp8", BLOCKS, "fp8"),
        ("blocks", WHOLE_BLOCKS, "fp8"),
        ("latent_blocks", {**WIDE, "q_lora_rank": 64, "expert_dim": 256, "ffn_dim": 512, "n_experts": 8}, "fp8"),
    )
    for name, changes, dtype in small:
        if not (output / name).exists():
            make_folder(output / f"{name}_weights", changes)
            mythos_ds.convert(output / f"{name}_weights", output / name, dtype=dtype)
    if not (output / "chat").exists():
        make_chat(output / "chat_weights")
        mythos_ds.convert(output / "chat_weights", output / "chat", dtype="float32")


def make_chat(folder: Path) -> None:
    """A model with random weights that ends its answer to MESSAGES after so many tokens, with the end of a turn, which
    only the chat's form tells from other tokens."""
    make_folder(folder, {**GQA, "dim": 64, "vocab_size": 1003, "head_dim": 32, "n_experts": 16})
    copy_tokenizer(byte_level_folder(folder.with_name("chat_tokenizer"), added=True), folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer.load(folder)
    end = tokenizer.special_tokens["<|im_end|>"]
    write_chat_format(folder, ChatFormat(CHATML, frozenset({end})), tokenizer.ends())
    model, metadata = load_model(folder), {**read_metadata(folder), "seq_len": CHAT_LENGTH}
    with torch.no_grad():
        *before, last = _states(model, encode_chat(tokenizer, MESSAGES, template=CHATML))
        basis = torch.linalg.qr(torch.stack(before).T).Q
        own = last - basis @ (basis.T @ last)  # what none of the tokens before has
        model.lm_head.weight[end] = 100 * own / own.norm()
    save_model(model, folder, metadata)


def _states(model: MythosModel, ids: list[int]) -> list[Tensor]:
    """What the head reads before each token of the likeliest answer, and before the one after it."""
    states: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0][0, -1].clone()))
    for _ in range(ANSWER_TOKENS + 1):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    hook.remove()
    return states


if __name__ == "__main__":
    main(Path(sys.argv[1]))
