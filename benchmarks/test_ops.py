"""Ours against the peer: every benchmark case, in float32 (both layouts) and bfloat16, forward and backward.

A row is timed only after its result was found right and our own operator was seen to have run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import pyvision_kernels as pvk
from benchmarks import ceilings, pair, sources
from pyvision_kernels._case import Case, Inputs, OpCases, all_cases, tensors_of
from pyvision_kernels._verify import Result, run_case

# What is wrong, or not launch-bound, ends before it is timed.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")

LAUNCH_BOUND = 100e-6  # Seconds; a GPU call shorter than this is timed by graph replay too.
CALLS_FOR_OVERHEAD = 200


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        provider: Whom we are measured against: torchvision (say) in the dtype, or in float32 where it may have no such
            kernel, or our own float32 kernel.
        mode: eager, or graph (replay of a CUDA graph).
        calls: Calls in a round; above 1 the host's clock is read, since the launch is what is measured.
    """

    spec: OpCases
    case: Case
    dtype: torch.dtype
    layout: str
    direction: str
    provider: str
    device: str
    mode: str = "eager"
    calls: int = 1

    @property
    def labels(self) -> dict[str, str]:
        return {
            "op": self.spec.name,
            "case": self.case.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
            "direction": self.direction,
            "mode": self.mode,
            "provider": self.provider,
        }

    @property
    def clock(self) -> pair.Clock:
        return pair.host_clock(self.device) if self.calls > 1 else pair.clock_of(self.device)

    def ours(self) -> pair.Call:
        inputs = _inputs(self.case, self.dtype, self.device, self.layout)
        if self.spec.in_eval and self.direction == "forward" and self.calls == 1:
            return self.spec.in_eval(inputs)
        return _call(self.spec, self.spec.op, inputs, self.direction)

    def peer(self) -> pair.Call:
        function = self.spec.op if self.provider.startswith("pvk") else self.spec.peer
        dtype = torch.float32 if self.provider.endswith("float32") else self.dtype
        if not self.spec.peer_is_native:
            return _call(self.spec, function, _inputs(self.case, dtype, self.device, self.layout), self.direction)
        calls = [
            _call(self.spec, function, _inputs(self.case, dtype, self.device, layout), self.direction)
            for layout in ("contiguous", "channels_last")
        ]
        return min(calls, key=lambda call: min(pair.timed(call, self.clock) for _ in range(5)))


def _rows(config: pytest.Config) -> Iterator[Row]:
    device, smoke, only = config.getoption("device"), config.getoption("smoke"), config.getoption("only")
    specs = {spec.name: spec for spec in all_cases()}
    names = {*specs, *(spec.family for spec in specs.values())}
    if only and only not in names:
        raise pytest.UsageError(f"--only: expected one of {', '.join(sorted(names))}, but got {only}")
    for spec in specs.values():
        if only and only not in (spec.name, spec.family):
            continue
        # The third test case of an op is an ordinary one: the first may be empty.
        for case in spec.tests()[2:3] if smoke else spec.benchmarks(config.getoption("full")):
            rows = _rows_of_case(spec, case, device, config.getoption("full"))
            count = len(spec.operators_on(device == "cuda"))
            yield from itertools.islice(rows, count) if smoke else rows
        calls = 5 if smoke else CALLS_FOR_OVERHEAD
        yield Row(spec, spec.tiny, torch.float32, "contiguous", "forward", spec.peer_package, device, calls=calls)


