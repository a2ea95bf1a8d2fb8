"""Runs planned launches of Triton kernels, and again without planning where a call is like an earlier one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton

from pyvision_kernels._packed import PLAIN
from pyvision_kernels.ops.conv2d.triton_launch import Launch, Machine

try:
    import triton

    from pyvision_kernels.ops.conv2d.triton_kernels import (
        INTERPRETED,
        conv2d_kernel,
        conv2d_weight_kernel,
        conv2d_weight_sum_kernel,
    )

    MISSING = ""
except (ImportError, AttributeError) as error:  # none is installed, or one without what the kernels use
    MISSING = f"{type(error).__name__}: {error}"

_MOST_KEPT = 4096


class _Step(NamedTuple):
    """A kernel of a call: its arguments, and which of the call's tensors stands where among them."""

    start: Callable[..., Any]
    arguments: list[Any]
    places: list[tuple[int, int]]


class Plan(NamedTuple):
    """A call to be repeated: the size and layout of its result, the size of its workspace, and its kernels."""

    output: tuple[int, ...]
    layout: torch.memory_format
    workspace: tuple[int, ...] | None
    described: bool
    steps: list[_Step]


plans: dict[Hashable, Plan] = {}


@functools.cache
def _machine(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    return Machine(10 * properties.major + properties.minor, properties.multi_processor_count)


def machine_of(op: str, tensor: Tensor) -> Machine:
    """What a tensor's kernels run on; NotImplementedError where they cannot."""
    if MISSING:
        raise NotImplementedError(f"{op}: expected triton to be installed, 3.6 or newer, but got {MISSING}")
    if tensor.is_cuda:
        return _machine(tensor.get_device())
    if INTERPRETED:
        return Machine(90, 2)
    raise NotImplementedError(f"{op}: expected tensors on a CUDA device, but got some on {tensor.device}")


def key_of(tensors: tuple[Tensor | None, ...], *options: Any) -> Hashable | None:
    """What says whether a plan can be used again; None where tensors are not plain ones, as those of a trace."""
    parts: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        elif type(tensor) in PLAIN:
            place = tensor.data_ptr() % 16, tensor.get_device() if tensor.is_cuda else -1
            parts.append((tensor.shape, tensor.stride(), tensor.dtype, place))
        else:
            return None
    return (*parts, *(tuple(option) if isinstance(option, list) else option for option in options))


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def run(launches: list[Launch], tensors: dict[str, Tensor | None], key: Hashable | None) -> None:
    """Starts the kernels, and keeps the plan under a key.

    Args:
        tensors: What the launches take, by the names of their arguments; the result last. One more is a workspace.
    """
    names, output = list(tensors), tensors["output_ptr"]
    assert output is not None
    steps, workspace = [], None
    for launch in launches:
        kernel = conv2d_weight_sum_kernel if launch.kernel == "conv2d_weight_sum_kernel" else conv2d_weight_kernel
        kernel = conv2d_kernel if launch.kernel == "conv2d_kernel" else kernel
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        if key is None:
            wrap_triton(kernel)[launch.grid](**launch.arguments, **options)
            continue
        grid = (*launch.grid, 1, 1)[:3]
        arguments = [launch.arguments[name] for name in kernel.arg_names]
        with _on(output, bool(launch.arguments.get("DESCRIPTORS"))):
            compiled = kernel[grid](*arguments, **options)
        places = []
        for place, name in enumerate(kernel.arg_names):
            argument = arguments[place]
            if isinstance(argument, Tensor):
                if tensors.get(name) is argument:  # by name: one tensor may be two arguments in one call only
                    index = names.index(name)
                else:
                    index, workspace = len(names), tuple(argument.shape)
                places.append((place, index))
                arguments[place] = None
        start = functools.partial(kernel[grid], **options) if INTERPRETED else compiled[grid]
        steps.append(_Step(start, arguments, places))
    if key is not None:
        if len(plans) >= _MOST_KEPT:
            plans.clear()
        last = torch.channels_last
        layout = last if output.is_contiguous(memory_format=last) else torch.contiguous_format
        described = any(launch.arguments.get("DESCRIPTORS") for launch in launches)
        plans[key] = Plan(tuple(output.shape), layout, workspace, described, steps)


def run_again(plan: Plan, *tensors: Tensor | None) -> Tensor:
    """The result of a call like the one that was planned; tensors as of `run`, but the result."""
    like = tensors[0]
    assert like is not None
    output = torch.empty(plan.output, dtype=like.dtype, device=like.device, memory_format=plan.layout)
    given = [*tensors, output]
    if plan.workspace is not None:
        given.append(torch.empty(plan.workspace, dtype=torch.float32, device=like.device))
    with _on(output, plan.described):
        for start, template, places in plan.steps:
            arguments = template.copy()
            for place, index in places:
                arguments[place] = given[index]
            start(*arguments)
    return output


def _on(tensor: Tensor, described: bool) -> torch.cuda.device:
    if described and tensor.is_cuda:
        triton.set_allocator(_allocate)  # where the kernels keep their descriptors
    return torch.cuda.device(tensor.get_device() if tensor.is_cuda else -1)
