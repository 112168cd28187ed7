"""The folders that vllm_parity.py reads: models/tiny, and small random models with latent attention, and with all that
families of dense models add."""

import sys
from pathlib import Path

import mythos_ds
from tests.parity.test_hf import GQA, TINY, make_folder

LATENT = {
    "dim": 64, "vocab_size": 512, "n_heads": 4, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "q_lora_rank": 32, "kv_lora_rank": 32, "n_experts": 16,
}  # fmt: skip
DENSE = {
    **GQA, "dim": 64, "vocab_size": 512, "head_dim": 32, "n_experts": 16, "attention_biases": "all", "qk_norm": True,
    "qk_norm_span": "all", "norm_placement": "after", "rope_theta": 500.0, "no_rope_layers": [1],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


def main(output: Path) -> None:
    """Write all, unless they are there."""
    if not (output / "tiny").exists():
        mythos_ds.convert(TINY, output / "tiny", dtype="float32")
    for name, changes in (("latent", LATENT), ("dense", DENSE)):
        if not (output / name).exists():
            make_folder(output / f"{name}_weights", changes)
            mythos_ds.convert(output / f"{name}_weights", output / name, dtype="float32")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
