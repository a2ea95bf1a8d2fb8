"""An op has one name in every folder, and everything that an op must have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import pyvision_kernels as pvk
from pyvision_kernels import _simt
from pyvision_kernels._case import all_cases
from pyvision_kernels._op import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent.name for path in (ROOT / "pyvision_kernels" / "ops").glob("*/__init__.py"))
SPECS = list(all_cases())
CSRC = ROOT / "csrc"
every_folder = pytest.mark.parametrize("folder", FOLDERS)
every_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def test_the_folders_agree():
    assert sorted(path.name for path in (CSRC / "ops").iterdir()) == FOLDERS
    assert sorted(path.stem for path in (ROOT / "docs" / "ops").glob("*.md")) == FOLDERS
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    assert tests.issuperset(FOLDERS)
    assert all(name.startswith(tuple(FOLDERS)) for name in tests)  # a folder may have more than one


def test_every_public_function_has_cases_and_every_folder_bears_the_name_of_one():
    assert sorted(spec.name for spec in SPECS) == sorted(pvk.ops.__all__)
    assert {spec.family for spec in SPECS} == set(FOLDERS) <= set(pvk.ops.__all__)


@every_folder
def test_folder_has_its_files(folder):
    for path in (
        *(f"csrc/ops/{folder}/{name}" for name in (f"{folder}.h", f"{folder}.cpp", "cpu.cpp", "cuda.cu")),
        *(f"pyvision_kernels/ops/{folder}/{name}" for name in ("__init__.py", "reference.py", "cases.py")),
    ):
        assert (ROOT / path).is_file(), f"{folder} lacks {path}"


@every_op
def test_op_is_documented(spec):
    function = getattr(pvk.ops, spec.name)
    assert function is spec.op
    for section in ("Args:", "Returns:", "Raises:", "Note: ", "Reference: "):
        assert section in function.__doc__, f"the docstring of {spec.name} lacks '{section}'"
    text = (ROOT / "docs" / "ops" / f"{spec.family}.md").read_text()
    assert len(text.split()) > 300, "the maths, the kernels, the differences"
    assert spec.name in text


@every_op
def test_op_has_cases(spec):
    assert len(spec.tests()) >= 5
    assert spec.benchmarks(full=False), "at least one benchmark in the quick set"
    assert spec.errors
    names = [case.name for case in spec.cases]
    assert len(names) == len(set(names))
    dtypes = {dtype for case in spec.tests() for dtype in case.dtypes}
    assert {torch.float32, torch.float64, torch.float16, torch.bfloat16} <= dtypes


def test_every_operator_has_a_fake_and_belongs_to_an_op():
    bindings = [*(CSRC / "graph").glob("*.cpp"), *(CSRC / "ops" / folder / f"{folder}.cpp" for folder in FOLDERS)]
    registered = {name for path in bindings for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())}
    in_python = {name for name, op in REGISTRY.items() if op.contract.implementation is not None}
    assert registered == set(REGISTRY) - in_python
    assert in_python == {
        *("_attention_triton", "_attention_triton_backward"),
        *("_conv2d_triton", "_conv2d_triton_backward_input", "_conv2d_triton_backward_weight"),
    }
    for name in in_python:
        assert str(REGISTRY[name].overload._schema) == f"pvk::{REGISTRY[name].contract.schema}"
    for name in REGISTRY:
        assert torch._library.simple_registry.singleton.find(f"pvk::{name}").fake_impl.kernel is not None


def test_every_operator_has_an_emulated_twin_with_the_same_contract(emulator):
    assert set(_simt.twins()) == {name for name, op in REGISTRY.items() if op.contract.implementation is None}
    for name, twin in _simt.twins().items():
        ours = REGISTRY[name].overload
        assert str(twin._schema) == str(ours._schema).replace("pvk::", "pvk_simt::")
        for key in ("CPU", "Autograd", "AutocastCPU", "FuncTorchBatched"):
            has = [torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for op in (twin, ours)]
            assert has[0] == has[1], f"{name}: {key}"
        assert torch._library.simple_registry.singleton.find(f"pvk_simt::{name}").fake_impl.kernel is not None


@every_folder
def test_binding_registers_every_operator(folder):
    operators = {name for spec in SPECS if spec.family == folder for name in spec.operators}
    binding = (CSRC / "ops" / folder / f"{folder}.cpp").read_text()
    assert operators <= set(re.findall(r'm\.impl\("(\w+)"', binding))


def _sources(pattern: str) -> list[Path]:
    return sorted(CSRC.rglob(pattern))


@pytest.mark.parametrize(
    "path", _sources("*.cu") + _sources("*.cuh") + _sources("cpu.cpp"), ids=lambda path: str(path.relative_to(CSRC))
)
def test_kernel_file_follows_the_rules(path):
    text = path.read_text()
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11)/", text), "a torch header in a kernel file"
    assert "<<<" not in text, "a launch outside core/launch.h"
    assert "__shared__" not in text or path.name == "warp.cuh", "shared memory only through the macros"
    assert not re.search(r"\basm\b", text) or path.parent.name == "core", "PTX only behind a wrapper in core"


def test_every_source_opens_with_what_it_is():
    for path in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *CSRC.rglob("*.cu"), *(CSRC / "ops").rglob("*.cpp")]:
        assert path.read_text().startswith("//"), path
