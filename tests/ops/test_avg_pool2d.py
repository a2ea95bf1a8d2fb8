"""What is special to average pooling: divisors, sums in 16 bits, layouts, double backward, vmap, layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels.ops import adaptive_avg_pool2d, avg_pool1d, avg_pool2d


def _layouts(input):
    last = input.contiguous(memory_format=torch.channels_last)
    return input, last, input.mT.contiguous().mT, last[:, :, 1:, 1:], input[:, :, 1:, 1:], input[:, 1:], last[:, ::2]


# Windows, strides, paddings that take each way through the kernels.
WINDOWS = [
    ((2, 2), (2, 2), (0, 0)),
    ((3, 3), (2, 2), (1, 1)),
    ((3, 3), (1, 1), (1, 1)),
    ((1, 5), (3, 4), (0, 2)),
    ((2, 33), (1, 1), (1, 16)),
    ((9, 3), (7, 9), (0, 0)),
]


def _close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3, 18])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_averages_and_gradients_are_torchs(device, window, channels):
    input = torch.randn(2, channels + 1, 13, 41, dtype=torch.float64, device=device)
    for like in _layouts(input):
        leaf = like.detach().requires_grad_()
        for options in ((False, True, None), (True, True, None), (True, False, None), (False, True, 7)):
            ours, theirs = (pool(leaf, *window, *options) for pool in (avg_pool2d, F.avg_pool2d))
            _close(ours, theirs)
            assert ours.stride() == theirs.stride()
            grad = torch.randn_like(ours)
            for direction in (grad, grad[:, :, :1, :1].expand_as(grad)):
                (mine,) = torch.autograd.grad(ours, leaf, direction, retain_graph=True)
                _close(mine, torch.autograd.grad(theirs, leaf, direction, retain_graph=True)[0])


@pytest.mark.parametrize("output_size", [1, (3, 5), (13, 41), (17, 50), (1, 7)], ids=str)
def test_adaptive_averages_and_gradients_are_torchs(device, output_size):
    for like in _layouts(torch.randn(2, 18, 13, 41, dtype=torch.float64, device=device)):
        leaf = like.detach().requires_grad_()
        ours, theirs = (pool(leaf, output_size) for pool in (adaptive_avg_pool2d, F.adaptive_avg_pool2d))
        _close(ours, theirs)
        grad = torch.randn_like(ours)
        _close(*(torch.autograd.grad(output, leaf, grad)[0] for output in (ours, theirs)))


def test_rows_are_averaged_as_torch_does(device):
    input = torch.randn(3, 5, 100, dtype=torch.float64, device=device)
    for like in (input, input.mT.contiguous().mT, input[0]):
        for arguments in ((2,), (3, 2, 1), (40, 3, 20, True, False)):
            _close(avg_pool1d(like, *arguments), F.avg_pool1d(like, *arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_16_bits_do_not_overflow_or_stall(device, dtype):
    # In 16 bits the sum of these stops growing, or is infinite.
    input = torch.full((1, 20, 64, 64), 100.0, dtype=dtype, device=device)
    for like in (input, input.contiguous(memory_format=torch.channels_last)):
        assert (adaptive_avg_pool2d(like, 1) == 100).all()
        assert (avg_pool2d(like, 64) == 100).all()
        assert (avg_pool2d(like, 16, 1) == 100).all()


@pytest.mark.parametrize("arguments", [(2,), (3, 2, 1), ((2, 3), 1, 1, True, False)], ids=str)
def test_gradcheck_and_gradgradcheck(device, arguments):
    for channels in (2, 9):
        input = torch.randn(1, channels, 6, 5, device=device, dtype=torch.float64)
        for like in (input, input.contiguous(memory_format=torch.channels_last)):
            leaf = like.requires_grad_()
            torch.autograd.gradcheck(lambda x: avg_pool2d(x, *arguments), leaf, fast_mode=True)
            torch.autograd.gradgradcheck(lambda x: avg_pool2d(x, *arguments), leaf, fast_mode=True)
    torch.autograd.gradgradcheck(lambda x: adaptive_avg_pool2d(x, (2, 3)), leaf, fast_mode=True)
    row = torch.randn(2, 30, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: avg_pool1d(x, 3, 2), row, fast_mode=True)


@pytest.mark.parametrize("dim", [0, 1, 4])
def test_vmap_equals_a_loop(device, dim):
    input = torch.randn(3, 2, 4, 9, 10, device=device).movedim(0, dim)

    def pooled(x):
        return avg_pool2d(x, 3, 2, 1)

    def grad(x):
        return torch.func.grad(lambda y: pooled(y).square().sum())(x)

    for function in (pooled, grad):
        looped = torch.stack([function(x) for x in input.unbind(dim)])
        assert torch.equal(torch.func.vmap(function, dim)(input), looped)


def test_maps_without_channels(device):
    input = torch.ones(2, 0, 5, 5, device=device, requires_grad=True)
    output = adaptive_avg_pool2d(input, 3)
    assert output.shape == F.adaptive_avg_pool2d(input, 3).shape
    assert torch.autograd.grad(output.sum(), input)[0].shape == input.shape


# Stock constructor, arguments, size of an input.
LAYERS = {
    "avg_pool2d": (nn.AvgPool2d, (3, 2, 1), (2, 4, 9, 11)),
    "avg_pool2d_divisor": (nn.AvgPool2d, (2, None, 0, True, False, 3), (4, 9, 11)),
    "avg_pool1d": (nn.AvgPool1d, (3, 2, 1), (2, 4, 11)),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, ((3, None),), (2, 4, 9, 11)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_drop_ins(name):
    stock_class, arguments, size = LAYERS[name]
    stock, ours = stock_class(*arguments), getattr(pvk.nn, stock_class.__name__)(*arguments)
    input = torch.randn(size, dtype=torch.float64)
    _close(ours(input), stock(input))
    leaf = input.clone().requires_grad_()
    _close(*(torch.autograd.grad(layer(leaf).square().sum(), leaf)[0] for layer in (ours, stock)))
    assert isinstance(ours, stock_class)
    assert repr(ours) == repr(stock)
    assert ours.__dict__.keys() == stock.__dict__.keys()
    for bad in (input.sum(), input[..., :0], input[None, None], input.to(torch.complex64)):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
            stock(bad)
        with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
            ours(bad)
        assert str(caught.value) == str(expected.value)
    traced = torch.fx.symbolic_trace(ours)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_function", "output"]
    _close(traced(input), stock(input))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    _close(compiled(input), stock(input))
    many = torch.stack([input, input + 1])
    _close(torch.vmap(ours)(many), torch.vmap(stock)(many))
