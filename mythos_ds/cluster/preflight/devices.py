"""Whether this process's device computes right and has memory, and how fast the links between processes are."""

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mythos_ds.cluster.preflight.host_facts import HostFacts
from mythos_ds.cluster.preflight.report import Check, places
from mythos_ds.config.layout import RankLayout
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.formatting import byte_text
from mythos_ds.parallel.process_groups import own_group

SLOW_SHARE = 0.5
"""A GPU or link with less than this share of the median speed is taken to be broken."""
_SIZES = {"cuda": (8192, 256 * 2**20), "cpu": (512, 4 * 2**20)}
"""Side of the multiplied matrices, bytes of a collective's message."""
_REPEATS = 5
_EXPERTS = (3, 5, 6)
"""Which of the groups that `memory_outside` opens exchange rows."""
OUTSIDE_LIMIT = 1.1
"""Of the planned memory outside of the allocator."""
_ECC = "ecc.errors.uncorrected.volatile.total"


def device_facts(device: torch.device) -> HostFacts:
    """A checked matrix product and its speed, free memory, and the driver's count of uncorrected memory errors.

    The matrices hold small whole numbers, so the product is exact in every precision and order of summation.
    """
    side, _ = _SIZES[device.type]
    values = torch.arange(side * side, device=device).reshape(side, side)
    left, right = (values % 3 - 1).float(), (values // side % 3 - 1).float()
    product = left @ right
    seconds = _seconds(lambda: torch.matmul(left, right, out=product), device)
    # (A B) 1 = A (B 1): a second way to the same numbers, in integers.
    expected = (left.double() @ right.double().sum(1, keepdim=True)).squeeze(1)
    facts: HostFacts = {"right": bool(torch.equal(product.double().sum(1), expected)), "flops": 2 * side**3 / seconds}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"device": torch.cuda.get_device_name(device), "memory_free": free, "memory_total": total}
        facts["uuid"] = str(getattr(torch.cuda.get_device_properties(device), "uuid", None))
        facts |= _memory_errors(device)
    else:
        facts["device"] = "cpu"
    return facts


