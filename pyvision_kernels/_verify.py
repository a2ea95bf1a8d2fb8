"""Runs a case against the float64 reference and the peer, and judges the error.

The rule: the error of ours against float64 may be at most twice that of the peer's kernel in the same dtype on the
same input, plus one unit of rounding of the output's dtype at the largest value. Where the peer has no kernel for a
dtype, it runs in float32 and its result is rounded to that dtype. Integer outputs are equal; so are NaN and infinities.
Where the peer is not installed, 64 units are allowed; in float64 8, where PyTorch's kernel is itself the reference. Of
an op that PyTorch has a kernel for too, our own runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._backend import backend
from pyvision_kernels._case import Case, Inputs, OpCases, map_tensors, tensors_of


@dataclass(frozen=True)
class Result:
    """One comparison. Errors are the largest difference to float64, relative to the largest value."""

    op: str
    case: str
    dtype: str
    layout: str
    direction: str  # forward or backward
    error: float
    peer_error: float  # NaN where there is no peer
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # false for NaN


# The error of a peer that is not installed is not known: that of rounding positions and sums, in units of the dtype.
UNITS_WITHOUT_PEER = 64
UNITS_OF_THE_REFERENCE = 8  # where it is the peer's own kernel in float64, and no more exact than ours
EXACT_UNITS = 4  # of an `exact` op's floating outputs
Labels = tuple[str, str, str, str]  # op, case, dtype, layout


def run_case(spec: OpCases, case: Case, dtype: torch.dtype, device: str, layout: str) -> Iterator[Result]:
    """Forward, and backward where the op has one: of each, its worst output or gradient."""
    with backend("pvk"):
        yield from list(_run_case(spec, case, dtype, device, layout))


def _run_case(spec: OpCases, case: Case, dtype: torch.dtype, device: str, layout: str) -> Iterator[Result]:
    labels = (spec.name, case.name, str(dtype)[6:], layout)
    if spec.exact:
        yield _run_exact(spec, case, dtype, device, layout, labels)
        return
    inputs = case.inputs(dtype, device, layout)
    ours = _forward_backward(spec, spec.op, inputs)
    exact, peer, exact_of_peer = _expected(spec, case, dtype, device, layout)
    leaves = spec.with_leaves(inputs)[1]
    for direction in ours:
        judged = []
        for index, tensor in enumerate(ours[direction]):
            problem = ""
            if direction == "backward" and tensor.dtype != leaves[index].dtype:
                problem = f"dtype {tensor.dtype}, expected {leaves[index].dtype}"
            error, problem = _error(tensor, exact[direction][index], problem)
            if not tensor.is_floating_point():
                judged.append(Result(*labels, direction, error, 0.0, 0.0, problem))
                continue
            peer_error = float("nan")
            if peer is not None and exact_of_peer is not None:
                peer_error, _ = _error(peer[direction][index], exact_of_peer[direction][index])
            unit = torch.finfo(tensor.dtype).eps
            if spec.peer_is_native and tensor.dtype == torch.float64:
                allowed = UNITS_OF_THE_REFERENCE * unit
            elif peer_error == peer_error:
                allowed = unit + 2 * peer_error
            else:
                allowed = 2 * unit if spec.peer_is_installed() else UNITS_WITHOUT_PEER * unit
            if case.l2 is not None and dtype == torch.float32 and direction == "forward" and not problem:
                error, allowed = _l2_error(tensor, exact[direction][index]), case.l2
            judged.append(Result(*labels, direction, error, peer_error, allowed, problem))
        yield max(judged, key=lambda result: (not result.ok, result.error / result.allowed if result.allowed else 0.0))


Tensors = dict[str, list[Tensor]]  # by direction


@functools.lru_cache(maxsize=64)
def _exact(spec: OpCases, case: Case, dtype: torch.dtype, device: str) -> Tensors:
    precise = _floating_to(case.inputs(dtype, device), torch.float64)
    return _forward_backward(spec, spec.reference, precise)


# The backends of a device are compared with one run of the reference and the peer.
@functools.lru_cache(maxsize=64)
def _expected(
    spec: OpCases, case: Case, dtype: torch.dtype, device: str, layout: str
) -> tuple[Tensors, Tensors | None, Tensors | None]:
    exact = _exact(spec, case, dtype, device)
    return exact, *_run_peer(spec, case, case.inputs(dtype, device, layout), exact)


def _run_exact(spec: OpCases, case: Case, dtype: torch.dtype, device: str, layout: str, labels: Labels) -> Result:
    inputs = case.inputs(dtype, device, layout)
    ours = [tensor.cpu() for tensor in tensors_of(spec.op(**inputs))]
    single = {name: map_tensors(_as_computed, value) for name, value in inputs.items()}
    others = {"reference": (spec.reference, single)}
    given = case.for_peer(single)
    if given is single and spec.peer_is_installed():
        others["peer"] = (spec.peer, given)
    wrong = []
    for name, (function, arguments) in others.items():
        theirs = tensors_of(function(**arguments))
        if len(ours) != len(theirs) or not all(map(_chose_the_same, ours, theirs)):
            wrong.append(name)
    note = f"differs from the {' and the '.join(wrong)}" if wrong else ""
    return Result(*labels, "forward", float(len(wrong)), 0.0, 0.0, note)


def _as_computed(tensor: Tensor) -> Tensor:
    return tensor.cpu().float() if tensor.is_floating_point() and tensor.element_size() == 2 else tensor.cpu()


def _chose_the_same(ours: Tensor, theirs: Tensor) -> bool:
    if not theirs.is_floating_point() or ours.shape != theirs.shape:
        return torch.equal(ours, theirs)
    unit = torch.finfo(ours.dtype).eps
    return torch.allclose(ours.double(), theirs.double(), rtol=EXACT_UNITS * unit, atol=0, equal_nan=True)


def _run_peer(spec: OpCases, case: Case, inputs: Inputs, exact: Tensors) -> tuple[Tensors | None, Tensors | None]:
    """The peer's outputs on what it can be given, and the exact ones for the same inputs."""
    given = case.for_peer(inputs)
    if given is None or not spec.peer_is_installed():
        return None, None
    if given is not inputs:
        exact = _forward_backward(spec, spec.reference, _floating_to(given, torch.float64))
    dtypes = [tensor.dtype for value in given.values() for tensor in tensors_of(value) if tensor.is_floating_point()]
    try:
        if len(set(dtypes)) != 1:
            raise RuntimeError("the peer takes one dtype")
        return _forward_backward(spec, spec.peer, given), exact
    except RuntimeError:
        single = _forward_backward(spec, spec.peer, _floating_to(given, torch.float32))
        return {direction: [tensor.to(dtypes[0]) for tensor in tensors] for direction, tensors in single.items()}, exact


