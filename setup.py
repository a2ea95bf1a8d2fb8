"""Build of the compiled parts: a CPU library, a CUDA library where it can be had, and the module `_C`.

PVK_BUILD=cpu|cuda forces one (cuda fails where it cannot be built); TORCH_CUDA_ARCH_LIST names the architectures
("8.0;9.0+PTX"); MAX_JOBS caps the compiler processes. PVK_SIMT=1 adds the CUDA kernels under the host emulator, and
the emulator's own tests; PVK_SIMT=asan the same under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest torch that the libraries load in
ARCHS_WITHOUT_GPU = "8.0;9.0+PTX"
ARCHS_OF_A_WHEEL = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"

# fp contraction is off so that a multiply-add is fused only where a kernel says fma().
CPU_FLAGS = "-O3 -ffp-contract=off -fno-math-errno -fno-trapping-math"
NVCC_FLAGS = "-std=c++20 -O3 --expt-relaxed-constexpr"
# Of the CUDA kernels under the emulator: rounded as they are written; a frame larger than the stack meets its end.
KERNEL_FLAGS = "-ffp-contract=off -fno-math-errno -fstack-clash-protection -Wno-unknown-pragmas"
# The functions that g++ calls at every load and store are csrc/simt/hooks.cpp: no sanitizer is linked. It does not call
# them for copies that it expands itself, nor for structs passed by value: hence library calls, and inlining.
HOOK_FLAGS = (
    "-fsanitize=thread,alignment,bounds -finline-functions -finline-small-functions "
    "-fno-builtin-memcpy -fno-builtin-memmove -fno-builtin-memset "
    "--param tsan-distinguish-volatile=1 --param tsan-instrument-func-entry-exit=0 -Wno-tsan"
)
# An offset to the null pointer of an empty tensor is harmless as long as nothing is read there.
ASAN_FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize=pointer-overflow -fno-sanitize-recover=undefined "
    "-fno-omit-frame-pointer"
)
ISA_FLAGS = {
    "baseline": "-DPVK_ISA_BASELINE",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}


@dataclass
class Cuda:
    nvcc: Path
    archs: list[str]
    runtime: Path


class BuildError(SystemExit):
    def __init__(self, message: str):
        super().__init__(f"pyvision_kernels: error: {message}")


def find_nvcc(torch) -> Path | None:
    """Of CUDA_HOME's, PATH's and the one that pip installs beside torch: the first of torch's major release, or any."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    candidates += sorted(Path(torch.__file__).parent.parent.glob("nvidia/cu*/bin/nvcc"))
    candidates = [path for path in candidates if path.is_file()]
    fitting = [path for path in candidates if has_release_of(torch, path)]
    return next(iter(fitting + candidates), None)


def release_of(nvcc: Path) -> str:
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", version)
    return match[1] if match else "unknown"


def has_release_of(torch, nvcc: Path) -> bool:
    return release_of(nvcc).split(".")[0] == str(torch.version.cuda).split(".")[0]


def lacks_nvcc() -> bool:
    """Whether torch has CUDA here, but no nvcc of its major release is found."""
    import torch

    nvcc = find_nvcc(torch)
    return torch.version.cuda is not None and (nvcc is None or not has_release_of(torch, nvcc))


def find_cuda_runtime(torch, nvcc: Path) -> Path | None:
    folders = sorted(Path(torch.__file__).parent.parent.glob("nvidia/cu*/lib"))
    home = Path(os.environ.get("CUDA_HOME", nvcc.resolve().parent.parent))
    folders += [home / "lib64", home / "lib", Path("/usr/local/cuda/lib64")]
    for folder in folders:
        found = sorted(folder.glob("libcudart.so*"))
        if found:
            return found[-1]
    return None


def gencode_flags(archs: list[str]) -> str:
    flags = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            raise BuildError(f"expected TORCH_CUDA_ARCH_LIST to be like '8.0;9.0+PTX', but got '{arch}' in it")
        if int(match[1]) < 8:
            raise BuildError(f"expected TORCH_CUDA_ARCH_LIST to name 8.0 or later, but got '{arch}' in it")
        code = f"{match[1]}{match[2]}{match[3]}"
        flags.append(f"-gencode arch=compute_{code},code=sm_{code}")
        if match[4]:
            flags.append(f"-gencode arch=compute_{code},code=compute_{code}")
    return " ".join(flags)


