"""What a device reaches at best, measured: how fast it copies, multiplies matrices, and launches a kernel.

A row that counts its bytes and operations is held against the floor that these give: no kernel is faster, unless its
data come from a cache.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import pair
from pyvision_kernels.ops.conv2d.choice import precision_of

RUNS, SECONDS = 20, 0.1  # of each, at most; the fastest counts


@dataclass(frozen=True)
class Ceilings:
    """Measured once for a device.

    Attributes:
        bytes_per_second: Of a copy from memory to memory, read and written bytes together.
        flops_per_second: Of a large matrix product, by its precision: float32, tf32, bfloat16, float16.
        launch: Seconds of a CUDA graph of one small kernel; None on the CPU.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]
    launch: float | None

    def floor(self, bytes: float, flops: float, precision: str) -> float:
        """Seconds that moving so many bytes and computing so many operations take at least."""
        return max(bytes / self.bytes_per_second, flops / self.flops_per_second[precision])

    def judge(self, row: dict[str, Any]) -> None:
        """Gives a row that counts its work the rates of ours, a `floor` in seconds, and its `share` of our time."""
        if "work" in row:
            work, seconds = row["work"], row["ours"]["median"]
            row["gb_per_s"], row["gflop_per_s"] = work["bytes"] / seconds / 1e9, work["flops"] / seconds / 1e9
            row["floor"] = self.floor(**work)
            row["share"] = row["floor"] / seconds

    def __str__(self) -> str:
        rates = [f"{name} {rate / 1e9:.3g} GFLOP/s" for name, rate in self.flops_per_second.items()]
        launch = [] if self.launch is None else [f"a launch {self.launch * 1e6:.2g} us"]
        return ", ".join([f"a copy {self.bytes_per_second / 1e9:.4g} GB/s", *rates, *launch])


def work_of(bytes: float, flops: float, precision: str) -> dict[str, Any]:
    """What a row says of its work; the arguments of `Ceilings.floor`."""
    return {"bytes": bytes, "flops": flops, "precision": precision}


def precision(dtype: torch.dtype, device: str, op: str) -> str:
    """In which an op multiplies: of convolutions and matrix products in float32, tf32 where PyTorch's flags let it."""
    multiplies = op in ("conv2d", "linear")
    if multiplies and precision_of(dtype, device, matmul=op == "linear"):
        return "tf32"
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether convolutions and matrix products on CUDA may round float32 to tf32, within the block."""
    before = torch._C._get_cudnn_allow_tf32(), torch.backends.cuda.matmul.allow_tf32
    _allow_tf32(allowed, allowed)
    try:
        yield
    finally:
        _allow_tf32(*before)


def _allow_tf32(convolutions: bool, products: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions recommend newer flags, which older ones lack
        torch._C._set_cudnn_allow_tf32(convolutions)  # the property can be locked
        torch.backends.cuda.matmul.allow_tf32 = products


def measure(device: str, smoke: bool = False) -> Ceilings:
    """All ceilings of a device; smoke: sizes that show no device's limits."""
    cuda = device == "cuda"
    copied = 2**20 if smoke else 2**30 if cuda else 2**27
    side = 64 if smoke else 8192 if cuda else 1024
    rates = {"float32": _product(device, side, torch.float32), "bfloat16": _product(device, side, torch.bfloat16)}
    if cuda:
        rates["float16"] = _product(device, side, torch.float16)
        rates["tf32"] = _product(device, side, torch.float32, rounded=True)
    else:  # some CPUs have no fast product of PyTorch's in bfloat16; in float32 it can be computed at least
        rates["bfloat16"] = max(rates.values())
    return Ceilings(_copy(device, copied), rates, _launch() if cuda else None)


def _fastest(call: pair.Call, clock: pair.Clock) -> float:
    end = time.monotonic() + SECONDS
    pair.timed(call, clock)
    runs = [pair.timed(call, clock)]
    while len(runs) < RUNS and time.monotonic() < end:
        runs.append(pair.timed(call, clock))
    return min(runs)


def _copy(device: str, size: int) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), pair.clock_of(device))


def _product(device: str, side: int, dtype: torch.dtype, rounded: bool = False) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    b, out = b.t(), torch.empty_like(a)
    with tf32(rounded):
        return 2.0 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), pair.clock_of(device))


def _launch() -> float:
    small = torch.zeros(1, device="cuda")
    return _fastest(pair.graphed(lambda: small.add_(1)), pair.clock_of("cuda"))
