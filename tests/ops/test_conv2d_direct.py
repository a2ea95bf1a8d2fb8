"""The direct convolution on the CPU: depths and widths that are cut, narrow groups, infinite weights, bfloat16 dots and
tiles.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import functional as F

from pyvision_kernels._extension import LIBRARIES, cpu_capabilities, force_cpu_capability
from pyvision_kernels.ops.conv2d import algorithm
from pyvision_kernels.ops.conv2d.geometry import Geometry
from pyvision_kernels.ops.conv2d.operator import conv2d_op, pack
from pyvision_kernels.ops.linear import linear_op, linear_pack_op

every_capability = pytest.mark.parametrize("capability", cpu_capabilities())


@contextlib.contextmanager
def _without_bfloat16_dot():
    handle = LIBRARIES["CPU"].handle
    had = handle.pvk_set_cpu_bfloat16_dot(1) == 0
    handle.pvk_set_cpu_bfloat16_dot(0)
    try:
        yield
    finally:
        handle.pvk_set_cpu_bfloat16_dot(int(had))


@contextlib.contextmanager
def _tile_model():
    """bfloat16 by the software model of AMX's tile registers."""
    handle = LIBRARIES["CPU"].handle
    before = handle.pvk_cpu_amx()
    if handle.pvk_set_cpu_amx(2) != 0:
        pytest.skip("this CPU has no bfloat16 dot products, whose layout of weights the tiles share")
    try:
        assert handle.pvk_cpu_amx() == 2
        yield
    finally:
        handle.pvk_set_cpu_amx(1 if before else 0)


def _problem(size, outputs, taps, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(5)
    groups = options.get("groups", 1)
    x = torch.randn(size, generator=generator).contiguous(memory_format=torch.channels_last)
    w = torch.randn(outputs, size[1] // groups, taps, taps, generator=generator)
    w /= (w[0].numel()) ** 0.5
    geometry = Geometry.of(
        *(options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1)),
        groups,
        "zeros",
        (taps, taps),
    )
    return x.to(dtype), w.to(dtype), geometry


def _direct(x, w, geometry, packed=None, residual=None, activation=0, pool=False):
    tensors = (x, w, None, None, None, residual, packed)
    return conv2d_op(*tensors, geometry.numbers, activation, pool, True, algorithm.DIRECT)


def _expected(x, w, geometry):
    padded = F.pad(x.double(), tuple(geometry.padding))
    return F.conv2d(padded, w.double(), None, geometry.stride, 0, geometry.dilation, geometry.groups)


# Depths beyond one piece of a panel, by channels and by taps; outputs of 1 to 5 registers, and none that is whole.
SHAPES = [
    ((1, 600, 5, 7), 70, 1, {}),
    ((1, 300, 6, 5), 33, 3, {"padding": 1}),
    ((2, 33, 9, 8), 130, 5, {"padding": 2, "stride": 2}),
    ((1, 16, 23, 20), 3, 3, {"padding": 4, "dilation": 4}),
    ((1, 24, 14, 14), 24, 1, {}),
    ((1, 128, 9, 9), 128, 3, {"padding": 1, "groups": 32}),
    ((1, 64, 9, 9), 64, 3, {"padding": 1, "groups": 8, "stride": 2}),
    ((1, 24, 9, 9), 24, 3, {"padding": 1, "groups": 3}),
]


@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_the_dtype(shape, dtype, capability):
    size, outputs, taps, options = shape
    x, w, geometry = _problem(size, outputs, taps, dtype, **options)
    expected = _expected(x, w, geometry)
    unit = torch.finfo(dtype).eps
    with force_cpu_capability(capability):
        for packed in (None, pack(w, geometry, algorithm.DIRECT)):
            error = (_direct(x, w, geometry, packed).double() - expected).abs().max()
            assert error <= {torch.float32: 16, torch.float64: 64}.get(dtype, 4) * unit


@every_capability
@pytest.mark.parametrize("groups", [1, 8])
def test_an_infinite_weight_never_meets_the_padding(groups, capability):
    x, w, geometry = _problem((1, 64, 6, 6), 64, 3, padding=1, groups=groups)
    w[3, 4, 0, 0], w[5, 5, 1, 2] = float("inf"), float("nan")
    with force_cpu_capability(capability):
        out = _direct(x, w, geometry)
    # The tap at the upper left reads padding in the first row and column, the one at the right in the last column.
    assert out[0, 3, 1:, 1:].isinf().all()
    assert out[0, 5, :, :5].isnan().all()
    rest = out.clone()
    rest[0, 3, 1:, 1:] = rest[0, 5, :, :5] = 0
    assert rest.isfinite().all()


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "padded rows"])
@pytest.mark.parametrize("pool", [False, True])
def test_residual_of_any_layout(layout, pool):
    x, w, geometry = _problem((2, 20, 8, 10), 37, 3, padding=1)
    residual = torch.randn(2, 37, 8, 13).contiguous(memory_format=torch.channels_last)[..., 2:12]
    if layout != "padded rows":
        last = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        residual = residual.contiguous(memory_format=last)
    expected = torch.relu(_expected(x, w, geometry) + residual)
    expected = F.max_pool2d(expected, 2) if pool else expected
    out = _direct(x, w, geometry, residual=residual, activation=1, pool=pool)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 7, 64, 1200])
