"""The parts of the emulator that this machine does not take by itself: fibers by ucontext, and the switch for arm64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from setup import HOOK_FLAGS, KERNEL_FLAGS, ROOT

RUNTIME = [str(path) for path in sorted((ROOT / "csrc" / "simt").glob("*.cpp"))]
HOST = (
    f"-std=c++20 -O1 -g1 -fPIC -DPVK_SIMT -DSIMT_HOOKS -I{ROOT / 'csrc'} -I{ROOT / 'csrc' / 'simt' / 'include'}".split()
)


def compile_and_link(compiler: str, flags: list[str], kernels: Path, output: Path, link: list[str]) -> None:
    objects = []
    for source in [*RUNTIME, str(kernels)]:
        kernel = ["-x", "c++", *KERNEL_FLAGS.split(), *HOOK_FLAGS.split()] if source == str(kernels) else []
        objects.append(str(output.with_name(f"{Path(source).stem}.o")))
        subprocess.run([compiler, *HOST, *flags, *kernel, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([compiler, *link, *objects, "-o", str(output)], check=True)


@pytest.mark.slow
def test_fibers_by_ucontext(tmp_path):
    library = tmp_path / "libselftest.so"
    compile_and_link("g++", ["-DSIMT_UCONTEXT"], ROOT / "tests" / "simt" / "right.cu", library, ["-shared"])
    function = ctypes.CDLL(str(library)).right_scan
    function.restype = ctypes.c_char_p
    x, out = torch.arange(3 * 300).reshape(3, 300).float(), torch.full((3, 300), torch.nan)
    assert function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), 3, 300) is None
    assert torch.equal(out, x.cumsum(1))


@pytest.mark.slow
def test_switch_for_arm64(tmp_path):
    compiler, machine = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or machine is None:
        pytest.skip("needs g++ for aarch64, and qemu")
    source = tmp_path / "main.cu"
    source.write_text(
        '#include "core/launch.h"\n'
        "__global__ void rotate_kernel(int* out, int rounds) {\n"
        "  SIMT_SHARED(int[256], shared);\n"
        "  const int i = threadIdx.x;\n"
        "  int value = i;\n"
        "  for (int k = 0; k < rounds; ++k) {\n"
        "    shared[i] = value;\n"
        "    __syncthreads();\n"
        "    value = shared[(i + 1) % 256];\n"
        "    __syncthreads();\n"
        "  }\n"
        "  out[i] = value;\n"
        "}\n"
        "int main() {\n"
        "  int* out;\n"
        "  cudaMalloc(&out, 256 * sizeof(int));\n"
        "  for (int seed = 0; seed < 8; ++seed) {\n"
        "    simt::set_options({uint64_t(seed)});\n"
        "    pvk::launch(rotate_kernel, {dim3(1), dim3(256)}, out, 20);\n"
        "    for (int i = 0; i < 256; ++i)\n"
        "      if (out[i] != (i + 20) % 256) return 1;\n"
        "  }\n"
        "}\n"
    )
    compile_and_link(compiler, [], source, tmp_path / "main", ["-static"])
    subprocess.run([machine, str(tmp_path / "main")], check=True)
