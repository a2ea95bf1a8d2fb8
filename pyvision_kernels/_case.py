"""Cases: inputs with a name, shared by the tests, `verify` and the benchmarks.

Each op's `cases.py` holds one `OpCases`, called CASES. A case makes float64 inputs on the CPU; `Case.inputs` turns
them into the dtype, device and layout asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels import ops

Inputs = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "strided")


@dataclass(frozen=True)
class Case:
    """One point of an op's input space.

    Attributes:
        name: Says what it is a case of.
        make: Takes a seeded generator, returns the public function's keyword arguments, tensors in float64.
        dtypes: Element types that the case makes sense in.
        for_peer: Maps the inputs to what the peer can be given (it may crash on hostile ones), None: nothing.
        bench: "", "quick" (make bench) or "full" (make bench-full only).
        single: Arguments that stay float32 beside 16-bit inputs.
    """

    name: str
    make: Callable[[torch.Generator], Inputs]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    for_peer: Callable[[Inputs], Inputs | None] = lambda inputs: inputs
    bench: str = ""
    single: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu", layout: str = "contiguous") -> Inputs:
        made = self.make(torch.Generator().manual_seed(0))
        result = {}
        for name, value in made.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                keeps_single = name in self.single and dtype in (torch.float16, torch.bfloat16)
                value = value.to(torch.float32 if keeps_single else dtype)
                value = in_layout(value.to(device), layout)
            result[name] = value
        return result


@dataclass(frozen=True)
class ErrorCase:
    """Inputs that must raise, and a part of the message."""

    name: str
    make: Callable[[str], Inputs]  # takes the device
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class OpCases:
    """Everything that is known of an op for checking and timing it.

    Attributes:
        op: The public function.
        reference: The same in readable PyTorch, given float64 (exact ops: given the dtype that the op computes in).
        peer: The fastest other implementation, in its dtype; raises where it has none.
        operators: Names of the dispatcher's operators that belong to the op.
        differentiable: Arguments that have gradients.
        exact: Outputs are indices, equal bit for bit.
        flops, bytes: Of a forward on given inputs and output: the least that must be computed and moved.
    """

    name: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    peer: Callable[..., Tensor]
    operators: tuple[str, ...]
    cases: tuple[Case, ...]
    errors: tuple[ErrorCase, ...]
    flops: Callable[[Inputs, Tensor], float]
    bytes: Callable[[Inputs, Tensor], float]
    differentiable: tuple[str, ...] = ()
    exact: bool = False
    peer_package: str = "torchvision"
    layouts: tuple[str, ...] = LAYOUTS

    def peer_is_installed(self) -> bool:
        return importlib.util.find_spec(self.peer_package) is not None

    def tests(self) -> list[Case]:
        return [case for case in self.cases if not case.bench]

    def benchmarks(self, full: bool) -> list[Case]:
        return [case for case in self.cases if case.bench and (full or case.bench == "quick")]


def error_case(op: str, name: str, error: type[Exception], message: str, inputs: Inputs) -> ErrorCase:
    """Inputs on the CPU, moved to the device of a test; those on another device stay there."""

    def make(device: str) -> Inputs:
        return {
            key: value.to(device) if isinstance(value, Tensor) and value.device.type == "cpu" else value
            for key, value in inputs.items()
        }

    return ErrorCase(name, make, error, f"{op}: {message}")


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; tensors that have no such layout stay as they are."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided" and tensor.dim() > 0:
        wide = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    return tensor.contiguous()


def all_cases() -> Iterator[OpCases]:
    """The cases of every op, by name."""
    for module in sorted(pkgutil.iter_modules(ops.__path__), key=lambda info: info.name):
        yield importlib.import_module(f"pyvision_kernels.ops.{module.name}.cases").CASES
