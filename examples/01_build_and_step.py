"""Build a small model, train it for a few steps on one batch, and look at its loss by loop count."""

import torch

import mythos_ds

small = ["model.dim=64", "model.n_experts=4"]
model = mythos_ds.MythosModel.from_preset("tiny", small, seed=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
torch.manual_seed(0)
tokens = torch.randint(0, model.config.vocab_size, (4, 33))
print("before:", mythos_ds.evaluate(model, [tokens], loops=[1, 4]))
for _ in range(5):
    model(tokens, labels=tokens, n_loops=4).backward()
    optimizer.step()
    optimizer.zero_grad()
print("after:", mythos_ds.evaluate(model, [tokens], loops=[1, 4]))
