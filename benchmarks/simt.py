"""`python -m benchmarks.simt`: what a barrier costs under the emulator, after `make test` has built it.

1,000 blocks of 256 threads with 100 barriers each, on one core, with the race detector and without.
"""

from __future__ import annotations

import ctypes
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from setup import build_folder

SEEDS = {"in order": 0, "at random": 1, "latest first": 3}
RUNS = 3


def seconds(library: ctypes.CDLL, seed: int, races: bool) -> float:
    library.pvk_simt_set_options(ctypes.c_uint64(seed), ctypes.c_int(races), ctypes.c_int(0))
    start = time.perf_counter()
    library.bench_barriers(1000, 256, 100)
    return time.perf_counter() - start


def main() -> None:
    library = ctypes.CDLL(str(build_folder(torch.__version__) / "libpvk_simt_selftest.so"))
    table = Table("schedule", "without the detector, s", "with it, s")
    for name, seed in SEEDS.items():
        runs = [(seconds(library, seed, False), seconds(library, seed, True)) for _ in range(RUNS)]
        table.add_row(name, *(f"{statistics.median(column):.2f}" for column in zip(*runs, strict=True)))
    Console().print(table)


if __name__ == "__main__":
    main()
