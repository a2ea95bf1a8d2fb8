"""`python -m benchmarks`: verify, time every case against its peer, run whole models, detect on a photograph, report.

On a GPU whole models and the matrix of convolutions are parts by themselves (--only), or of --full.

The record, the chart and the picture go to benchmarks/out/, or with --save to benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import ceilings, convolutions, end_to_end, environment, models, report
from benchmarks.sources import RESULTS, ROOT

OUT = ROOT / "benchmarks" / "out"
BUSY = 0.5  # Processes a CPU before we start.
MODELS, CONVOLUTIONS = "models", "convolutions"  # for --only: one of these alone
# On a GPU: seconds after which no model, or row of the matrix, is begun, by the size of the run.
BUDGETS = {
    MODELS: {"smoke": 60.0, "quick": 120.0, "full": 3600.0},
    CONVOLUTIONS: {"smoke": 60.0, "quick": 60.0, "full": 5400.0},
}
SECONDS_OF_A_ROW = {"smoke": 0.02, "quick": 0.4, "full": 4.0}


class ShowProgress:
    """A pytest plugin: a bar on the console, drawn between the tests and never while one is timed."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.task = progress.add_task("starting", total=None)
        self.failed: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self.task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.progress.update(self.task, description=_name(nodeid))
        self.progress.refresh()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(f"{_name(report.nodeid)}: {_reason(report)}")

    def pytest_runtest_logfinish(self) -> None:
        self.progress.advance(self.task)


def _name(nodeid: str) -> str:
    return nodeid.rpartition("[")[2].rstrip("]")


def _reason(report: pytest.TestReport) -> str:
    lines = [line[2:] for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return (lines or ["failed"])[0].strip()


def verify(options: argparse.Namespace) -> bool:
    command = [sys.executable, "-m", "pyvision_kernels", "verify", "--device", options.device]
    command += [] if options.full else ["--small"]
    command += ["conv2d", "linear"] if options.only in BUDGETS else [options.only] if options.only else []
    return subprocess.run(command, cwd=ROOT).returncode == 0


def benchmark_cases(options: argparse.Namespace, folder: Path, console: Console) -> tuple[list[report.Row], list[str]]:
    """Runs pytest-benchmark in this process; its own output goes to `pytest.log`. Returns rows and failures."""
    results = folder / "pytest.json"
    results.unlink(missing_ok=True)
    arguments = [str(ROOT / "benchmarks" / "test_ops.py"), f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    arguments += ["-W", "ignore:Not saving anything"]  # where nothing was right, nothing was timed
    arguments += ["-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={results}"]
    arguments += [f"--device={options.device}", f"--seconds={SECONDS_OF_A_ROW[options.size]}"]
    arguments += [f"--{options.size}"] if options.size != "quick" else []
    arguments += [f"--only={options.only}"] if options.only else []
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        plugin = ShowProgress(progress)
        with (folder / "pytest.log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = pytest.main(arguments, plugins=[plugin])
    failed = plugin.failed
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        failed.append(f"pytest ended with {code!r} (see pytest.log)")
    # pytest-benchmark writes no file where nothing was timed.
    return report.rows_of(json.loads(results.read_text())) if results.is_file() else [], failed


def detect(name: str, options: argparse.Namespace, folder: Path, console: Console) -> report.Row:
    small: dict[str, Any] = {"side": 200, "proposals": 100} if options.smoke else {}
    outcome = end_to_end.run(name, options.device, folder, 0.0 if options.smoke else 20.0, **small)
    console.print(
        f"{name} on a photograph: {outcome.detections} detections of both, matched "
        f"(IoU >= {outcome.worst_iou:.5f}, scores within {outcome.worst_score:.0e}); "
        f"{outcome.timing.ratio.median:.3f}x; roi_align and nms take {outcome.share:.0%} of the stock model's time"
    )
    return end_to_end.as_row(outcome)


def parts_of(options: argparse.Namespace) -> list[str]:
    """What is timed beside the cases: on the CPU whole models, on CUDA what was asked for, or all with --full."""
    if options.only:
        return [options.only] if options.only in BUDGETS else []
    if options.device == "cpu":
        return [MODELS]
    return list(BUDGETS) if options.size == "full" else []


def run_part(part: str, options: argparse.Namespace, console: Console) -> tuple[list[report.Row], list[str], list[str]]:
    """Its rows, what was wrong, and what its budget did not reach."""
    budget = BUDGETS[part][options.size] if options.device == "cuda" else math.inf
    budget = budget if options.budget is None else options.budget
    if part == MODELS:
        return models.run_all(options.size, console, options.device, budget, options.match)
    return convolutions.run_all(options.size, console, options.device, budget, options.match, options.tune)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every case")
    parser.add_argument(
        "--smoke", action="store_true", help="one small case of each op, in seconds: no figure to quote"
    )
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/<device>/")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to without --save")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", metavar="OP", help="this op alone, and nothing end to end; or: models, convolutions")
    parser.add_argument("--budget", type=float, help="seconds after which no model or layer of the matrix is begun")
    parser.add_argument("--match", default="", help="models and layers of the matrix with this in their names alone")
    parser.add_argument("--tune", action="store_true", help="tune each layer of the matrix too, on a GPU")
    parser.add_argument("--no-verify", action="store_true", help="where the test suite has just passed")
    options = parser.parse_args(arguments)
    options.size = "smoke" if options.smoke else "full" if options.full else "quick"
    if options.smoke and (options.save or options.full):
        parser.error("--smoke goes with neither --save nor --full")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.device == "cpu" and not options.smoke and (options.only == CONVOLUTIONS or options.tune):
        parser.error("the matrix of convolutions is for a GPU; on the CPU it goes with --smoke alone")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 170, file=sys.stdout)
    folder = RESULTS / environment.slug(environment.device_name(options.device)) if options.save else options.out
    folder.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(parents=True, exist_ok=True)

    load = environment.load_per_cpu()
    if load > BUSY and not options.smoke:
        console.print(f"this machine is busy ({load:.1f} processes a CPU): the figures will be noisy", style="yellow")
    verified = None if options.no_verify else verify(options)
    if verified is False:
        console.print("verify failed: what computes the wrong thing is not timed", style="red")
        return 1
    measured = ceilings.measure(options.device, options.smoke)
    console.print(f"at best: {measured}", highlight=False)
    rows: list[report.Row] = []
    failed: list[str] = []
    skipped: list[str] = []
    if options.only not in BUDGETS:
        rows, failed = benchmark_cases(options, OUT if options.save else folder, console)
    for part in parts_of(options):
        more, wrong, missed = run_part(part, options, console)
        rows, failed, skipped = rows + more, failed + wrong, skipped + missed
    for name in [] if options.only else end_to_end.DETECTORS:
        try:
            rows.append(detect(name, options, folder, console))
        except AssertionError as error:
            failed.append(f"end_to_end {name}: {error}")

    for row in rows:
        measured.judge(row)
    record = report.record_of(rows, failed, options.device, verified, load)
    record |= {"ceilings": asdict(measured), "skipped": skipped}
    report.print_table(record, console)
    for line in failed:
        console.print(f"FAILED, not timed: {line}", style="red", markup=False, soft_wrap=True)
    for line in skipped:
        console.print(f"skipped, out of time: {line}", style="yellow", markup=False, soft_wrap=True)
    for path in report.write(record, folder, f"bench-{options.only}" if options.only else "bench"):
        console.print(f"wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}", highlight=False)
    console.print(
        f"{len(rows)} rows, {len(failed)} failed, {len(skipped)} skipped, {time.perf_counter() - start:.0f} s in all"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
