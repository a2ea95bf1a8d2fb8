"""Ahead-of-time check of the Triton kernels, a part of aot.py: compiles what the library would launch, without a GPU.

Each launch is planned from tensors on the meta device and compiled: for sm_90 in bfloat16 with every configuration of
the table, other types, variants and architectures with the default one; with `--full` everything for all of them. Fails
where ptxas reports spills or a stack frame, where a program needs more shared memory than the architecture has, and
where a kernel lacks the instruction that it was written for.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}  # KB that a program may have
PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")  # instructions that multiply, the largest first
WITHOUT_PRODUCTS = ("conv2d_weight_sum_kernel", "attention_delta_kernel")
HALF = (torch.bfloat16, torch.float16)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """A launch to compile: a direction of a convolution of [2, C, 56, 56] by K filters, and a configuration."""

    arch: str
    direction: str
    dtype: torch.dtype
    precision: str
    config: tuple[int, ...]
    channels_last: bool = True
    taps: int = 3
    stride: int = 1
    extras: bool = False  # bias, scale, shift, residual, silu; 2 x 2 maxima where pool says so
    pool: bool = False
    images: int = 64  # of 4096, offsets are of 64 bits

    @property
    def name(self) -> str:
        kind = f"{NAMES[self.dtype]}{' tf32' if self.precision == 'tf32' else ''}"
        what = [f"{self.taps}x{self.taps}", *([f"/{self.stride}"] if self.stride > 1 else [])]
        what += ["fused"] * self.extras + ["pool"] * self.pool + ["contiguous"] * (not self.channels_last)
        what += ["large"] * (self.images > 64)
        tile = "x".join(map(str, self.config[:3]))
        return f"triton {self.direction} {kind} {' '.join(what)} {tile} w{self.config[3]} s{self.config[4]}"


@dataclass(frozen=True)
class OfAttention:
    """The launches of a direction of attention to compile: 2 x 12 heads, 1000 queries and keys."""

    arch: str
    direction: str
    dtype: torch.dtype
    features: int
    described: bool = True

    @property
    def name(self) -> str:
        how = "" if self.described else ", by pointers"
        return f"triton attention {self.direction} {NAMES[self.dtype]} of {self.features}{how}"


@dataclass
class Compiled:
    """What ptxas, Triton and the SASS say of a kernel."""

    variant: Variant | OfAttention
    kernel: str
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    shared: int = 0
    opcodes: set[str] = field(default_factory=set)
    descriptors: bool = False
    problem: str = ""


def variants(archs: list[str], full: bool) -> list[Variant]:
    from pyvision_kernels.ops.conv2d.triton_configs import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, shapes

    half, single = torch.bfloat16, torch.float32
    others: list[dict[str, Any]] = [{"channels_last": False}, {"taps": 1}, {"taps": 1, "channels_last": False}]
    others += [{"stride": 2}, {"stride": 2, "channels_last": False}, {"taps": 1, "stride": 2}]
    others += [{"images": 4096}, {"images": 4096, "stride": 2}, {"images": 4096, "channels_last": False}]
    fused: list[dict[str, Any]] = [{"extras": True}, {"extras": True, "channels_last": False}]
    fused += [{"pool": True}, {"pool": True, "channels_last": False}]
    found = []
    for arch in archs:
        whole = full or arch == "90"
        for direction in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT):
            for dtype, precision in ((half, "ieee"), (torch.float16, "ieee"), (single, "tf32"), (single, "ieee")):
                table = shapes(int(arch), dtype, precision)
                tiles = [config for configs in table.values() for config in configs]
                if not (full or (whole and dtype == half)):
                    tiles = list(table["wide"][: 1 if whole or dtype == half else 0])
                found += [Variant(arch, direction, dtype, precision, tuple(tile)) for tile in dict.fromkeys(tiles)]
            default = tuple(shapes(int(arch), half, "ieee")["wide"][0])
            options = (others + (fused if direction == FORWARD else [])) if whole else []
            found += [Variant(arch, direction, half, "ieee", default, **option) for option in options]
    return found


def variants_of_attention(archs: list[str], full: bool) -> list[OfAttention]:
    half = torch.bfloat16
    found = []
    for arch in archs:
        whole = full or arch == "90"
        features = (16, 32, 64, 72, 80, 96, 128, 256) if full else (64, 72, 128, 256) if whole else (64,)
        for direction in ("forward", "backward"):
            found += [OfAttention(arch, direction, half, size) for size in features]
            found.append(OfAttention(arch, direction, torch.float16, 64))
            found.append(OfAttention(arch, direction, half, 64, described=False))
    return found


def launches_of_attention(variant: OfAttention) -> list[Any]:
    """As the library plans them."""
    from pyvision_kernels.ops.attention import triton as plan
    from pyvision_kernels.ops.conv2d.triton_launch import Machine

    B, H, L, D = 2, 12, 1000, variant.features
    step = D if variant.described else D + 1
    rows = [torch.empty((B, H, L, step), dtype=variant.dtype, device="meta")[..., :D] for _ in range(6)]
    sums = [torch.empty((B, H, L), device="meta") for _ in range(2)]
    machine, options = Machine(int(variant.arch), 132), (0.125, -1, -1)
    query, key, value, output, grad, other = rows
    if variant.direction == "forward":
        return [plan.plan_forward(machine, query, key, value, None, output, sums[0], *options)]
    grads = (query, key, other)
    return plan.plan_backward(machine, grad, None, query, key, value, None, output, *sums, grads, *options)


def launches(variant: Variant) -> list[Any]:
    """As the library plans them."""
    from pyvision_kernels.ops.conv2d import triton_launch as plan
    from pyvision_kernels.ops.conv2d.triton_configs import BACKWARD_INPUT, BACKWARD_WEIGHT, Config

    layout = torch.channels_last if variant.channels_last else torch.contiguous_format

    def make(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=variant.dtype, device="meta").to(memory_format=layout)

    n, channels, outputs, side = variant.images, 256, 256, 56
    edge = variant.taps // 2
    to = (side + 2 * edge - variant.taps) // variant.stride + 1
    numbers = [variant.stride, variant.stride, edge, edge, edge, edge, 1, 1, 1, 0]
    source = make(n, channels, side, side)
    weight = make(outputs, channels, variant.taps, variant.taps).contiguous(memory_format=torch.channels_last)
    result = make(n, outputs, to, to)
    machine, config = plan.Machine(int(variant.arch), 132), Config(*variant.config)
    if variant.direction == BACKWARD_WEIGHT:
        return plan.weight_gradient(machine, config, variant.precision, result, source, weight, numbers)
    vector = torch.empty(outputs, device="meta") if variant.extras else None
    extras: tuple[Any, ...] = ((vector, vector, vector), result if variant.extras else None)
    options = (numbers, 4 if variant.extras else 0, variant.pool, variant.direction == BACKWARD_INPUT)
    if variant.direction == BACKWARD_INPUT:
        result, source = source, result
    output = make(n, outputs, to // 2, to // 2) if variant.pool else result
    return [plan.product(machine, config, variant.precision, source, weight, *extras, output, *options)]


def _source(launch: Any) -> Any:
    """The kernel as it is specialised for a launch: what is 1, a multiple of 16, or beyond 32 bits."""
    from triton.compiler import ASTSource

    from pyvision_kernels.ops.attention import triton_kernels as of_attention
    from pyvision_kernels.ops.conv2d import triton_kernels as of_conv2d

    kernel = getattr(of_attention if launch.kernel.startswith("attention") else of_conv2d, launch.kernel)
    signature, constants, attributes = {}, {}, {}
    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    for place, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        tensor = isinstance(value, torch.Tensor)
        if type(value) is float:
            signature[parameter.name] = "fp32"
            continue
        signature[parameter.name] = types[value.dtype] if tensor else "i64" if abs(value) >= 2**31 else "i32"
        if tensor or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_one(variant: Variant | OfAttention) -> list[Compiled]:
    """In a process of its own: the kernels of a variant."""
    planned = launches_of_attention(variant) if isinstance(variant, OfAttention) else launches(variant)
    return [_compile(variant, launch) for launch in planned]


def _compile(variant: Variant | OfAttention, launch: Any) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    result = Compiled(variant, launch.kernel, descriptors=bool(launch.arguments.get("DESCRIPTORS")))
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    try:
        made = triton.compile(_source(launch), target=GPUTarget("cuda", int(variant.arch), 32), options=options)
    except Exception as error:
        result.problem = f"{type(error).__name__}: {error}"
        return result
    result.shared = made.metadata.shared
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    target = re.search(r"^\.target (\w+)", made.asm["ptx"], re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(made.asm["ptx"])
        # Triton has another ptxas for Blackwell; its own cubin is what is read below.
        ptxas = tools / "ptxas-blackwell" if int(variant.arch) >= 100 else tools / "ptxas"
        command = [
            str(ptxas if ptxas.is_file() else tools / "ptxas"),
            "-v",
            f"-arch={target[1]}",
            str(ptx),
            "-o",
            str(cubin),
        ]
        log = subprocess.run(command, capture_output=True, text=True)
        if log.returncode != 0:
            result.problem = f"ptxas failed\n{log.stderr}"
            return result
        cubin.write_bytes(made.asm["cubin"])
        sass = subprocess.run([str(tools / "nvdisasm"), "-c", str(cubin)], capture_output=True, text=True).stdout
    for stack, stores, loads in re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.stderr
    ):
        result.stack += int(stack)
        result.spilled += int(stores) + int(loads)
    result.registers = max((int(count) for count in re.findall(r"Used (\d+) registers", log.stderr)), default=0)
    result.opcodes = set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE))
    return result


def problems_of(compiled: Compiled) -> list[str]:
    variant = compiled.variant
    name = f"sm_{variant.arch} {variant.name}, {compiled.kernel}"
    if compiled.problem:
        return [f"{name}: {compiled.problem}"]
    found = []
    if compiled.stack or compiled.spilled:
        found.append(f"{name}: stack frame {compiled.stack} bytes, {compiled.spilled} bytes spilled")
    if compiled.shared > SHARED[variant.arch] * 1024:
        found.append(f"{name}: {compiled.shared} bytes of shared memory, more than {SHARED[variant.arch]} KB")
    if compiled.kernel in WITHOUT_PRODUCTS:
        return found
    half, arch = variant.dtype in HALF, int(variant.arch)
    if isinstance(variant, OfAttention) and variant.direction == "backward" and variant.features > 128:
        arch = min(arch, 80)  # tiles are too small for the instructions of a warp group
    wanted = {
        "HGMMA": half and arch == 90,
        "UTCHMMA": half and arch == 100,
        "HMMA": (half or variant.precision == "tf32") and (arch < 90 or arch == 120),
        "FFMA": variant.dtype == torch.float32 and variant.precision == "ieee",
        "UTMALDG": compiled.descriptors,
        "LDGSTS": not compiled.descriptors and isinstance(variant, Variant) and variant.channels_last,
    }
    found += [
        f"{name}: expected {opcode} in the SASS"
        for opcode, wants in wanted.items()
        if wants and opcode not in compiled.opcodes
    ]
    return found


def check(archs: list[str], full: bool) -> tuple[list[Compiled], list[str]]:
    """All of it, in two processes, or as many as MAX_JOBS says."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(int(os.environ.get("MAX_JOBS", "2")), mp_context=context) as pool:
        chosen = [*variants(archs, full), *variants_of_attention(archs, full)]
        compiled = [item for items in pool.map(compile_one, chosen) for item in items]
    return compiled, [problem for item in compiled for problem in problems_of(item)]


def print_table(compiled: list[Compiled]) -> None:
    from rich.console import Console
    from rich.table import Table

    archs = list(dict.fromkeys(item.variant.arch for item in compiled))
    rows: dict[str, dict[str, Compiled]] = {}
    for item in compiled:
        if item.kernel not in WITHOUT_PRODUCTS:
            part = item.kernel.removeprefix("attention_backward_").removesuffix("_kernel")
            name = item.variant.name
            if item.kernel.startswith("attention_backward"):
                name += f", {part}"
            rows.setdefault(name, {})[item.variant.arch] = item
    table = Table(title="Triton: registers + shared memory (bytes), products by", title_justify="left")
    table.add_column("direction, type, taps, tile, warps, stages")
    for arch in archs:
        table.add_column(f"sm_{arch}", justify="right")
    for name, by_arch in rows.items():
        cells = []
        for arch in archs:
            found = by_arch.get(arch)
            products = found and next((opcode for opcode in PRODUCTS if opcode in found.opcodes), "")
            cells.append(f"{found.registers} + {found.shared} {products}" if found else "-")
        table.add_row(name.removeprefix("triton "), *cells)
    console = Console()
    if console.width < 120:
        console = Console(width=120)
    console.print(table)
