"""What is special to resizing: PyTorch's indices, weights, layouts, gradients, infinities, sizes and scales, layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels.ops import interpolate

MODES = [
    ("nearest", None, False),
    ("nearest-exact", None, False),
    ("bilinear", False, False),
    ("bilinear", True, False),
    ("bicubic", False, False),
    ("bicubic", True, False),
    ("bilinear", False, True),
    ("bilinear", True, True),
    ("bicubic", False, True),
    ("area", None, False),
]
every_mode = pytest.mark.parametrize(
    "options",
    [dict(zip(("mode", "align_corners", "antialias"), mode, strict=True)) for mode in MODES],
    ids=lambda options: "-".join(str(option) for option in options.values()),
)
# Larger, smaller, both, one pixel, the same, far smaller (more registers than taps are picked from), a wide one.
SIZES = [(26, 82), (5, 17), (40, 9), (1, 1), (13, 41), (13, 60), (29, 41), (2, 3), (3, 300)]


def _layouts(input):
    last = input.contiguous(memory_format=torch.channels_last)
    return input, last, input.mT.contiguous().mT, last[:, :, 1:, 1:], input[:, :, 1:, 1:], input[:, 1:], last[:, ::2]


def _close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def _compare(input, close=_close, **options):
    leaf = input.detach().requires_grad_()
    ours, theirs = (resize(leaf, **options) for resize in (interpolate, F.interpolate))
    close(ours, theirs)
    assert ours.stride() == theirs.stride()
    inconsistent = options["mode"] == "bicubic" or options["antialias"]
    if "scale_factor" in options and inconsistent and theirs.shape == input.shape:
        return  # one of PyTorch's forward and gradient is then the identity's, and the other is not
    grad = torch.randn_like(theirs)
    for direction in (grad, grad[:, :, :1, :1].expand_as(grad)):
        mine, other = (torch.autograd.grad(out, leaf, direction, retain_graph=True)[0] for out in (ours, theirs))
        close(mine, other)


@every_mode
@pytest.mark.parametrize("channels", [1, 3, 18])
def test_values_and_gradients_are_torchs(device, options, channels):
    input = torch.randn(2, channels + 1, 13, 41, dtype=torch.float64, device=device)
    for size in SIZES:
        for like in _layouts(input) if size in SIZES[:3] else _layouts(input)[:2]:
            _compare(like, size=size, **options)


@every_mode
@pytest.mark.parametrize("factor", [2, 0.5, 1.7, (0.31, 3.3), 1.04, (8, 0.11)], ids=str)
def test_scale_factors_are_used_as_torch_uses_them(device, options, factor):
    input = torch.randn(1, 5, 11, 23, dtype=torch.float64, device=device)
    for like in (input, input.contiguous(memory_format=torch.channels_last)):
        for recompute in (None, False, True):
            _compare(like, scale_factor=factor, recompute_scale_factor=recompute, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_the_nearest_pixel_is_torchs_for_every_size(one_thread, mode, dtype):
    # Of results so small that PyTorch computes every index in float32, and by halves where a side doubles.
    for length in (1, 7, 50, 97):
        row = torch.arange(length, dtype=dtype).view(1, 1, 1, length)
        for column in (row, row.mT):
            for count in range(1, 127):
                size = (1, count) if column is row else (count, 1)
                assert torch.equal(interpolate(column, size, mode=mode), F.interpolate(column, size, mode=mode))
            for factor in (0.3, 0.7, 1.1, 1.01, 1.3333333, 2.0, 2.01, 2.3, 3.0, 7.7):
                if 0 < int(length * factor) < 127:
                    factors = (1.0, factor) if column is row else (factor, 1.0)
                    ours, theirs = (f(column, None, factors, mode) for f in (interpolate, F.interpolate))
                    assert torch.equal(ours, theirs)
    if dtype != torch.float64:
        row = torch.arange(97, dtype=dtype).view(1, 1, 97)
        for count in (1, 5, 500, 3001):
            assert torch.equal(interpolate(row, count, mode=mode), F.interpolate(row, count, mode=mode))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_mode
def test_weights_are_torchs(one_thread, options, dtype):
    # Of rows of the identity: what each output reads, and by what weight. No weight is read where PyTorch has none.
    for length in (1, 2, 9, 40):
        rows = torch.eye(length, dtype=dtype).view(1, length, 1, length)
        for count in (1, 2, 5, 9, 18, 27, 39, 41, 80, 131):
            ours, theirs = (f(rows, (1, count), **options) for f in (interpolate, F.interpolate))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * (length + 8) * torch.finfo(dtype).eps)


@every_mode
def test_infinities_go_where_torchs_go(device, options):
    # Also by weights that are zero, and by both taps of the last pixel.
    torch.manual_seed(3)
    for channels in (1, 3, 20):
        input = torch.randn(2, channels, 16, 24, dtype=torch.float64, device=device)
        input[torch.rand_like(input) < 0.02] = torch.inf
        input[torch.rand_like(input) < 0.02] = -torch.inf
        input[..., -1, -1] = torch.inf
        for like in (input, input.contiguous(memory_format=torch.channels_last)):
            for size in ((32, 48), (8, 12), (16, 48), (16, 24), (64, 12)):
                ours, theirs = (f(like, size, **options) for f in (interpolate, F.interpolate))
                torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear", "area"])
def test_rows_are_resized_as_torch_does(device, mode):
    input = torch.randn(3, 5, 100, dtype=torch.float64, device=device)
    input[..., 7] = torch.inf
    for like in (input, input.mT.contiguous().mT):
        for arguments in ((200,), ([37],), (None, 1.3), (None, [0.2])):
            ours, theirs = (f(like, *arguments, mode=mode) for f in (interpolate, F.interpolate))
            torch.testing.assert_close(ours, theirs, equal_nan=True)
    for corners in (False, True):
        ours, theirs = (f(input, 130, mode="linear", align_corners=corners) for f in (interpolate, F.interpolate))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_summed_in_float32(device, dtype):
    # In 16 bits the gradient of one pixel that a thousand outputs read stops growing, or is infinite.
    leaf = torch.ones(1, 16, 1, 1, dtype=dtype, device=device, requires_grad=True)
    for like in (leaf, leaf.contiguous(memory_format=torch.channels_last)):
        for mode in ("nearest", "bilinear"):
            output = interpolate(like, (50, 60), mode=mode)
            (grad,) = torch.autograd.grad(output, like, torch.full_like(output, 2.0))
            torch.testing.assert_close(grad, torch.full_like(grad, 6000.0))


@every_mode
def test_double_backward_is_the_forward(options):
    input = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    resize = lambda value: interpolate(value, (8, 4), **options)  # noqa: E731
    assert torch.autograd.gradcheck(resize, input)
    assert torch.autograd.gradgradcheck(resize, input)


@every_mode
def test_vmap_resizes_the_larger_batch(options):
    batch = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    resize = lambda value: interpolate(value, (6, 13), **options)  # noqa: E731
    _close(torch.vmap(resize)(batch), torch.stack([resize(item) for item in batch]))
    grads = torch.vmap(torch.func.grad(lambda value: resize(value).sin().sum()))(batch)
    _close(grads[1], torch.func.grad(lambda value: resize(value).sin().sum())(batch[1]))


LAYERS = {
    "scale": (nn.Upsample, {"scale_factor": 2}),
    "bilinear": (nn.Upsample, {"scale_factor": 1.5, "mode": "bilinear", "align_corners": True}),
    "recomputed": (
        nn.Upsample,
        {"scale_factor": (1.3, 2.2), "mode": "bicubic", "recompute_scale_factor": True},
    ),
    "size": (nn.Upsample, {"size": (7, 30), "mode": "nearest-exact"}),
    "nearest": (nn.UpsamplingNearest2d, {"scale_factor": 3}),
    "corners": (nn.UpsamplingBilinear2d, {"size": 20}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_torchs(name):
    stock_class, options = LAYERS[name]
    stock, ours = stock_class(**options), getattr(pvk.nn, stock_class.__name__)(**options)
    assert repr(ours) == repr(stock)
    assert not ours.state_dict()
    input = torch.randn(2, 3, 9, 11)
    torch.testing.assert_close(ours(input), stock(input))
    converted = pvk.convert(nn.Sequential(nn.ReLU(), stock))
    assert type(converted[1]) is type(ours)
    assert any(line.startswith("interpolate") for line in pvk.explain(converted, input))
    assert torch.equal(converted(input), ours(input.relu()))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(input).dtype == stock(input).dtype


def test_layers_take_what_the_stock_layers_take():
    layer = pvk.nn.Upsample(scale_factor=2)
    images = torch.randint(0, 255, (1, 3, 4, 5), dtype=torch.uint8)
    assert torch.equal(layer(images), F.interpolate(images, scale_factor=2))
    volumes = torch.randn(1, 2, 3, 4, 5)
    assert torch.equal(layer(volumes), F.interpolate(volumes, scale_factor=2))
    with pytest.raises(NotImplementedError, match="Got 3D input, but bilinear mode needs 4D input"):
        pvk.nn.Upsample(scale_factor=2, mode="bilinear")(torch.randn(1, 2, 3))


def test_operators_refuse_numbers_that_could_read_outside():
    input = torch.ones(1, 2, 4, 4)
    for filters, rows, factor in (([0, 9], 4, 0.0), ([2], 4, 0.0), ([2, 2], 0, 0.0), ([2, 2], 4, float("nan"))):
        with pytest.raises(RuntimeError, match=r"^interpolate: expected"):
            torch.ops.pvk.interpolate(input, filters, rows, 4, False, factor, 0.0)
    for factor in (1e-300, 1e-20, 1e20, 1e300):  # that do not go with the sizes
        for filter in range(6):
            output = torch.ops.pvk.interpolate(input, [filter, filter], 7, 3, False, factor, factor)
            assert output.shape == (1, 2, 7, 3)
            torch.ops.pvk._interpolate_backward(output, [filter, filter], 4, 4, False, factor, factor, False)


def test_auto_takes_ours_but_where_torchs_are_faster():
    planes, few = torch.ones(1, 16, 32, 32), torch.ones(1, 3, 64, 64)
    last = planes.contiguous(memory_format=torch.channels_last)
    with pvk.backend("auto"):
        for ours in (planes, few, few.contiguous(memory_format=torch.channels_last)):
            assert pvk.explain(interpolate, ours, (64, 64))
        assert pvk.explain(interpolate, last, (64, 64), mode="bicubic")
        assert pvk.explain(interpolate, last, (64, 64), mode="bilinear", antialias=True)
        assert not pvk.explain(interpolate, last, (64, 64), mode="bilinear")
        assert not pvk.explain(interpolate, torch.ones(1, 2, 4, 4), (8, 8))
    with pvk.backend("torch"):
        assert not pvk.explain(interpolate, planes, (64, 64))


@pytest.mark.parametrize("factor", [1.1, 2.3])
def test_auto_reads_the_same_pixels_whatever_the_batch(factor):
    rows = torch.arange(7.0).expand(1, 1000, 7).contiguous()
    with pvk.backend("auto"):
        assert torch.equal(
            pvk.ops.interpolate(rows[:, :10], scale_factor=factor)[0, 0],
            pvk.ops.interpolate(rows, scale_factor=factor)[0, 0],
        )


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": math.nan},
        {"scale_factor": math.inf},
        {"scale_factor": 1e30},
        {"scale_factor": "2"},
        {"size": True},
        {"size": 2**70},
        {"size": (2**31, 1)},
        {"size": 4, "mode": "bilinear", "align_corners": "x"},
    ],
)
def test_hostile_arguments_are_refused_in_words(options):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"^interpolate: expected .*, but got "):
        pvk.ops.interpolate(torch.ones(1, 1, 4, 4), **options)
