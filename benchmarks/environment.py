"""The machine, the versions and the commit that a figure belongs to."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import pyvision_kernels as pvk
from benchmarks.sources import ROOT


def describe(device: str) -> dict[str, Any]:
    """What a record says of where it was made; None where it cannot be known."""
    return {
        **commit(),
        "date": now(),
        "device": device_name(device),
        "driver": driver() if device == "cuda" else None,
        "cpu": cpu_model(),
        "cpu_capability": pvk.cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "triton": version("triton"),
        "onnxruntime": version("onnxruntime"),
        "openvino": version("openvino"),
        "pyvision_kernels": pvk.__version__,
    }


def now() -> str:
    """The date and time, UTC, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def load_per_cpu() -> float:
    """Processes that wanted to run in the last minute, for each CPU that this one may use."""
    return os.getloadavg()[0] / len(os.sched_getaffinity(0))


def commit() -> dict[str, Any]:
    """The commit's sha, and whether files differ from it (records apart); None where there is no repository."""
    sha = _output(["git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD"])
    changes = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    return {"git_sha": sha, "dirty": None if changes is None else bool(changes)}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_model()


def slug(name: str) -> str:
    """A device's name as the name of a folder: 'NVIDIA H200' -> 'nvidia-h200'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    """What a command prints; None where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
