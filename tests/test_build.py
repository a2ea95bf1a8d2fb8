"""The build says what it does and why, and fails loudly where it cannot do what it was told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from setup import install

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build needs, without results of builds."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "pyvision_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _build(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *(arguments or ("build_ext", "--inplace"))],
        cwd=tree,
        env={**os.environ, "MAX_JOBS": "2", "PVK_SIMT": "0", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def _fake_torch(tree: Path, cuda: str | None) -> str:
    package = tree / "fake" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__version__ = '2.14.1'\nclass version:\n    cuda = {cuda!r}\n")
    return str(package.parent)


def test_cuda_is_refused_with_the_reason_where_torch_has_none(tree):
    run = _build(tree, PVK_BUILD="cuda", PYTHONPATH=_fake_torch(tree, None))
    assert run.returncode != 0
    assert "error: PVK_BUILD=cuda, but torch 2.14.1 is a build without CUDA" in run.stderr


def _fake_cuda(tree: Path, release: str) -> dict[str, str]:
    """The environment of a toolkit whose nvcc knows its release and no more, and of a torch with CUDA 13.0."""
    (tree / "cuda" / "bin").mkdir(parents=True)
    (tree / "cuda" / "lib64").mkdir()
    (tree / "cuda" / "lib64" / "libcudart.so").touch()
    nvcc = tree / "cuda" / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.89'\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(tree / "cuda"), "PATH": "/usr/bin:/bin", "PYTHONPATH": _fake_torch(tree, "13.0")}


def test_nvcc_of_another_major_release_is_refused(tree):
    run = _build(tree, PVK_BUILD="cuda", **_fake_cuda(tree, "11.8"))
    assert run.returncode != 0
    assert "is of CUDA 11.8, but torch was built with CUDA 13.0" in run.stderr


def test_unknown_kind_of_build_is_refused(tree):
    run = _build(tree, PVK_BUILD="rocm")
    assert run.returncode != 0
    assert "expected PVK_BUILD to be cpu, cuda or auto, but got 'rocm'" in run.stderr


def test_unknown_emulator_is_refused(tree):
    run = _build(tree, PVK_BUILD="cpu", PVK_SIMT="yes")
    assert run.returncode != 0
    assert "expected PVK_SIMT to be 0, 1 or asan, but got 'yes'" in run.stderr


def _fake_compiler(tree: Path, version: str) -> dict[str, str]:
    """The environment of a compiler that knows its version and no more."""
    compiler = tree / "c++"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo '{version}'\n")
    compiler.chmod(0o755)
    return {"CXX": str(compiler), "PVK_BUILD": "cpu", "PYTHONPATH": _fake_torch(tree, None)}


def test_emulator_needs_the_hooks_of_gcc(tree):
    run = _build(tree, PVK_SIMT="1", **_fake_compiler(tree, "Debian clang version 19.1.7"))
    assert run.returncode != 0
    assert "expected g++ to build the emulator, but got Debian clang version 19.1.7" in run.stderr


@pytest.mark.parametrize("kind", ["1", "asan"])
def test_emulated_kernels_are_compiled_with_their_checks(tree, kind):
    _build(tree, PVK_SIMT=kind, **_fake_compiler(tree, "g++ 12.2.0"))
    (rules,) = (tree / "build").glob("*/build.ninja")
    folder = "simt_asan" if kind == "asan" else "simt"
    flags = dict(re.findall(rf"^build {folder}/(\S+)\.o: cxx .*\n  flags = (.*)$", rules.read_text(), re.MULTILINE))
    for kernel in ("ops_nms_cuda", "ops_roi_align_cuda"):
        assert ("-fsanitize=thread,alignment,bounds" in flags[kernel]) == (kind == "1")
        assert "-ffp-contract=off" in flags[kernel]
    # The emulator itself calls no hooks: they would call themselves.
    assert "-fsanitize=thread" not in flags["simt_control"] + flags["ops_nms_nms"]
    assert all(("-fsanitize=address,undefined" in flag) == (kind == "asan") for flag in flags.values())


def test_what_an_earlier_build_left_in_the_package_is_removed(tmp_path):
    package, built = tmp_path / "package", tmp_path / "built"
    (package / "lib").mkdir(parents=True)
    built.mkdir()
    for name in ("cuda", "simt", "simt_asan"):
        (package / "lib" / f"libpvk_{name}.so").touch()
    (built / "libpvk_cpu.so").touch()
    (built / "libpvk_simt.so").write_text("new")
    install(built, package, ["lib/libpvk_cpu.so", "lib/libpvk_simt.so"])
    assert sorted(path.name for path in (package / "lib").iterdir()) == ["libpvk_cpu.so", "libpvk_simt.so"]
    assert (package / "lib" / "libpvk_simt.so").read_text() == "new"


def test_missing_torch_is_named(tree):
    package = tree / "fake" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('No module named torch')")
    run = _build(tree, PYTHONPATH=str(package.parent))
    assert run.returncode != 0
    assert "No module named torch; install torch, ninja and pybind11 first" in run.stderr


@pytest.mark.slow
def test_wheel_works_away_from_the_source(tree, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    environment = {**os.environ, "PVK_BUILD": "cpu", "PVK_SIMT": "0", "MAX_JOBS": "2"}
    wheel = [*pip, "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(tmp_path / "wheels"), str(tree)]
    run = subprocess.run(wheel, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "building CPU only for torch" in run.stdout + run.stderr
    site = tmp_path / "site"
    files = [str(path) for path in (tmp_path / "wheels").glob("*.whl")]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), *files], check=True, capture_output=True)
    code = (
        "import torch, pyvision_kernels as pvk\n"
        "assert pvk.build_info()['cuda'] is False\n"
        "print(pvk.__file__, pvk.ops.nms(torch.rand(3, 4), torch.rand(3), 0.5).shape)"
    )
    python = [sys.executable, "-c", code]
    run = subprocess.run(python, cwd="/", env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert str(site) in run.stdout


@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("8.0;volta", "expected TORCH_CUDA_ARCH_LIST to be like '8.0;9.0+PTX', but got 'volta' in it"),
        ("7.5", "expected TORCH_CUDA_ARCH_LIST to name 8.0 or later, but got '7.5' in it"),
    ],
)
def test_wrong_architecture_list_is_named(tree, archs, message):
    run = _build(tree, PVK_BUILD="cuda", TORCH_CUDA_ARCH_LIST=archs, **_fake_cuda(tree, "13.0"))
    assert run.returncode != 0
    assert message in run.stderr


def test_architecture_list_is_honoured(tree):
    _build(tree, PVK_BUILD="cuda", TORCH_CUDA_ARCH_LIST="8.6;9.0a+PTX;", **_fake_cuda(tree, "13.0"))
    (rules,) = (tree / "build").glob("*/build.ninja")
    flags = "code=sm_86 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90a,code=compute_90a"
    assert f"-gencode arch=compute_86,{flags}" in rules.read_text()
