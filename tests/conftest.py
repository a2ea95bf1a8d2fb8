"""Backends that the tests run on, and outputs poisoned with NaN before a kernel writes them.

PVK_SIMT_SEEDS="7" or "0,5,9" names the schedules under which the emulator runs the CUDA kernels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

import pyvision_kernels as pvk
from pyvision_kernels import _simt
from pyvision_kernels._extension import cpu_capabilities, force_cpu_capability

# Of the emulator's schedule: threads in order, the latest first, at random.
SEEDS = os.environ.get("PVK_SIMT_SEEDS", "0,3,1").split(",")


pytest.register_assert_rewrite("tests.fused", "tests.convolutions")


@pytest.hookimpl(trylast=True)  # so that backends vary first, and share the expected outputs
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device`: each instruction set of this CPU, the CUDA kernels emulated, and the GPU where there is one."""
    if "device" not in metafunc.fixturenames:
        return
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    marker = metafunc.definition.get_closest_marker
    emulated = [pytest.mark.simt, *([pytest.mark.slow] if marker("slow_emulated") else [])]
    backends = [
        *(f"cpu-{name}" for name in cpu_capabilities()),
        *(pytest.param(f"simt-{seed}", marks=emulated) for seed in (SEEDS if marker("every_schedule") else SEEDS[-1:])),
        pytest.param("cuda", marks=[pytest.mark.cuda, no_gpu]),
    ]
    metafunc.parametrize("device", backends, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not os.environ.get("PVK_TEST_FULL"):
        config.hook.pytest_deselected(items=[item for item in items if _is_one_backend_more(item)])
        items[:] = [item for item in items if not _is_one_backend_more(item)]
        skip = pytest.mark.skip(reason="slow; make test-full runs it")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def _is_one_backend_more(item: pytest.Item) -> bool:
    """A case in float16 or float64 (bfloat16 too, under the emulator) on another backend than the last of its kind.

    The steps of a kernel are those of float32, and so are its schedules; instruction sets differ in how they load
    16-bit types, of which bfloat16 is one. Nor does a schedule matter to the plain CUDA kernels beside PyTorch's, whose
    threads share nothing, or an instruction set to an operator's contract.
    """
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    dtype, (kind, _, option) = parameters.get("dtype"), str(parameters.get("device", "")).partition("-")
    if option in (SEEDS[-1], cpu_capabilities()[-1]):
        return False
    if kind == "cpu" and item.name.startswith("test_opcheck"):
        return True
    if kind == "simt":
        if getattr(parameters.get("spec"), "peer_is_native", False):
            return True
        return dtype in (torch.bfloat16, torch.float16, torch.float64)
    return kind == "cpu" and dtype in (torch.float16, torch.float64)


@pytest.fixture(scope="module")
def one_thread():
    """For maps too small for more: where a machine is busy, threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _our_kernels() -> Iterator[None]:
    """Also where `auto` would take PyTorch's."""
    with pvk.backend("pvk"):
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer), so that an element nobody wrote is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def emulator() -> None:
    """Skips what needs the emulator where it is not built; fails it where PVK_SIMT, set by make, asks for it."""
    library = _simt.load()
    if library.handle is None:
        give_up = pytest.skip if os.environ.get("PVK_SIMT", "0") == "0" else pytest.fail
        give_up(f"emulator: {library.reason} ({library.mend})")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a backend, with its instruction set, or the emulator, in force."""
    kind, _, option = request.param.partition("-")
    if kind == "simt":
        request.getfixturevalue("emulator")
        # Races on global memory are looked for where inputs are small.
        small = request.node.get_closest_marker("every_schedule") is not None
        with _simt.emulated(int(option), global_races=small):
            yield "cpu"
    else:
        with force_cpu_capability(option) if option else contextlib.nullcontext():
            yield kind
