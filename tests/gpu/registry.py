"""The checks, in the order in which they run. Nothing heavy is imported: each runs in a process of its own."""

from mythos_ds.bench.acceptance import AcceptanceCheck

_KERNELS, _MODEL, _ENGINE, _SEVERAL, _FIGURES, _REGIONS = (
    f"tests.gpu.{name}"
    for name in ("kernel_checks", "model_checks", "engine_checks", "several_ranks", "benchmarks", "region_checks")
)
_COMPILES = "on a CPU a C++ compiler takes minutes for it; tests/unit/kernels has it there"

CHECKS = (
    AcceptanceCheck(
        "facts", 1,
        "Torch has a fused attention in bf16 for the widths that presets use.",
        f"{_KERNELS}:facts", 60,
    ),
    AcceptanceCheck(
        "experts", 1,
        "4 to 1024 experts with even, odd, one-sided and no rows give the results and gradients of fp32 within 1 %, in "
        "memory full of NaN; experts without rows get a gradient of exactly 0.",
        f"{_KERNELS}:experts", 90,
    ),
    AcceptanceCheck(
        "attention", 1,
        "Attention with and without documents, with GQA and MLA widths, gives the results and gradients of fp32 within "
        "2 %; no bit of it depends on another document.",
        f"{_KERNELS}:attention", 60,
    ),
    AcceptanceCheck(
        "two-widths", 1,
        "Values of 128 channels to queries of 192 give the results and gradients of fp32 within 2 % by every back end "
        "that takes them as they are, padded, and in torch's own attention of documents.",
        f"{_KERNELS}:two_widths", 60,
    ),
    AcceptanceCheck(
        "parity", 1,
        "The model in fp32 gives the loss (1e-5), the gradients (1e-4) and the routing of the reference in fp64; in "
        "bf16 its loss is within 2 %.",
        f"{_MODEL}:parity", 90,
    ),
    AcceptanceCheck(
        "routing-precision", 1,
        "Products in TF32 route bf16 weights as products in fp32 do.",
        f"{_MODEL}:routing_precision", 45,
    ),
    AcceptanceCheck(
        "regions", 1,
        "Compiled regions give the loss (1e-6) and gradients (5e-6) in fp32 that they give as written, and in bf16 "
        "gradients as near to fp32's.",
        f"{_REGIONS}:numerics", 180, _COMPILES,
    ),
    AcceptanceCheck(
        "region-graphs", 1,
        "Depths and rows that were not seen before make no new graph.",
        f"{_REGIONS}:graphs", 180, _COMPILES,
    ),
    AcceptanceCheck(
        "recompute", 1,
        "A recomputed loop routes as it did the first time and gives the same gradients: bit for bit where sums do not "
        "vary by themselves.",
        f"{_MODEL}:recompute", 90,
    ),
    AcceptanceCheck(
        "generation", 1,
        "The built-in model writes, greedily, what a plain loop on the CPU writes.",
        f"{_MODEL}:generation", 60,
    ),
    AcceptanceCheck(
        "optimizer", 1,
        "Five AdamW steps are those of its formula in fp64 to 1e-6.",
        f"{_MODEL}:optimizer", 45,
    ),
    AcceptanceCheck(
        "syncs", 1,
        "A forward and backward without documents never makes the host wait for the device.",
        f"{_MODEL}:syncs", 60, "the detector is CUDA's",
    ),
    AcceptanceCheck(
        "step-syncs", 1,
        "An optimizer step makes the host wait for the device a bounded number of times.",
        f"{_ENGINE}:step_syncs", 60, "the detector is CUDA's",
    ),
    AcceptanceCheck(
        "collectives", 1,
        "The real back end carries integers, float64, objects and no rows at all, on one rank.",
        f"{_ENGINE}:collectives", 45,
    ),
    AcceptanceCheck(
        "presets", 1,
        "Every preset's proxy takes three steps with finite numbers.",
        f"{_ENGINE}:presets", 120,
    ),
    AcceptanceCheck(
        "variants", 1,
        "ACT, post injection, LoRA at the output, tied embeddings and a depth for each sequence train in bf16.",
        f"{_ENGINE}:variants", 90,
    ),
    AcceptanceCheck(
        "muon", 1,
        "Muon trains in bf16.",
        f"{_ENGINE}:muon", 120, "DeepSpeed compiles it, which takes minutes on a CPU",
    ),
    AcceptanceCheck(
        "checkpoints", 1,
        "Checkpoints of ZeRO-3, also written beside training, and of ZeRO-1 hold the weights bit for bit, and training "
        "goes on from them as without a stop.",
        f"{_ENGINE}:checkpoints", 90,
    ),
    AcceptanceCheck(
        "numerics", 1,
        "Exploding weights end a run with the error that says so.",
        f"{_ENGINE}:numerics", 45,
    ),
    AcceptanceCheck(
        "primitives", 2,
        "Each collective and message of the tests' back end gives what it should.",
        f"{_SEVERAL}:primitives", 60,
    ),
    AcceptanceCheck(
        "two-ranks", 2,
        "EP 2 with ZeRO-3 and with ZeRO-1 trains as one process; all ranks issue what they send in one order.",
        f"{_SEVERAL}:two_ranks", 120,
    ),
    AcceptanceCheck(
        "two-ranks-bf16", 2,
        "EP 2 with ZeRO-3 in bf16 stays within 1 % of fp32 over ten steps.",
        f"{_SEVERAL}:two_ranks_bf16", 120,
    ),
    AcceptanceCheck(
        "four-ranks", 2,
        "EP 2 with two copies and ZeRO-3 trains as one process; all ranks issue what they send in one order.",
        f"{_SEVERAL}:four_ranks", 120,
    ),
    AcceptanceCheck(
        "ring", 2,
        "A ring of 2 stages trains as one process; its idle shares lie between 0 and 1.",
        f"{_SEVERAL}:ring", 120,
    ),
    AcceptanceCheck(
        "stages", 2,
        "A ring of 2 stages with EP 2, and stages of 1, 2 and 1 ranks, train as one process, in one order.",
        f"{_SEVERAL}:stages", 120,
    ),
    AcceptanceCheck(
        "gradient-types", 2,
        "Gradients travel in the type that is configured; averaged in bf16 they differ by less than 0.5 %.",
        f"{_SEVERAL}:gradient_types", 120,
    ),
    AcceptanceCheck(
        "ceilings", 3,
        "Large products and copies reach most of the data sheet's rates.",
        f"{_FIGURES}:ceilings", 60,
    ),
    AcceptanceCheck(
        "loop", 3,
        "A layer is at most 220 kernels forward, and the device waits for the host less than 10 % of a loop.",
        f"{_FIGURES}:loop", 60,
    ),
    AcceptanceCheck(
        "step", 3,
        "A training step of 1b reaches 12 % MFU and the plan's memory within 10 %.",
        f"{_FIGURES}:step", 240,
    ),
    AcceptanceCheck(
        "learning", 3,
        "Thirty steps lower the loss with expert loads below 4 times the mean.",
        f"{_FIGURES}:learning", 90,
    ),
    AcceptanceCheck(
        "expert-speed", 3,
        "The experts of 1b, 100b and 1t reach 35, 50 and 55 % of the data sheet's rate, forward and backward.",
        f"{_FIGURES}:experts", 60,
    ),
    AcceptanceCheck(
        "attention-speed", 3,
        "Rates of every attention back end, and what documents cost.",
        f"{_FIGURES}:attention", 60,
    ),
    AcceptanceCheck(
        "region-speed", 3,
        "Compiled regions make a layer of at most 120 kernels forward, and a loop at least 1.2 times as fast.",
        f"{_REGIONS}:speed", 180, _COMPILES,
    ),
    AcceptanceCheck("pieces", 3, "Rates of norm, router, feed-forward and cross-entropy.", f"{_FIGURES}:pieces", 60),
)  # fmt: skip
