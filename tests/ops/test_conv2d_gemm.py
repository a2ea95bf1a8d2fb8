"""Convolution on CUDA as an implicit matrix product, emulated: forward and gradient of the input, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyvision_kernels import _simt
from pyvision_kernels._activation import FUNCTIONS
from pyvision_kernels.ops.conv2d.algorithm import DIRECT, TF32
from pyvision_kernels.ops.conv2d.backward import backward_input_op
from pyvision_kernels.ops.conv2d.geometry import Geometry
from pyvision_kernels.ops.conv2d.operator import conv2d_op, pack
from tests.conftest import SEEDS
from tests.convolutions import MODES, expected_of, in_layout, within_the_rule

pytestmark = [pytest.mark.simt, pytest.mark.usefixtures("emulator")]

# name -> (size of the input, outputs, taps, options)
PROBLEMS = {
    "vectors": ((2, 24, 9, 7), 40, (3, 3), {"padding": 1}),  # steps of the reduction over the ends of taps
    "split": ((1, 64, 5, 6), 72, (3, 3), {"padding": 1}),  # few tiles, a long reduction
    "odd": ((2, 13, 8, 11), 9, (3, 2), {"padding": (2, 0, 1, 3)}),
    "pointwise": ((3, 40, 7, 5), 70, (1, 1), {}),
    "first_layer": ((1, 3, 21, 18), 16, (7, 7), {"stride": 2, "padding": 3}),
    "strided": ((2, 16, 11, 12), 24, (3, 3), {"stride": (2, 3), "padding": 1}),
    "strides_over_taps": ((1, 16, 9, 10), 8, (1, 2), {"stride": 3}),  # most phases of the gradient have no tap
    "dilated": ((1, 16, 12, 13), 8, (3, 3), {"dilation": (2, 3), "padding": 2}),
    "dilation_beside_stride": ((1, 8, 15, 14), 16, (3, 3), {"dilation": (2, 3), "stride": (4, 2), "padding": 1}),
    "grouped": ((2, 32, 7, 6), 48, (3, 3), {"groups": 2, "padding": 1}),
    "many_groups": ((1, 12, 7, 8), 18, (3, 3), {"groups": 6, "padding": 1}),
}
# Enough pixels for each of the larger tiles of tensor cores: 128 x 32, 128 x 64, 128 x 128.
LARGE = {"narrow": ((1, 8, 131, 130), 24), "half": ((1, 8, 131, 130), 40), "whole": ((2, 8, 93, 91), 72)}
every_problem = pytest.mark.parametrize("name", PROBLEMS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _problem(name, dtype, layout="channels_last", padding_mode="zeros"):
    """Input, weight, bias and Geometry; in float64 of eighths, whose sums are exact."""
    size, outputs, taps, options = PROBLEMS[name]
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
    geometry = Geometry.of(*options.values(), padding_mode, taps)
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(size, generator=generator)
    w = torch.randn(outputs, size[1] // geometry.groups, *taps, generator=generator)
    b = torch.randn(outputs, generator=generator)
    if dtype == torch.float64:
        x, w, b = ((tensor * 8).round() / 8 for tensor in (x, w, b))
    return in_layout(x.to(dtype), layout), w.to(dtype), b.to(dtype), geometry


def _ours(x, w, b, geometry, seed=SEEDS[-1], last=False, kernel=DIRECT, packed=None, **options):
    given = {"scale": None, "shift": None, "residual": None, "activation": 0, "pool": False, **options}
    scale, shift, residual, activation, pool = given.values()
    with _simt.emulated(int(seed), global_races=True):
        return conv2d_op(x, w, b, scale, shift, residual, packed, geometry.numbers, activation, pool, last, kernel)


def _gradient(g, w, size, geometry, seed=SEEDS[-1], last=False, kernel=DIRECT):
    with _simt.emulated(int(seed), global_races=True):
        return backward_input_op(g, w, None, geometry.numbers, list(size[2:]), 0, last, kernel)


def _expected_gradient(g, w, size, geometry):
    left, right, top, bottom = geometry.padding
    height, width = size[2:]
    padded = g.new_empty(*size[:2], height + top + bottom, width + left + right)
    by_input = torch.ops.aten.convolution_backward(
        *(g, padded, w, None, geometry.stride, (0, 0), geometry.dilation, False, (0, 0), geometry.groups),
        (True, False, False),
    )[0]
    return by_input[:, :, top : top + height, left : left + width]


def _output_gradient(x, w, geometry, layout):
    size = x.shape[0], w.shape[0], *geometry.output_size(x.shape[2:], w.shape[2:])
    g = torch.randn(size, generator=torch.Generator().manual_seed(12))
    return in_layout(((g * 8).round() / 8 if x.dtype == torch.float64 else g).to(x.dtype), layout)


def _rounded(tensor):
    """To tf32: to the nearest of 10 fraction bits, ties away from zero."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@every_problem
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "window"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradient_of_the_input(name, layout, dtype):
    x, w, b, geometry = _problem(name, dtype, layout)
    ours, exact = _ours(x, w, b, geometry), expected_of(x.double(), w.double(), b.double(), geometry)
    g = _output_gradient(x, w, geometry, layout)
    grad, exact_grad = _gradient(g, w, x.shape, geometry), _expected_gradient(g.double(), w.double(), x.shape, geometry)
    if dtype == torch.float64:
        assert torch.equal(ours, exact)
        assert torch.equal(grad, exact_grad)
        return
    within_the_rule(ours, exact, expected_of(x, w, b, geometry))
    within_the_rule(grad, exact_grad, _expected_gradient(g, w, x.shape, geometry))


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(("dtype", "kernel"), [(torch.bfloat16, DIRECT), (torch.float32, TF32)])
def test_large_tiles(name, dtype, kernel):
    size, outputs = LARGE[name]
    geometry = Geometry.of(1, 0, 1, 1, "zeros", (1, 1))
    generator = torch.Generator().manual_seed(13)
    x, w = torch.randn(size, generator=generator), torch.randn(outputs, size[1], 1, 1, generator=generator)
    x, w = (_rounded(tensor) if kernel == TF32 else tensor.to(dtype) for tensor in (x, w))
    exact, peer = (expected_of(x.to(t), w.to(t), None, geometry) for t in (torch.float64, dtype))
    for layout in ("channels_last", "contiguous"):
        ours = _ours(in_layout(x, layout), w, None, geometry, last=layout == "channels_last", kernel=kernel)
        within_the_rule(ours, exact, peer)