def _memory_errors(device: torch.device) -> HostFacts:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    query = ["nvidia-smi", f"--query-gpu={_ECC}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"ecc_errors": int(answer)} if answer.isdigit() else {}


def device_verdicts(everybody: Sequence[HostFacts], names: Sequence[str]) -> list[Check]:
    """Checks of all processes' `device_facts`; names: "rank 3 (node7)"."""
    pairs = list(zip(everybody, names, strict=True))
    wrong = [name for facts, name in pairs if not facts["right"]]
    checks = [Check("device arithmetic", not wrong, places(wrong) if wrong else "a matrix product is right everywhere")]
    kinds = {facts["device"] for facts in everybody}
    if kinds == {"cpu"}:
        return [*checks, Check("device speed", None, "no GPU here")]
    checks.append(_one_each(everybody, names))
    speeds = sorted(facts["flops"] for facts in everybody)
    median = speeds[len(speeds) // 2]
    slow = [f"{name} {facts['flops'] / 1e12:.1f}" for facts, name in pairs if facts["flops"] < SLOW_SHARE * median]
    text = f"{', '.join(sorted(kinds))}: median {median / 1e12:.1f} TFLOP/s in fp32"
    alike = len(kinds) == 1 and not slow
    checks.append(Check("device speed", alike, text + (f"; slow: {places(slow)}" if slow else ""), median, "FLOP/s"))
    used = [
        f"{name}: {byte_text(facts['memory_free'])} of {byte_text(facts['memory_total'])} free"
        for facts, name in pairs
        if facts["memory_free"] < 0.9 * facts["memory_total"]
    ]
    checks.append(Check("device memory", not used, places(used) if used else "at least 90 % free everywhere"))
    bad = [f"{name}: {facts['ecc_errors']}" for facts, name in pairs if facts.get("ecc_errors")]
    told = any("ecc_errors" in facts for facts in everybody)
    fine = "no uncorrected errors" if told else "the driver does not tell"
    checks.append(Check("device memory errors", not bad if told else None, places(bad) if bad else fine))
    return checks


def _one_each(everybody: Sequence[HostFacts], names: Sequence[str]) -> Check:
    """Each process has a GPU of its own; where the launcher shows each only one, it may be the same one."""
    takers: dict[str, list[str]] = {}
    for facts, name in zip(everybody, names, strict=True):
        takers.setdefault(facts["uuid"], []).append(name)
    takers.pop(str(None), None)  # the driver does not tell
    shared = [f"{' and '.join(users)}: {uuid}" for uuid, users in takers.items() if len(users) > 1]
    return Check("one GPU each", not shared, places(shared) if shared else "no two processes share one")


@dataclass(frozen=True)
class Links:
    """Groups of ranks: those of each host, and those of equal number on every host (a rail)."""

    inside: list[list[int]]
    across: list[list[int]]

    @classmethod
    def of(cls, nodes: dict[str, list[int]]) -> "Links":
        """Groups by hosts' ranks; hosts of unequal size have no ranks of equal number to spare."""
        rails = zip(*nodes.values(), strict=False)
        return cls(list(nodes.values()), [list(rail) for rail in rails])


def open_group(
    environment: ProcessEnvironment, device: torch.device, store: torch_distributed.Store, limit_s: float
) -> None:
    """Start torch.distributed at the meeting's store. Collective."""
    torch_distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch_distributed.PrefixStore("links", store),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timedelta(seconds=max(1.0, limit_s)),
    )


def memory_outside(layout: RankLayout, device: torch.device, limit_s: float, ranks_per_node: int = 0) -> HostFacts:
    """Bytes of this process's GPU that are not torch's, once the run's own groups have spoken; none without a GPU.
    Collective. What other programs hold counts too. ranks_per_node: of a run whose rows travel by node, else 0."""
    everyone, timeout = range(layout.world_size), timedelta(seconds=max(1.0, limit_s))
    stages = layout.all_stages if layout.pipelined else ()
    shared = (layout.all_expert_groups, layout.all_expert_copies) if layout.run_ep_size > 1 else ()
    by_node: tuple[Sequence[range], ...] = ()
    if ranks_per_node:
        by_node = layout.experts_across_nodes(ranks_per_node), layout.expert_nodes(ranks_per_node)
    for number, groups in enumerate(((everyone,), (everyone,), stages, *shared, *by_node)):
        own = own_group(tuple(map(tuple, groups)), timeout, f"memory {number}")
        if own.size() == 1:
            continue
        message = torch.ones(_SIZES[device.type][1] // 4 // own.size() * own.size(), device=device)
        torch_distributed.all_reduce(message, op=torch_distributed.ReduceOp.MAX, group=own)
        if number in _EXPERTS:
            torch_distributed.all_to_all_single(torch.empty_like(message), message, group=own)
    _finish(device)
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"outside_bytes": total - free - torch.cuda.memory_reserved(device)}


def outside_verdict(everybody: Sequence[HostFacts], names: Sequence[str], planned: float) -> Check:
    """What all processes' `memory_outside` found, beside the plan's number, an assumption: more is no fault."""
    pairs = zip(everybody, names, strict=True)
    found = [(facts["outside_bytes"], name) for facts, name in pairs if "outside_bytes" in facts]
    if not found:
        return Check("context and communicators", None, "no GPU here")
    most, where = max(found)
    text = f"{byte_text(most)} at the most ({where}), planned {byte_text(planned)}"
    fits = most <= OUTSIDE_LIMIT * planned
    cure = f"; plan with cluster.context_bytes={most}"
    return Check("context and communicators", True if fits else None, text if fits else text + cure, most, "bytes")


def clock_offset(device: torch.device) -> list[float]:
    """This clock minus rank 0's after each of several barriers, in seconds. Collective."""
    offsets = []
    for _ in range(_REPEATS):
        _barrier(device)
        now = torch.tensor(time.time(), dtype=torch.float64, device=device)
        first = now.clone()
        torch_distributed.broadcast(first, 0)
        offsets.append((now - first).item())
    return offsets


def link_speeds(links: Links, device: torch.device, limit_s: float) -> HostFacts:
    """Bytes per second that each kind of link moved for this rank: bus bandwidth of all-reduce and all-to-all.

    Collective. "inside": all hosts at once, each among its ranks; "across": all rails at once.
    """
    facts: HostFacts = {}
    timeout = timedelta(seconds=max(1.0, limit_s))
    for where, groups in (("inside", links.inside), ("across", links.across)):
        own = own_group(tuple(map(tuple, groups)), timeout, f"links {where} hosts")
        _barrier(device)
        if own.size() == 1:
            continue
        size, n = _SIZES[device.type][1], own.size()
        message = torch.ones(size // 4 // n * n, device=device)
        target = torch.empty_like(message)
        work: dict[str, tuple[Callable[[], object], float]] = {
            "all-reduce": (_all_reduce(message, own), 2 * (n - 1) / n),
            "all-to-all": (_all_to_all(target, message, own), (n - 1) / n),
        }
        for name, (call, share) in work.items():
            facts[f"{name} {where} hosts"] = share * message.nbytes / _seconds(call, device)
    return facts


def _all_reduce(message: Tensor, group: torch_distributed.ProcessGroup) -> Callable[[], object]:
    return lambda: torch_distributed.all_reduce(message, op=torch_distributed.ReduceOp.MAX, group=group)


def _all_to_all(target: Tensor, message: Tensor, group: torch_distributed.ProcessGroup) -> Callable[[], object]:
    return lambda: torch_distributed.all_to_all_single(target, message, group=group)


def link_verdicts(everybody: Sequence[HostFacts], names: Sequence[str], *, judge: bool) -> list[Check]:
    """Checks of all processes' `link_speeds`. judge: whether a slow link fails; CPUs share their cores."""
    checks = []
    for kind in dict.fromkeys(kind for facts in everybody for kind in facts):
        found = [(facts[kind], name) for facts, name in zip(everybody, names, strict=True) if kind in facts]
        speeds = sorted(speed for speed, _ in found)
        median = speeds[len(speeds) // 2]
        slow = [f"{name} {byte_text(speed)}/s" for speed, name in found if speed < SLOW_SHARE * median]
        worst = min(found)
        text = f"median {byte_text(median)}/s, slowest {byte_text(worst[0])}/s ({worst[1]})"
        fails = judge and bool(slow)
        checks.append(Check(kind, not fails, f"{text}; slow: {places(slow)}" if fails else text, median, "bytes/s"))
    return checks or [Check("links", None, "one process: nothing to send")]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    _finish(device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        call()
    _finish(device)
    return (time.perf_counter() - started) / _REPEATS


def _barrier(device: torch.device) -> None:
    if device.type == "cuda":
        torch_distributed.barrier(device_ids=[device.index])
    else:
        torch_distributed.barrier()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
