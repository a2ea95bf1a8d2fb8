"""Ahead-of-time check of the CUDA kernels, without a GPU: `python tests/aot.py [--arch 80 90 100] [--full]`.

Compiles every csrc/ops/*/cuda*.cu, and csrc/graph/cuda.cu, for each architecture with the flags of setup.py, and fails
where a kernel spills or needs a stack frame without a reason in aot_allowed.json, where such a reason no longer
applies, and where a kernel lacks the instruction that it was written for. The same for the kernels of
tests/simt/right.cu, as "core": they use all PTX of csrc/core.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from setup import NVCC_FLAGS, find_nvcc  # noqa: E402

ALLOWED = Path(__file__).with_name("aot_allowed.json")
ARCHS = ["80", "90", "100"]
ARCHS_FULL = ["80", "86", "89", "90", "100", "120"]
FLAGS = [*NVCC_FLAGS.split(), f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]

# An op's cuda.cu bears its name, its cuda_<part>.cu that of the op and the part.
SOURCES = {
    path.parent.name + path.stem.removeprefix("cuda"): path
    for path in sorted((ROOT / "csrc" / "ops").glob("*/cuda*.cu"))
}
SOURCES["graph"] = ROOT / "csrc" / "graph" / "cuda.cu"
SOURCES["core"] = ROOT / "tests" / "simt" / "right.cu"

# op -> (kernel, as a prefix; instruction; why it must be there; the first architecture that has it, if not all do)
OPCODES: dict[str, list[tuple[Any, ...]]] = {
    "core": [
        ("matmul_kernel<__half", r"HMMA\.16816", "mma_m16n8k16"),
        ("matmul_kernel<__nv_bfloat16", r"HMMA\.16816\.F32\.BF16", "mma_m16n8k16"),
        ("matmul_kernel<float", r"HMMA\.1688\.F32\.TF32", "mma of tf32"),
        ("matmul_kernel<__half", r"LDSM\.16\.M88\.4", "ldmatrix"),
        ("matmul_kernel<__half", r"LDSM\.16\.MT88", "ldmatrix, transposed"),
        ("matmul_kernel<__half", r"LDGSTS\.E\.BYPASS\.128", "cp_async of 16 bytes, past L1"),
        ("matmul_kernel<float, 4>", r"LDGSTS\.E", "cp_async of 4 bytes"),
        ("named_barrier_kernel", r"BAR\.ARV", "arrival at a named barrier"),
    ],
    "graph": [
        ("graph_chain_kernel<__nv_bfloat16, false", r"HMMA\.16816\.F32\.BF16", "tensor cores"),
        ("graph_chain_kernel<__half, false", r"HMMA\.16816\.F32 ", "tensor cores"),
        ("graph_chain_kernel<float, false", r"HMMA\.1688\.F32\.TF32", "tensor cores where tf32 is allowed"),
        ("graph_chain_kernel<float, false", r"FFMA", "fused multiply-adds where it is not"),
        ("graph_chain_kernel<__half, false", r"LDG\.E\.128\.CONSTANT", "weights straight into registers"),
        ("graph_chain_kernel<__half, false", r"LDS\.64", "4 channels of a pixel in one read"),
        ("graph_chain_kernel<__half, true", r"UCGABAR_ARV", "the barrier of a cluster", 90),
        ("graph_chain_kernel<__half, true", r"HMMA\.16816\.F32 ", "tensor cores", 90),
        ("graph_chain_kernel<__half, true", r"\bST\.E\.128", "16-byte stores into other blocks", 90),
    ],
    "roi_align": [
        ("roi_align_forward_channels_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the map"),
        ("roi_align_forward_channels_kernel<float, 4", r"STG\.E\.128", "16-byte stores of the output"),
        ("roi_align_forward_channels_kernel<__half, 8", r"LDG\.E\.128", "16-byte loads of the map"),
        ("roi_align_forward_channels_kernel<__nv_bfloat16, 8", r"LDG\.E\.128", "16-byte loads of the map"),
        ("roi_align_forward_pixels_kernel<float", r"SHFL\.BFLY", "columns are summed over lanes"),
        ("roi_align_backward_channels_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the gradient"),
        ("roi_align_backward_channels_kernel<float, 4", r"STG\.E\.128", "16-byte stores of the gradient"),
    ],
    "avg_pool2d": [
        ("avg_pool2d_forward_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the map"),
        ("avg_pool2d_backward_kernel<__nv_bfloat16, 8", r"STG\.E\.128", "16-byte stores of the gradient"),
    ],
    "interpolate": [
        ("interpolate_kernel<float, 4, true, false", r"LDG\.E\.128", "16-byte loads of the map"),
        ("interpolate_kernel<float, 4, false, false", r"STG\.E\.128", "16-byte stores of a row"),
        ("interpolate_kernel<__nv_bfloat16, 8, true, true", r"STG\.E\.128", "16-byte stores of the gradient"),
    ],
    "max_pool2d": [
        ("max_pool2d_forward_kernel<float, 4, true", r"LDG\.E\.128", "16-byte loads of the map"),
        ("max_pool2d_forward_kernel<__half, 8, true", r"STG\.E\.128", "16-byte stores of values and places"),
        ("max_pool2d_backward_kernel<__nv_bfloat16, 8", r"LDG\.E\.128", "16-byte loads of gradients and places"),
    ],
    "roi_pool": [
        ("roi_pool_forward_channels_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the map"),
        ("roi_pool_forward_channels_kernel<float, 4", r"STG\.E\.128", "16-byte stores of values and places"),
        ("roi_pool_forward_channels_kernel<__nv_bfloat16, 8", r"LDG\.E\.128", "16-byte loads of the map"),
    ],
    "sigmoid_focal_loss": [
        ("sigmoid_focal_loss_forward_kernel<float, 4", r"LDG\.E\.128", "16-byte loads"),
        ("sigmoid_focal_loss_backward_kernel<float, 4", r"STG\.E\.128", "16-byte stores"),
        ("sigmoid_focal_loss_partials_kernel<__nv_bfloat16, 8", r"LDG\.E\.128", "16-byte loads"),
    ],
    "box_iou": [
        ("box_iou_forward_kernel<float", r"LDS\.128", "a row's box is read by vectors"),
    ],
    "generalized_box_iou_loss": [
        ("box_iou_loss_backward_kernel<float", r"STG\.E\.128", "a box's gradient is one 16-byte store"),
    ],
    "batch_norm": [
        ("batch_norm_forward_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the map"),
        ("batch_norm_forward_kernel<__nv_bfloat16, 8", r"STG\.E\.128", "16-byte stores of the map"),
        ("batch_norm_backward_input_kernel<float, 4", r"STG\.E\.128", "16-byte stores of the gradient"),
    ],
    "group_norm": [
        ("group_norm_moments_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the map"),
        ("group_norm_forward_kernel<float, 4", r"STG\.E\.128", "16-byte stores of the map"),
        ("group_norm_forward_kernel<__nv_bfloat16, 8", r"LDG\.E\.128", "16-byte loads of the map"),
        ("group_norm_backward_input_kernel<float, 4", r"STG\.E\.128", "16-byte stores of the gradient"),
    ],
    "layer_norm": [
        ("layer_norm_forward_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of rows"),
        ("layer_norm_forward_kernel<float, 4", r"STG\.E\.128", "16-byte stores of rows"),
        ("layer_norm_forward_kernel<__nv_bfloat16, 8", r"LDG\.E\.128", "16-byte loads of rows"),
        ("layer_norm_backward_input_kernel<float, 4", r"STG\.E\.128", "16-byte stores of the gradient"),
    ],
    "softmax_cross_entropy": [
        ("softmax_cross_entropy_rows_kernel<float, 4, 32", r"LDG\.E\.128", "16-byte loads of rows"),
        ("softmax_cross_entropy_planes_kernel<__nv_bfloat16, 8", r"LDG\.E\.128", "16-byte loads of planes"),
        ("softmax_cross_entropy_backward_rows_kernel<float, 4, 32", r"STG\.E\.128", "16-byte stores of rows"),
        ("softmax_cross_entropy_backward_planes_kernel<float, 4", r"STG\.E\.128", "16-byte stores of planes"),
    ],
    "nms": [
        ("nms_resolve_kernel", r"REDUX\.OR", "mask words are merged by the warp's own reduction"),
        ("nms_compare_kernel<float>", r"LDS\.128", "a box is one shared-memory read"),
        ("nms_soft_kernel<float>", r"LDG\.E\.128", "a box is one read"),
    ],
}
# op -> (kernel, as a prefix; instruction; why it must not be there)
FORBIDDEN: dict[str, list[tuple[Any, ...]]] = {
    "graph": [("graph_chain_", r"\b(ATOMG?|RED)\.", "sums are added in order: no atomics")],
    "avg_pool2d": [("avg_pool2d_", r"\b(ATOMG?|RED)\.", "the gradient is gathered: no atomics, deterministic")],
    "interpolate": [("interpolate_", r"\b(ATOMG?|RED)\.", "the gradient is gathered: no atomics, deterministic")],
    "max_pool2d": [("max_pool2d_", r"\b(ATOMG?|RED)\.", "the gradient is gathered: no atomics, deterministic")],
    "ps_roi_align": [("ps_roi_align_", r"\b(ATOMG?|RED)\.", "the gradient is gathered: no atomics, deterministic")],
    "softmax_cross_entropy": [("softmax_cross_entropy_", r"\b(ATOMG?|RED)\.", "sums are added in order: no atomics")],
    "nms": [("nms_soft_", r"\b(ATOMG?|RED)\.", "scores are decayed in one order: no atomics, deterministic")],
    "batch_norm": [("batch_norm_", r"\b(ATOMG?|RED)\.", "parts of a channel are merged in order")],
    "group_norm": [("group_norm_", r"\b(ATOMG?|RED)\.", "parts of a group are merged in order")],
    "layer_norm": [("layer_norm_", r"\b(ATOMG?|RED)\.", "sums over rows are made in parts, which are added in order")],
    "box_iou": [("box_iou_", r"\b(ATOMG?|RED)\.", "sums are in one order: no atomics")],
    "generalized_box_iou_loss": [("box_iou_loss_", r"\b(ATOMG?|RED)\.", "sums are in one order: no atomics")],
    "roi_align": [("roi_align_", r"\b(ATOMG?|RED)\.", "the gradient is gathered: no atomics, deterministic")],
    "roi_pool": [("roi_pool_", r"\b(ATOM[GS]?|RED)\.", "a lane owns the pixels it adds to: no atomics, deterministic")],
    "sigmoid_focal_loss": [("sigmoid_focal_loss_", r"\b(ATOMG?|RED)\.", "partial sums are added in order")],
}


@dataclass
class Kernel:
    op: str
    arch: str
    symbol: str
    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def key(self) -> str:
        return f"sm_{self.arch} {self.name}"

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)


def find_disassembler(nvcc: Path) -> Path | None:
    on_path = shutil.which("nvdisasm")
    candidates = [nvcc.resolve().parent / "nvdisasm"] + ([Path(on_path)] if on_path else [])
    candidates.append(Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin/nvdisasm")
    return next((path for path in candidates if path.is_file()), None)


def demangle(symbol: str) -> str:
    """`roi_align_forward_kernel<float, 4>` of a mangled kernel: without namespaces, result and arguments."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_char_p
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if status.value != 0 or text is None:
        return symbol
    name = text.decode().replace("(anonymous namespace)::", "").removeprefix("void ").split("(")[0]
    return re.sub(r"^(\w+::)+", "", name)


