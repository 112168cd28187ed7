"""Export a model, and serve it with transformers: a batch of prompts, another depth, a stream of text.

The export is a Hugging Face folder. vLLM serves the same folder over HTTP (docs/serving.md). Needs the extra `hf`.
Writes to the folder `tiny-export`.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import mythos_ds
import mythos_hf  # noqa: F401  (the Auto classes know the model by this import)

mythos_ds.convert("tiny", "tiny-export", dtype="float32")

tokenizer = AutoTokenizer.from_pretrained("tiny-export", padding_side="left")
model = AutoModelForCausalLM.from_pretrained("tiny-export").eval()

prompts = ["def main(", "import os\n"]
batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
for loops in (1, 8):
    with torch.inference_mode():
        tokens = model.generate(**batch, max_new_tokens=16, do_sample=False, n_loops=loops)
    for prompt, text in zip(prompts, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
        print(f"{loops} loops, {prompt!r}: {text!r}")

one = tokenizer(prompts[0], return_tensors="pt", add_special_tokens=False)
model.generate(**one, max_new_tokens=16, do_sample=False, streamer=TextStreamer(tokenizer))
