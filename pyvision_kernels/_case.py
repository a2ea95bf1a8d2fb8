"""Cases: inputs with a name, shared by the tests, `verify` and the benchmarks.

Each folder of ops has a `cases.py` that ends in CASES: an `OpCases` for every public function. A case makes float64
inputs on the CPU; `Case.inputs` turns them into the dtype, device and layout asked for. An argument may be a Tensor or
a list of them, a result a Tensor or a tuple of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels import ops

Inputs = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "strided")  # and "transposed": [B, H, L, D] as [B, L, H, D] in memory


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
        l2: Of an algorithm that is faster for being less exact, in float32: its output's error in the l2 norm, relative
            to the output's, is at most this, instead of the rule in the largest error. None: the rule.
    """

    name: str
    make: Callable[[torch.Generator], Inputs]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    for_peer: Callable[[Inputs], Inputs | None] = lambda inputs: inputs
    bench: str = ""
    single: tuple[str, ...] = ()
    l2: float | None = None

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu", layout: str = "contiguous") -> Inputs:
        made = self.make(torch.Generator().manual_seed(0))
        single = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

        def convert(tensor: Tensor, wanted: torch.dtype) -> Tensor:
            if tensor.is_floating_point():
                tensor = tensor.to(wanted)
            return in_layout(tensor.to(device), layout)

        return {
            name: map_tensors(functools.partial(convert, wanted=single if name in self.single else dtype), value)
            for name, value in made.items()
        }


@dataclass(frozen=True)
class ErrorCase:
    """Inputs that must raise, and a part of the message."""

    name: str
    make: Callable[[str], Inputs]  # takes the device
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class OpCases:
    """Everything that is known of a public function for checking and timing it.

    Attributes:
        name: Of the function in `pvk.ops`.
        op: The function.
        reference: The same in readable PyTorch, given float64 (exact ops: given the dtype that the op computes in).
        peer: The fastest other implementation, in its dtype; raises where it has none.
        operators: Names of the dispatcher's operators that it runs: of the forward, of the backward.
        cuda_operators: Those on CUDA, where they are others.
        tiny: Inputs so small that a call is nothing but its overhead.
        flops, bytes: Of a forward on given inputs and output: the least that must be computed and moved.
        differentiable: Arguments that have gradients.
        exact: What is computed is a choice (of boxes, say): indices are equal bit for bit, other outputs within
            EXACT_UNITS of rounding.
        sized_by_data: The size of the output depends on values: a GPU synchronises, meta tensors raise.
        in_eval: Inputs -> the call that a layer in eval mode makes of them, its weights packed; what benchmarks time of
            the forward. None: the op itself.
        peer_is_native: The peer has kernels of its own for 16-bit types, and picks the better of the layouts.
        family: The folder of `ops` that it is in; set by `all_cases`.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    peer: Callable[..., Any]
    operators: tuple[str, ...]
    cases: tuple[Case, ...]
    errors: tuple[ErrorCase, ...]
    tiny: Case
    flops: Callable[[Inputs, Any], float]
    bytes: Callable[[Inputs, Any], float]
    differentiable: tuple[str, ...] = ()
    exact: bool = False
    sized_by_data: bool = False
    peer_package: str = "torchvision"
    layouts: tuple[str, ...] = LAYOUTS
    in_eval: Callable[[Inputs], Callable[[], Any]] | None = None
    peer_is_native: bool = False
    cuda_operators: tuple[str, ...] = ()
    family: str = ""

    def operators_on(self, cuda: bool) -> tuple[str, ...]:
        """Of the forward, of the backward; alone the first, where the gradient is PyTorch's."""
        return (cuda and self.cuda_operators) or self.operators

    def peer_is_installed(self) -> bool:
        return importlib.util.find_spec(self.peer_package) is not None

    def tests(self) -> list[Case]:
        return [case for case in self.cases if not case.bench]

    def benchmarks(self, full: bool) -> list[Case]:
        return [case for case in self.cases if case.bench and (full or case.bench == "quick")]

    def with_leaves(self, inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
        """The inputs with fresh leaves in place of what is differentiable, and these leaves."""
        leaves = {
            name: map_tensors(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), inputs[name])
            for name in self.differentiable
        }
        tensors = [leaf for value in leaves.values() for leaf in tensors_of(value)]
        return {**inputs, **leaves}, [leaf for leaf in tensors if leaf.requires_grad]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an argument or a result."""
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)] if isinstance(value, list | tuple) else []


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A Tensor, or each Tensor of a list, through the function; anything else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    return value


def error_case(op: str, name: str, error: type[Exception], message: str, inputs: Inputs) -> ErrorCase:
    """Inputs on the CPU, moved to the device of a test; those on another device stay there."""

    def make(device: str) -> Inputs:
        return {
            key: map_tensors(lambda tensor: tensor.to(device) if tensor.device.type == "cpu" else tensor, value)
            for key, value in inputs.items()
        }

    return ErrorCase(name, make, error, f"{op}: {message}")


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; tensors that have no such layout stay as they are."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() == 4:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided" and tensor.dim() > 0:
        is_bool = tensor.dtype == torch.bool
        absent = float("nan") if tensor.is_floating_point() else is_bool or torch.iinfo(tensor.dtype).max
        wide = tensor.new_full([2 * size + 1 for size in tensor.shape], absent)
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    return tensor.contiguous()


def all_cases() -> Iterator[OpCases]:
    """The cases of every function, folder by folder."""
    for module in sorted(pkgutil.iter_modules(ops.__path__), key=lambda info: info.name):
        for spec in importlib.import_module(f"pyvision_kernels.ops.{module.name}.cases").CASES:
            yield replace(spec, family=module.name)