def _rows_of_case(spec: OpCases, case: Case, device: str, full: bool) -> Iterator[Row]:
    single, half = torch.float32, torch.bfloat16
    for dtype, layout in itertools.product((single, half), ("contiguous", "channels_last")):
        if dtype not in case.dtypes or layout not in spec.layouts:
            continue
        if not full and (dtype, layout) == (half, "channels_last"):
            continue
        # An op without a backward operator has PyTorch's.
        for direction in ("forward", "backward")[: len(spec.operators_on(device == "cuda"))]:
            if dtype == single or spec.peer_is_native:
                providers = [spec.peer_package]
            elif layout == "contiguous":
                providers = [f"{spec.peer_package} float32", *(["pvk float32"] if full else [])]
            else:
                providers = ["pvk float32"]
            for provider in providers:
                row = Row(spec, case, dtype, layout, direction, provider, device)
                yield row
                if device == "cuda" and direction == "forward" and not spec.sized_by_data:
                    yield replace(row, mode="graph")


@functools.lru_cache(maxsize=4)
def _inputs(case: Case, dtype: torch.dtype, device: str, layout: str) -> Inputs:
    return case.inputs(dtype, device, layout)


@functools.lru_cache(maxsize=2)
def _checked(spec: OpCases, case: Case, dtype: torch.dtype, device: str, layout: str) -> dict[str, Result]:
    """The error of ours by the rule of `_verify`, with the peer in float64 for what is exact; by direction."""
    results = run_case(replace(spec, reference=spec.peer), case, dtype, device, layout)
    return {result.direction: result for result in results}


def _call(spec: OpCases, function: Callable[..., Any], inputs: Inputs, direction: str) -> pair.Call:
    """A forward, or the backward of a graph that is kept; the gradient has the layout of the output."""
    if direction == "forward":
        return functools.partial(function, **inputs)
    inputs, leaves = spec.with_leaves(inputs)
    outputs = [output for output in tensors_of(function(**inputs)) if output.is_floating_point()]
    grads = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def operators_seen(call: pair.Call) -> set[str]:
    """Names of the operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call()
    return {event.key for event in profile.key_averages()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    params = []
    for row in _rows(metafunc.config):
        mark = pytest.mark.benchmark(timer=row.clock.timer, disable_gc=True, group=row.spec.name)
        params.append(pytest.param(row, id="-".join(row.labels.values()).replace(" ", "_"), marks=mark))
    metafunc.parametrize("row", params)


def test_ours_against_the_peer(benchmark, row, request):
    result = _checked(row.spec, row.case, row.dtype, row.device, row.layout)[row.direction]
    assert result.ok, f"error {result.error:.1e}, allowed {result.allowed:.1e}; {result.note}"
    with pvk.backend("pvk"):
        _time(benchmark, row, result, request.config.getoption("seconds"))


def _time(benchmark: Any, row: Row, result: Result, seconds_of_row: float) -> None:
    ours, peer = row.ours(), row.peer()
    seen = operators_seen(ours)
    operator = row.spec.operators_on(row.device == "cuda")[row.direction == "backward"]
    assert f"pvk::{operator}" in seen or any(name.startswith("pvk::_conv2d_triton") for name in seen)
    assert not [name for name in seen if name.startswith("torchvision::")]

    if row.mode == "graph":
        seconds = pair.timed(ours, row.clock)
        if seconds > LAUNCH_BOUND:
            pytest.skip(f"not launch-bound: {seconds * 1e6:.0f} us")
        ours, peer = pair.graphed(ours), pair.graphed(peer)
    timing = pair.measure(benchmark, ours, peer, row.clock, seconds_of_row, row.calls)
    if timing is None:
        return
    info = {**row.labels, "error": result.error, "peer_error": result.peer_error, "allowed": result.allowed}
    info["source_hash"] = sources.kernel_hash(row.spec.family, row.device)
    if row.direction == "forward" and row.calls == 1:  # the cases count a forward's work
        inputs = _inputs(row.case, row.dtype, row.device, row.layout)
        output = row.spec.op(**inputs)
        moved, flops = row.spec.bytes(inputs, output), row.spec.flops(inputs, output)
        precision = ceilings.precision(row.dtype, row.device, row.spec.family)
        info["work"] = ceilings.work_of(moved, flops, precision)
    benchmark.extra_info.update(info)