def choose_cuda(torch, for_wheel: bool) -> tuple[Cuda | None, str]:
    """What to build for CUDA, and why (not)."""
    wanted = os.environ.get("PVK_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise BuildError(f"expected PVK_BUILD to be cpu, cuda or auto, but got '{wanted}'")
    if wanted == "cpu":
        return None, "PVK_BUILD=cpu"
    cuda, reason = find_cuda(torch, for_wheel)
    if cuda is None and wanted == "cuda":
        raise BuildError(f"PVK_BUILD=cuda, but {reason}")
    return cuda, reason


def find_cuda(torch, for_wheel: bool) -> tuple[Cuda | None, str]:
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a build without CUDA"
    nvcc = find_nvcc(torch)
    if nvcc is None:
        return None, "no nvcc in CUDA_HOME, on PATH or in site-packages/nvidia (pip install nvidia-cuda-nvcc)"
    runtime = find_cuda_runtime(torch, nvcc)
    if runtime is None:
        return None, f"no libcudart.so beside torch or {nvcc}"
    release = release_of(nvcc)
    if not has_release_of(torch, nvcc):
        return None, f"{nvcc} is of CUDA {release}, but torch was built with CUDA {torch.version.cuda}"
    archs, source = choose_archs(torch, for_wheel)
    if not archs:
        return None, "the GPUs here are older than 8.0, the lowest architecture that is supported"
    return Cuda(nvcc, re.split(r"[; ]+", archs.strip("; ")), runtime), f"nvcc {release}, {archs} ({source})"


def choose_archs(torch, for_wheel: bool) -> tuple[str, str]:
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"], "TORCH_CUDA_ARCH_LIST"
    if for_wheel:
        return ARCHS_OF_A_WHEEL, "a wheel"
    if torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities) if major >= 8), "the GPUs here"
    return ARCHS_WITHOUT_GPU, "no GPU here"


