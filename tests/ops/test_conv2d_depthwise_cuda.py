"""Depthwise convolution on CUDA, emulated: forward, and both gradients, against float64 by the library's rule."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyvision_kernels import _simt
from pyvision_kernels._activation import FUNCTIONS, NUMBERS
from pyvision_kernels.ops.conv2d.algorithm import DIRECT
from pyvision_kernels.ops.conv2d.backward import backward_input_op, backward_weight_op
from pyvision_kernels.ops.conv2d.geometry import Geometry
from pyvision_kernels.ops.conv2d.operator import conv2d_op
from tests.conftest import SEEDS
from tests.convolutions import MODES, expected_of, in_layout, within_the_rule

pytestmark = [pytest.mark.simt, pytest.mark.usefixtures("emulator")]

LAYOUTS = ("channels_last", "contiguous", "window")
# Strips of several outputs, idle lanes and several tiles; too few outputs for long strips; pairs of channels.
SIZES = {"wide": (2, 72, 13, 17), "narrow": (1, 40, 7, 6), "pairs": (2, 38, 11, 10)}


def _tensors(size, multiplier, taps, geometry, dtype, layout="contiguous"):
    """Input, weight, bias and the gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    outputs = size[1] * multiplier
    x = torch.randn(size, generator=generator).to(dtype)
    w = torch.randn(outputs, 1, *taps, generator=generator).to(dtype)
    b = torch.randn(outputs, generator=generator).to(dtype)
    g = torch.randn(size[0], outputs, *geometry.output_size(size[2:], taps), generator=generator).to(dtype)
    return in_layout(x, layout), w, b, in_layout(g, layout)


def _forward(x, w, b, geometry, layout, seed=SEEDS[-1], **options):
    arguments = {"scale": None, "shift": None, "residual": None, "activation": 0, "pool": False, **options}
    scale, shift, residual, activation, pool = arguments.values()
    with _simt.emulated(int(seed), global_races=True):
        return conv2d_op(
            *(x, w, b, scale, shift, residual, None, geometry.numbers, activation, pool),
            *(layout == "channels_last", DIRECT),
        )


def _gradients(g, x, w, geometry, layout, seed=SEEDS[-1]):
    """Of the input and of the weight."""
    numbers, last = geometry.numbers, layout == "channels_last"
    with _simt.emulated(int(seed), global_races=True):
        by_input = backward_input_op(g, w, None, numbers, list(x.shape[2:]), 0, last, DIRECT)
        return by_input, backward_weight_op(g, x, numbers, list(w.shape[2:]), False, DIRECT)


def _expected_gradients(g, x, w, geometry):
    left, right, top, bottom = geometry.padding
    padded = F.pad(x, geometry.padding)
    by_input, by_weight, _ = torch.ops.aten.convolution_backward(
        *(g, padded, w, None, geometry.stride, (0, 0), geometry.dilation, False, (0, 0), geometry.groups),
        (True, True, False),
    )
    rows, columns = padded.shape[2] - bottom, padded.shape[3] - right
    return by_input[:, :, top:rows, left:columns], by_weight


def _check_all(x, w, b, g, geometry, layout):
    """The forward and both gradients by the rule."""
    exact = [tensor.double() for tensor in (x, w, b)]
    within_the_rule(
        _forward(x, w, b, geometry, layout), expected_of(*exact, geometry), expected_of(x, w, b, geometry).to(x.dtype)
    )
    if geometry.padding_mode == 0:
        ours = _gradients(g, x, w, geometry, layout)
        exact = _expected_gradients(g.double(), x.double(), w.double(), geometry)
        for one, right, peer in zip(ours, exact, _expected_gradients(g, x, w, geometry), strict=True):
            within_the_rule(one, right, peer)


# ---- kernels with the taps and the stride as constants ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("taps", [3, 5, 7])
def test_square_taps(taps, stride, size, layout):
    geometry = Geometry.of(stride, taps // 2, 1, SIZES[size][1], "zeros", (taps, taps))
    dtypes = {"channels_last": (torch.float32, torch.bfloat16)}.get(layout, (torch.float32,))
    for dtype in dtypes:
        _check_all(*_tensors(SIZES[size], 1, (taps, taps), geometry, dtype, layout), geometry, layout)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, layout):
    for stride in (1, 2):
        geometry = Geometry.of(stride, 1, 1, 48, "zeros", (3, 3))
        _check_all(*_tensors((1, 48, 9, 11), 1, (3, 3), geometry, dtype, layout), geometry, layout)


