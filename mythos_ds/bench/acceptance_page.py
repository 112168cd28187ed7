"""The page of the acceptance checks: what they are, and what the committed run of them found."""

import json
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.bench.acceptance import AcceptanceCheck, AcceptanceResult, bar_text, number_text, read_results
from mythos_ds.errors import OptionError
from mythos_ds.formatting import byte_text
from mythos_ds.io import write_atomic

PAGE, DATA = "gpu_acceptance.md", "gpu_acceptance.jsonl"
CALLS = {
    1: "One process: are the kernels, the model and the engine right?",
    2: "Several ranks on one GPU: do layouts train the same model?",
    3: "Figures: how fast, and how much memory?",
}


def publish(checks: Sequence[AcceptanceCheck], files: Sequence[Path], docs: Path) -> str:
    """Write the page, and the results it is made from beside it; returns what was written, for people.

    files: results of runs; where several have a check, the last one counts. Without any, those that are committed.
    Raises OptionError for results without a GPU, and of checks that there are not.
    """
    committed = docs / DATA
    written = [docs / PAGE]
    if files:
        results = read_results(files)
        _require_of_a_gpu(results, checks)
        lines = [json.dumps(vars(results[check.name])) for check in checks if check.name in results]
        write_atomic(committed, "\n".join(lines) + "\n")
        written.append(committed)
    write_atomic(docs / PAGE, page(checks, read_results([committed]) if committed.is_file() else {}))
    return "".join(f"{path}: written\n" for path in written)


def _require_of_a_gpu(results: dict[str, AcceptanceResult], checks: Sequence[AcceptanceCheck]) -> None:
    known = {check.name for check in checks}
    for name, result in results.items():
        if name not in known:
            raise OptionError(f"--page: there is no check {name!r}; allowed: results of this version's checks")
        if result.device.get("kind") != "cuda":
            raise OptionError(f"--page: {name} ran without a GPU; allowed: results of --device cuda")


def page(checks: Sequence[AcceptanceCheck], results: dict[str, AcceptanceResult]) -> str:
    """docs/gpu_acceptance.md of these results."""
    parts = [_HEAD, _summary(checks, results)]
    for call, title in CALLS.items():
        own = [check for check in checks if check.call == call]
        parts += [f"## {title}", f"`python -m tools.gpu_acceptance --call {call} --output acceptance`"]
        header = ["| check | what holds | without a GPU |", "|---|---|---|"]
        if results:
            header = ["| check | what holds | result | seconds |", "|---|---|---|---:|"]
        rows = [_row(check, results.get(check.name) if results else None, bool(results)) for check in own]
        parts.append("\n".join([*header, *rows]))
        numbers = [
            f"| {check.name} | {number['name']} | {number_text(number)} | {bar_text(number)} |"
            for check in own
            if check.name in results
            for number in results[check.name].numbers
        ]
        if numbers:
            parts.append("\n".join(["| check | number | measured | held to |", "|---|---|---:|---:|", *numbers]))
    return "\n\n".join(parts) + "\n"


def _summary(checks: Sequence[AcceptanceCheck], results: dict[str, AcceptanceResult]) -> str:
    if not results:
        return "**Not run yet on a GPU.** No figure of this page was measured; these are the checks that are waiting."
    devices = dict.fromkeys(_device(result) for result in results.values())
    dates = sorted(result.date[:10] for result in results.values())
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    states = [results[check.name].status if check.name in results else "not run" for check in checks]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("pass", "fail", "skip", "not run"))
    commits = ", ".join(dict.fromkeys(str(result.commit) for result in results.values()))
    return f"Run on {when}: {counts}. {'; '.join(devices)}. Commit {commits}."


def _device(result: AcceptanceResult) -> str:
    device, versions = result.device, result.versions
    size = f", {byte_text(device['memory_bytes'])}" if "memory_bytes" in device else ""
    return (
        f"{device.get('name', 'a GPU')}{size}, torch {versions.get('torch')}, CUDA {device.get('cuda')}, "
        f"DeepSpeed {versions.get('deepspeed')}, Python {versions.get('python')}"
    )


def _row(check: AcceptanceCheck, result: AcceptanceResult | None, ran: bool) -> str:
    if not ran:
        return f"| `{check.name}` | {check.shows} | {'skipped' if check.needs_gpu else 'at small size'} |"
    if result is None:
        return f"| `{check.name}` | {check.shows} | not run | |"
    reason = f": {result.reason}".replace("|", "/") if result.reason else ""
    status = f"**{result.status}**" if result.status == "fail" else result.status
    return f"| `{check.name}` | {check.shows} | {status}{reason} | {result.seconds:.0f} |"


_HEAD = """# GPU acceptance

Generated by `python -m tools.gpu_acceptance --page FILE...` from the checks of `tests/gpu` and from the results that
are committed beside this page; a test holds them in step.

`make gpu-acceptance` runs all checks, each in processes of its own, on the first GPU that torch sees, and adds a line
for each to `acceptance.jsonl`. Each of the three calls takes at most seven minutes. Where there is no GPU, the same
checks run at small size, and those that need one are skipped by name; `.ci/run` does that, so that the checks keep
working. Several ranks share one GPU by a back end of the tests, which carries messages through host memory: it shows
that a layout is right, and nothing about NCCL or speed.

A machine without a network needs Python, torch with its CUDA libraries, and a checkout, which need not be installed.
Where there is a network, collect the wheels that are missing there, by `pip download --no-deps --only-binary=:all:
--python-version 3.12 -d wheels ...`, and by `pip wheel --no-deps -w wheels deepspeed==...` for what has none. Then, in
the checkout:

```bash
python -m pip install --no-index --find-links wheels --no-deps wheels/*.whl
python -m tools.gpu_acceptance --call 1 --output acceptance
python -m tools.gpu_acceptance --only experts recompute --output acceptance   # what failed, once it is mended
```

Results of several runs are joined, the last of each check counts: `--page acceptance/*.jsonl` writes this page and the
results beside it. Figures of call 3 that [benchmarks.md](benchmarks.md) quotes are copied there by hand, with date,
hardware and command."""
