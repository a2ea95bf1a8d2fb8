"""A problem for each algorithm of conv2d, and how tests run and check one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyvision_kernels.ops.conv2d import algorithm, reference
from pyvision_kernels.ops.conv2d.geometry import Geometry
from pyvision_kernels.ops.conv2d.operator import conv2d_op

MODES = ("zeros", "reflect", "replicate", "circular")
# name -> (algorithm, size of the input, outputs, taps, options)
PROBLEMS = {
    "direct": (algorithm.DIRECT, (2, 19, 11, 13), 21, (3, 3), {"padding": 1}),
    "pointwise": (algorithm.DIRECT, (2, 37, 9, 11), 70, (1, 1), {}),
    "grouped": (algorithm.DIRECT, (1, 24, 9, 10), 16, (3, 2), {"groups": 4, "stride": (2, 1), "dilation": (1, 2)}),
    "winograd2": (algorithm.WINOGRAD2, (2, 19, 11, 13), 21, (3, 3), {"padding": 1}),
    "winograd4": (algorithm.WINOGRAD4, (2, 19, 11, 13), 21, (3, 3), {"padding": 1}),
    "depthwise": (algorithm.DEPTHWISE, (2, 37, 9, 21), 37, (3, 3), {"groups": 37, "padding": 1}),
    "depthwise_strided": (algorithm.DEPTHWISE, (1, 20, 15, 22), 20, (5, 5), {"groups": 20, "padding": 2, "stride": 2}),
    "multiplier": (algorithm.DEPTHWISE, (1, 6, 9, 10), 18, (3, 5), {"groups": 6, "padding": 2}),
    "few_channels": (algorithm.FEW_CHANNELS, (2, 3, 15, 18), 21, (7, 7), {"padding": 3, "stride": 2}),
    "one_channel": (algorithm.FEW_CHANNELS, (2, 1, 15, 18), 33, (3, 4), {"padding": 2, "dilation": 2}),
}
every_problem = pytest.mark.parametrize("name", PROBLEMS)
of_cpu_algorithms = pytest.mark.slow_emulated("the CUDA kernel is one for all algorithms")


def problem(name, dtype=torch.float32, padding_mode="zeros"):
    """The algorithm, input, weight, bias and Geometry."""
    kernel, size, outputs, taps, options = PROBLEMS[name]
    generator = torch.Generator().manual_seed(3)
    groups = options.get("groups", 1)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    w = torch.randn(outputs, size[1] // groups, *taps, generator=generator, dtype=torch.float64)
    b = torch.randn(outputs, generator=generator, dtype=torch.float64)
    geometry = Geometry.of(
        options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1), groups, padding_mode, taps
    )
    return kernel, x.to(dtype), w.to(dtype), b.to(dtype), geometry


def by(kernel, x, w, b, geometry, packed=None, pool=False, channels_last=False, activation=0, residual=None):
    return conv2d_op(x, w, b, None, None, residual, packed, geometry.numbers, activation, pool, channels_last, kernel)


def expected_of(x, w, b, geometry):
    mode = MODES[geometry.padding_mode]
    options = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return reference.conv2d(x, w, b, *options, padding_mode=mode)


def in_layout(tensor, layout):
    """channels_last, contiguous, or a window of a larger map."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "window":  # of a larger map: rows do not follow each other
        return F.pad(tensor, (2, 1, 1, 3))[:, :, 1:-3, 2:-1]
    return tensor.contiguous()


def within_the_rule(ours, exact, peer):
    """Asserts that the error is at most twice the peer's."""
    assert ours.shape == exact.shape
    assert ours.dtype == peer.dtype
    scale = exact.abs().max().item() or 1.0
    errors = [(tensor.double() - exact).abs().max().item() / scale for tensor in (ours, peer)]
    unit = torch.finfo(ours.dtype).eps
    allowed = 8 * unit if ours.dtype == torch.float64 else 2 * errors[1] + unit
    assert errors[0] <= allowed, f"error {errors[0]:.3g}, allowed {allowed:.3g}"
