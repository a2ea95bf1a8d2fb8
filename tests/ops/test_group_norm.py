"""What is special to group_norm: residual and activation, memory formats, gradients, hostile samples, layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels._activation import FUNCTIONS
from tests.errors import assert_as_good


def _normal(*size, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", [(5, 4), (2, 4, 3), (2, 4, 2, 3)])
def test_gradients_and_theirs(size):
    x, rest = _normal(*size).requires_grad_(), _normal(*size).mul(0.5).requires_grad_()
    w, b = (_normal(4 + i)[i:].requires_grad_() for i in (0, 1))

    def function(x, w, b, rest):
        return pvk.ops.group_norm(x, 2, w, b, 1e-2, residual=rest)

    assert torch.autograd.gradcheck(function, (x, w, b, rest))
    assert torch.autograd.gradgradcheck(function, (x, w, b, rest))


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_gradients_of_activations(activation):
    x, rest = _normal(2, 4, 3).requires_grad_(), _normal(2, 4, 3).mul(0.5).requires_grad_()
    w, b = (_normal(4 + i)[i:].requires_grad_() for i in (0, 1))

    def function(x, w, b, rest):
        return pvk.ops.group_norm(x, 2, w, b, residual=rest, activation=activation)

    assert torch.autograd.gradcheck(function, (x, w, b, rest))
    assert torch.autograd.gradgradcheck(function, (x, w, b, rest))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "groups", "pixels"), [(24, 3, 9), (3, 1, 16), (8, 8, 7), (64, 16, 32)])
def test_memory_format_is_kept_forward_and_backward(channels_last, channels, groups, pixels, device):
    format = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (_normal(3, channels, pixels, 6 + i)[..., i:].to(device) for i in (0, 1))
    w, b = _normal(channels).to(device), _normal(channels).to(device)
    leaf = x.contiguous(memory_format=format).requires_grad_()
    ours, theirs = (op(leaf, groups, w, b) for op in (pvk.ops.group_norm, F.group_norm))
    assert ours.is_contiguous(memory_format=format)
    torch.testing.assert_close(ours, theirs)
    # The gradient may come in another format.
    found, expected = (torch.autograd.grad(out, leaf, grad)[0] for out in (ours, theirs))
    assert found.is_contiguous(memory_format=format)
    torch.testing.assert_close(found, expected)


def test_layouts_agree(device):
    x, w = _normal(2, 12, 9, 8, dtype=torch.float32).to(device), _normal(12, dtype=torch.float32).to(device)
    ours = [
        pvk.ops.group_norm(x.contiguous(memory_format=format), 3, w)
        for format in (torch.contiguous_format, torch.channels_last)
    ]
    torch.testing.assert_close(*ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 6, 5, 7), (4, 6, 16, 16)])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_sample_does_not_depend_on_the_others(size, format, device):
    x = _normal(*size, dtype=torch.float32).to(device).contiguous(memory_format=format)
    alone = torch.cat([pvk.ops.group_norm(one.unsqueeze(0).contiguous(memory_format=format), 2) for one in x])
    assert torch.equal(pvk.ops.group_norm(x, 2), alone)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_constants_give_the_bias_exactly(format, device):
    for value in (0.0, 0.1, -3e4, 1e30):
        x = torch.full((2, 6, 23, 31), value, device=device).contiguous(memory_format=format)
        b = _normal(6, dtype=torch.float32).to(device)
        assert torch.equal(pvk.ops.group_norm(x, 2, None, b), b[:, None, None].expand_as(x))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_nan_and_infinity_stay_in_their_groups(format, device):
    x = _normal(2, 6, 5, 7, dtype=torch.float32)
    expected = F.group_norm(x, 3)
    x[0, 2, 1, 1], x[1, 5, 0, 0] = float("nan"), float("-inf")
    ours = pvk.ops.group_norm(x.to(device).contiguous(memory_format=format), 3).cpu()
    assert ours[0, 2:4].isnan().all()
    assert ours[1, 4:].isnan().all()
    torch.testing.assert_close(ours[0, [0, 1, 4, 5]], expected[0, [0, 1, 4, 5]])
    torch.testing.assert_close(ours[1, :4], expected[1, :4])


def _hostile(name):
    """Maps in which the first values say nothing of the others."""
    x = _normal(1, 4, 64, 90)
    if name == "mean_jumps_late":
        return x.mul_(1e-2).index_add_(2, torch.arange(3, 64), torch.full((1, 4, 61, 90), 1e4, dtype=torch.float64))
    if name == "mean_jumps_at_the_end":
        x[:, :, -1, -1] = 1e5
        return x
    if name == "drifts":
        return x + 100 * torch.arange(64, dtype=torch.float64)[:, None]
    x[:, :, 0, 0] = -1e6
    return x


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["mean_jumps_late", "mean_jumps_at_the_end", "drifts", "first_is_far"])
def test_statistics_do_not_hang_on_the_first_values(name, format, device):
    x = _hostile(name).float()
    exact = F.group_norm(x.double(), 2)
    x = x.contiguous(memory_format=format)
    assert_as_good(pvk.ops.group_norm(x.to(device), 2).cpu(), F.group_norm(x, 2), exact)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_func():
    x, w, rest = _normal(3, 2, 4, 5), _normal(3, 4), _normal(2, 4, 5)
    for ours, theirs, dims, args in (
        (lambda x: pvk.ops.group_norm(x, 2, w[0]), lambda x: F.group_norm(x, 2, w[0]), (0,), (x,)),
        (lambda x: pvk.ops.group_norm(x, 2, w[0]), lambda x: F.group_norm(x, 2, w[0]), (1,), (x.movedim(0, 1),)),
        (lambda x, w: pvk.ops.group_norm(x, 2, w), lambda x, w: F.group_norm(x, 2, w), (0, 0), (x, w)),
        (
            lambda x: pvk.ops.group_norm(x, 2, residual=rest, activation="relu"),
            lambda x: F.relu(F.group_norm(x, 2) + rest),
            (0,),
            (x,),
        ),
    ):
        torch.testing.assert_close(torch.vmap(ours, dims)(*args), torch.vmap(theirs, dims)(*args))
    grads = [
        torch.func.grad(lambda w, op=op: op(x[0], 2, w).square().sum())(w[1])
        for op in (pvk.ops.group_norm, F.group_norm)
    ]
    torch.testing.assert_close(*grads)
    leaf = x[0].clone().requires_grad_()
    ours, theirs = (
        torch.autograd.grad(op(leaf, 2, w[0]), leaf, x, is_grads_batched=True)
        for op in (pvk.ops.group_norm, F.group_norm)
    )
    torch.testing.assert_close(ours, theirs)


def test_layers_take_a_residual_an_activation_and_their_own_words():
    stock, ours = nn.GroupNorm(2, 4), pvk.nn.GroupNorm(2, 4, activation="relu")
    nn.init.normal_(stock.weight)
    ours.load_state_dict(stock.state_dict())
    x, rest = (_normal(2, 4, 3, 5 + i, dtype=torch.float32)[..., i:] for i in (0, 1))
    torch.testing.assert_close(ours(x), F.relu(stock(x)))
    torch.testing.assert_close(ours(x, rest), F.relu(stock(x) + rest))
    assert "activation='relu'" in repr(ours)
    with pytest.raises(RuntimeError, match="Expected weight to be a vector of size equal to the number of channels"):
        ours(_normal(2, 6, 3, dtype=torch.float32))
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        pvk.nn.InstanceNorm2d(4)(_normal(2, 4, 1, 1, dtype=torch.float32))
    tracked = nn.InstanceNorm2d(4, track_running_stats=True)
    mine = pvk.nn.InstanceNorm2d(4, track_running_stats=True, activation="relu")
    torch.testing.assert_close(mine(x), F.relu(tracked(x)))
    torch.testing.assert_close(mine.state_dict(), tracked.state_dict())


def test_backend_torch_takes_the_kernel_of_torch():
    x = _normal(5, 8, dtype=torch.float32)
    assert pvk.explain(pvk.ops.group_norm, x, 2) == ["group_norm [5, 8]: pvk"]
    with pvk.backend("torch"):
        assert pvk.explain(pvk.ops.group_norm, x, 2) == ["group_norm [5, 8]: torch aten::native_group_norm"]


def test_auto_takes_the_kernel_of_torch_where_the_call_is_longer_than_its_work():
    with pvk.backend("auto"):
        (few,), (many,) = (
            pvk.explain(pvk.ops.group_norm, _normal(*size, dtype=torch.float32), 2) for size in ((5, 8), (2, 8, 96, 96))
        )
        leaf = _normal(*(2, 8, 96, 96), dtype=torch.float32).requires_grad_()
        assert type(pvk.ops.group_norm(leaf, 2).grad_fn).__name__ == "NativeGroupNormBackward0"
    assert few.endswith("torch aten::native_group_norm")
    assert many.endswith(": pvk")
