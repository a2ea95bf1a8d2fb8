"""What is special to the losses of box regression: equality with torchvision, gradients, reductions, dtypes."""

from __future__ import annotations

import pytest
import torch
import torchvision

import pyvision_kernels as pvk
from pyvision_kernels.ops.generalized_box_iou_loss.cases import make_pairs

NAMES = ("generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss")
every_loss = pytest.mark.parametrize("name", NAMES)
REDUCTIONS = ("none", "mean", "sum")


def _functions(name):
    return getattr(pvk.ops, name), getattr(torchvision.ops, name)


def _pairs(count, device, dtype=torch.float32, ties=False):
    return [boxes.to(device, dtype) for boxes in make_pairs(torch.Generator().manual_seed(0), count, ties)]


@every_loss
def test_equals_torchvision(device, name):
    ours, theirs = _functions(name)
    pairs = _pairs(1000, device)
    if name == "complete_box_iou_loss":  # but for the arc tangents
        torch.testing.assert_close(ours(*pairs), theirs(*pairs), rtol=0, atol=1e-6)
    else:
        assert torch.equal(ours(*pairs), theirs(*pairs))


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_and_gradgradcheck(device, name, reduction):
    ours, theirs = _functions(name)
    pairs = [boxes.requires_grad_() for boxes in _pairs(5, device, torch.float64)]
    if name != "complete_box_iou_loss":  # whose alpha has no gradient
        torch.autograd.gradcheck(lambda *boxes: ours(*boxes, reduction), pairs)
        torch.autograd.gradgradcheck(lambda *boxes: ours(*boxes, reduction), pairs)
    grads = []
    for each in (ours, theirs):
        first = torch.autograd.grad(each(*pairs, reduction).sin().sum(), pairs, create_graph=True)
        grads.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), pairs))
    torch.testing.assert_close(*grads)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_at_ties_are_torchvisions(device, name, reduction):
    pairs = [boxes.requires_grad_() for boxes in _pairs(300, device, torch.float64, ties=True)]
    grads = [torch.autograd.grad(each(*pairs, reduction).sum(), pairs) for each in _functions(name)]
    torch.testing.assert_close(*grads)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_of_nothing_is_torchvisions(device, name, reduction):
    for each in _functions(name):
        boxes = torch.zeros(0, 4, device=device, requires_grad=True)
        loss = each(boxes, torch.zeros(0, 4, device=device), reduction)
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert loss.sum() == 0
        loss.sum().backward()
        assert boxes.grad.shape == (0, 4)


@every_loss
def test_the_reduced_loss_is_the_reduction_of_the_losses(device, name):
    ours = _functions(name)[0]
    pairs = _pairs(5000, device)
    each = ours(*pairs).double()
    torch.testing.assert_close(ours(*pairs, reduction="sum").double(), each.sum(), rtol=2e-7, atol=0)
    torch.testing.assert_close(ours(*pairs, reduction="mean").double(), each.mean(), rtol=2e-7, atol=0)


@every_loss
def test_one_gradient_alone_is_the_same(device, name):
    ours = _functions(name)[0]
    pairs = [boxes.requires_grad_() for boxes in _pairs(40, device)]
    both = torch.autograd.grad(ours(*pairs, "mean"), pairs)
    for index in range(2):
        some = [boxes if i == index else boxes.detach() for i, boxes in enumerate(pairs)]
        (alone,) = torch.autograd.grad(ours(*some, "mean"), pairs[index])
        assert torch.equal(alone, both[index])


@every_loss
def test_epsilon_is_torchvisions(device, name):
    ours, theirs = _functions(name)
    pairs = _pairs(40, device, torch.float64)
    torch.testing.assert_close(ours(*pairs, eps=0.5), theirs(*pairs, eps=0.5))


@every_loss
def test_dtypes(device, name):
    ours, theirs = _functions(name)
    one, two = _pairs(30, device)
    assert torch.equal(ours(one, two.double()), ours(one.double(), two.double()))
    for dtype in (torch.float16, torch.bfloat16, torch.int32):
        pair = [one.to(dtype), two.to(dtype)]
        output = ours(*pair)
        assert output.dtype == torch.float32
        assert torch.equal(output, ours(*(boxes.float() for boxes in pair)))
        torch.testing.assert_close(output, theirs(*pair))


@every_loss
def test_leading_dimensions_and_broadcasting(device, name):
    ours, theirs = _functions(name)
    one, two = _pairs(12, device)
    assert torch.equal(ours(one.view(3, 2, 2, 4), two.view(3, 2, 2, 4)), ours(one, two).view(3, 2, 2))
    assert ours(one[0], two[0]).shape == ()
    torch.testing.assert_close(ours(one, two[0]), theirs(one, two[0].expand(12, 4)))
    leaf = two[0].clone().requires_grad_()
    grads = [
        torch.autograd.grad(each(one, other, "sum"), leaf)
        for each, other in ((ours, leaf), (theirs, leaf.expand(12, 4)))
    ]
    torch.testing.assert_close(*grads)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap(device, name, reduction):
    ours = _functions(name)[0]
    one, two = (boxes.view(3, 10, 4) for boxes in _pairs(30, device))

    def loss(one, two):
        return ours(one, two, reduction)

    def first(one, two):
        return torch.func.grad(lambda one, two: loss(one, two).sum(), (0, 1))(one, two)

    torch.testing.assert_close(torch.vmap(loss)(one, two), torch.stack(list(map(loss, one, two))))
    torch.testing.assert_close(torch.vmap(loss, (0, None))(one, two[0]), torch.stack([loss(o, two[0]) for o in one]))
    expected = tuple(torch.stack(grads) for grads in zip(*map(first, one, two), strict=True))
    torch.testing.assert_close(torch.vmap(first)(one, two), expected)


@every_loss
def test_compiles_with_a_step_of_training(device, name):
    ours = _functions(name)[0]
    one, two = _pairs(50, device)
    leaf = one.clone().requires_grad_()
    compiled = torch.compile(lambda boxes: ours(boxes * 1.01, two, "mean"), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(grad, torch.autograd.grad(ours(leaf * 1.01, two, "mean"), leaf)[0])
    torch._dynamo.reset()
