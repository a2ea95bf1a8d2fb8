"""What is special to sigmoid_focal_loss: accuracy of exp and log, gradients of gradients, layouts, mixed dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss as torchvision_sigmoid_focal_loss

from pyvision_kernels.ops import sigmoid_focal_loss
from pyvision_kernels.ops.sigmoid_focal_loss.reference import sigmoid_focal_loss as reference

LOGITS = torch.cat(
    [torch.linspace(-105, 105, 20_011), torch.linspace(-1, 1, 5_003), torch.logspace(-38, 0, 503).mul(-1)]
).double()


def _units(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, in units of the last place."""
    magnitude = exact.to(ours.dtype).abs()
    unit = torch.nextafter(magnitude, magnitude.new_tensor(math.inf)).double() - magnitude.double()
    return ((ours.double() - exact.double()).abs() / unit).max().item()


def test_single_precision_is_accurate_to_units_of_the_last_place(device):
    # With gamma 0 and no weights the loss of label 0 is log(1 + exp(x)) and its gradient is sigmoid(x); both are
    # subnormal from -88 on.
    x = LOGITS.float().to(device).requires_grad_()
    loss = sigmoid_focal_loss(x, torch.zeros_like(x), -1, 0)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    exact = x.detach().double()
    assert _units(loss, torch.where(exact < 20, exact.exp().log1p(), exact + (-exact).exp())) < 2
    assert _units(grad, exact.sigmoid()) < 3


def test_double_precision_is_accurate_to_units_of_the_last_place(device):
    mpmath = pytest.importorskip("mpmath")
    x = torch.cat([LOGITS[::40], torch.linspace(-745, -700, 50, dtype=torch.float64)]).to(device)
    loss = sigmoid_focal_loss(x, torch.zeros_like(x), -1, 0)
    with mpmath.workdps(40):
        for value, ours in zip(x.tolist(), loss.tolist(), strict=True):
            exact = mpmath.log1p(mpmath.exp(mpmath.mpf(value)))
            assert abs(exact - ours) <= 2 * math.ulp(float(exact)), value


@pytest.mark.parametrize("gamma", [0.3, 2.2, 40.0])
def test_any_exponent_is_exp_of_log(device, gamma):
    x = torch.linspace(-20, 3, 3001, device=device)
    loss = sigmoid_focal_loss(x, torch.zeros_like(x), -1, gamma)
    exact = reference(x.double(), torch.zeros_like(x).double(), -1, gamma)
    normal = exact > 1e-36
    torch.testing.assert_close(loss[normal].double(), exact[normal], rtol=3e-7 * (1 + 20 * gamma), atol=0)


def test_logits_that_are_not_finite(device):
    # An infinite logit of the right class is 0 times infinity, as in torch.
    inputs = torch.tensor([math.nan, math.nan, math.inf, -math.inf, math.inf, -math.inf, 0.5], device=device)
    targets = torch.tensor([0.0, 1, 0, 1, 1, 0, 1], device=device)
    loss = sigmoid_focal_loss(inputs, targets)
    assert loss[[0, 1, 4, 5]].isnan().all()
    assert (loss[2:4] == math.inf).all()
    assert torch.equal(loss[6:], sigmoid_focal_loss(inputs[6:], targets[6:]))


def test_extreme_logits_give_finite_gradients(device):
    x = torch.tensor([1e4, -1e4, 1e30, -1e30, 200.0, -200.0, 0.0], device=device)
    for target in (0.0, 0.25, 1.0):
        for gamma in (0, 0.3, 0.5, 1, 2, 2.3):
            leaf, targets = x.clone().requires_grad_(), torch.full_like(x, target).requires_grad_()
            loss = sigmoid_focal_loss(leaf, targets, 0.25, gamma)
            grads = torch.autograd.grad(loss.sum(), (leaf, targets))
            for tensor in (loss, *grads):
                assert torch.isfinite(tensor).all(), (target, gamma)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (-1, 1.5), (0.6, 2.3), (0.25, 0)])
def test_gradcheck_and_gradgradcheck(device, reduction, alpha, gamma):
    inputs = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    targets = torch.rand(2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def loss(inputs, targets):
        return sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)

    torch.autograd.gradcheck(loss, (inputs, targets))
    torch.autograd.gradgradcheck(loss, (inputs, targets))
    hard = targets.detach().round()
    torch.autograd.gradgradcheck(lambda x: loss(x, hard), inputs)


def test_gradients_only_where_they_are_needed(device):
    inputs, targets = torch.randn(70, device=device), torch.rand(70, device=device)
    both = [inputs.clone().requires_grad_(), targets.clone().requires_grad_()]
    grads = torch.autograd.grad(sigmoid_focal_loss(*both, reduction="sum"), both)
    for index in range(2):
        pair = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(both)]
        (alone,) = torch.autograd.grad(sigmoid_focal_loss(*pair, reduction="sum"), pair[index])
        assert torch.equal(alone, grads[index])


@pytest.mark.parametrize("count", [1, 15, 8191, 8193, 70_001])
def test_sum_and_mean_equal_those_of_the_elements(device, count):
    inputs, targets = torch.randn(count, device=device), torch.rand(count, device=device).round()
    each = sigmoid_focal_loss(inputs, targets).double()
    for reduction, exact in (("sum", each.sum()), ("mean", each.mean())):
        torch.testing.assert_close(
            sigmoid_focal_loss(inputs, targets, reduction=reduction).double(), exact, rtol=2e-7, atol=0
        )
    assert sigmoid_focal_loss(inputs[:0], targets[:0], reduction="mean").isnan()


def test_memory_order_is_that_of_the_inputs(device):
    inputs = torch.randn(2, 3, 4, 5, device=device)
    targets = torch.rand_like(inputs).round()
    expected = sigmoid_focal_loss(inputs, targets)
    last = inputs.to(memory_format=torch.channels_last)
    for given in (targets, targets.to(memory_format=torch.channels_last), targets[:1, :1].expand(2, 3, 4, 5)):
        ours = sigmoid_focal_loss(last, given)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, sigmoid_focal_loss(inputs, given.contiguous()))
    assert torch.equal(sigmoid_focal_loss(inputs.mT, targets.mT), expected.mT)
    unaligned = torch.cat([inputs.flatten()[:1], inputs.flatten()])[1:].view_as(inputs)
    assert torch.equal(sigmoid_focal_loss(unaligned, targets), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_dtypes_are_promoted(device, dtype):
    inputs, targets = torch.randn(9, device=device), torch.rand(9, device=device).round()
    ours = sigmoid_focal_loss(inputs.to(dtype), targets)
    assert ours.dtype == torchvision_sigmoid_focal_loss(inputs.to(dtype), targets).dtype == torch.float32
    assert torch.equal(ours, sigmoid_focal_loss(inputs.to(dtype).float(), targets))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 0)])
def test_vmap_equals_a_loop(device, reduction, in_dims):
    pair = torch.randn(3, 4, 5, dtype=torch.float64, device=device), torch.rand(3, 4, 5, device=device).double()
    stacked = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(pair, in_dims, strict=True)]

    def loss(inputs, targets):
        return sigmoid_focal_loss(inputs, targets, reduction=reduction)

    def grad(inputs, targets):
        return torch.func.grad(lambda x: loss(x, targets).pow(2).sum())(inputs)

    for function in (loss, grad):
        looped = torch.stack(
            [function(*(x[0 if dim is None else i] for x, dim in zip(pair, in_dims, strict=True))) for i in range(3)]
        )
        torch.testing.assert_close(torch.func.vmap(function, in_dims)(*stacked), looped)
