"""`python -m benchmarks`: verify, time every case against its peer, run whole models, detect on a photograph, report.

The record, the chart and the picture go to benchmarks/out/, or with --save to benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import end_to_end, environment, models, report
from benchmarks.sources import RESULTS, ROOT

OUT = ROOT / "benchmarks" / "out"
BUSY = 0.5  # Processes a CPU before we start.
MODELS = "models"  # for --only: whole models alone
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
    command += ["conv2d", "linear"] if options.only == MODELS else [options.only] if options.only else []
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


def whole_models(options: argparse.Namespace, console: Console) -> tuple[list[report.Row], list[str]]:
    if options.device != "cpu":
        console.print("whole models are compared on the CPU only, for now")
        return [], []
    return models.run_all(options.size, console)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every case")
    parser.add_argument(
        "--smoke", action="store_true", help="one small case of each op, in seconds: no figure to quote"
    )
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/<device>/")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to without --save")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", metavar="OP", help="this op alone, and nothing end to end; or: models")
    parser.add_argument("--no-verify", action="store_true", help="where the test suite has just passed")
    options = parser.parse_args(arguments)
    options.size = "smoke" if options.smoke else "full" if options.full else "quick"
    if options.smoke and (options.save or options.full):
        parser.error("--smoke goes with neither --save nor --full")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
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
    rows: list[report.Row] = []
    failed: list[str] = []
    if options.only != MODELS:
        rows, failed = benchmark_cases(options, OUT if options.save else folder, console)
    if options.only in (None, MODELS):
        more, wrong = whole_models(options, console)
        rows, failed = rows + more, failed + wrong
    for name in [] if options.only else end_to_end.DETECTORS:
        try:
            rows.append(detect(name, options, folder, console))
        except AssertionError as error:
            failed.append(f"end_to_end {name}: {error}")

    record = report.record_of(rows, failed, options.device, verified, load)
    report.print_table(record, console)
    for line in failed:
        console.print(f"FAILED, not timed: {line}", style="red", markup=False, soft_wrap=True)
    for path in report.write(record, folder, f"bench-{options.only}" if options.only else "bench"):
        console.print(f"wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}", highlight=False)
    console.print(f"{len(rows)} rows, {len(failed)} failed, {time.perf_counter() - start:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