def _forward_backward(spec: OpCases, function: Any, inputs: Inputs) -> Tensors:
    inputs, leaves = spec.with_leaves(inputs)
    outputs = tensors_of(function(**inputs))
    result = {"forward": [output.detach() for output in outputs]}
    if leaves:
        outputs = [output for output in outputs if output.is_floating_point()]
        generator = torch.Generator().manual_seed(1)
        # Quarters between -2 and 2: exact in every dtype, so that all get the same gradient.
        grads = [
            (torch.randint(-8, 9, output.shape, generator=generator) / 4).to(output.device, output.dtype)
            for output in outputs
        ]
        result["backward"] = list(torch.autograd.grad(outputs, leaves, grads, materialize_grads=True))
    return result


def _error(ours: Tensor, exact: Tensor, problem: str = "") -> tuple[float, str]:
    """The largest difference, relative to the largest finite value; of integers, how many differ."""
    if ours.shape != exact.shape:
        problem = f"shape {list(ours.shape)}, expected {list(exact.shape)}"
    if problem:
        return float("inf"), problem
    if not exact.is_floating_point():
        return float((ours != exact).sum()), ""
    ours = ours.double()
    agrees = (ours == exact) | (ours.isnan() & exact.isnan())
    difference = torch.where(agrees, 0.0, (ours - exact).abs())
    if difference.numel() == 0:
        return 0.0, ""
    scale = torch.where(exact.isfinite(), exact.abs(), 0.0).max().item() or 1.0
    return difference.nan_to_num(float("inf"), float("inf")).max().item() / scale, ""


def _l2_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def _floating_to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return {name: map_tensors(convert, value) for name, value in inputs.items()}
