"""Loads the compiled libraries, and says plainly what is missing and how to build it.

Importing this never fails. A library that is absent or does not load is remembered with the reason, and the first op
that needs it raises that reason (see `_op.declare`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "lib"
_REBUILD = "pip install -e . --no-build-isolation"
CPU_CAPABILITIES = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Library:
    """One compiled library: its handle, or why there is none and what mends it."""

    name: str
    handle: ctypes.CDLL | None
    reason: str = ""
    mend: str = ""

    def error(self, op: str) -> RuntimeError:
        return RuntimeError(f"{op}: the {self.name} kernels are not available: {self.reason}. To mend it: {self.mend}")


def build_info() -> dict[str, Any]:
    """What was built: torch, compiler, cuda, cuda_reason, cuda_archs, cpu_isas; empty where nothing was."""
    try:
        module = importlib.import_module("pyvision_kernels._C")
    except ImportError:
        return {}
    return json.loads(module.build_info())


def load_library(name: str, path: Path, absent: str, mend: str) -> Library:
    if not path.is_file():
        return Library(name, None, absent, mend)
    try:
        return Library(name, ctypes.CDLL(str(path)))
    except OSError as error:
        return Library(name, None, f"{path.name} does not load: {error}", mend)


def _load_cpu() -> Library:
    mend = f"build the extension again ({_REBUILD})"
    library = load_library("CPU", FOLDER / "libpvk_cpu.so", "the extension is not built", mend)
    wanted = os.environ.get("PVK_CPU_CAPABILITY")
    if library.handle is None:
        return library
    library.handle.pvk_cpu_capability.restype = ctypes.c_char_p
    library.handle.pvk_cpu_best_capability.restype = ctypes.c_char_p
    if wanted and library.handle.pvk_set_cpu_capability(wanted.encode()) != 0:
        best = library.handle.pvk_cpu_best_capability().decode()
        reason = f"expected PVK_CPU_CAPABILITY to be one of {_up_to(best)} on this CPU, but got '{wanted}'"
        return Library("CPU", None, reason, "unset PVK_CPU_CAPABILITY")
    return library


def _load_cuda() -> Library:
    built = build_info()
    absent = f"CUDA was not built: {built['cuda_reason']}" if built else "the extension is not built"
    mend = f"build it where torch has CUDA and nvcc is installed (PVK_BUILD=cuda {_REBUILD})"
    return load_library("CUDA", FOLDER / "libpvk_cuda.so", absent, mend)


def _up_to(best: str) -> list[str]:
    return list(CPU_CAPABILITIES[: CPU_CAPABILITIES.index(best) + 1])


LIBRARIES = {"CPU": _load_cpu(), "CUDA": _load_cuda()}


def cpu_capabilities() -> list[str]:
    """Instruction sets that this CPU can run, from portable to best."""
    handle = LIBRARIES["CPU"].handle
    return _up_to(handle.pvk_cpu_best_capability().decode()) if handle else []


def cpu_capability() -> str:
    """The instruction set in force: PVK_CPU_CAPABILITY, else the best that this CPU has."""
    handle = LIBRARIES["CPU"].handle
    return handle.pvk_cpu_capability().decode() if handle else "none"


@torch.compiler.assume_constant_result
def cpu_has_bfloat16_dot() -> bool:
    """Whether the instruction set in force multiplies bfloat16 by dot products."""
    handle = LIBRARIES["CPU"].handle
    return handle is not None and bool(handle.pvk_cpu_has_bfloat16_dot())


@contextlib.contextmanager
def force_cpu_capability(name: str) -> Iterator[None]:
    """Runs the CPU kernels of one instruction set inside the block; for tests.

    Raises:
        ValueError: this CPU, or the build, lacks it.
    """
    handle = LIBRARIES["CPU"].handle
    if handle is None or name not in cpu_capabilities():
        raise ValueError(f"expected one of {cpu_capabilities()}, but got '{name}'")
    before = cpu_capability()
    handle.pvk_set_cpu_capability(name.encode())
    try:
        yield
    finally:
        handle.pvk_set_cpu_capability(before.encode())


def cuda_status() -> str:
    """One line: whether CUDA kernels can run here, and why (not)."""
    library = LIBRARIES["CUDA"]
    if library.handle is None:
        return f"no: {library.reason}"
    if not torch.cuda.is_available():
        return "built, but torch sees no GPU here"
    return "yes"
