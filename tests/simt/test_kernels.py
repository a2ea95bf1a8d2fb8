"""The emulator's own tests: right kernels run without a complaint, and are right; wrong ones are stopped, in words that
name the kernel, the threads and the lines.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

SCHEDULES = range(50)
WRONG_SCHEDULES = range(8)
SOURCE = Path(__file__).with_name("wrong.cu")

only_hooks = pytest.mark.skipif(
    os.environ.get("PVK_SIMT") == "asan", reason="AddressSanitizer's build sees no races, and has words of its own"
)


def call(library: ctypes.CDLL, name: str, *arguments: torch.Tensor | int) -> str | None:
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    message = function(
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in arguments)
    )
    return message.decode() if message else None


def set_options(library: ctypes.CDLL, seed: int = 0, races: bool = True, global_races: bool = False) -> None:
    library.pvk_simt_set_options(ctypes.c_uint64(seed), ctypes.c_int(races), ctypes.c_int(global_races))


@pytest.fixture(autouse=True)
def _default_options(selftest: ctypes.CDLL) -> Iterator[None]:
    set_options(selftest)
    yield
    set_options(selftest)


# ---- right kernels: each case is the arguments, the result among them, what it must be, and the tolerance ----


def integers(*shape: int, dtype: torch.dtype = torch.float32, limit: int = 8) -> torch.Tensor:
    """Small whole numbers, whose sums are exact in any order."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def scan_case(rows: int, n: int):
    x, out = integers(rows, n), nans(rows, n)
    return [x, out, rows, n], out, x.double().cumsum(1), 0.0


def reduce_case(n: int, blocks: int):
    x, out = integers(n), nans(1)
    return [x, out, n, blocks], out, x.double().sum(0, keepdim=True), 0.0


def transpose_case(rows: int, columns: int, dtype: torch.dtype):
    x, out = torch.randn(rows, columns).to(dtype), nans(columns, rows, dtype=dtype)
    return [x, out, rows, columns, dtype.itemsize], out, x.double().T, 0.0