def job_count() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return max(1, min(len(os.sched_getaffinity(0)), memory // (2 << 30)))


def find_compiler() -> tuple[str, str]:
    """The command, and the first line of its version."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        raise BuildError(f"no C++ compiler: '{compiler}' is not on PATH (install g++, or set CXX)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise BuildError("no Python.h: install the headers of this Python (python3-dev on Debian)")
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
    return compiler, version.split("\n")[0]


def choose_simt() -> str:
    """The name of the emulator's library, or nothing."""
    wanted = os.environ.get("PVK_SIMT", "")
    names = {"": "", "0": "", "1": "simt", "asan": "simt_asan"}
    if wanted not in names:
        raise BuildError(f"expected PVK_SIMT to be 0, 1 or asan, but got '{wanted}'")
    return names[wanted]


def sources(pattern: str) -> list[Path]:
    return sorted(ROOT.glob(pattern))


def bindings() -> list[Path]:
    return [path for path in sources("csrc/ops/*/*.cpp") if path.stem == path.parent.name]


def cuda_bindings() -> list[Path]:
    return [*bindings(), *sources("csrc/graph/chain.cpp")]


def cuda_kernels() -> list[Path]:
    return [*sources("csrc/ops/*/cuda*.cu"), *sources("csrc/graph/cuda*.cu")]


def build_folder(torch_version: str) -> Path:
    return ROOT / "build" / f"torch-{torch_version}-{sysconfig.get_config_var('SOABI')}"


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def install(folder: Path, package: Path, names: list[str]) -> None:
    """Puts what was built into the package."""
    (package / "lib").mkdir(parents=True, exist_ok=True)
    # What an earlier build left there would be loaded, though it is of other sources, or of another torch.
    for path in (package / "lib").glob("libpvk_*.so"):
        if f"lib/{path.name}" not in names:
            path.unlink()
    for name in names:
        source, target = folder / Path(name).name, package / name
        if not target.exists() or source.stat().st_mtime_ns != target.stat().st_mtime_ns:
            # A new file, so that a process that has the old one mapped keeps it.
            fresh = target.with_name(f"{target.name}.new")
            shutil.copy2(source, fresh)
            fresh.replace(target)


class NinjaFile:
    def __init__(self):
        self.lines: list[str] = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, deps: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if deps:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: str, rule: str, inputs: list[str], flags: str = "") -> str:
        self.lines += [f"build {output}: {rule} {' '.join(inputs)}", f"  flags = {flags}"]
        return output

    def compile(self, source: Path, folder: str, flags: str = "", rule: str = "cxx") -> str:
        """The object of a source; each set of flags has a folder."""
        base = ROOT / "csrc"
        relative = source.relative_to(base if source.is_relative_to(base) else ROOT)
        return self.build(f"{folder}/{'_'.join(relative.with_suffix('').parts)}.o", rule, [str(source)], flags)

    def write(self, path: Path) -> None:
        write_if_changed(path, "\n".join(self.lines) + "\n")


class BuildNinja(build_ext):
    """Writes one build.ninja for everything, runs it, and puts the results into the package."""

    def outputs(self) -> list[str]:
        libraries = ["cpu", "cuda" if self.cuda else "", self.simt]
        return [*(f"lib/libpvk_{name}.so" for name in libraries if name), self.module]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "pyvision_kernels" / name) for name in getattr(self, "built", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def run(self) -> None:
        try:
            import ninja
            import pybind11
            import torch
        except ImportError as error:
            raise BuildError(
                f"{error}; install torch, ninja and pybind11 first, or build with isolation (no --no-build-isolation)"
            ) from None
        self.module = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
        for_wheel = "bdist_wheel" in sys.argv or not (self.inplace or getattr(self, "editable_mode", False))
        self.cuda, self.cuda_reason = choose_cuda(torch, for_wheel)
        self.simt = choose_simt()
        what = ("CPU and CUDA" if self.cuda else "CPU only") + (f", and {self.simt}" if self.simt else "")
        print(f"pyvision_kernels: building {what} for torch {torch.__version__}: {self.cuda_reason}", flush=True)
        folder = build_folder(torch.__version__)
        folder.mkdir(parents=True, exist_ok=True)
        self.write_ninja(folder, torch, pybind11.get_include())
        for path in folder.glob("libpvk_*_selftest.so"):
            if path.name != f"libpvk_{self.simt}_selftest.so":
                path.unlink()  # tests look for it here, and install() says why a stale one goes
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-j", str(job_count())]
        if subprocess.run(command).returncode != 0:
            raise BuildError("the compiler failed; its message is above")
        in_place = self.inplace or getattr(self, "editable_mode", False)
        self.built = self.outputs()
        install(folder, (ROOT if in_place else Path(self.build_lib).resolve()) / "pyvision_kernels", self.built)

    def write_ninja(self, folder: Path, torch, pybind11_include: str) -> None:
        compiler, version = find_compiler()
        if self.simt and "clang" in version:
            raise BuildError(f"expected g++ to build the emulator, but got {version}; PVK_SIMT=0 leaves it out")
        torch_dir = Path(torch.__file__).parent
        self.torch_flags = f"-O2 -isystem {torch_dir / 'include'} -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
        self.torch_libraries = f"-L{torch_dir / 'lib'} -ltorch_cpu -lc10"
        file = NinjaFile()
        warnings = "-Wall -Wextra -Wno-maybe-uninitialized"
        base = f"-std=c++20 -fPIC -fvisibility=hidden {warnings} -I{ROOT / 'csrc'} -MD -MF $out.d"
        file.rule("cxx", f"{compiler} {base} {os.environ.get('CXXFLAGS', '')} $flags -c $in -o $out")
        file.rule("link", f"{compiler} -shared {os.environ.get('LDFLAGS', '')} $in -o $out $flags", deps=False)
        self.cpu_library(file)
        if self.cuda:
            self.cuda_library(file, self.cuda, compiler)
        if self.simt:
            self.simt_libraries(file)
        info = {
            "torch": torch.__version__,
            "compiler": version,
            "cuda": bool(self.cuda),
            "cuda_reason": self.cuda_reason,
            "cuda_archs": self.cuda.archs if self.cuda else [],
            "cpu_isas": list(self.isas()),
        }
        definition = json.dumps(json.dumps(info)).replace("$", "$$")
        write_if_changed(folder / "build_info.h", f"#define PVK_BUILD_INFO {definition}\n")
        include = f"-O2 -I{folder} -isystem {pybind11_include} -isystem {sysconfig.get_paths()['include']}"
        module = file.compile(ROOT / "csrc" / "module.cpp", "python", include)
        file.build(self.module, "link", [module])
        file.write(folder / "build.ninja")

    def cpu_library(self, file: NinjaFile) -> None:
        objects = [file.compile(path, "cpu", self.torch_flags) for path in sources("csrc/core/*.cpp")]
        flags = f"{self.torch_flags} -DPVK_NAMESPACE=pvk -DPVK_DISPATCH_KEY=CPU"
        objects += [file.compile(path, "cpu", flags) for path in [*bindings(), *sources("csrc/graph/graph.cpp")]]
        for isa, flags in self.isas().items():
            flags = f"{CPU_FLAGS} -DPVK_ISA={isa} {flags}"
            kernels = [*sources("csrc/ops/*/cpu*.cpp"), *sources("csrc/graph/cpu*.cpp")]
            objects += [file.compile(path, isa, flags) for path in kernels]
        file.build("libpvk_cpu.so", "link", objects, self.torch_libraries)

    def cuda_library(self, file: NinjaFile, cuda: Cuda, compiler: str) -> None:
        file.rule(
            "nvcc",
            f"{cuda.nvcc} {NVCC_FLAGS} -I{ROOT / 'csrc'} -Xcompiler -fPIC,-fvisibility=hidden "
            f"-ccbin {compiler.split()[-1]} {gencode_flags(cuda.archs)} -MD -MF $out.d -c $in -o $out",
        )
        flags = f"{self.torch_flags} -DUSE_CUDA -DPVK_CUDA -DPVK_NAMESPACE=pvk -DPVK_DISPATCH_KEY=CUDA"
        objects = [file.compile(path, "cuda", flags) for path in cuda_bindings()]
        objects += [file.compile(path, "cuda", rule="nvcc") for path in cuda_kernels()]
        libraries = f"{self.torch_libraries} -ltorch_cuda -lc10_cuda {cuda.runtime}"
        file.build("libpvk_cuda.so", "link", objects, libraries)

    def simt_libraries(self, file: NinjaFile) -> None:
        """The bindings with the CUDA kernels under the emulator, and the emulator's tests, which need no torch."""
        asan = self.simt == "simt_asan"
        common = f"-g -DPVK_SIMT {ASAN_FLAGS if asan else '-DSIMT_HOOKS'}"
        host = f"-O2 {common} -I{ROOT / 'csrc' / 'simt' / 'include'}"
        kernel = f"-x c++ {host} -O1 {KERNEL_FLAGS} {'' if asan else HOOK_FLAGS}"
        binding = f"{self.torch_flags} {common} -DPVK_NAMESPACE=pvk_simt -DPVK_DISPATCH_KEY=CPU"
        link = ASAN_FLAGS if asan else ""

        # First in both: of an inline function that the kernels' files have too, the linker keeps the one without hooks.
        runtime = [file.compile(path, self.simt, host) for path in sources("csrc/simt/*.cpp")]
        objects = [file.compile(path, self.simt, binding) for path in cuda_bindings()]
        objects += [file.compile(path, self.simt, kernel) for path in cuda_kernels()]
        file.build(f"libpvk_{self.simt}.so", "link", runtime + objects, f"{link} {self.torch_libraries}")
        objects = [file.compile(path, self.simt, kernel) for path in sources("tests/simt/*.cu")]
        objects += [file.compile(path, self.simt, host) for path in sources("tests/simt/*.cpp")]
        file.build(f"libpvk_{self.simt}_selftest.so", "link", runtime + objects, link)

    @staticmethod
    def isas() -> dict[str, str]:
        return ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ISA_FLAGS["baseline"]}


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("pyvision_kernels._C", sources=[])],
        cmdclass={"build_ext": BuildNinja},
    )