@every_problem
def test_tf32_rounds_factors_and_nothing_else(name):
    x, w, b, geometry = _problem(name, torch.float32)
    ours = _ours(x, w, b, geometry, kernel=TF32)
    g = _output_gradient(x, w, geometry, "channels_last")
    grad = _gradient(g, w, x.shape, geometry, kernel=TF32)
    x, w, g = map(_rounded, (x, w, g))
    within_the_rule(ours, expected_of(x.double(), w.double(), b.double(), geometry), expected_of(x, w, b, geometry))
    exact = _expected_gradient(g.double(), w.double(), x.shape, geometry)
    within_the_rule(grad, exact, _expected_gradient(g, w, x.shape, geometry))


@pytest.mark.parametrize("name", ["vectors", "split", "odd", "first_layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedules_layouts_of_the_result_and_packing_change_no_bit(name, dtype):
    x, w, b, geometry = _problem(name, dtype)
    g = _output_gradient(x, w, geometry, "channels_last")
    expected, grad = _ours(x, w, b, geometry), _gradient(g, w, x.shape, geometry)
    with _simt.emulated():
        packed = pack(w, geometry, DIRECT)
    weights = {"packed": w, "channels_last": w.contiguous(memory_format=torch.channels_last)}
    for seed in (*SEEDS, 5):
        for last in (False, True):
            for how, weight in weights.items():
                kept = packed if how == "packed" else None
                ours = _ours(x, weight, b, geometry, seed, last, packed=kept)
                assert torch.equal(ours, expected)
                assert ours.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            assert torch.equal(_gradient(g, w, x.shape, geometry, seed, last), grad)


@pytest.mark.parametrize("name", ["vectors", "odd", "split"])
@pytest.mark.parametrize("padding_mode", MODES)
def test_padding_modes(name, padding_mode):
    x, w, b, geometry = _problem(name, torch.float64, padding_mode=padding_mode)
    assert torch.equal(_ours(x, w, b, geometry), expected_of(x, w, b, geometry))


@pytest.mark.parametrize("name", ["vectors", "split", "odd", "first_layer"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "window"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pool", [False, True])
def test_what_follows_is_in_the_same_pass(name, layout, dtype, pool):
    x, w, b, geometry = _problem(name, dtype, layout)
    generator = torch.Generator().manual_seed(14)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = (torch.randn(w.shape[0], generator=generator).to(wide) for _ in range(2))
    residual = _output_gradient(x, w, geometry, layout)
    options = {"scale": scale, "shift": shift, "residual": residual, "pool": pool}
    ours = _ours(
        x, w, b, geometry, last=layout == "channels_last", activation=list(FUNCTIONS).index("silu") + 1, **options
    )

    def by_steps(dtype):
        out = expected_of(x.to(dtype), w.to(dtype), b.to(dtype), geometry).to(dtype)
        out = out * scale.to(dtype).view(-1, 1, 1) + shift.to(dtype).view(-1, 1, 1) + residual.to(dtype)
        out = F.silu(out)
        return F.max_pool2d(out, 2) if pool else out

    within_the_rule(ours, by_steps(torch.float64), by_steps(dtype))


@pytest.mark.parametrize("name", ["vectors", "odd", "split", "strided"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_value_that_is_not_finite_stays_with_the_pixels_that_read_it(name, layout):
    x, w, b, geometry = _problem(name, torch.bfloat16, layout)
    x[0, 1, 0, 0] = float("inf")  # beside the padding, which is not to be multiplied with
    w[0, 0, 0, 0] = float("nan")  # of a tap that lies beyond the map at the edges
    ours, exact = _ours(x, w, b, geometry), expected_of(x.double(), w.double(), b.double(), geometry)
    if any(geometry.padding):
        # PyTorch multiplies the padding with NaN; ours does so too: a tap reads zeros there.
        assert torch.equal(ours.isnan().any(1), exact.isnan().any(1))
    finite = ours[:, 1:].isfinite()
    assert torch.equal(finite, exact[:, 1:].isfinite())
    assert finite.any()


def test_no_channels_give_the_activated_bias_and_no_outputs_nothing():
    geometry = Geometry.of(1, 1, 1, 1, "zeros", (3, 3))
    b = torch.tensor([-1.0, 2.0, 3.0])
    ours = _ours(torch.ones(2, 0, 6, 7), torch.ones(3, 0, 3, 3), b, geometry, activation=1)
    assert torch.equal(ours, b.relu().view(1, 3, 1, 1).expand(2, 3, 6, 7))
    g = torch.ones(2, 0, 6, 7)
    assert torch.equal(_gradient(g, torch.ones(0, 4, 3, 3), (2, 4, 6, 7), geometry), torch.zeros(2, 4, 6, 7))
