"""Ahead-of-time check of the CUDA kernels, without a GPU: `python tests/aot.py [--arch 80 90 100] [--full]`.

Takes every csrc/ops/*/cuda*.cu, and csrc/graph/cuda.cu, for each architecture from the objects of the build, or
compiles it with the same flags where the build has none that is newer than the sources. Fails where a kernel needs a
stack frame, as one that spills does, without a reason in aot_allowed.json, where such a reason no longer applies, and
where a kernel lacks the instruction that it was written for. The same for the kernels of tests/simt/right.cu, as
"core": they use all PTX of csrc/core. The kernels of Triton are compiled by aot_triton.py.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
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
from setup import NVCC_FLAGS, build_folder, find_nvcc  # noqa: E402

ALLOWED = Path(__file__).with_name("aot_allowed.json")
ARCHS = ["80", "90", "100"]
ARCHS_FULL = ["80", "86", "89", "90", "100", "120"]
FLAGS = [*NVCC_FLAGS.split(), f"-I{ROOT / 'csrc'}"]

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
    **{
        f"attention_{part}_{name}": [
            (f"attention_{part}_kernel<{scalar}", opcode, reason)
            for opcode, reason in (
                (products, "products on tensor cores"),
                (r"LDSM\.16\.M88\.4", "fragments of four matrices"),
                (r"LDGSTS\.E\.BYPASS\.128", "copies of 16 bytes beside the products"),
            )
        ]
        + (
            [(f"attention_{part}_kernel<{scalar}", r"LDSM\.16\.MT88\.4", "the second product's, transposed")]
            * (part != "backward_bias")
        )
        for name, scalar, products in (
            ("float16", "__half", r"HMMA\.16816\.F32 "),
            ("bfloat16", "__nv_bfloat16", r"HMMA\.16816\.F32\.BF16"),
        )
        for part in ("forward", "backward_query", "backward_key", "backward_bias")
    },
    **{
        f"attention_{part}_float32": [
            (f"attention_{part}_kernel<float", r"FFMA", "fused multiply-adds"),
            (f"attention_{part}_kernel<float", r"LDS\.128", "operands by vectors"),
            (f"attention_{part}_kernel<float", r"LDGSTS\.E\.BYPASS\.128", "copies of 16 bytes beside the products"),
        ]
        for part in ("forward", "backward_query", "backward_key", "backward_bias")
    },
    "avg_pool2d": [
        ("avg_pool2d_forward_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the map"),
        ("avg_pool2d_backward_kernel<__nv_bfloat16, 8", r"STG\.E\.128", "16-byte stores of the gradient"),
    ],
    "conv2d_depthwise": [
        ("conv2d_depthwise_channels_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the map"),
        ("conv2d_depthwise_channels_kernel<__half, 8", r"STG\.E\.128", "16-byte stores of the map"),
        ("conv2d_depthwise_channels_kernel<__nv_bfloat16, 8", r"LDG\.E\.128", "16-byte loads of the map"),
        ("conv2d_depthwise_channels_kernel<__nv_bfloat16, 8", r"LDS\.128", "taps of 8 channels are one read"),
        ("conv2d_depthwise_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the map"),
    ],
    "conv2d_depthwise_backward": [
        ("conv2d_depthwise_channels_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of the gradient"),
        ("conv2d_depthwise_channels_kernel<__nv_bfloat16, 8", r"STG\.E\.128", "16-byte stores of the gradient"),
    ],
    **{
        f"conv2d_gemm_{name}": [
            (f"gather_gemm_kernel<pvk::conv2d::MmaPolicy<{scalar}, {tile}", opcode, reason)
            for tile, opcode, reason in (
                ("", products, "products on tensor cores"),
                ("128, 128, 64, 32, 1>, true", r"LDGSTS\.E\.BYPASS\.128", "copies of 16 bytes beside the products"),
                ("", r"LDSM\.16\.M88\.4", "fragments of four matrices"),
            )
        ]
        for name, scalar, products in (
            ("float16", "__half", r"HMMA\.16816\.F32 "),
            ("bfloat16", "__nv_bfloat16", r"HMMA\.16816\.F32\.BF16"),
            ("tf32", "float", r"HMMA\.1688\.F32\.TF32"),
        )
    },
    "conv2d_backward_weight": [
        (f"conv2d_backward_weight_kernel<pvk::MmaTile<{scalar}", opcode, reason)
        for scalar, products in (("__half", r"HMMA\.16816\.F32 "), ("__nv_bfloat16", r"HMMA\.16816\.F32\.BF16"))
        for opcode, reason in (
            (products, "products on tensor cores"),
            (r"LDSM\.16\.MT88\.4", "fragments of both factors, transposed"),
            (r"LDGSTS\.E\.BYPASS\.128", "copies of 16 bytes beside the products"),
        )
    ]
    + [("conv2d_backward_weight_kernel<pvk::MmaTile<float", r"HMMA\.1688\.F32\.TF32", "tf32 on tensor cores")],
    "conv2d_depthwise_backward_weight": [
        ("conv2d_depthwise_weight_channels_kernel<float, 4", r"LDG\.E\.128", "16-byte loads of map and gradient"),
        ("conv2d_depthwise_weight_channels_kernel<__nv_bfloat16, 8", r"LDG\.E\.128", "16-byte loads of both"),
        ("conv2d_depthwise_weight_channels_kernel<__half, 8", r"STG\.E\.128", "16-byte stores of partial sums"),
        ("conv2d_depthwise_weight_planes_kernel<float", r"SHFL\.BFLY", "threads are summed over lanes"),
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
    "conv2d_backward_weight": [
        ("conv2d_backward_weight_", r"\b(ATOMG?|RED)\.", "parts are added in order: no atomics")
    ],
    "conv2d_depthwise_backward": [("conv2d_depthwise_", r"\b(ATOMG?|RED)\.", "the gradient is gathered: no atomics")],
    "conv2d_depthwise_backward_weight": [
        ("conv2d_depthwise_weight_", r"\b(ATOMG?|RED)\.", "parts are summed, and then added in order: no atomics")
    ],
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
    **{
        f"attention_{part}_{name}": [("attention_", r"\b(ATOMG?|RED)\.", "sums are in one order: no atomics")]
        for part in ("backward_query", "backward_key", "backward_bias")
        for name in ("float16", "bfloat16", "float32", "float64")
    },
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

    @property
    def key(self) -> str:
        return f"sm_{self.arch} {self.name}"


@dataclass(frozen=True)
class Tools:
    """What reads compiled kernels; nvdisasm may be absent, then opcodes are not checked."""

    nvcc: Path
    cuobjdump: Path
    nvdisasm: Path | None


def find_tool(nvcc: Path, name: str) -> Path | None:
    on_path = shutil.which(name)
    candidates = [nvcc.resolve().parent / name] + ([Path(on_path)] if on_path else [])
    candidates.append(Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin" / name)
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


def parse(text: str, op: str, arch: str) -> list[Kernel]:
    """The kernels in what `cuobjdump -res-usage` prints."""
    usage = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
    return [
        Kernel(op, arch, symbol, demangle(symbol), int(registers), int(shared), int(stack))
        for symbol, registers, stack, shared in usage.findall(text)
    ]


def check_spills(kernels: list[Kernel], allowed: dict[str, str]) -> list[str]:
    archs = {f"sm_{kernel.arch}" for kernel in kernels}
    spilling = {kernel.key: kernel for kernel in kernels if kernel.stack}
    problems = [
        f"{key}: a stack frame of {kernel.stack} bytes" for key, kernel in spilling.items() if key not in allowed
    ]
    problems += [
        f"{key}: {ALLOWED.name} excuses it, but it needs no stack frame"
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


def built_object(op: str) -> Path | None:
    """The object of the build, where it is newer than all sources."""
    if not SOURCES[op].is_relative_to(ROOT / "csrc"):
        return None
    parts = SOURCES[op].relative_to(ROOT / "csrc").with_suffix("").parts
    path = build_folder(torch.__version__) / "cuda" / f"{'_'.join(parts)}.o"
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".h", ".cuh", ".cu")]
    newest = max(file.stat().st_mtime for file in [*sources, ROOT / "setup.py"])
    return path if path.is_file() and path.stat().st_mtime > newest else None


def cubin_of(tools: Tools, op: str, arch: str, folder: Path) -> Path:
    """From the build's object where that has the architecture, else compiled."""
    found = built_object(op)
    if found is not None:
        run([tools.cuobjdump, "-xelf", f".sm_{arch}.", found], folder)
        if extracted := list(folder.glob("*.cubin")):
            return extracted[0]
    cubin = folder / "out.cubin"
    run([tools.nvcc, *FLAGS, f"-arch=sm_{arch}", "-cubin", SOURCES[op], "-o", cubin], folder)
    return cubin


