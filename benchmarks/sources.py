"""Which sources a kernel is made of, and one hash of them: a figure or a verification holds for that hash only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def op_names() -> list[str]:
    """Ops that have kernels in C++ or CUDA."""
    return sorted(path.name for path in (ROOT / "csrc" / "ops").iterdir() if path.is_dir())


# Of csrc/core, what only the CPU kernels are made of; in an op's folder their files begin with "cpu". A GPU's
# verification outlives a change of them.
CPU_ONLY = {
    f"{name}.h"
    for name in (
        "amx",
        "buffer",
        "dispatch",
        "epilogue",
        "isa",
        "largest",
        "memory",
        "parallel",
        "radix_sort",
        "transpose",
    )
}


def is_cpu_only(path: Path) -> bool:
    return path.name in CPU_ONLY or path.name.startswith(("cpu", "gemm", "simd"))


# Verified beside the ops: the wrappers of csrc/core, by the kernels of tests/simt.
CORE = "core"
# And the kernels that run a stretch of layers.
GRAPH = "graph"


def kernel_sources(op: str, device: str) -> list[Path]:
    """The op's own files and the headers that its kernels may include, on "cpu" or "cuda"; there Triton's too."""
    folders = {CORE: ROOT / "tests" / "simt", GRAPH: ROOT / "csrc" / "graph"}
    folder = folders.get(op, ROOT / "csrc" / "ops" / op)
    own = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    in_triton = (ROOT / "pyvision_kernels" / "ops" / op).glob("triton*.py") if device == "cuda" else ()
    found = {path for path in (ROOT / "csrc" / "core").iterdir() if path.suffix in (".h", ".cuh")}
    left = own
    while left:  # headers of other ops too
        path = left.pop()
        if path not in found:
            found.add(path)
            left += [ROOT / "csrc" / name for name in re.findall(r'#include "(ops/[^"]+)"', path.read_text())]
    return sorted([*in_triton, *(path for path in found if device == "cpu" or not is_cpu_only(path))])


def files_below(*folders: str) -> list[Path]:
    """C++, CUDA and Python sources below folders of the repository; a file stands for itself."""
    found: list[Path] = []
    for name in folders:
        path = ROOT / name
        files = [path] if path.is_file() else path.rglob("*")
        found += [file for file in files if file.suffix in (".h", ".cuh", ".cpp", ".cu", ".py")]
    return sorted(found)


def hash_of(files: Iterable[Path]) -> str:
    """sha256 of the names (below the root) and contents."""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def kernel_hash(op: str, device: str) -> str:
    return hash_of(kernel_sources(op, device))
