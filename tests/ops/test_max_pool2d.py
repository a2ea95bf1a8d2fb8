"""What is special to max pooling: indices, NaN, windows without pixels, double backward, vmap, layouts, unpool."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels.ops import adaptive_max_pool2d, max_pool1d, max_pool2d, max_unpool2d
from pyvision_kernels.ops.max_pool2d import max_pool2d_backward_op, max_pool2d_op, max_unpool2d_op

NAN, INF = math.nan, math.inf


def _hostile(*size, dtype=torch.float32):
    """Few values, so that many are equal, with NaN and infinities among them."""
    input = (torch.randn(size) * 2).round()
    kinds = torch.randint(0, 12, size)
    for number, value in enumerate((NAN, INF, -INF)):
        input = torch.where(kinds == number, value, input)
    return input.to(dtype)


def _layouts(input):
    last = input.contiguous(memory_format=torch.channels_last)
    return input, last, input.mT.contiguous().mT, last[:, :, 1:, 1:], input[:, :, 1:, 1:], input[:, 1:], last[:, ::2]


# Windows, strides, paddings, dilations of rows and columns that take each way through the kernels.
WINDOWS = [
    ((2, 2), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 5), (3, 4), (0, 2), (1, 1)),
    ((4, 2), (1, 3), (2, 1), (2, 7)),
    ((2, 33), (1, 1), (1, 16), (1, 1)),
    ((9, 3), (7, 9), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("channels", [1, 3, 18])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_values_and_indices_are_torchs(device, window, channels):
    kernel, stride, padding, dilation = window
    input = _hostile(2, channels + 1, 13, 41)
    for like in _layouts(input.to(device)):
        for ceil in (False, True):
            arguments = kernel, stride, padding, dilation, ceil, True
            values, indices = max_pool2d(like, *arguments)
            theirs = F.max_pool2d(like, *arguments)
            torch.testing.assert_close(values, theirs[0], rtol=0, atol=0, equal_nan=True)
            assert torch.equal(indices, theirs[1])
            assert indices.dtype == torch.int64
            only_values = max_pool2d(like, *arguments[:-1])
            torch.testing.assert_close(only_values, values, rtol=0, atol=0, equal_nan=True)
            assert values.stride() == theirs[0].stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_and_indices_are_torchs_in_other_dtypes(device, dtype):
    for like in _layouts(_hostile(2, 17, 9, 70, dtype=dtype).to(device)):
        for window in (2, (3, 2, 1), ((5, 50), 1, (2, 25))):
            arguments = (window,) if isinstance(window, int) else window
            ours, theirs = (pool(like, *arguments, return_indices=True) for pool in (max_pool2d, F.max_pool2d))
            torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
            assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("output_size", [1, (3, 5), (13, 41), (17, 50), (1, 7)], ids=str)
def test_adaptive_values_and_indices_are_torchs(device, output_size):
    for like in _layouts(_hostile(2, 18, 13, 41).to(device)):
        ours, theirs = (pool(like, output_size, True) for pool in (adaptive_max_pool2d, F.adaptive_max_pool2d))
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ours[1], theirs[1])


def test_rows_are_pooled_as_torch_does(device):
    input = _hostile(3, 5, 100).to(device)
    for like in (input, input.mT.contiguous().mT, input[0]):
        for arguments in ((2,), (3, 2, 1), (40, 3, 20), (3, 1, 1, 5, True)):
            ours, theirs = (pool(like, *arguments, return_indices=True) for pool in (max_pool1d, F.max_pool1d))
            torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
            assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradients_are_torchs(device, window):
    input = (torch.randn(2, 18, 13, 41, device=device) * 2).round()
    for like in _layouts(input):
        leaf = like.detach().requires_grad_()
        ours, theirs = max_pool2d(leaf, *window), F.max_pool2d(leaf, *window)
        grad = torch.randint(-8, 9, ours.shape, device=device).float()  # sums are exact in any order
        for direction in (grad, grad.mT.contiguous().mT, grad[:, :, :1, :1].expand_as(grad)):
            (mine,) = torch.autograd.grad(ours, leaf, direction, retain_graph=True)
            assert torch.equal(mine, torch.autograd.grad(theirs, leaf, direction, retain_graph=True)[0])


def test_windows_without_pixels_have_no_maximum_and_no_gradient(device):
    for channels in (1, 20):
        for last in (False, True):
            input = torch.randn(2, channels, 9, 5, device=device)
            input = input.contiguous(memory_format=torch.channels_last) if last else input
            input.requires_grad_()
            values, indices = max_pool2d(input, 2, 1, 1, (10, 1), return_indices=True)
            assert (values == -INF).all()
            assert (indices == -1).all()
            (grad,) = torch.autograd.grad(values.sum(), input)
            assert not grad.any()


def test_places_outside_of_the_map_are_ignored(device):
    for channels in (1, 20):
        places = torch.tensor([-1, 24, 2**31 - 1, -(2**31), 3, 23], dtype=torch.int32, device=device)
        places = places.view(1, 1, 2, 3).expand(2, channels, 2, 3)
        grad = torch.ones(places.shape, device=device)
        for last in (False, True):
            grad_input = max_pool2d_backward_op(grad, places, [2, 2, 2, 2, 0, 0, 1, 1], 4, 6, last)
            assert grad_input.sum() <= 2 * 2 * channels


@pytest.mark.parametrize("arguments", [(2,), (3, 2, 1), ((2, 3), 1, 1, (2, 1))], ids=str)
def test_gradcheck_and_gradgradcheck(device, arguments):
    for channels in (2, 9):
        input = torch.randperm(channels * 30, device=device).view(1, channels, 6, 5).double() / 7
        for like in (input, input.contiguous(memory_format=torch.channels_last)):
            leaf = like.requires_grad_()
            torch.autograd.gradcheck(lambda x: max_pool2d(x, *arguments), leaf, fast_mode=True)
            torch.autograd.gradgradcheck(lambda x: max_pool2d(x, *arguments), leaf, fast_mode=True)
    row = torch.randperm(60, device=device).view(2, 30).double().requires_grad_()
    torch.autograd.gradgradcheck(lambda x: max_pool1d(x, 3, 2), row, fast_mode=True)
    torch.autograd.gradgradcheck(lambda x: adaptive_max_pool2d(x, (2, 3)), leaf, fast_mode=True)


def test_gradient_that_was_not_in_sight(device):
    # Of the operator without places, as a graph that was traced without gradients calls it.
    input = torch.randn(2, 3, 8, 9, device=device, requires_grad=True)
    values, places = max_pool2d_op(input, [2, 2, 2, 2, 0, 0, 1, 1], 4, 4, False)
    assert places.numel() == 0
    (ours,) = torch.autograd.grad(values.sum(), input)
    assert torch.equal(ours, torch.autograd.grad(F.max_pool2d(input, 2).sum(), input)[0])


@pytest.mark.parametrize("dim", [0, 1, 4])
def test_vmap_equals_a_loop(device, dim):
    input = torch.randn(3, 2, 4, 9, 10, device=device).movedim(0, dim)

    def pooled(x):
        return max_pool2d(x, 3, 2, 1)

    def grad(x):
        return torch.func.grad(lambda y: pooled(y).square().sum())(x)

    def with_indices(x):
        return max_pool2d(x, 2, return_indices=True)[1]

    for function in (pooled, grad, with_indices):
        looped = torch.stack([function(x) for x in input.unbind(dim)])
        assert torch.equal(torch.func.vmap(function, dim)(input), looped)
    values, indices = max_pool2d(input.movedim(dim, 0).flatten(0, 1), 2, return_indices=True)
    values, indices = values.unflatten(0, (3, 2)), indices.unflatten(0, (3, 2))
    for dims in ((0, 0), (0, None), (None, 0)):
        given = [x if d == 0 else x[0] for x, d in zip((values, indices), dims, strict=True)]
        looped = torch.stack(
            [max_unpool2d(*(x[i] if d == 0 else x for x, d in zip(given, dims, strict=True)), 2) for i in range(3)]
        )
        assert torch.equal(torch.func.vmap(lambda v, i: max_unpool2d(v, i, 2), dims)(*given), looped)


def _unpooled_by_torch(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return F.max_unpool2d(*arguments)


@pytest.mark.parametrize("channels", [1, 3, 20])
def test_unpool_of_repeated_indices_takes_the_last(device, channels):
    input = torch.randn(2, channels, 5, 6)
    indices = torch.randint(0, 20, input.shape)
    expected = torch.zeros(2, channels, 80)
    for element in range(30):
        expected.scatter_(
            2, indices.flatten(2)[..., element : element + 1], input.flatten(2)[..., element : element + 1]
        )
    for last in (False, True):
        like = input.contiguous(memory_format=torch.channels_last) if last else input
        ours = max_unpool2d_op(like.to(device), indices.to(device), 8, 10)
        assert torch.equal(ours.cpu().flatten(2), expected)


def test_unpool_of_indices_outside(device, request):
    input, indices = torch.ones(1, 2, 2, 2, device=device), torch.arange(4, device=device).view(1, 1, 2, 2)
    for wrong in (-1, 16, 2**40, -(2**63), 2**31):
        bad = indices.repeat(1, 2, 1, 1)
        bad[0, 1, 1, 0] = wrong
        if "simt" in request.node.name or device == "cuda":  # left out
            output = max_unpool2d(input, bad, 2)
            assert output[0, 0].sum() == 4
            assert output[0, 1].sum() == 3
            continue
        with pytest.raises(RuntimeError, match=rf"indices to lie in an output of 4 x 4 pixels, but got {wrong}$"):
            max_unpool2d(input, bad, 2)


def test_unpool_has_the_gradient_of_torch(device):
    values, indices = F.max_pool2d(
        torch.randn(2, 3, 8, 9, device=device, dtype=torch.float64), 3, 2, 1, return_indices=True
    )
    for like in (values, values.contiguous(memory_format=torch.channels_last)):
        leaf = like.detach().requires_grad_()
        grad = torch.randn(2, 3, 8, 9, device=device, dtype=torch.float64)
        ours = max_unpool2d(leaf, indices, 3, 2, 1, (8, 9))
        theirs = _unpooled_by_torch(leaf, indices, 3, 2, 1, (8, 9))
        for output in (ours, theirs):
            (mine,) = torch.autograd.grad(output, leaf, grad)
            assert torch.equal(mine, grad.flatten(2).gather(2, indices.flatten(2)).view_as(leaf))
    distinct = torch.randperm(8 * 9, device=device)[:20].view(1, 1, 4, 5)
    leaf = torch.randn(1, 1, 4, 5, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: max_unpool2d_op(x, distinct, 8, 9), leaf, fast_mode=True)
    torch.autograd.gradgradcheck(lambda x: max_unpool2d_op(x, distinct, 8, 9), leaf, fast_mode=True)


# Stock constructor, arguments, size of an input.
LAYERS = {
    "max_pool2d": (nn.MaxPool2d, (3, 2, 1), (2, 4, 9, 11)),
    "max_pool2d_indices": (nn.MaxPool2d, (2, None, 0, 1, True, True), (4, 9, 11)),
    "max_pool1d": (nn.MaxPool1d, (3, 2, 1), (2, 4, 11)),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d, ((3, None), True), (2, 4, 9, 11)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_drop_ins(name):
    stock_class, arguments, size = LAYERS[name]
    stock, ours = stock_class(*arguments), getattr(pvk.nn, stock_class.__name__)(*arguments)
    input = torch.randn(size)
    leaf = input.clone().requires_grad_()
    for x in (input, leaf, input.double(), input.bfloat16()):
        for mine, theirs in zip(_tuple(ours(x)), _tuple(stock(x)), strict=True):
            assert torch.equal(mine, theirs)
    assert isinstance(ours, stock_class)
    assert repr(ours) == repr(stock)
    assert ours.__dict__.keys() == stock.__dict__.keys()
    for bad in (input.sum(), input[..., :0], input[None, None], input.to(torch.complex64)):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
            stock(bad)
        with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
            ours(bad)
        assert str(caught.value) == str(expected.value)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_tuple(ours(input))[0], _tuple(stock(input))[0])
    traced = torch.fx.symbolic_trace(ours)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_function", "output"]
    assert torch.equal(_tuple(traced(input))[0], _tuple(stock(input))[0])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(_tuple(compiled(input))[0], _tuple(stock(input))[0])
    many = torch.stack([input, input + 1])
    assert torch.equal(_tuple(torch.vmap(ours)(many))[0], _tuple(torch.vmap(stock)(many))[0])


def test_unpool_layer_is_a_drop_in():
    stock, ours = nn.MaxUnpool2d(2, padding=0), pvk.nn.MaxUnpool2d(2, padding=0)
    values, indices = F.max_pool2d(torch.randn(2, 3, 9, 10), 2, return_indices=True)
    for arguments in ((values, indices + 0), (values[0], indices[0]), (values.to(torch.complex64), indices)):
        size = [*values.shape[:-2], 9, 10] if arguments[0].dim() == 4 else [9, 10]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = stock(*arguments, output_size=size)
            except RuntimeError as error:
                with pytest.raises(RuntimeError) as caught:
                    ours(*arguments, output_size=size)
                assert str(caught.value) == str(error)  # noqa: PT017
            else:
                assert torch.equal(ours(*arguments, output_size=size), expected)
            with pytest.raises(RuntimeError, match="Found an invalid max index"):
                ours(arguments[0].real, arguments[1] + 100)
    assert repr(ours) == repr(stock)


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(
    ("size", "layout", "trains", "ours"),
    [
        ((1, 16, 64, 64), "contiguous_format", False, "max avg adaptive largest"),
        ((1, 16, 64, 64), "contiguous_format", True, "max avg adaptive largest"),
        ((1, 16, 64, 64), "channels_last", False, ""),
        ((1, 32, 64, 64), "channels_last", False, "max adaptive largest"),
        ((1, 32, 64, 64), "channels_last", True, "mean"),
        ((1, 32, 128, 128), "channels_last", False, "max avg adaptive largest"),
        ((1, 32, 128, 128), "channels_last", True, "max mean"),
        ((2, 32, 128, 128), "channels_last", True, "max avg mean"),
        ((2, 64, 128, 128), "channels_last", True, "max avg adaptive mean largest"),
        ((1, 3, 128, 128), "channels_last", True, "max avg adaptive largest"),
        ((1, 16, 8, 8), "contiguous_format", False, "max avg adaptive largest"),
        ((1, 16, 8, 8), "contiguous_format", True, ""),
        ((1, 16, 8, 8), "channels_last", False, ""),
    ],
)
def test_auto_takes_the_kernels_that_were_measured_faster(size, layout, trains, ours):
    input = torch.randn(size).contiguous(memory_format=getattr(torch, layout)).requires_grad_(trains)
    calls = {
        "max": lambda: pvk.ops.max_pool2d(input, 2),
        "avg": lambda: pvk.ops.avg_pool2d(input, 2),
        "adaptive": lambda: pvk.ops.adaptive_max_pool2d(input, 7),
        "mean": lambda: pvk.ops.adaptive_avg_pool2d(input, 1),
        "largest": lambda: pvk.ops.adaptive_max_pool2d(input, 1),
    }
    found = []
    for name, call in calls.items():
        with pvk.backend("auto"), torch.profiler.profile(acc_events=True) as profile:
            call()
        found += [name] * any(event.name.startswith("pvk::") for event in profile.events())
    assert found == ours.split()


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_auto_leaves_no_window_without_a_pixel_to_torch(layout):
    input = torch.randn(2, 8, 2, 70).contiguous(memory_format=getattr(torch, layout)).requires_grad_()
    window = {"kernel_size": 2, "stride": (1, 5), "padding": 1, "dilation": 3}
    with pvk.backend("auto"):
        values, places = pvk.ops.max_pool2d(input, **window, return_indices=True)
    assert torch.equal(places == -1, values == -INF)
    assert (places == -1).any()
    (grad,) = torch.autograd.grad(values.sum(), input)
    assert grad.sum() == (places != -1).sum()


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.AdaptiveAvgPool2d(1), (2, 4, 3, 8, 8)),
        (nn.AdaptiveAvgPool2d(1), (8, 8)),
        (nn.MaxPool2d(torch.tensor(2)), (1, 2, 4, 4)),
    ],
    ids=["video", "plane", "tensor"],
)
@pytest.mark.parametrize("backend", ["auto", "pvk"])
def test_layers_take_what_the_stock_layer_takes(layer, size, backend):
    input = torch.randn(size)
    expected = layer(input)
    with pvk.backend(backend):
        assert torch.equal(pvk.convert(layer)(input), expected)
    pvk.revert(layer)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 0, 3), (1, 1, 3, 0), (1, 16, 0, 3)], ids=str)
@pytest.mark.parametrize("window", [[], [2, 2, 2, 2, 0, 0, 1, 1]], ids=["adaptive", "plain"])
def test_operators_take_a_map_without_pixels(window, size, layout):
    input = torch.zeros(size).contiguous(memory_format=layout)
    values, places = max_pool2d_op(input, window, 1, 1, True)
    assert torch.equal(values, torch.full((*size[:2], 1, 1), -INF))
    assert torch.equal(places, torch.full_like(places, -1))
    average = torch.ops.pvk.avg_pool2d(input, window, 1, 1, True, 0)
    assert average.shape == values.shape
