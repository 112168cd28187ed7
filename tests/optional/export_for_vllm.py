"""The folders that vllm_parity.py reads: models/tiny, and a small random model with latent attention."""

import sys
from pathlib import Path

import mythos_ds
from tests.parity.test_hf import TINY, make_folder

LATENT = {
    "dim": 64, "vocab_size": 512, "n_heads": 4, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "q_lora_rank": 32, "kv_lora_rank": 32, "n_experts": 16,
}  # fmt: skip


def main(output: Path) -> None:
    """Write both, unless they are there."""
    if not (output / "tiny").exists():
        mythos_ds.convert(TINY, output / "tiny", dtype="float32")
    if not (output / "latent").exists():
        make_folder(output / "latent_weights", LATENT)
        mythos_ds.convert(output / "latent_weights", output / "latent", dtype="float32")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
