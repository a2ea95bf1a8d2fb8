"""Runs a case against the float64 reference and the peer, and judges the error.

The rule: the error of ours against float64 may be at most twice that of the peer's kernel in the same dtype on the
same input, plus one unit of rounding of the output's dtype at the largest value. Where the peer has no kernel for a
dtype, it runs in float32 and its result is rounded to that dtype. Index outputs are equal. Where the peer is not
installed, 64 units are allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._case import Case, Inputs, OpCases


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
Labels = tuple[str, str, str, str]  # op, case, dtype, layout


def run_case(spec: OpCases, case: Case, dtype: torch.dtype, device: str, layout: str) -> Iterator[Result]:
    """Forward, and backward where the op has one."""
    labels = (spec.name, case.name, str(dtype)[6:], layout)
    if spec.exact:
        yield _run_exact(spec, case, dtype, device, layout, labels)
        return
    inputs = case.inputs(dtype, device, layout)
    ours = _forward_backward(spec, spec.op, inputs)
    exact, peer, exact_of_peer = _expected(spec, case, dtype, device, layout)
    for index, direction in enumerate(("forward", "backward")[: len(ours)]):
        error, problem = _relative_error(
            ours[index], exact[index], like=inputs[spec.differentiable[0]] if index else None
        )
        peer_error = float("nan")
        if peer is not None and exact_of_peer is not None:
            peer_error, _ = _relative_error(peer[index], exact_of_peer[index])
        unit = torch.finfo(dtype).eps
        if peer_error == peer_error:
            allowed = unit + 2 * peer_error
        else:
            allowed = 2 * unit if spec.peer_is_installed() else UNITS_WITHOUT_PEER * unit
        yield Result(*labels, direction, error, peer_error, allowed, problem)


@functools.lru_cache(maxsize=64)
def _exact(spec: OpCases, case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    precise = {name: _double(value) for name, value in case.inputs(dtype, device).items()}
    return _forward_backward(spec, spec.reference, precise)


# The backends of a device are compared with one run of the reference and the peer.
@functools.lru_cache(maxsize=64)
def _expected(spec: OpCases, case: Case, dtype: torch.dtype, device: str, layout: str) -> tuple[list[Tensor], Any, Any]:
    exact = _exact(spec, case, dtype, device)
    return exact, *_run_peer(spec, case, case.inputs(dtype, device, layout), exact)


def _run_exact(spec: OpCases, case: Case, dtype: torch.dtype, device: str, layout: str, labels: Labels) -> Result:
    inputs = case.inputs(dtype, device, layout)
    single = {
        name: value.cpu().float() if isinstance(value, Tensor) and value.element_size() == 2 else _cpu(value)
        for name, value in inputs.items()
    }
    ours = spec.op(**inputs).cpu()
    others = {"reference": spec.reference, **({"peer": spec.peer} if spec.peer_is_installed() else {})}
    wrong = [name for name, other in others.items() if not torch.equal(ours, other(**single))]
    note = f"differs from the {' and the '.join(wrong)}" if wrong else ""
    return Result(*labels, "forward", float(len(wrong)), 0.0, 0.0, note)


def _run_peer(spec: OpCases, case: Case, inputs: Inputs, exact: list[Tensor]) -> Any:
    """The peer's outputs on what it can be given, and the exact ones for the same inputs."""
    given = case.for_peer(inputs)
    if given is None or not spec.peer_is_installed():
        return None, None
    if given is not inputs:
        exact = _forward_backward(spec, spec.reference, {name: _double(value) for name, value in given.items()})
    inputs = given
    first = inputs[spec.differentiable[0]]
    same = all(value.dtype == first.dtype for value in inputs.values() if isinstance(value, Tensor))
    try:
        if not same:
            raise RuntimeError("the peer takes one dtype")
        return _forward_backward(spec, spec.peer, inputs), exact
    except RuntimeError:
        single = {name: value.float() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        return [value.to(first.dtype) for value in _forward_backward(spec, spec.peer, single)], exact


def _forward_backward(spec: OpCases, function: Any, inputs: Inputs) -> list[Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in spec.differentiable}
    output = function(**{**inputs, **leaves})
    generator = torch.Generator().manual_seed(1)
    # Quarters between -2 and 2: exact in every dtype, so that all get the same gradient.
    grad = (torch.randint(-8, 9, output.shape, generator=generator) / 4).to(output)
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad)]


def _relative_error(ours: Tensor, exact: Tensor, like: Tensor | None = None) -> tuple[float, str]:
    if ours.shape != exact.shape:
        return float("inf"), f"shape {list(ours.shape)}, expected {list(exact.shape)}"
    if like is not None and ours.dtype != like.dtype:
        return float("inf"), f"dtype {ours.dtype}, expected {like.dtype}"
    if exact.numel() == 0:
        return 0.0, ""
    scale = exact.abs().max().item() or 1.0
    return (ours.double() - exact).abs().max().item() / scale, ""


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