def histogram_case(n: int, bins: int, blocks: int):
    x = torch.randint(bins, (n,), dtype=torch.int32)
    x[: n // 2] = 1  # a word that many threads meet at
    out = torch.full((bins,), -1, dtype=torch.int32)
    return [x, out, n, bins, blocks], out, torch.bincount(x, minlength=bins).double(), 0.0


def reverse_bytes_case(blocks: int):
    x = torch.randint(256, (blocks * 32, 4), dtype=torch.uint8)
    out = torch.zeros_like(x)
    return [x, out, blocks], out, x.flip(1).double(), 0.0


def half_warps_case():
    x, out = integers(4, 2, 16), nans(4, 2, 16)
    want = x.double()
    want[:, 0] = want[:, 0].sum(1, keepdim=True)
    want[:, 1] = want[:, 1].amax(1, keepdim=True)
    return [x, out], out, want, 0.0


def relay_case(blocks: int, warps: int):
    x, out = torch.randint(1000, (blocks, warps), dtype=torch.int32), torch.full((blocks, warps), -1, dtype=torch.int32)
    return [x, out, blocks, warps], out, x.double().cumsum(1), 0.0


DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def matmul_case(m: int, n: int, k: int, dtype: torch.dtype, pad: int = 0, whole_numbers: bool = True):
    """`pad` NaNs end each row: the kernel must not take them in."""
    make = integers if whole_numbers else torch.randn
    a, b = make(m, k).to(dtype), make(k, n).to(dtype)
    padded_a, padded_b, out = nans(m, k + pad, dtype=dtype), nans(k, n + pad, dtype=dtype), nans(m, n)
    padded_a[:, :k], padded_b[:, :n] = a, b
    tolerance = torch.zeros(())
    if not whole_numbers:
        # Of the sums; tf32 rounds each factor to 11 bits as well.
        unit = 2.0**-20 + (2.0**-10 if dtype == torch.float32 else 0.0)
        tolerance = unit * (a.double().abs() @ b.double().abs())
    arguments = [padded_a, padded_b, out, m, n, k, k + pad, n + pad, DTYPES[dtype]]
    return arguments, out, a.double() @ b.double(), tolerance


def mma_tile_case(dtype: torch.dtype, whole_numbers: bool):
    k = 32 // dtype.itemsize
    make = integers if whole_numbers else torch.randn
    a, b, c = make(16, k).to(dtype), make(k, 8).to(dtype), make(16, 8)
    if dtype == torch.float32:  # of tf32's bits
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    want = c.double() + a.double() @ b.double()
    return [a, b, c, DTYPES[dtype]], c, want, 0.0 if whole_numbers else 1e-5


def fma_tile_case(dtype: torch.dtype, a_by_k: bool, b_by_k: bool):
    """Sums in the tile's order, each rounded once: with few bits in the factors, a loop gives the same bits."""
    k, depth = 48, 16 if dtype == torch.float32 else 48  # of a sum, which is added to the others'
    a, b, out = torch.randn(64, k).half().to(dtype), torch.randn(k, 32).half().to(dtype), nans(64, 32, dtype=dtype)
    want = torch.zeros(64, 32, dtype=dtype)
    for first in range(0, k, depth):
        part = torch.zeros_like(want)
        for step in range(first, first + depth):  # products are exact
            part = (part.double() + a[:, step : step + 1].double() * b[step : step + 1].double()).to(dtype)
        want += part
    return [a, b, out, k, int(a_by_k), int(b_by_k), int(dtype == torch.float64)], out, want.double(), 0.0


def ldmatrix_case(count: int, transposed: bool):
    matrices = torch.randint(-(2**15), 2**15, (count, 8, 8), dtype=torch.int16)
    out = torch.zeros(32, count, 2, dtype=torch.int16)  # the low and the high half of each register
    lane = torch.arange(32)
    seen = matrices.mT if transposed else matrices
    want = torch.stack([seen[:, lane // 4, 2 * (lane % 4) + half] for half in (0, 1)], dim=2)  # [count, 32, 2]
    return [matrices, out, count, int(transposed)], out, want.transpose(0, 1).double(), 0.0


def pipeline_case(n: int, *more: int):
    x, out = integers(n), nans(n)
    mirrored = torch.zeros((n + 127) // 128 * 128, dtype=torch.float64)
    mirrored[:n] = x
    mirrored = mirrored.view(-1, 128).flip(1).flatten()[:n]
    return [x, out, n, *more], out, x.double() + 2 * mirrored, 0.0


def last_block_case(n: int):
    x, out = integers(n), nans(1)
    return [x, out, n], out, x.double().sum(0, keepdim=True), 0.0


def look_back_case(n: int, cooperative: bool):
    x, out = integers(n), nans(n)
    return [x, out, n, int(cooperative)], out, x.double().cumsum(0), 0.0


def stencil_case(rows: int, columns: int, steps: int, blocks: int):
    x, out = torch.randn(rows, columns), nans(rows, columns)
    want = x.double()
    for _ in range(steps):
        padded = torch.nn.functional.pad(want, (1, 1, 1, 1))
        want = 0.2 * (want + padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:])
    return [x, out, rows, columns, steps, blocks], out, want, 1e-6


def cluster_histogram_case(n: int, cluster: int):
    x = torch.randint(64 * cluster, (n,), dtype=torch.int32)
    out = torch.full((64 * cluster,), -1, dtype=torch.int32)
    return [x, out, n, cluster], out, torch.bincount(x, minlength=64 * cluster).double(), 0.0


def cluster_case(rows: int, n: int, cluster: int):
    x, out = integers(rows, n), nans(rows)
    return [x, out, rows, n, cluster], out, x.double().sum(1), 0.0


RIGHT: dict[str, Callable[[], tuple[list[torch.Tensor | int], torch.Tensor, torch.Tensor, torch.Tensor | float]]] = {
    "scan": lambda: scan_case(2, 150),
    "scan of 1024": lambda: scan_case(1, 1024),
    "reduce": lambda: reduce_case(1000, 5),
    "transpose": lambda: transpose_case(45, 70, torch.float32),
    "transpose of half": lambda: transpose_case(70, 33, torch.float16),
    "histogram": lambda: histogram_case(700, 37, 3),
    "histogram of 16000 bins": lambda: histogram_case(300, 16000, 1),  # 64 KB of shared memory
    "reverse_bytes": lambda: reverse_bytes_case(2),
    "half_warps": half_warps_case,
    "relay": lambda: relay_case(2, 5),
    "matmul of half": lambda: matmul_case(64, 128, 96, torch.float16),
    "matmul of bfloat16": lambda: matmul_case(128, 64, 64, torch.bfloat16),
    "matmul of float": lambda: matmul_case(64, 64, 48, torch.float32),
    "matmul of half, odd": lambda: matmul_case(37, 69, 45, torch.float16, pad=3),
    "matmul of bfloat16, odd": lambda: matmul_case(3, 65, 33, torch.bfloat16, pad=7),
    "matmul of float, odd": lambda: matmul_case(65, 11, 19, torch.float32, pad=1),
    "matmul of float, even pitches": lambda: matmul_case(30, 66, 34, torch.float32),
    "matmul of float, odd pitches": lambda: matmul_case(7, 67, 31, torch.float32),
    "matmul of half, random": lambda: matmul_case(64, 64, 64, torch.float16, whole_numbers=False),
    "matmul of float, random": lambda: matmul_case(64, 64, 64, torch.float32, whole_numbers=False),
    "mma_tile of half": lambda: mma_tile_case(torch.float16, True),
    "mma_tile of half, random": lambda: mma_tile_case(torch.float16, False),
    "mma_tile of bfloat16": lambda: mma_tile_case(torch.bfloat16, True),
    "mma_tile of bfloat16, random": lambda: mma_tile_case(torch.bfloat16, False),
    "mma_tile of float": lambda: mma_tile_case(torch.float32, True),
    "mma_tile of float, random": lambda: mma_tile_case(torch.float32, False),
    **{
        f"fma_tile of {'double' if dtype == torch.float64 else 'float'}{', A by k' * a}{', B by k' * b}": (
            lambda dtype=dtype, a=a, b=b: fma_tile_case(dtype, a, b)
        )
        for dtype in (torch.float32, torch.float64)
        for a in (False, True)
        for b in (False, True)
    },
    **{
        f"ldmatrix x{count}{', transposed' if transposed else ''}": lambda count=count, transposed=transposed: (
            ldmatrix_case(count, transposed)
        )
        for count in (1, 2, 4)
        for transposed in (False, True)
    },
    "pipeline": lambda: pipeline_case(1111, 2),
    "named_barriers": lambda: pipeline_case(515),
    "last_block": lambda: last_block_case(600),
    "look_back": lambda: look_back_case(200, False),
    "look_back, cooperative": lambda: look_back_case(200, True),
    "stencil": lambda: stencil_case(13, 31, 3, 3),
    "cluster_reduce of 4": lambda: cluster_case(2, 1000, 4),
    "cluster_reduce of 8": lambda: cluster_case(1, 1001, 8),
    "cluster_reduce of 16": lambda: cluster_case(1, 2000, 16),
    "cluster_gather of 4": lambda: cluster_case(3, 333, 4),
    "cluster_gather of 8": lambda: cluster_case(1, 100, 8),
    "cluster_histogram of 4": lambda: cluster_histogram_case(1000, 4),
}


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernel_is_right_under_every_schedule(selftest: ctypes.CDLL, case: str) -> None:
    arguments, out, want, tolerance = RIGHT[case]()
    name = f"right_{re.split('[ ,]', case)[0]}"
    before = out.clone()
    for seed in SCHEDULES:
        set_options(selftest, seed, global_races=True)
        out.copy_(before)
        assert call(selftest, name, *arguments) is None, f"seed {seed}"
        error = (out.double() - want).abs()
        assert bool((error <= tolerance).all()), f"seed {seed}: wrong by up to {error.max()}"


def test_tf32_is_the_nearest_of_11_bits(selftest: ctypes.CDLL) -> None:
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 2 - 2.0**-11, 1 + 2.0**-11 - 2.0**-23])
    x = torch.cat([torch.randn(500) * 2.0 ** torch.randint(-60, 60, (500,)), ties, torch.zeros(3)])
    out = nans(len(x))
    assert call(selftest, "right_to_tf32", x, out, len(x)) is None
    fraction, exponent = torch.frexp(x.double())
    rounded = torch.floor(fraction.abs() * 2**11 + 0.5) / 2**11  # ties away from zero
    assert torch.equal(out.double(), torch.ldexp(torch.copysign(rounded, x.double()), exponent))
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    out = torch.zeros(3)
    assert call(selftest, "right_to_tf32", special, out, 3) is None
    assert torch.equal(out[:2], special[:2])
    assert out[2].isnan()


def test_barriers_are_met(selftest: ctypes.CDLL) -> None:
    assert call(selftest, "bench_barriers", 4, 64, 10) is None


# ---- wrong kernels: name -> what the message has; {line <what>} is a line of the kernel ----

RACE = "race on shared memory"
UNFINISHED_COPY = "which a cp.async of block (0, 0, 0) thread ("
NOT_WAITED_FOR = "has not been waited for"

WRONG: dict[str, list[str]] = {
    "missing_barrier": [RACE, "`shared`", "{line write}", "{line read}"],
    "write_after_read": [RACE, "`shared`", "{line write}", "{line read}"],
    "missing_first_barrier": ["`shared`", "{line read}"],
    "missing_syncwarp": [RACE, "`shared`", "{line write}", "{line read}"],
    "shuffle_for_syncwarp": [RACE, "`shared`", "{line write}", "{line read}"],
    "partial_syncwarp": [RACE, "`shared`", "{line write}", "{line read}"],
    "two_writers": [RACE, "`last`", "{line write}"],
    "atomic_and_write": [RACE, "`count`", "{line write}", "{line atomic}", "atomically"],
    "atomic_after_own_write": [RACE, "`count`", "{line write}", "{line atomic}", "atomically"],
    "read_after_atomics": [RACE, "`sum`", "{line read}"],
    "global_race": ["race on global memory", "{line write}", "{line update}", "block (0, 0, 0)", "block (1, 0, 0)"],
    "missing_grid_sync": ["race on global memory", "{line read}", "block (0, 0, 0)", "block (1, 0, 0)"],
    "missing_fence": ["race on global memory", "{line write}", "{line read}", "block (0, 0, 0)", "block (1, 0, 0)"],
    "divergent_barrier": ["a barrier in divergent code", "__syncthreads {line lower}", "__syncthreads {line upper}"],
    "deadlock": ["deadlock", "[mbarrier wait {line wait}] x32", "[__syncthreads {line barrier}] x32"],
    "endless_spin": ["livelock"],
    "few_at_named_barrier": ["deadlock", "[bar.sync {line sync}] x64"],
    "odd_named_barrier": ["bar.sync {line sync}", "a multiple of 32", "but got 40"],
    "divergent_named_barrier": ["divergent code", "bar.sync {line lower}", "bar.sync {line upper}"],
    "half_warps_at_named_barrier": ["bar.sync {line sync}", "whole warps"],
    "barrier_16": ["bar.sync {line sync}", "a barrier below 16, but got 16"],
    "two_counts_of_named_barrier": ["{line arrive}", "{line sync}", "64", "96"],
    "lane_missing": ["__shfl_xor_sync {line shuffle}", "__syncthreads {line barrier}"],
    "exited_lane": ["__shfl_xor_sync {line shuffle}", "exit"],
    "two_sites": ["__shfl_xor_sync {line lower}", "__shfl_xor_sync {line upper}", "lane"],
    "two_masks": ["__ballot_sync {line ballot}", "with mask ffffffff"],
    "lane_outside_mask": ["__shfl_sync", "lane 15 reads lane 16, which is not in the mask"],
    "caller_outside_mask": ["__ballot_sync {line ballot}", "mask 0000ffff, in which it is not"],
    "half_warp": ["__ballot_sync {line ballot}", "which the block does not have"],
    "read_before_wait": ["{line read}", UNFINISHED_COPY, "{line copy}", NOT_WAITED_FOR],
    "missing_commit": ["{line read}", UNFINISHED_COPY, "{line copy}", NOT_WAITED_FOR],
    "short_wait": ["{line read}", UNFINISHED_COPY, "{line copy}", NOT_WAITED_FOR],
    "wait_without_barrier": [RACE, "`shared`", "{line copy}", "{line read}"],
    "copy_over_readers": [RACE, "`shared`", "{line copy}", "{line read}"],
    "exit_with_copies": ["exits with 1 cp.async", "{line copy}"],
    "copy_from_shared": ["cp.async {line copy}", "source to be in global memory"],
    "unaligned_copy": ["cp.async {line copy}", "misaligned source", "no multiple of 16"],
    "copy_past_the_end": ["{line copy}", "out of bounds of global memory", "array of 256 bytes"],
    "shared_read_out_of_bounds": ["reads 4 bytes at {line read}", "out of bounds of shared memory", "`shared`"],
    "shared_write_out_of_bounds": ["writes 4 bytes at {line write}", "out of bounds of shared memory", "`shared`"],
    "dynamic_shared_out_of_bounds": ["{line write}", "out of bounds of shared memory", "dynamic shared memory"],
    "uninitialised": ["reads 4 bytes at {line read}", "uninitialised shared memory", "`shared`"],
    "uninitialised_in_next_block": ["{line read}", "uninitialised shared memory", "`shared`"],
    "global_read_out_of_bounds": ["reads 4 bytes at {line read}", "out of bounds of global memory", "of 256 bytes"],
    "global_write_out_of_bounds": ["writes 4 bytes at {line write}", "out of bounds of global memory", "of 256 bytes"],
    "atomic_out_of_bounds": ["atomically", "{line atomic}", "out of bounds of global memory"],
    "memset_out_of_bounds": ["writes 260 bytes at {line clear}", "out of bounds of global memory", "across the end"],
    "memcpy_out_of_bounds": ["reads 12 bytes at {line copy}", "out of bounds of global memory", "across the end"],
    "value_out_of_bounds": [
        "reads",
        "out of bounds of global memory",
        "0 bytes behind the end of an array of 256 bytes",
    ],
    "null_pointer": ["reads 4 bytes at {line read}", "out of bounds of global memory: 0x0"],
    "others_local": ["{line read}", "the local memory of another thread"],
    "large_local": ["local memory exceeds the 64 KB"],
    "unaligned_vector": ["misaligned", "no multiple of 16"],
    "unaligned_shared_vector": ["misaligned", "{line write}", "no multiple of 8"],
    "unaligned_ldmatrix": ["misaligned", "{line load}", "no multiple of 16", "`shared`"],
    "ldmatrix_from_global": ["ldmatrix", "in shared memory"],
    "ldmatrix_without_barrier": [RACE, "`shared`", "{line write}", "{line load}"],
    "mma_lane_missing": ["mma.m16n8k16 {line mma}", "exit"],
    "double_arrival": ["mbarrier arrive {line arrive}", "arrives twice in one phase"],
    "too_many_arrivals": ["mbarrier arrive {line arrive}", "17 arrivals", "16"],
    "store_to_mbarrier": ["writes 8 bytes at {line store}", "`barrier`", "which is an mbarrier"],
    "uninitialised_mbarrier": ["mbarrier arrive {line arrive}", "`barrier`", "not initialised"],
    "mbarrier_init_without_barrier": ["`barrier`", "{line arrive}"],
    "twice_initialised_mbarrier": ["mbarrier init {line init}", "`barrier`", "already initialised"],
    "invalidated_mbarrier": ["mbarrier arrive {line arrive}", "`barrier`", "not initialised"],
    "mbarrier_in_global_memory": ["mbarrier init {line init}", "shared memory"],
    "arrive_before_wait": ["`shared`", "{line copy}", "{line read}"],
    "overrun_slot": [RACE, "`slot`", "{line write}", "{line read}"],
    "wrong_parity": [RACE, "`shared`", "{line write}", "{line read}"],
    "missing_cluster_barrier": ["`shared`", "{line read}"],
    "exited_block": ["`shared`", "a block of the cluster that has exited"],
    "rank_out_of_range": ["map_shared {line map}", "a rank below 2, but got 2"],
    "remote_wait": ["mbarrier wait {line wait}", "`barrier`", "another block"],
    "early_remote_arrival": ["`barrier`", "{line arrive}"],
    "divergent_cluster_barrier": ["divergent code", "cluster_arrive {line lower}", "cluster_arrive {line upper}"],
    "two_cluster_arrivals": ["cluster_arrive {line arrive}", "twice without a cluster_wait"],
    "wait_without_arrival": ["cluster_wait {line wait}", "without a cluster_arrive"],
    "second_cluster_wait": ["cluster_wait {line wait}", "without a cluster_arrive"],
    "grid_sync": ["grid_sync {line sync}", "not cooperative"],
    "grid_sync_after_exit": ["grid_sync {line sync}", "exit"],
    "much_static_shared": ["53248 bytes of static shared memory", "at most 49152"],
    "static_and_dynamic_shared": ["236544 bytes of shared memory", "at most 232448"],
    "freed_memory": ["out of bounds of global memory"],
    "host_memory": ["out of bounds of global memory"],
}

REFUSED: dict[str, list[str]] = {
    "too_many_threads": ["1025 threads a block", "at most 1024"],
    "too_many_threads_in_all": ["1056 threads a block", "at most 1024"],
    "deep_block": ["64 along z"],
    "empty_block": ["the block is empty"],
    "empty_grid": ["the grid is empty"],
    "empty_grid_y": ["the grid is empty"],
    "high_grid": ["65536 blocks along y", "at most 65535"],
    "deep_grid": ["65536 blocks along z", "at most 65535"],
    "too_much_shared": ["232449 bytes", "at most 232448"],
    "large_cluster": ["17 blocks a cluster", "1 to 16"],
    "part_of_a_cluster": ["6 blocks along x", "clusters of 4"],
    "too_many_cooperative_blocks": ["too many blocks in cooperative launch", "265 blocks", "264"],
}


def lines_of(kernel: str) -> dict[str, str]:
    """What the comments `line: <kernel> <what>` mark."""
    found = {}
    for number, text in enumerate(SOURCE.read_text().splitlines(), 1):
        if match := re.search(rf"// line: {kernel} (\w+)$", text):
            found[match[1]] = f"tests/simt/wrong.cu:{number}"
    return found


def threads_in(message: str) -> list[int]:
    return [int(x) for x in re.findall(r"block \(\d+, 0, 0\) thread \((\d+), 0, 0\)", message)]


@pytest.mark.emulator_only
@only_hooks
@pytest.mark.parametrize("kernel", WRONG)
def test_wrong_kernel_is_stopped_under_every_schedule(selftest: ctypes.CDLL, kernel: str) -> None:
    lines = lines_of(kernel)
    words = [re.sub(r"\{line (\w+)\}", lambda match: lines[match[1]], part) for part in WRONG[kernel]]
    kernels = {"freed_memory": "global_write_out_of_bounds", "host_memory": "global_write_out_of_bounds"}
    for seed in WRONG_SCHEDULES[: 2 if kernel == "endless_spin" else None]:
        set_options(selftest, seed, global_races="race on global memory" in words)
        message = call(selftest, f"wrong_{kernel}")
        assert message is not None, f"seed {seed}: not stopped"
        for part in [f"simt: {kernels.get(kernel, kernel)}_kernel: block (", *words]:
            assert part in message, f"seed {seed}"
    assert call(selftest, "bench_barriers", 2, 64, 2) is None  # the next launch is as any other


LEGAL = re.findall(r"^LEGAL\((\w+),", SOURCE.with_name("legal.cu").read_text(), re.MULTILINE)


@pytest.mark.emulator_only
@pytest.mark.parametrize("kernel", LEGAL)
def test_legal_kernel_is_not_accused(selftest: ctypes.CDLL, kernel: str) -> None:
    for seed in WRONG_SCHEDULES[: 2 if kernel == "many_atomics" else None]:
        set_options(selftest, seed, global_races=True)
        assert call(selftest, f"legal_{kernel}") is None, f"seed {seed}"


@pytest.mark.emulator_only
@pytest.mark.parametrize("launch", REFUSED)
def test_launch_that_a_device_refuses_is_refused(selftest: ctypes.CDLL, launch: str) -> None:
    message = call(selftest, f"wrong_{launch}")
    assert message is not None
    for part in ["launch with grid [", *REFUSED[launch]]:
        assert part in message


@pytest.mark.emulator_only
@only_hooks
@pytest.mark.parametrize("kernel", ["missing_barrier", "write_after_read"])
def test_race_names_the_two_threads(selftest: ctypes.CDLL, kernel: str) -> None:
    for seed in WRONG_SCHEDULES:
        set_options(selftest, seed)
        message = call(selftest, f"wrong_{kernel}") or ""
        threads = threads_in(message)
        assert len(threads) == 2, message
        assert sum(threads) == 63, message  # thread i reads what 63 - i writes


@pytest.mark.emulator_only
@only_hooks
def test_races_are_looked_for_only_where_asked(selftest: ctypes.CDLL) -> None:
    set_options(selftest, races=False)
    assert call(selftest, "wrong_two_writers") is None
    set_options(selftest, global_races=False)
    assert call(selftest, "wrong_global_race") is None


@pytest.mark.emulator_only
def test_every_wrong_kernel_is_tested() -> None:
    text = SOURCE.read_text()
    names = re.findall(r"^WRONG\((\w+),", text, re.MULTILINE)
    names += re.findall(r"^SELFTEST wrong_(\w+)\(", text, re.MULTILINE)
    assert sorted(names) == sorted(WRONG)
    assert sorted(re.findall(r"^REFUSED\((\w+),", text, re.MULTILINE)) == sorted(REFUSED)