def parse(log: str, op: str, arch: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` printed."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernels.append(Kernel(op, arch, match[1], demangle(match[1])))
            continue
        if not kernels:
            continue
        kernel = kernels[-1]
        if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # Properties of a function that the kernel calls come under the function's own name: they add up.
            kernel.stack += int(match[1])
            kernel.spill_stores += int(match[2])
            kernel.spill_loads += int(match[3])
        if match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match[1])
        if match := re.search(r"(\d+) bytes smem", line):
            kernel.shared = int(match[1])
    return kernels


def check_spills(kernels: list[Kernel], allowed: dict[str, str]) -> list[str]:
    archs = {f"sm_{kernel.arch}" for kernel in kernels}
    spilling = {kernel.key: kernel for kernel in kernels if kernel.spills}
    problems = [
        f"{key}: stack frame {kernel.stack} bytes, spill stores {kernel.spill_stores}, spill loads {kernel.spill_loads}"
        for key, kernel in spilling.items()
        if key not in allowed
    ]
    problems += [
        f"{key}: {ALLOWED.name} excuses it, but it does not spill"
        for key in allowed
        if key not in spilling and key.split()[0] in archs
    ]
    return problems


def split_sass(text: str) -> dict[str, str]:
    """Symbol -> its instructions, of what `nvdisasm -c` prints."""
    functions: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            current = functions.setdefault(match[1], [])
        elif re.match(r"\s*\.section\b", line):
            current = None
        elif current is not None:
            current.append(line)
    return {symbol: "\n".join(lines) for symbol, lines in functions.items()}


def check_opcodes(kernels: list[Kernel], sass: dict[str, str]) -> list[str]:
    """Of one op and architecture."""
    problems = []
    for table, wanted in ((OPCODES, True), (FORBIDDEN, False)):
        for prefix, opcode, reason, *first in table.get(kernels[0].op, []):
            if first and int(kernels[0].arch) < first[0]:
                continue
            matching = [kernel for kernel in kernels if kernel.name.startswith(prefix)]
            if not matching:
                problems.append(f"sm_{kernels[0].arch} {prefix}: no such kernel, but the table of opcodes names it")
            problems += [
                f"{kernel.key}: expected {'' if wanted else 'no '}{opcode} in the SASS ({reason})"
                for kernel in matching
                if bool(re.search(opcode, sass.get(kernel.symbol, ""))) != wanted
            ]
    return problems


def compile_one(nvcc: Path, disassembler: Path | None, op: str, arch: str) -> tuple[list[Kernel], list[str]]:
    source = SOURCES[op]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [str(nvcc), *FLAGS, f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            return [], [f"sm_{arch} {op}: nvcc failed\n{result.stdout}{result.stderr}"]
        kernels = parse(result.stdout + result.stderr, op, arch)
        if not kernels:
            return [], [f"sm_{arch} {op}: ptxas -v named no kernel"]
        if disassembler is None:
            return kernels, []
        result = subprocess.run([str(disassembler), "-c", str(cubin)], capture_output=True, text=True)
        if result.returncode != 0:
            return kernels, [f"sm_{arch} {op}: {disassembler.name} failed\n{result.stderr}"]
        return kernels, check_opcodes(kernels, split_sass(result.stdout))


def print_table(kernels: list[Kernel], allowed: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, {})[kernel.arch] = kernel
    table = Table(
        title="registers + static shared memory (bytes); spilled bytes where there are any", title_justify="left"
    )
    table.add_column("kernel")
    for arch in archs:
        table.add_column(f"sm_{arch}", justify="right")
    for name in sorted(rows):
        cells = []
        for arch in archs:
            kernel = rows[name].get(arch)
            text = f"{kernel.registers} + {kernel.shared}" if kernel else "-"
            if kernel and kernel.spills:
                spilled = kernel.spill_stores + kernel.spill_loads
                text += f" [{'yellow' if kernel.key in allowed else 'red'}]stack {kernel.stack}, spill {spilled}[/]"
            cells.append(text)
        table.add_row(name, *cells)
    console = Console()
    if console.width < 100:
        console = Console(width=100)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", help=f"compute capabilities; default {' '.join(ARCHS)}")
    parser.add_argument("--full", action="store_true", help=f"all of {' '.join(ARCHS_FULL)}")
    args = parser.parse_args()
    archs = args.arch or (ARCHS_FULL if args.full else ARCHS)

    nvcc = find_nvcc(torch)
    if nvcc is None:
        print(
            "aot: no nvcc in CUDA_HOME, on PATH or beside torch. `make aot` installs one beside torch.", file=sys.stderr
        )
        return 1
    disassembler = find_disassembler(nvcc)
    allowed = json.loads(ALLOWED.read_text())
    start = time.monotonic()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        tasks = [pool.submit(compile_one, nvcc, disassembler, op, arch) for arch in archs for op in SOURCES]
        results = [task.result() for task in tasks]
    kernels = [kernel for found, _ in results for kernel in found]
    problems = [problem for _, found in results for problem in found] + check_spills(kernels, allowed)

    if kernels:
        print_table([kernel for kernel in kernels if kernel.op != "core"], allowed)
    if disassembler is None:
        print("aot: opcodes NOT checked: no nvdisasm beside nvcc, on PATH or in triton (pip install triton)")
    for problem in problems:
        print(f"aot: {problem}", file=sys.stderr)
    print(
        f"aot: {len(kernels)} kernels of {', '.join(SOURCES)} for {', '.join(f'sm_{arch}' for arch in archs)} in "
        f"{time.monotonic() - start:.0f} s: {f'{len(problems)} problems' if problems else 'no spills'}"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
