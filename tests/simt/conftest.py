"""The library of the emulator's own tests: kernels that are right, kernels that it must stop, intrinsics.

Where a GPU is, its hardware runs them too, except those of what only the emulator does.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from setup import NVCC_FLAGS, ROOT, build_folder, find_nvcc

HERE = Path(__file__).parent
ON_GPU = ("right.cu", "intrinsics.cu", "tiles.cu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "cuda" not in item.keywords:
            item.add_marker(pytest.mark.simt)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "selftest" not in metafunc.fixturenames:
        return
    libraries = ["emulated"]
    if torch.cuda.is_available() and not metafunc.definition.get_closest_marker("emulator_only"):
        libraries.append(pytest.param("cuda", marks=pytest.mark.cuda))
    metafunc.parametrize("selftest", libraries, indirect=True)


@pytest.fixture
def selftest(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The functions of tests/simt/*.cu, for ctypes; torch has no part in them."""
    return request.getfixturevalue(f"{request.param}_selftest")


@pytest.fixture(scope="session")
def emulated_selftest(emulator: None) -> ctypes.CDLL:
    """As the build left it beside the emulated kernels."""
    name = "libpvk_simt_asan_selftest.so" if os.environ.get("PVK_SIMT") == "asan" else "libpvk_simt_selftest.so"
    return ctypes.CDLL(str(build_folder(torch.__version__) / name))


@pytest.fixture(scope="session")
def cuda_selftest(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compiled here, for this GPU."""
    nvcc = find_nvcc(torch)
    if nvcc is None:
        pytest.skip("no nvcc in CUDA_HOME, on PATH or beside torch")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no clusters on this GPU")
    library = tmp_path_factory.mktemp("selftest") / "libpvk_cuda_selftest.so"
    command = [str(nvcc), *NVCC_FLAGS.split(), "-arch=native", f"-I{ROOT / 'csrc'}", "-shared", "-Xcompiler"]
    command += ["-fPIC,-fvisibility=hidden", *(str(HERE / name) for name in ON_GPU), "-o", str(library)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.pvk_simt_set_options = lambda *options: None  # the hardware's schedule has no seed
    return loaded


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Hostile values are meant."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
