"""What happens where a library is missing, broken or forced; that instruction sets do not leak."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyvision_kernels as pvk
from pyvision_kernels import _extension, _simt

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


def test_emulator_that_is_not_built_says_what_builds_it(package):
    code = (
        "from pyvision_kernels import _simt\nprint(_simt.status(), _simt.options())\nwith _simt.emulated():\n    pass"
    )
    run = _python(code, package, PVK_SIMT="1")
    assert run.stdout.strip() == "no: not built (run make test) None"
    assert "emulated: the emulated CUDA kernels are not available: not built. To mend it: run make test" in run.stderr


def test_sanitized_emulator_is_not_loaded_without_its_runtime(package):
    # The sanitizer would end the process.
    code = "from pyvision_kernels import _simt; print(_simt.status())"
    run = _python(code, package, PVK_SIMT="asan", LD_PRELOAD="")
    assert run.stdout.strip() == "no: libasan is not preloaded (run make test-asan)"


def test_ops_are_emulated_inside_the_block_alone(emulator):
    boxes, scores = torch.rand(5, 4), torch.rand(5)
    with torch.profiler.profile(acc_events=True) as profile:
        with _simt.emulated(seed=3), contextlib.suppress(KeyError):
            pvk.ops.nms(boxes, scores, 0.5)
            with _simt.emulated(seed=4, global_races=True):
                assert _simt.options() == (4, True, True)
            assert _simt.options() == (3, True, False)
            raise KeyError
        assert _simt.options() is None
        pvk.ops.nms(boxes, scores, 0.5)
    names = [event.name for event in profile.events() if event.name.endswith("::nms")]
    assert names == ["pvk_simt::nms", "pvk::nms"]


def test_gradients_autocast_and_vmap_are_emulated_too(emulator):
    input, boxes = torch.rand(2, 3, 8, 8, requires_grad=True), torch.tensor([[0.0, 1, 1, 6, 6], [1, 0, 2, 5, 7]])
    pooled = functools.partial(pvk.ops.roi_align, boxes=boxes, output_size=2)
    with torch.profiler.profile(acc_events=True) as profile, _simt.emulated():
        torch.autograd.grad(pooled(input).sum(), input)
        with torch.autocast("cpu", torch.bfloat16):
            pooled(input.detach())
        torch.func.vmap(pooled)(torch.rand(3, 2, 3, 8, 8))
        torch.func.grad(lambda x: pooled(x).sum())(input.detach())
    names = {event.name for event in profile.events() if event.name.startswith("pvk")}
    assert names == {"pvk_simt::roi_align", "pvk_simt::_roi_align_backward"}


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
        isa = path.parent.name
        inside = re.compile(rf"::{isa}::|^_Z+NK?3pvk{len(isa)}{isa}")  # nm leaves some names of lambdas as they are
        symbols = subprocess.run(["nm", "--demangle", str(path)], capture_output=True, text=True, check=True).stdout
        for line in symbols.splitlines():
            kind, _, name = line[17:].partition(" ")
            if kind in "WVu" and not name.startswith("DW.ref."):  # a pointer, not code
                assert inside.search(name), f"{path.name}: {name}"


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