# Of a padding that is odd, even, none, on one side, or beyond the taps: where strips of a strided gradient begin.
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("padding", [0, 2, (0, 1, 0, 1), (3, 0, 1, 2), (5, 4, 4, 5)])
def test_padding_on_four_sides(padding, layout):
    for stride, size in ((1, (1, 16, 9, 10)), (2, (1, 16, 9, 10)), (2, (2, 32, 12, 21))):
        geometry = Geometry.of(stride, padding, 1, size[1], "zeros", (3, 3))
        _check_all(*_tensors(size, 1, (3, 3), geometry, torch.float32, layout), geometry, layout)


def test_planes_smaller_than_the_taps_and_many_strips():
    for size in ((3, 9, 2, 1), (2, 40, 37, 33)):
        geometry = Geometry.of(1, 2, 1, size[1], "zeros", (5, 5))
        _check_all(*_tensors(size, 1, (5, 5), geometry, torch.float32), geometry, "contiguous")


# ---- the general ones ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("channels", "multiplier", "taps", "options"),
    [
        (5, 1, (3, 3), {"padding": 1}),  # no whole vector of channels
        (6, 3, (3, 3), {"padding": 1, "stride": 2}),
        (6, 2, (5, 5), {"padding": 2}),
        (8, 1, (4, 3), {"padding": (2, 1)}),
        (8, 1, (3, 3), {"padding": 2, "dilation": 2}),
        (8, 1, (3, 3), {"padding": (2, 3), "dilation": (2, 3), "stride": (2, 3)}),
        (8, 2, (1, 7), {"padding": (0, 3), "stride": (1, 2)}),
        (8, 1, (5, 5), {"padding": 2, "stride": 3}),
    ],
    ids=str,
)
def test_any_taps_strides_dilations_and_multipliers(channels, multiplier, taps, options, layout):
    geometry = Geometry.of(
        *(options.get("stride", 1), options["padding"], options.get("dilation", 1), channels, "zeros", taps)
    )
    _check_all(*_tensors((2, channels, 9, 10), multiplier, taps, geometry, torch.float32, layout), geometry, layout)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_modes(mode, layout):
    geometry = Geometry.of(1, (2, 1, 1, 2), 1, 8, mode, (3, 3))
    _check_all(*_tensors((2, 8, 6, 7), 1, (3, 3), geometry, torch.float32, layout), geometry, layout)


# ---- what follows the sums ----


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("activation", [None, *FUNCTIONS])
def test_what_follows_the_sums(activation, layout):
    geometry = Geometry.of(1, 1, 1, 16, "zeros", (3, 3))
    x, w, b, residual = _tensors((1, 16, 9, 11), 1, (3, 3), geometry, torch.bfloat16, layout)
    scale, shift = (torch.randn(16) for _ in range(2))  # float32 beside bfloat16
    function = FUNCTIONS.get(activation) or (lambda value: value)

    def of(x, w, b, residual):
        before = expected_of(x, w, b, geometry)
        return function(before * scale.to(x)[:, None, None] + shift.to(x)[:, None, None] + residual)

    values = [tensor.double() for tensor in (x, w, b, residual)]
    exact, peer = of(*values), of(*(value.float() for value in values)).bfloat16()
    given = {"scale": scale, "shift": shift, "activation": NUMBERS[activation]}
    for pool in (False, True):
        wanted = [F.max_pool2d(tensor, 2) for tensor in (exact, peer.double())] if pool else [exact, peer]
        for term in (residual, residual.transpose(2, 3).contiguous().transpose(2, 3)):
            out = _forward(x, w, b, geometry, layout, residual=term, pool=pool, **given)
            within_the_rule(out, wanted[0], wanted[1].bfloat16())


def test_a_transposed_convolution_has_a_bias_and_an_activation():
    for layout in LAYOUTS[:2]:
        geometry = Geometry.of(2, 1, 1, 16, "zeros", (3, 3))
        x, w, b, g = _tensors((2, 16, 8, 9), 1, (3, 3), geometry, torch.float32, layout)
        with _simt.emulated(int(SEEDS[-1])):
            last = layout == "channels_last"
            out = backward_input_op(g, w, b, geometry.numbers, [8, 9], NUMBERS["relu"], last, DIRECT)
        exact, _ = _expected_gradients(g.double(), x.double(), w.double(), geometry)
        peer, _ = _expected_gradients(g, x, w, geometry)
        within_the_rule(out, (exact + b.double()[:, None, None]).relu(), (peer + b[:, None, None]).relu())