def run(command: list[Path | str], folder: Path) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)
    if result.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed\n{result.stdout}{result.stderr}")
    return result.stdout


def check_one(tools: Tools, op: str, arch: str) -> tuple[list[Kernel], list[str]]:
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            cubin = cubin_of(tools, op, arch, Path(folder))
            kernels = parse(run([tools.cuobjdump, "-res-usage", cubin], cubin.parent), op, arch)
            if not kernels and ("launch(" in SOURCES[op].read_text() or op in OPCODES):
                raise RuntimeError("cuobjdump names no kernel")
            if not kernels or tools.nvdisasm is None:  # a file may only choose among the kernels of others
                return kernels, []
            return kernels, check_opcodes(kernels, split_sass(run([tools.nvdisasm, "-c", cubin], cubin.parent)))
        except RuntimeError as error:
            return kernels, [f"sm_{arch} {op}: {error}"]


def print_table(kernels: list[Kernel], allowed: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, {})[kernel.arch] = kernel
    table = Table(
        title="registers + static shared memory (bytes); the stack frame where there is one", title_justify="left"
    )
    table.add_column("kernel")
    for arch in archs:
        table.add_column(f"sm_{arch}", justify="right")
    for name in sorted(rows):
        cells = []
        for arch in archs:
            kernel = rows[name].get(arch)
            text = f"{kernel.registers} + {kernel.shared}" if kernel else "-"
            if kernel and kernel.stack:
                text += f" [{'yellow' if kernel.key in allowed else 'red'}]stack {kernel.stack}[/]"
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
    cuobjdump, nvdisasm = find_tool(nvcc, "cuobjdump"), find_tool(nvcc, "nvdisasm")
    if cuobjdump is None:
        print("aot: no cuobjdump beside nvcc, on PATH or in triton (pip install triton)", file=sys.stderr)
        return 1
    tools = Tools(nvcc, cuobjdump, nvdisasm)
    allowed = json.loads(ALLOWED.read_text())
    start = time.monotonic()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        tasks = [pool.submit(check_one, tools, op, arch) for arch in archs for op in SOURCES]
        results = [task.result() for task in tasks]
    kernels = [kernel for found, _ in results for kernel in found]
    problems = [problem for _, found in results for problem in found] + check_spills(kernels, allowed)

    if kernels:
        print_table([kernel for kernel in kernels if kernel.op != "core"], allowed)
    if nvdisasm is None:
        print("aot: opcodes NOT checked: no nvdisasm beside nvcc, on PATH or in triton (pip install triton)")
    if importlib.util.find_spec("triton") is None:
        print("aot: the kernels of Triton are NOT checked: no triton (pip install triton)")
    else:
        import aot_triton

        compiled, found = aot_triton.check(archs, args.full)
        problems += found
        aot_triton.print_table(compiled)
    for problem in problems:
        print(f"aot: {problem}", file=sys.stderr)
    print(
        f"aot: {len(kernels)} kernels of {', '.join(SOURCES)} for {', '.join(f'sm_{arch}' for arch in archs)} in "
        f"{time.monotonic() - start:.0f} s: {f'{len(problems)} problems' if problems else 'no spills'}"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
