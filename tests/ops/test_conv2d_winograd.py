"""Convolution by Winograd: any sizes, its error, and divisions of the work."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyvision_kernels._activation import FUNCTIONS
from pyvision_kernels.ops.conv2d import algorithm
from pyvision_kernels.ops.conv2d.geometry import Geometry
from pyvision_kernels.ops.conv2d.operator import pack
from tests.convolutions import MODES, by, expected_of

WINOGRADS = (algorithm.WINOGRAD2, algorithm.WINOGRAD4)


@pytest.mark.parametrize("kernel", WINOGRADS)
@pytest.mark.parametrize(
    ("size", "outputs", "padding"),
    [
        ((1, 1, 1, 1), 1, 1),
        ((1, 17, 3, 3), 130, 0),  # one pixel out; more than two panels of outputs, the last of two
        ((2, 5, 7, 9), 3, 2),
        ((1, 40, 5, 4), 33, (1, 2, 0, 5)),  # left, right, top, bottom
        ((2, 8, 4, 60), 24, 4),  # tiles that read nothing but padding
        ((1, 150, 10, 11), 80, 1),  # two chunks of channels
    ],
)
def test_winograd_of_any_size(kernel, size, outputs, padding):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(size, generator=generator)
    w = torch.randn(outputs, size[1], 3, 3, generator=generator) / (9 * size[1]) ** 0.5
    b = torch.randn(outputs, generator=generator)
    geometry = Geometry.of(1, padding, 1, 1, "zeros", (3, 3))
    exact = expected_of(x.double(), w.double(), b.double(), geometry)
    ours = by(kernel, x, w, b, geometry, channels_last=True)
    assert (ours - exact).norm() <= 2e-6 * exact.norm()
    if min(exact.shape[-2:]) > 1:
        pooled = F.max_pool2d(exact, 2)  # odd sizes lose their last row or column
        assert (by(kernel, x, w, b, geometry, pool=True) - pooled).norm() <= 2e-6 * pooled.norm()


@pytest.mark.parametrize("kernel", WINOGRADS)
@pytest.mark.parametrize(("channels", "side"), [(32, 46), (136, 30), (136, 7)])
def test_winograd_is_the_same_for_every_division_of_the_work(kernel, channels, side):
    generator = torch.Generator().manual_seed(2)
    last = torch.channels_last
    x = torch.randn(2, channels, side, side, generator=generator).contiguous(memory_format=last)
    w = torch.randn(72, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    b = torch.randn(72, generator=generator)
    residual = torch.randn(2, 72, side, side, generator=generator)
    geometry = Geometry.of(1, 1, 1, 1, "zeros", (3, 3))
    exact = (expected_of(x.double(), w.double(), b.double(), geometry) + residual).relu()
    relu = list(FUNCTIONS).index("relu") + 1
    packed = pack(w, geometry, kernel)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for added in (residual, residual.contiguous(memory_format=last)):
                for weight in (None, packed):
                    options = {"channels_last": True, "activation": relu, "residual": added}
                    runs.append(by(kernel, x, w, b, geometry, weight, **options))
    finally:
        torch.set_num_threads(threads)
    assert (runs[0] - exact).norm() <= 2e-6 * exact.norm()
    assert all(torch.equal(runs[0], other) for other in runs)


@pytest.mark.parametrize("kernel", WINOGRADS)
@pytest.mark.parametrize("padding_mode", range(1, len(MODES)))
def test_winograd_tiles_beyond_the_output_read_nothing(kernel, padding_mode):
    x = torch.randn(1, 3, 3, 2, generator=torch.Generator().manual_seed(1))
    w = torch.ones(2, 3, 3, 3)
    geometry = Geometry.of(1, 1, 1, 1, MODES[padding_mode], (3, 3))
    torch.testing.assert_close(by(kernel, x, w, None, geometry), expected_of(x, w, None, geometry))


@pytest.mark.parametrize("channels", [64, 512])
def test_the_error_of_large_tiles_does_not_grow_with_the_channels(channels):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, channels, 16, 16, generator=generator)
    w = torch.randn(48, channels, 3, 3, generator=generator)
    exact = F.conv2d(x.double(), w.double(), padding=1)
    ours = by(algorithm.WINOGRAD4, x, w, None, Geometry.of(1, 1, 1, 1, "zeros", (3, 3)))
    assert (ours - exact).norm() / exact.norm() <= 2e-6