# ---- values that are not finite ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(("taps", "stride"), [(3, 1), (3, 2), (5, 2), (7, 1)])
def test_no_value_is_multiplied_with_padding(taps, stride, layout, value):
    """A weight that lies beyond the edge, and a gradient at it, meet the pixels that are there and no others."""
    size = (1, 16, 8, 9)
    geometry = Geometry.of(stride, taps // 2, 1, 16, "zeros", (taps, taps))
    ones = torch.ones(size)
    x, w = in_layout(ones, layout), torch.ones(16, 1, taps, taps)
    w[:, :, 0, 0] = value
    g = in_layout(torch.ones(1, 16, *geometry.output_size(size[2:], (taps, taps))), layout)
    out = _forward(x, w, None, geometry, layout)
    reads = _forward(x, (w != 1).float(), None, geometry, layout) > 0  # who reads the pixel through this tap
    assert torch.equal(out.isfinite(), ~reads)
    by_input, _ = _gradients(g, x, w, geometry, layout)
    reads = _expected_gradients(g, ones, (w != 1).float(), geometry)[0] > 0
    assert torch.equal(by_input.isfinite(), ~reads)
    g[:, :, 0, 0] = value
    _, by_weight = _gradients(g, x, torch.ones_like(w), geometry, layout)
    assert torch.equal(by_weight.isfinite(), _taps_beyond(taps).expand_as(by_weight))
    g[:, :, 0, 0], x[:, :, 0, 0] = 1, value
    _, by_weight = _gradients(g, x, torch.ones_like(w), geometry, layout)
    reads = _expected_gradients(g, (x != 1).float(), w, geometry)[1] > 0
    assert torch.equal(by_weight.isfinite(), ~reads)


def _taps_beyond(taps):
    """Which taps of the first output lie in the padding."""
    inside = torch.arange(taps) >= taps // 2
    return ~(inside[:, None] & inside)


def test_a_value_that_is_not_finite_stays_with_its_channel_and_image():
    for layout in LAYOUTS[:2]:
        geometry = Geometry.of(1, 1, 1, 16, "zeros", (3, 3))
        x, w, b, g = _tensors((2, 16, 9, 10), 1, (3, 3), geometry, torch.float32, layout)
        x[1, 3, 4, 4] = float("inf")
        out, by_weight = _forward(x, w, b, geometry, layout), _gradients(g, x, w, geometry, layout)[1]
        for result, wrong in ((out, out[1, 3, 3:6, 3:6]), (by_weight, by_weight[3])):
            assert not wrong.isfinite().any()
            assert (~result.isfinite()).sum() == wrong.numel()


# ---- empty, and the same bits ----


def test_no_images_and_no_channels():
    geometry = Geometry.of(1, 1, 1, 16, "zeros", (3, 3))
    for layout in LAYOUTS[:2]:
        x, w, b, g = _tensors((0, 16, 5, 6), 1, (3, 3), geometry, torch.float32, layout)
        assert _forward(x, w, b, geometry, layout).shape == (0, 16, 5, 6)
        by_input, by_weight = _gradients(g, x, w, geometry, layout)
        assert by_input.shape == x.shape
        assert torch.equal(by_weight, torch.zeros_like(w))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(
    ("size", "taps", "options"),
    [
        ((2, 40, 13, 17), (3, 3), {"padding": 1}),
        ((1, 36, 9, 6), (5, 5), {"padding": 2, "stride": 2}),
        ((1, 10, 9, 6), (3, 3), {"padding": 2, "dilation": 2}),
    ],
)
def test_every_schedule_gives_the_same_bits(size, taps, options, layout):
    geometry = Geometry.of(
        *(options.get("stride", 1), options["padding"], options.get("dilation", 1), size[1], "zeros", taps)
    )
    x, w, b, g = _tensors(size, 1, taps, geometry, torch.float32, layout)
    runs = [
        (_forward(x, w, b, geometry, layout, seed), *_gradients(g, x, w, geometry, layout, seed)) for seed in range(6)
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))
