"""What happens where a library is missing, broken or forced; that instruction sets do not leak."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyvision_kernels import _extension

ROOT = Path(__file__).resolve().parent.parent
CALL = "import torch, pyvision_kernels as pvk; pvk.ops.nms(torch.rand(3, 4), torch.rand(3), 0.5)"


def _python(code: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def package(tmp_path):
    """A copy of the package, without the compiled parts."""
    shutil.copytree(
        ROOT / "pyvision_kernels", tmp_path / "pyvision_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def test_import_works_without_the_libraries_and_the_first_op_says_what_to_do(package):
    assert _python("import pyvision_kernels", package).returncode == 0
    run = _python(CALL, package)
    assert "RuntimeError: nms: the CPU kernels are not available: the extension is not built." in run.stderr
    assert "pip install -e . --no-build-isolation" in run.stderr
    info = subprocess.run(
        [sys.executable, "-m", "pyvision_kernels", "info"], cwd=package, capture_output=True, text=True
    )
    assert info.returncode == 0
    assert "the extension is not built" in info.stdout


def test_library_that_does_not_load_is_named_with_the_reason(package):
    (package / "pyvision_kernels" / "lib").mkdir(exist_ok=True)
    (package / "pyvision_kernels" / "lib" / "libpvk_cpu.so").write_bytes(b"not a library")
    run = _python(CALL, package)
    assert "the CPU kernels are not available: libpvk_cpu.so does not load" in run.stderr


def test_layers_can_be_built_without_the_libraries(package):
    assert _python("import pyvision_kernels as pvk; pvk.nn.RoIAlign(7, 0.25, 2)", package).returncode == 0


def test_cuda_error_says_why_there_is_no_cuda(package):
    code = (
        "import pyvision_kernels, torch\n"
        "from pyvision_kernels._extension import LIBRARIES\n"
        "print(LIBRARIES['CUDA'].error('nms'))"
    )
    run = _python(code, package)
    assert "nms: the CUDA kernels are not available: the extension is not built" in run.stdout
    assert "PVK_BUILD=cuda" in run.stdout


@pytest.mark.parametrize("name", _extension.cpu_capabilities())
def test_environment_forces_an_instruction_set(name):
    run = _python("import pyvision_kernels as pvk; print(pvk.cpu_capability())", PVK_CPU_CAPABILITY=name)
    assert run.stdout.strip() == name


def test_unknown_instruction_set_is_refused_at_the_first_op():
    run = _python(CALL, PVK_CPU_CAPABILITY="avx9")
    assert "expected PVK_CPU_CAPABILITY to be one of" in run.stderr
    assert "but got 'avx9'" in run.stderr
    assert _python("import pyvision_kernels", PVK_CPU_CAPABILITY="avx9").returncode == 0


def test_force_cpu_capability_refuses_what_this_cpu_lacks():
    with pytest.raises(ValueError, match="but got 'avx9'"), _extension.force_cpu_capability("avx9"):
        pass


def test_instruction_sets_do_not_leak_through_the_linker():
    # A weak symbol outside the namespace of its instruction set could be taken by the baseline: an illegal
    # instruction on an older CPU.
    objects = sorted((ROOT / "build").glob("*/avx*/*.o"))
    if not objects:
        pytest.skip("no build folder: an installed package is tested")
    for path in objects:
        symbols = subprocess.run(["nm", "--demangle", str(path)], capture_output=True, text=True, check=True).stdout
        for line in symbols.splitlines():
            kind, _, name = line[17:].partition(" ")
            if kind in "WVu" and not name.startswith("DW.ref."):  # a pointer, not code
                assert f"::{path.parent.name}::" in name, f"{path.name}: {name}"


def test_library_depends_on_torch_by_its_stable_interface_alone():
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", str(ROOT / "pyvision_kernels/lib/libpvk_cpu.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "aoti_torch_" in symbols
    for namespace in ("at::", "c10::", "torch::"):
        assert f" {namespace}" not in symbols
