"""Backends that the tests run on, and outputs poisoned with NaN before a kernel writes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from pyvision_kernels._extension import cpu_capabilities, force_cpu_capability

# Every instruction set that this CPU can run, and the GPU where there is one.
BACKENDS = [
    *(f"cpu-{name}" for name in cpu_capabilities()),
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
    ),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("PVK_TEST_FULL"):
        skip = pytest.mark.skip(reason="slow; make test-full runs it")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer), so that an element nobody wrote is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a backend, with its instruction set in force."""
    kind, _, capability = request.param.partition("-")
    with force_cpu_capability(capability) if capability else contextlib.nullcontext():
        yield kind
