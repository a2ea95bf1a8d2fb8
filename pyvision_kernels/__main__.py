"""`python -m pyvision_kernels info` and `verify [op ...]`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import pyvision_kernels as pvk
from pyvision_kernels import _simt
from pyvision_kernels._case import OpCases, all_cases
from pyvision_kernels._extension import LIBRARIES, cpu_capabilities, cpu_capability, cuda_status
from pyvision_kernels._verify import Result, run_case


def info(console: Console) -> None:
    """Versions, what was built, what this machine can run."""
    built = pvk.build_info()
    cpu = LIBRARIES["CPU"]
    rows = {
        "pyvision_kernels": pvk.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchvision", "triton")},
        "built with": f"torch {built['torch']}, {built['compiler']}" if built else "nothing is built",
        "CPU kernels": f"{cpu_capability()} in force, of {', '.join(cpu_capabilities())}" if cpu.handle else cpu.reason,
        "threads": str(torch.get_num_threads()),
        "CUDA kernels": cuda_status(),
        "CUDA build": f"{', '.join(built['cuda_archs']) or 'none'}: {built['cuda_reason']}" if built else "none",
        "CUDA emulator": _simt.status(),
    }
    if torch.cuda.is_available():
        rows["GPU"] = torch.cuda.get_device_name()
    for name, value in rows.items():
        console.print(f"{name:>16}  {value}", highlight=False, soft_wrap=True)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def verify(console: Console, names: list[str], device: str, small: bool = False, seed: int = 0) -> bool:
    """Runs the shipped cases, prints the worst error of each op, dtype and direction; true if all hold.

    The device "simt" is the emulator on the CPU, with a seed of its schedule.
    """
    specs = list(all_cases())
    known = sorted({name for spec in specs for name in (spec.name, spec.family)})
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"verify: expected ops among {', '.join(known)}, but got {', '.join(unknown)}")
    chosen = [spec for spec in specs if not names or spec.name in names or spec.family in names]
    emulator: contextlib.AbstractContextManager = contextlib.nullcontext()
    if device == "simt":
        if _simt.load().handle is None:
            raise SystemExit(f"verify: expected an emulator for simt, but there is none: {_simt.load().reason}")
        emulator = _simt.emulated(seed, global_races=True)
    with Progress(console=console, transient=True) as progress, emulator:
        task = progress.add_task(f"verify on {device}", total=sum(len(_cases(spec, small)) for spec in chosen))
        results: list[Result] = []
        for spec in chosen:
            for case in _cases(spec, small):
                for dtype in case.dtypes:
                    for layout in spec.layouts:
                        results += run_case(spec, case, dtype, "cpu" if device == "simt" else device, layout)
                progress.advance(task)
    _print_results(console, results, device)
    for package in sorted({spec.peer_package for spec in chosen if not spec.peer_is_installed()}):
        console.print(f"{package} is not installed: compared with the float64 reference alone")
    return all(result.ok for result in results)


def _cases(spec: OpCases, small: bool) -> list:
    return spec.tests()[:4] if small else spec.tests()


def _print_results(console: Console, results: Iterable[Result], device: str) -> None:
    table = Table(title=f"Largest error against float64, relative to the largest value, on {device}")
    for column in ("op", "direction", "dtype", "worst case"):
        table.add_column(column)
    for column in ("checks", "failed", "error", "peer's", "allowed"):
        table.add_column(column, justify="right")
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.op, result.direction, result.dtype), []).append(result)
    for (op, direction, dtype), group in groups.items():
        failed = [result for result in group if not result.ok]
        worst = max(
            failed or group, key=lambda result: result.error / result.allowed if result.allowed else result.error
        )
        numbers = (f"{value:.1e}" for value in (worst.error, worst.peer_error, worst.allowed))
        table.add_row(
            op, direction, dtype, f"{worst.case}, {worst.layout}", str(len(group)), str(len(failed)), *numbers
        )
    console.print(table)
    for group in groups.values():
        for result in group:
            if not result.ok:
                console.print(
                    f"FAILED {result.op} {result.direction} {result.case} {result.dtype} {result.layout}: "
                    f"error {result.error:.2e}, allowed {result.allowed:.2e} {result.note}",
                    style="red",
                    soft_wrap=True,
                )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyvision_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, what was built, what this machine can run")
    checks = commands.add_parser("verify", help="run the shipped cases against float64 and torchvision")
    checks.add_argument(
        "op", nargs="*", help="a function, or a family of them by its folder in ops; all where none is named"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checks.add_argument("--device", default=device, help="cpu, cuda, or simt: the CUDA kernels emulated on the CPU")
    checks.add_argument("--seed", type=int, default=0, help="of simt's schedule; 0 runs threads in order")
    checks.add_argument("--small", action="store_true", help="a few cases of each op, for slow checkers")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.command == "info":
        info(console)
        return 0
    return 0 if verify(console, options.op, options.device, options.small, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
