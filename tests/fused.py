"""What the tests of fused models share: a model with one of everything, and comparisons with the stock forward."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pyvision_kernels as pvk


def randomized(model, dtype=torch.float64):
    """In eval mode, with running statistics and affine parameters as after training."""
    model = model.eval().to(dtype)
    for module in model.modules():
        for name, low, high in (("running_mean", -0.3, 0.3), ("running_var", 0.5, 2.0)):
            if isinstance(getattr(module, name, None), torch.Tensor):
                getattr(module, name).uniform_(low, high)
                nn.init.uniform_(module.weight, 0.5, 1.5) if module.weight.requires_grad else module.weight.uniform_(
                    0.5, 1.5
                )
                nn.init.uniform_(module.bias, -0.3, 0.3) if module.bias.requires_grad else module.bias.uniform_(
                    -0.3, 0.3
                )
    return model


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def operators(model, *inputs):
    with torch.no_grad(), Calls() as calls:
        model(*inputs)
    return calls.names


def norms(model, *inputs):
    return sum("batch_norm" in call for call in operators(model, *inputs))


def assert_close(ours, stock, tolerance=1e-9):
    if isinstance(stock, dict):
        assert type(ours) is type(stock)
        assert list(ours) == list(stock)
        ours, stock = tuple(ours.values()), tuple(stock.values())
    if isinstance(stock, (tuple, list)):
        assert len(ours) == len(stock)
        for pair in zip(ours, stock, strict=True):
            assert_close(*pair, tolerance)
        return
    assert ours.shape == stock.shape
    assert ours.is_contiguous() == stock.is_contiguous()
    assert (ours - stock).abs().max() <= tolerance * (stock.abs().max() + 1e-3)


def forward(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


class Block(nn.Module):
    """One of everything."""

    def __init__(self, channels=16):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 3)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(self.drop(out)))
        out += x
        out = self.relu(out)
        return F.gelu(self.fc(out.mean((2, 3))))


def block(fuse=True):
    torch.manual_seed(3)
    model = randomized(Block())
    return (pvk.convert(model, fuse=True) if fuse else model), torch.randn(2, 16, 9, 10, dtype=torch.float64)


def check(model, picture):
    """The fused model against a stock copy of it as it is now."""
    stock = pvk.revert(copy.deepcopy(model))
    expected = forward(stock, picture)
    for _ in range(2):
        assert_close(forward(model, picture), expected)
    assert norms(model, picture) == 0
