"""The CUDA kernels on the CPU, under the host emulator (csrc/simt): each op has a twin `pvk_simt::<name>`.

PVK_SIMT=asan takes the library that is built with the address sanitizer.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pyvision_kernels._extension import FOLDER, Library, load_library
from pyvision_kernels._op import REGISTRY, Emulation, define

_library = torch.library.Library("pvk_simt", "DEF")


class Options(NamedTuple):
    """How kernels are run: the seed of the schedule (0: in order), and where races are looked for."""

    seed: int
    races: bool  # on shared memory
    global_races: bool


_in_force: Options | None = None


@functools.cache
def load() -> Library:
    """The emulated kernels, or why there are none. Never raises."""
    name, asan = "emulated CUDA", os.environ.get("PVK_SIMT") == "asan"
    if asan and not hasattr(ctypes.CDLL(None), "__asan_init"):  # to load it nevertheless would end the process
        return Library(name, None, "libasan is not preloaded", "run make test-asan")
    file, mend = ("libpvk_simt_asan.so", "run make test-asan") if asan else ("libpvk_simt.so", "run make test")
    library = load_library(name, FOLDER / file, "not built", mend)
    if library.handle is not None:
        library.handle.pvk_simt_set_options.argtypes = (ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
    return library


def status() -> str:
    """One line: whether the emulator can run here, and why (not)."""
    library = load()
    return "yes" if library.handle is not None else f"no: {library.reason} ({library.mend})"


def options() -> Options | None:
    """Those in force; None where ops are not emulated."""
    return _in_force


@functools.cache
def twins() -> dict[str, torch._ops.OpOverload]:
    """Every op with a CUDA kernel in C++ declared in the second namespace, with the same contract."""
    kernels = {name: op.contract for name, op in REGISTRY.items() if op.contract.implementation is None}
    return {name: define(contract, _library) for name, contract in kernels.items()}


@contextlib.contextmanager
def emulated(seed: int = 0, races: bool = True, global_races: bool = False) -> Iterator[None]:
    """Inside the block, ops on CPU tensors run the CUDA kernels under the emulator; for tests, on one thread.

    Args:
        seed: Of the schedule; 0 runs threads in order.
        races: Look for races on shared memory.
        global_races: And on global memory.

    Raises:
        RuntimeError: the emulator is not built; inside the block, a kernel is wrong.
    """
    global _in_force
    handle = load().handle
    if handle is None:
        raise load().error("emulated")
    before, overloads = _in_force, {name: op.overload for name, op in REGISTRY.items()}
    Emulation.active = True
    _in_force = Options(seed, races, global_races)
    handle.pvk_simt_set_options(*_in_force)
    for name, twin in twins().items():
        REGISTRY[name].overload = twin
    try:
        yield
    finally:
        for name, overload in overloads.items():
            REGISTRY[name].overload = overload
        _in_force, Emulation.active = before, before is not None
        if before is not None:
            handle.pvk_simt_set_options(*before)
