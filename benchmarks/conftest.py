"""Options of `pytest benchmarks`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyvision_kernels benchmarks")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="device to measure on")
    group.addoption("--full", action="store_true", help="every benchmark case, not only the representative ones")
    group.addoption("--smoke", action="store_true", help="one small case of each op")
    group.addoption("--only", metavar="OP", help="this op alone")
    group.addoption("--seconds", type=float, default=1.5, help="time box of a row; at least 3 rounds are run")
