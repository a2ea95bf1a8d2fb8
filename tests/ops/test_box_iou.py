"""What is special to the pairwise overlaps: equality with torchvision, gradients at ties, formats, dtypes, batches."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision

import pyvision_kernels as pvk
from pyvision_kernels._case import in_layout
from pyvision_kernels.ops.box_iou.cases import make_boxes

NAMES = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
every_kind = pytest.mark.parametrize("name", NAMES)


def _functions(name):
    return getattr(pvk.ops, name), getattr(torchvision.ops, name)


def _boxes(count, device, seed=0, ties=False, dtype=torch.float32):
    return make_boxes(torch.Generator().manual_seed(seed), count, ties=ties).to(device, dtype)


@every_kind
@pytest.mark.parametrize("ties", [False, True])
def test_equals_torchvision_bit_for_bit(device, name, ties):
    ours, theirs = _functions(name)
    for dtype in (torch.float32, torch.float64):
        boxes = _boxes(75, device, 0, ties, dtype), _boxes(1090, device, 1, ties, dtype)
        if name == "complete_box_iou":  # but for the arc tangents
            torch.testing.assert_close(ours(*boxes), theirs(*boxes), rtol=0, atol=4 * torch.finfo(dtype).eps)
        else:
            assert torch.equal(ours(*boxes), theirs(*boxes))


@every_kind
def test_gradcheck_and_gradgradcheck(device, name):
    function = _functions(name)[0]
    boxes = [_boxes(count, device, count, dtype=torch.float64).requires_grad_() for count in (3, 4)]
    # alpha has no gradient, so that numerical differentiation of complete_box_iou disagrees by design.
    if name != "complete_box_iou":
        torch.autograd.gradcheck(function, boxes)
        torch.autograd.gradgradcheck(function, boxes)
    theirs = _functions(name)[1]
    grads = []
    for each in (function, theirs):
        first = torch.autograd.grad(each(*boxes).sin().sum(), boxes, create_graph=True)
        grads.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), boxes))
    torch.testing.assert_close(*grads)


def _clamp_passes_at_its_bound():
    zero = torch.zeros((), requires_grad=True)
    return bool(torch.autograd.grad(zero.clamp(min=0), zero)[0])


@pytest.mark.skipif(_clamp_passes_at_its_bound(), reason="boxes that touch have another gradient in this PyTorch")
@every_kind
def test_gradients_at_ties_are_torchvisions(device, name):
    # Equal coordinates, and boxes that touch: the derivative is one-sided there.
    ours, theirs = _functions(name)
    boxes = [_boxes(count, device, count, ties=True, dtype=torch.float64).requires_grad_() for count in (40, 50)]
    weight = torch.randn(40, 50, device=device, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(ours(*boxes), boxes, weight), torch.autograd.grad(theirs(*boxes), boxes, weight)
    )


@every_kind
def test_one_gradient_alone_is_the_same(device, name):
    function = _functions(name)[0]
    boxes = [_boxes(count, device, count).requires_grad_() for count in (20, 1050)]
    both = torch.autograd.grad(function(*boxes).sum(), boxes)
    for index in range(2):
        pair = [box if i == index else box.detach() for i, box in enumerate(boxes)]
        (alone,) = torch.autograd.grad(function(*pair).sum(), boxes[index])
        assert torch.equal(alone, both[index])


def test_gradient_through_any_strides(device):
    boxes = [_boxes(count, device, count).requires_grad_() for count in (33, 70)]
    output = pvk.ops.generalized_box_iou(*boxes)
    weight = torch.randn(33, 70, device=device)
    expected = torch.autograd.grad(output, boxes, weight, retain_graph=True)
    for grad in (weight.t().contiguous().t(), in_layout(weight, "strided")):
        assert all(map(torch.equal, torch.autograd.grad(output, boxes, grad, retain_graph=True), expected))
    ones = torch.autograd.grad(output, boxes, torch.ones_like(output), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(output.sum(), boxes), ones))  # strides 0


@pytest.mark.parametrize("fmt", ["xywh", "cxcywh"])
def test_formats(device, fmt):
    boxes = [torchvision.ops.box_convert(_boxes(count, device, count), "xyxy", fmt) for count in (30, 40)]
    corners = [torchvision.ops.box_convert(each, fmt, "xyxy") for each in boxes]
    torch.testing.assert_close(pvk.ops.box_iou(*boxes, fmt=fmt), torchvision.ops.box_iou(*corners))
    leaves = [each.double().requires_grad_() for each in boxes]
    grads = torch.autograd.grad(pvk.ops.box_iou(*leaves, fmt=fmt).sum(), leaves)
    converted = [torchvision.ops.box_convert(leaf, fmt, "xyxy") for leaf in leaves]
    torch.testing.assert_close(grads, torch.autograd.grad(torchvision.ops.box_iou(*converted).sum(), leaves))


@every_kind
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_integers(device, name, dtype):
    ours, theirs = _functions(name)
    boxes = [_boxes(count, device, count).to(dtype) for count in (30, 40)]
    expected = theirs(*(box.to(torch.int64) for box in boxes))  # torchvision's sides of small integers wrap around
    output = ours(*boxes)
    assert output.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(output, expected)


@every_kind
def test_two_dtypes(device, name):
    function = _functions(name)[0]
    one, two = _boxes(9, device, 0), _boxes(12, device, 1)
    assert torch.equal(function(one, two.double()), function(one.double(), two.double()))
    assert torch.equal(function(one.half(), two.bfloat16()), function(one.half().float(), two.bfloat16().float()))
    for dtype in (torch.float16, torch.bfloat16):
        half = [one.to(dtype), two.to(dtype)]
        assert torch.equal(function(*half), function(*(box.float() for box in half)))


@every_kind
def test_batches_are_loops(device, name):
    function = _functions(name)[0]
    one, two = _boxes(24, device, 0).view(2, 3, 4, 4), _boxes(15, device, 1).view(3, 5, 4)
    output = function(one, two)
    assert output.shape == (2, 3, 4, 5)
    for i in range(2):
        for j in range(3):
            assert torch.equal(output[i, j], function(one[i, j], two[j]))


@every_kind
def test_vmap(device, name):
    function = _functions(name)[0]
    one, two = _boxes(12, device, 0).view(3, 4, 4), _boxes(5, device, 1)
    looped = torch.stack([function(each, two) for each in one])
    assert torch.equal(torch.vmap(function, (0, None))(one, two), looped)
    assert torch.equal(torch.vmap(function, (1, None))(one.transpose(0, 1), two), looped)

    def first(one, two):
        return torch.func.grad(lambda one, two: function(one, two).sum(), (0, 1))(one, two)

    expected = [torch.stack(grads) for grads in zip(*(first(each, two) for each in one), strict=True)]
    torch.testing.assert_close(torch.vmap(first, (0, None))(one, two), tuple(expected))


@every_kind
def test_nan_coordinate_makes_all_its_pairs_nan(device, name):
    function = _functions(name)[0]
    one, two = _boxes(5, device, 0), _boxes(40, device, 1)
    clean = function(one, two)
    for column in range(4):
        bad = one.clone()
        bad[2, column] = math.nan
        output = function(bad, two)
        assert output[2].isnan().all()
        assert torch.equal(output[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
        assert function(two, bad)[:, 2].isnan().all()


@pytest.mark.slow_emulated("12 million pairs")
def test_anchors_of_a_whole_image(device):
    one, two = _boxes(100, device, 0), _boxes(120_000, device, 1)
    assert torch.equal(pvk.ops.box_iou(one, two), torchvision.ops.box_iou(one, two))
    assert torch.equal(pvk.ops.box_iou(two, one), torchvision.ops.box_iou(two, one))
