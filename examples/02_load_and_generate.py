"""Load a trained model, continue a text at two depths, and measure its loss on a text at several.

A run's directory, a checkpoint or a model folder may stand in place of "tiny", the model that is installed with the
package.
"""

import torch

import mythos_ds

SOURCE = "tiny"
TEXT = "for name in sorted(names):\n    print(name)\n"

for loops in (1, 8):
    print(f"{loops} loops:", repr(mythos_ds.generate(SOURCE, "def main(", loops=loops, new_tokens=24, temperature=0)))

model = mythos_ds.MythosModel.from_pretrained(SOURCE)
mythos_ds.convert(SOURCE, "tiny-hf")  # for transformers and vLLM; the tokenizer goes along
tokenizer = mythos_ds.Tokenizer.load("tiny-hf")
print("loss:", mythos_ds.evaluate(model, [torch.tensor([tokenizer.encode(TEXT)])], loops=[1, 4, 16]))