def test_bfloat16_without_dot_products(channels):
    x, w, geometry = _problem((1, channels, 7, 9), 50, 3, torch.bfloat16, padding=1)
    out = _direct(x, w, geometry)
    with _without_bfloat16_dot():
        upcast = _direct(x, w, geometry, pack(w, geometry, algorithm.DIRECT))
    expected = _expected(x, w, geometry)
    for result in (out, upcast):
        assert (result.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@every_capability
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_of_few_rows(rows, dtype, capability):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 301, generator=generator).to(dtype)
    w = (torch.randn(67, 301, generator=generator) / 17).to(dtype)
    residual = torch.randn(67, rows, generator=generator).to(dtype).t()
    expected = x.double() @ w.double().t() + residual.double()
    with force_cpu_capability(capability):
        for packed in (None, linear_pack_op(w)):
            out = linear_op(x, w, None, residual, packed, 0)
            assert (out.double() - expected).abs().max() <= 24 * torch.finfo(dtype).eps


# Tiles are 16 pixels x 32 channels by 16 outputs; pairs of each. Odd channels, last steps that overlap the one before,
# blocks with 1 to 32 pixels left, panels with a register left.
TILED = [
    ((1, 32, 5, 7), 16, 1, {}),
    ((2, 40, 9, 8), 33, 3, {"padding": 1}),
    ((1, 63, 8, 8), 80, 1, {}),
    ((2, 64, 17, 15), 64, 3, {"padding": 1, "stride": 2}),
    ((1, 100, 12, 33), 70, 3, {"padding": 2, "dilation": 2}),
    ((1, 33, 40, 40), 24, 2, {}),
    ((1, 96, 9, 9), 64, 3, {"padding": 1, "groups": 2}),
    ((1, 700, 6, 6), 130, 1, {}),
]


def _with_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_tiles_agree_with_float64(shape, pool):
    size, outputs, taps, options = shape
    x, w, geometry = _problem(size, outputs, taps, torch.bfloat16, **options)
    expected = _expected(x, w, geometry)
    residual = torch.randn_like(expected).bfloat16().contiguous(memory_format=torch.channels_last)
    dots = _direct(x, w, geometry, None, residual, 1, pool)
    expected = torch.relu(expected + residual.double())
    expected = F.max_pool2d(expected, 2) if pool else expected
    with _tile_model():
        results = [
            _with_threads(threads, lambda p=packed: _direct(x, w, geometry, p, residual, 1, pool))
            for packed in (None, pack(w, geometry, algorithm.DIRECT))
            for threads in (1, 2, 7)
        ]
    for result in results:
        assert torch.equal(result, results[0])
    # Sums are float32, in another order than the dot products': half a unit of each result, rounded once.
    tolerance = 2**-8 * expected.abs() + 1e-5
    assert ((results[0].double() - expected).abs() <= tolerance).all()
    torch.testing.assert_close(results[0], dots, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("activation", range(7))
def test_tiles_with_activations(activation):
    x, w, geometry = _problem((1, 48, 9, 11), 40, 3, torch.bfloat16, padding=1)
    dots = _direct(x, w, geometry, activation=activation)
    with _tile_model():
        tiled = _direct(x, w, geometry, activation=activation)
    torch.testing.assert_close(tiled, dots, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("rows", [15, 17, 32, 95])
def test_tiles_in_linear(rows):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 301, generator=generator).bfloat16()
    w = (torch.randn(67, 301, generator=generator) / 17).bfloat16()
    expected = x.double() @ w.double().t()
    with _tile_model():
        for packed in (None, linear_pack_op(w)):
            out = linear_op(x, w, None, None, packed, 0)
            assert ((out.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()


def test_tiles_keep_what_is_not_finite_where_it_is():
    x, w, geometry = _problem((1, 40, 9, 9), 64, 3, torch.bfloat16, padding=1)
    x[0, 39, 4, 4], x[0, 0, 0, 0] = float("nan"), float("inf")
    with _tile_model():
        out = _direct(x, w, geometry)
        w[3, 4, 0, 0] = float("inf")
        infinite = _direct(x, w, geometry)
    reached = torch.zeros(9, 9, dtype=torch.bool)
    reached[3:6, 3:6] = reached[:2, :2] = True
    assert not out[0, :, reached].isfinite().any()
    assert out[0, :, ~reached].isfinite().all()
    # The tap at the upper left reads padding in the first row and column.
    assert infinite[0, 3, 0, 2:].isfinite().all()
    assert torch.equal(infinite[0, 4].nan_to_num(), out[0, 4].nan_to_num())


def test_only_the_model_of_tiles_keeps_subnormals():
    x = torch.full((1, 32, 4, 4), 2.0**-130, dtype=torch.bfloat16)
    w = torch.full((16, 32, 1, 1), 2.0**120, dtype=torch.bfloat16)
    geometry = Geometry.of(1, 0, 1, 1, "zeros", (1, 1))
    with _tile_model():
        assert (_direct(x, w, geometry) == 2.0**-5).all()
        assert (_direct(x[:, :, :1, :3], w, geometry) == 0).all()  # too few pixels for a tile: dot products
        assert (_direct(x[:, :31], w[:, :31], geometry) == 0).all()  # too few channels


@pytest.mark.skipif("avx512" not in cpu_capabilities(), reason="needs two instruction sets with as large packs")
def test_weights_packed_for_another_instruction_set_are_packed_anew():
    x, w, geometry = _problem((1, 32, 9, 9), 64, 3, padding=1)
    with force_cpu_capability("avx2"):
        packed = pack(w, geometry, algorithm.DIRECT)
        expected = _direct(x, w, geometry)
    torch.testing.assert_close(_direct(x, w, geometry, packed), expected)
