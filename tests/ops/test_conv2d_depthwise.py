"""Depthwise convolution and that of few channels, on the CPU: any sizes and layouts, and all that follows the sums."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyvision_kernels._activation import FUNCTIONS, NUMBERS
from pyvision_kernels.ops.conv2d import algorithm
from pyvision_kernels.ops.conv2d.geometry import Geometry
from tests.convolutions import by, expected_of, of_cpu_algorithms, problem


def _layouts(tensor):
    """The tensor contiguous, in channels_last, and as a window of a larger map."""
    yield tensor
    yield tensor.contiguous(memory_format=torch.channels_last)
    yield F.pad(tensor, (2, 1, 1, 3)).contiguous(memory_format=torch.channels_last)[:, :, 1:-3, 2:-1]


def _check(kernel, x, w, geometry, channels_last, **options):
    b = torch.randn(w.shape[0], dtype=x.dtype, device=x.device)
    out = by(kernel, x, w, b, geometry, channels_last=channels_last, **options)
    torch.testing.assert_close(out, expected_of(x, w, b, geometry), rtol=1e-5, atol=1e-4)


# Registers along C hold 4 to 16 lanes: fewer channels, whole registers, and what is left over; blocks of channels.
@of_cpu_algorithms
@pytest.mark.parametrize("channels", [1, 7, 40, 300])
@pytest.mark.parametrize("taps", [(3, 3), (5, 5), (7, 7), (4, 3)])
def test_depthwise_of_any_size(channels, taps, device):
    for stride, dilation in ((1, 1), (2, 1), (1, (2, 3))):
        geometry = Geometry.of(stride, (taps[0] // 2, taps[1] // 2), dilation, channels, "zeros", taps)
        w = torch.randn(channels, 1, *taps, device=device)
        for x in _layouts(torch.randn(1, channels, 19, 23, device=device)):
            for channels_last in (False, True):
                _check(algorithm.DEPTHWISE, x, w, geometry, channels_last)


@of_cpu_algorithms
@pytest.mark.parametrize("outputs", [1, 33, 48, 100])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_few_channels_of_any_size(channels, outputs, device):
    for taps, stride, padding in ((3, 1, 1), (7, 2, 3), (4, 4, 0), (3, (1, 5), 2)):
        geometry = Geometry.of(stride, padding, 1, 1, "zeros", (taps, taps))
        w = torch.randn(outputs, channels, taps, taps, device=device)
        for x in _layouts(torch.randn(2, channels, 13, 29, device=device)):
            for channels_last in (False, True):
                _check(algorithm.FEW_CHANNELS, x, w, geometry, channels_last)


@of_cpu_algorithms
def test_few_channels_of_a_patch_embedding(device):
    geometry = Geometry.of(16, 0, 1, 1, "zeros", (16, 16))
    x, w = torch.randn(1, 3, 48, 64, device=device), torch.randn(80, 3, 16, 16, device=device)
    for channels_last in (False, True):
        _check(algorithm.FEW_CHANNELS, x, w, geometry, channels_last)


@of_cpu_algorithms
@pytest.mark.parametrize("name", ["depthwise", "depthwise_strided", "multiplier", "few_channels", "one_channel"])
@pytest.mark.parametrize("activation", [None, *FUNCTIONS])
def test_depthwise_and_few_channels_with_all_that_follows(name, activation, device):
    kernel, x, w, b, geometry = problem(name)
    x, w, b = (tensor.to(device) for tensor in (x, w, b))
    plain = by(kernel, x, w, b, geometry)
    residual = torch.randn_like(plain)
    function = FUNCTIONS.get(activation)
    expected = plain if function is None else function(plain)
    added = plain + residual if function is None else function(plain + residual)
    for image, channels_last in ((x, False), (x.contiguous(memory_format=torch.channels_last), True), (x, True)):
        options = {"channels_last": channels_last, "activation": NUMBERS[activation]}
        for pool in (False, True):
            out = by(kernel, image, w, b, geometry, pool=pool, **options)
            torch.testing.assert_close(out, F.max_pool2d(expected, 2) if pool else expected, rtol=1e-5, atol=1e-5)
            for term in (residual, residual.contiguous(memory_format=torch.channels_last)):
                out = by(kernel, image, w, b, geometry, pool=pool, residual=term, **options)
                torch.testing.assert_close(out, F.max_pool2d(added, 2) if pool else added, rtol=1e-5, atol=1e-5)


@of_cpu_algorithms
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [3, 20])
def test_depthwise_and_few_channels_multiply_no_weight_with_padding(channels, value, device):
    x = torch.ones(1, channels, 6, 7, device=device)
    w = torch.ones(channels, 1, 3, 3, device=device)
    b = torch.zeros(channels, device=device)
    w[:, :, 0, 0] = value  # read by all but the first row and column
    geometry = Geometry.of(1, 1, 1, channels, "zeros", (3, 3))
    dense = torch.ones(channels, channels, 3, 3, device=device)
    dense[:, :, 0, 0] = value
    for channels_last in (False, True):
        for out in (
            by(algorithm.DEPTHWISE, x, w, b, geometry, channels_last=channels_last),
            by(
                algorithm.FEW_CHANNELS,
                x,
                dense,
                b,
                Geometry.of(1, 1, 1, 1, "zeros", (3, 3)),
                None,
                False,
                channels_last,
            ),
        ):
            assert out[:, :, 0].isfinite().all()
            assert out[:, :, :, 0].isfinite().all()
            assert not out[:, :, 1:, 1:].isfinite().any()


def test_few_channels_of_none(device):
    x, w = torch.randn(2, 0, 5, 6, device=device), torch.randn(3, 0, 3, 3, device=device)
    out = by(algorithm.FEW_CHANNELS, x, w, torch.arange(3.0, device=device), Geometry.of(1, 1, 1, 1, "zeros", (3, 3)))
    assert torch.equal(out, torch.arange(3.0, device=device).view(1, 3, 1, 1).expand(2, 3, 5, 6))


def test_depthwise_of_a_map_larger_than_the_caches():  # its outputs go past them
    x = torch.randn(1, 64, 260, 201).contiguous(memory_format=torch.channels_last)
    w, geometry = torch.randn(64, 1, 3, 3), Geometry.of(1, 1, 1, 64, "zeros", (3, 3))
    _check(algorithm.DEPTHWISE, x, w, geometry, True)
