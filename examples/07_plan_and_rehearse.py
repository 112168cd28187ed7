"""Plan a run of the trillion-parameter preset, and simulate one of its ranks, before any machine is rented.

Both are arithmetic on this machine: no GPU, no other process, no memory for weights.
"""

import json
import subprocess
import sys

import mythos_ds

PIPELINE = ["parallel.pp_size=4", "parallel.ep_size=256"]


def rehearse(rank: int, *overrides: str) -> dict:
    """Simulate a rank of the preset's 1,024; what it holds and sends, as `mythos-ds rehearse --json` prints it."""
    command = ["rehearse", "--config", "1t.json", "--rank", str(rank), "--json", *overrides]
    done = subprocess.run([sys.executable, "-m", "mythos_ds", *command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


for layout in ([], PIPELINE):
    plan = mythos_ds.plan_run("1t", overrides=layout)
    print(str(plan).splitlines()[0])
    for cost in plan.numbers["costs"]:
        print(f"  at {cost['at']}: {cost['days']:.0f} days, {cost['dollars'] / 1e6:.1f} million dollars")

for rank, layout in ((777, []), (300, PIPELINE)):
    found = rehearse(rank, *layout)
    print(
        f"rank {rank}: pipeline stage {found['stage']}, {len(found['experts'])} experts of each layer, layers",
        found["layers"],
    )
    print("  ", {name: found[name] for name in ("n_loops", "micro_batches", "traffic_bytes")})
