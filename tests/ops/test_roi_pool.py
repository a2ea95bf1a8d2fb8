"""What is special to roi_pool: places of maxima, NaN, gradients of gradients, vmap, bad boxes, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import RoIPool as TorchvisionRoIPool
from torchvision.ops import roi_pool as torchvision_roi_pool

import pyvision_kernels as pvk
from pyvision_kernels.ops import roi_pool
from pyvision_kernels.ops.roi_pool import roi_pool_backward_op, roi_pool_op

NAN, INF = math.nan, math.inf
LOWEST = torch.finfo(torch.float32).min


def _inputs(device, dtype=torch.float64, images=2, channels=5, size=(9, 11), count=6):
    input = torch.randn(images, channels, *size, device=device, dtype=dtype)
    corner = torch.rand(count, 2, device=device, dtype=dtype) * 20
    side = torch.rand(count, 2, device=device, dtype=dtype) * 20 + 1
    index = torch.randint(0, images, (count, 1), device=device).to(dtype)
    return input, torch.cat([index, corner, corner + side], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("output_size", [(7, 7), (3, 5), (1, 13)])
@pytest.mark.parametrize("scale", [0.25, 0.3, 1 / 3])
def test_outputs_places_and_gradients_equal_torchvisions(device, dtype, output_size, scale):
    # Few values, so that many are equal: the first of them counts. Halves: coordinates that round away from zero.
    input, boxes = _inputs(device, dtype, channels=19, size=(14, 17), count=40)
    input = (input * 2).round()
    boxes[20:, 1:] = (boxes[20:, 1:] * scale - 3).floor() / scale + 0.5 / scale
    theirs = torch.ops.torchvision.roi_pool(input, boxes, scale, *output_size)
    grad = torch.randint(-8, 9, theirs[0].shape, device=device).to(dtype)  # sums are exact in any order
    rest = (scale, *output_size, *input.shape)
    grad_input = torch.ops.torchvision._roi_pool_backward(grad, boxes, theirs[1], *rest)
    for like in (input, input.to(memory_format=torch.channels_last), input.mT.contiguous().mT):
        ours = roi_pool_op(like, boxes, scale, *output_size)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(roi_pool_backward_op(grad, boxes, ours[1], *rest), grad_input)
        assert torch.equal(roi_pool_backward_op(grad, boxes, ours[1], *rest, True), grad_input)


def test_nan_is_never_the_maximum(device):
    input = torch.randn(1, 3, 6, 6, device=device)
    input[0, 0] = NAN
    input[0, 1, ::2] = NAN
    input[0, 2] = -INF
    input[0, 2, 0, 0] = INF
    boxes = torch.tensor([[0.0, 0, 0, 5, 5]], device=device)
    output, argmax = roi_pool_op(input, boxes, 1.0, 2, 2)
    theirs = torch.ops.torchvision.roi_pool(input, boxes, 1.0, 2, 2)
    assert torch.equal(output, theirs[0])
    assert torch.equal(argmax, theirs[1])
    assert (output[0, 0] == LOWEST).all()
    assert (argmax[0, 0] == -1).all()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(roi_pool(input.to(dtype), boxes, 2), roi_pool(input.to(dtype).float(), boxes, 2).to(dtype))


@pytest.mark.parametrize(
    "box",
    [
        [0, NAN, 4, 20, 30],
        [1, 4, 4, INF, 30],
        [NAN, 4, 4, 20, 20],
        [-1, 4, 4, 20, 20],
        [2, 4, 4, 20, 20],
        [3e38, 4, 4, 20, 20],
        [0, -3e38, 0, 3e38, 1],
    ],
)
def test_bad_box_is_zero_and_changes_no_other(device, box):
    input, boxes = _inputs(device, torch.float32)
    bad = torch.cat([boxes[:3], torch.tensor([box], device=device), boxes[3:]])
    input.requires_grad_()
    alone, output = roi_pool(input, boxes, 3), roi_pool(input, bad, 3)
    assert torch.equal(output[3], torch.zeros_like(output[3]))
    assert (roi_pool_op(input, bad, 1.0, 3, 3)[1][3] == -1).all()
    assert torch.equal(torch.cat([output[:3], output[4:]]), alone)
    weight = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, input, weight)
    (grad_alone,) = torch.autograd.grad(alone, input, torch.cat([weight[:3], weight[4:]]))
    assert torch.equal(grad, grad_alone)


def test_huge_box_has_the_whole_map_in_its_middle_bin(device):
    input = torch.randn(1, 3, 8, 9, device=device)
    for side in (1e6, 1e10, 1e30, 1e38):
        output = roi_pool(input, torch.tensor([[0, -side, -side, side, side]], device=device), 3)
        assert torch.equal(output[0, :, 1, 1], input.amax((2, 3))[0])
        assert output.count_nonzero() == 3


def test_places_outside_the_map_are_ignored(device):
    input, boxes = _inputs(device, torch.float32)
    _, argmax = roi_pool_op(input, boxes, 1.0, 3, 3)
    grad = torch.ones(argmax.shape, device=device)
    rest = (1.0, 3, 3, *input.shape)
    outside = argmax.clone()
    outside[2] = torch.iinfo(torch.int32).max
    outside[3] = torch.iinfo(torch.int32).min
    grad_without = grad.clone()
    grad_without[2:4] = 0
    assert torch.equal(
        roi_pool_backward_op(grad, boxes, outside, *rest), roi_pool_backward_op(grad_without, boxes, argmax, *rest)
    )


def test_gradcheck_and_gradgradcheck(device):
    input, boxes = _inputs(device, channels=2, size=(5, 4), count=3)
    boxes[1, 0] = 7.0  # out of range
    input.requires_grad_()

    def pooled(x):
        return roi_pool(x, boxes, 2, 0.25)

    torch.autograd.gradcheck(pooled, input, fast_mode=False)
    torch.autograd.gradgradcheck(pooled, input)


def test_expanded_gradient(device):
    # sum() gives a gradient of stride 0.
    input, boxes = _inputs(device, torch.float32, channels=70)
    input.requires_grad_()
    for like in (input, input.detach().to(memory_format=torch.channels_last).requires_grad_()):
        (ours,) = torch.autograd.grad(roi_pool(like, boxes, 3, 0.25).sum(), like)
        (theirs,) = torch.autograd.grad(torchvision_roi_pool(like, boxes, 3, 0.25).sum(), like)
        assert torch.equal(ours, theirs)
        assert ours.stride() == like.stride()


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0), (2, 1)])
def test_vmap_equals_a_loop(device, in_dims):
    inputs, boxes = zip(*(_inputs(device) for _ in range(3)), strict=True)
    boxes = [box.index_fill(0, torch.tensor([1], device=device), 7.0) for box in boxes]  # one index out of range
    stacked = [
        tensors[0] if dim is None else torch.stack(tensors, dim)
        for tensors, dim in zip((inputs, boxes), in_dims, strict=True)
    ]

    def pooled(input, boxes):
        return roi_pool(input, boxes, (2, 3), 0.25)

    def grad(input, boxes):
        return torch.func.grad(lambda x: pooled(x, boxes).pow(2).sum())(input)

    for function in (pooled, grad):
        looped = torch.stack(
            [function(inputs[0 if in_dims[0] is None else i], boxes[0 if in_dims[1] is None else i]) for i in range(3)]
        )
        torch.testing.assert_close(torch.func.vmap(function, in_dims)(*stacked), looped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_with_float32_boxes(device, dtype):
    input, boxes = _inputs(device, torch.float32)
    half = input.to(dtype)
    assert torch.equal(roi_pool(half, boxes, 3), roi_pool(half.float(), boxes, 3).to(dtype))


def test_box_list_equals_joined_boxes(device):
    input, boxes = _inputs(device, torch.float32)
    boxes = boxes[boxes[:, 0].argsort()]
    split = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
    assert torch.equal(roi_pool(input, split, 3, 0.25), roi_pool(input, boxes, 3, 0.25))
    assert roi_pool(input, [boxes[:0, 1:], boxes[:0, 1:]], 3).shape == (0, 5, 3, 3)


def test_layer_is_a_drop_in(device):
    input, boxes = _inputs(device, torch.float32)
    ours, theirs = pvk.nn.RoIPool((3, 2), 0.25), TorchvisionRoIPool((3, 2), 0.25)
    expected = theirs(input, boxes)
    assert torch.equal(ours(input, boxes), expected)
    assert repr(ours).replace(" ", "") == repr(theirs).replace(" ", "")
    assert ours.state_dict() == {}
    ours.__class__, theirs.__class__ = TorchvisionRoIPool, pvk.nn.RoIPool
    assert torch.equal(ours(input, boxes), expected)
    assert torch.equal(theirs(input, boxes), expected)
