"""Check a machine's GPU: correctness, several ranks on one GPU, figures; without a GPU the same checks at small size.

Runs in a checkout. Each check runs in processes of its own; one that fails or hangs does not stop the rest.

    python -m tools.gpu_acceptance
    python -m tools.gpu_acceptance --call 2 --output acceptance
    python -m tools.gpu_acceptance --only experts attention
    python -m tools.gpu_acceptance --page acceptance/acceptance.jsonl

Exit code 0: all passed or were skipped; 1: some failed; 2: not started.
"""

import importlib
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mythos_ds.bench.acceptance import CALL_LIMIT_S, DEVICES, AcceptanceCheck, AcceptanceResult, run_checks, select
from mythos_ds.bench.acceptance_page import publish
from mythos_ds.errors import MythosError, OptionError
from mythos_ds.formatting import plain_table
from mythos_ds.mains import run_tool

FAILED_EXIT_CODE = 1
OUTPUT = Path(".cache", "gpu_acceptance")


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    what = made.add_mutually_exclusive_group()
    what.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="these checks alone")
    what.add_argument("--call", type=int, action="append", default=[], choices=(1, 2, 3), help="the checks of one call")
    made.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"folder for acceptance.jsonl and what checks print ({OUTPUT})"
    )
    made.add_argument("--device", choices=DEVICES, help="default: cuda where torch sees a GPU")
    made.add_argument(
        "--limit", type=float, default=CALL_LIMIT_S, metavar="SECONDS", help=f"of a call in all ({CALL_LIMIT_S:.0f})"
    )
    made.add_argument("--list", action="store_true", help="print the checks and stop")
    made.add_argument(
        "--page", nargs="*", type=Path, metavar="FILE", help="write docs/gpu_acceptance.md from these results and stop"
    )
    return made


def suite() -> tuple[list[AcceptanceCheck], Path]:
    """All checks, and the checkout they are in. Raises MythosError outside of one."""
    try:
        registry: Any = importlib.import_module("tests.gpu.registry")
    except ImportError as error:
        raise MythosError(
            f"the checks cannot be imported ({error}); allowed: `python -m tools.gpu_acceptance` in a checkout"
        ) from None
    return list(registry.CHECKS), Path(registry.__file__).resolve().parents[2]


def chosen_device(given: str | None) -> str:
    """The device that is asked for. Raises OptionError for a GPU that is not there."""
    if given == "cpu":
        return given
    import torch

    present = torch.cuda.is_available()
    if given == "cuda" and not present:
        raise OptionError(f"--device: given cuda, but torch {torch.__version__} sees no GPU; allowed: cpu")
    return given or ("cuda" if present else "cpu")


def run(arguments: Namespace) -> list[AcceptanceResult]:
    """Run what is asked for, showing each result as it comes."""
    from rich.console import Console

    checks, root = suite()
    chosen = select(checks, arguments.only, arguments.call)
    if not 0 < arguments.limit < float("inf"):
        raise OptionError(f"--limit: given {arguments.limit:g}; allowed: seconds above 0; nearest: {CALL_LIMIT_S:.0f}")
    console = Console(stderr=True, highlight=False)
    device = chosen_device(arguments.device)
    colours = {"pass": "green", "fail": "red", "skip": "yellow"}
    results: list[AcceptanceResult] = []
    running = run_checks(chosen, arguments.output, device=device, root=root, limit_s=arguments.limit)
    for check in chosen:
        with console.status(f"{check.name} ({len(results) + 1} of {len(chosen)}, at most {check.limit_s:.0f} s)"):
            result = next(running)
        results.append(result)
        colour = colours[result.status]
        console.print(f"[{colour}]{result.status}[/] {result.check:18} {result.seconds:6.1f} s  ", end="")
        console.print(result.reason, markup=False, soft_wrap=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    results: list[AcceptanceResult] = []

    def work(arguments: Namespace) -> None:
        if arguments.page is not None:
            checks, root = suite()
            sys.stdout.write(publish(checks, arguments.page, root / "docs"))
        elif arguments.list:
            rows = [[str(check.call), check.name, check.shows] for check in suite()[0]]
            sys.stdout.write(plain_table(["call", "check", "what holds"], rows) + "\n")
        else:
            results.extend(run(arguments))
            counts = {status: sum(each.status == status for each in results) for status in ("pass", "fail", "skip")}
            summary = ", ".join(f"{count} {status}" for status, count in counts.items())
            sys.stdout.write(f"{summary}; {os.path.join(arguments.output, 'acceptance.jsonl')}\n")

    code = run_tool(parser(), work, argv)
    return code or (FAILED_EXIT_CODE if any(result.status == "fail" for result in results) else 0)


if __name__ == "__main__":
    sys.exit(main())
