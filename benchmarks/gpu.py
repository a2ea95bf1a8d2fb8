"""`python -m benchmarks.gpu`: everything that only a GPU can show, in stages, within eight minutes.

build -> suite of each op -> the emulator's own tests -> compute-sanitizer of each op -> benchmarks: cases, the matrix
of convolutions, whole models. Ops whose sources changed since they were last verified come first. Each stage is a
process with a time box and a log in benchmarks/results/<gpu>/; what passed on the same inputs before is skipped, so
that a run that was cut off goes on where it ended. ONLY=<op> runs one op alone.
Needs Python with torch, nvcc, and what the build and the benchmarks import; neither network nor a virtual environment.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import environment, sources
from benchmarks.gpu_state import State, all_states, standing
from pyvision_kernels._case import all_cases

TOTAL_SECONDS = 480.0
LEAST_SECONDS = 10.0  # a stage is not begun with less left
NO_TESTS_COLLECTED = 5  # pytest's exit status
PYTHON = sys.executable
DEBT = ("failed", "changed", "never", "verified")


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: Of the stage and its log.
        inputs: Hash of all that its outcome depends on.
        limit: Time box in seconds.
        op, check: The op that the outcome is noted for, and as what.
        missing: Why it cannot run here, if so.
    """

    name: str
    command: list[str]
    inputs: str
    limit: float
    op: str = ""
    check: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def stages(ops: list[str], only: str) -> list[Stage]:
    """All stages, for ops in order of debt."""

    def hash_below(*folders: str) -> str:
        versions = f"torch {torch.__version__}, cuda {torch.version.cuda}, python {platform.python_version()}"
        return f"{sources.hash_of(sources.files_below(*folders, 'setup.py'))} {versions}"

    package = hash_below("csrc", "pyvision_kernels", "tests")
    timed = hash_below("csrc", "pyvision_kernels", "benchmarks")
    build = [PYTHON, "setup.py", "build_ext", "--inplace"]
    result = [Stage("build", build, hash_below("csrc"), 180, environment={"PVK_BUILD": "cuda"})]
    for op in ops:
        names = " or ".join([op, *(spec.name for spec in all_cases() if spec.family == op)])
        tests = [PYTHON, "-m", "pytest", "tests", "-m", "cuda", "-k", names, "-q", "-p", "no:cacheprovider"]
        result.append(Stage(f"suite-{op}", tests, package, 150, op, "suite"))
    if not only:
        # The kernels and intrinsics that hold the emulator to what hardware does.
        tests = [PYTHON, "-m", "pytest", "tests/simt", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
        result.append(Stage("suite-core", tests, hash_below("csrc", "tests/simt"), 90, sources.CORE, "suite"))
        tests = [PYTHON, "-m", "pytest", "tests/test_program_cuda.py", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
        result.append(Stage("suite-graph", tests, package, 90, sources.GRAPH, "suite"))
        models = [f"tests/test_{name}.py" for name in ("convert", "override", "cuda_graph")]
        tests = [PYTHON, "-m", "pytest", *models, "-m", "cuda", "-q", "-p", "no:cacheprovider"]
        result.append(Stage("suite-models", tests, package, 90))
    sanitizer = find_sanitizer()
    for op in ops:
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
            command += [PYTHON, "-m", "pyvision_kernels", "verify", op, "--device", "cuda", "--small"]
            # Without torch's cache each tensor is an allocation of its own, so that an overrun is seen.
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            missing = "" if sanitizer else "compute-sanitizer is neither on PATH nor in CUDA_HOME"
            result.append(Stage(f"{tool}-{op}", command, package, 90, op, tool, uncached, missing))
    command = [PYTHON, "-m", "benchmarks", "--device", "cuda", "--save", "--no-verify"]
    name = f"benchmarks-{only}" if only else "benchmarks"
    result.append(Stage(name, command + (["--only", only] if only else []), timed, 240))
    for part, limit in (("convolutions", 120), ("models", 240)) if not only else ():
        result.append(Stage(part, [*command, "--only", part], timed, limit))
    return result


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_stage(stage: Stage, seconds: float, log: Path) -> tuple[str, str]:
    """(passed | failed | timed out | not run, a reason). The process and its children end with the time box."""
    variables = {**os.environ, "PYTHONPATH": str(sources.ROOT), **stage.environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            stage.command,
            cwd=sources.ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "timed out", f"over {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == NO_TESTS_COLLECTED and stage.check == "suite":
        return "not run", "no test of this op is marked cuda"
    return ("passed", "") if code == 0 else ("failed", f"exit status {code}, see {log.name}")


def run_all(planned: list[Stage], state: State, console: Console, seconds: float = TOTAL_SECONDS) -> bool:
    """Runs, notes and prints every stage; true if each passed, now or before, or cannot run here."""
    deadline = time.monotonic() + seconds
    commit = environment.commit()["git_sha"]
    ok = True
    for stage in planned:
        if stage.name != "build" and state.has_passed(stage.name, stage.inputs):  # what ninja has built takes a second
            console.print(f"{stage.name}: passed before on the same sources, skipped")
            continue
        left = deadline - time.monotonic()
        start = time.monotonic()
        if stage.missing:
            status, reason = "not run", stage.missing
        elif left < LEAST_SECONDS:
            status, reason = "not run", "out of time; run again to go on"
            ok = False
        else:
            console.print(f"{stage.name} ...")
            status, reason = run_stage(stage, min(stage.limit, left), state.folder / f"{stage.name}.log")
            ok &= status in ("passed", "not run")
        where = {"date": environment.now(), "git_sha": commit}
        state.stages[stage.name] = {
            "status": status,
            "reason": reason,
            "inputs": stage.inputs,
            "seconds": round(time.monotonic() - start, 1),
            **where,
        }
        if stage.op:
            state.note_check(stage.op, stage.check, status, sources.kernel_hash(stage.op, "cuda"), where)
        state.save()
        console.print(f"{stage.name}: {status} {reason}", style="green" if status == "passed" else "yellow")
        if stage.name == "build" and status != "passed":
            console.print("without a build nothing else can be shown", style="red")
            return False
    return ok


def print_summary(state: State, planned: list[Stage], console: Console) -> None:
    table = Table("stage", "status", "seconds", "date", "reason", title=state.gpu)
    for stage in planned:
        known: dict[str, Any] = state.stages.get(stage.name, {"status": "not reached"})
        table.add_row(stage.name, *(str(known.get(key, "")) for key in ("status", "seconds", "date", "reason")))
    console.print(table)


def main() -> int:
    console = Console(width=None if sys.stdout.isatty() else 140, file=sys.stdout)
    if not torch.cuda.is_available():
        console.print(f"make gpu: torch {torch.__version__} sees no GPU here, so nothing was run", style="red")
        return 1
    only = os.environ.get("ONLY", "")
    names = sources.op_names()
    if only and only not in names:
        console.print(f"ONLY: expected one of {', '.join(names)}, but got {only}", style="red")
        return 1
    gpu = environment.device_name("cuda")
    state = State.load(sources.RESULTS / environment.slug(gpu), gpu)
    state.save()
    known = all_states()
    ops = [only] if only else sorted(names, key=lambda op: DEBT.index(standing(op, known)[0]))
    planned = stages(ops, only)
    ok = run_all(planned, state, console)
    print_summary(state, planned, console)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
