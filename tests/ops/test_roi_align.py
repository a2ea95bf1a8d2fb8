"""What is special to roi_align: gradients of gradients, vmap, bad boxes, layouts, sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import RoIAlign as TorchvisionRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align

import pyvision_kernels as pvk
from pyvision_kernels import _simt
from pyvision_kernels.ops import roi_align

NAN, INF = math.nan, math.inf


def _inputs(device, dtype=torch.float64, images=2, channels=5, size=(9, 11), count=6):
    input = torch.randn(images, channels, *size, device=device, dtype=dtype)
    corner = torch.rand(count, 2, device=device, dtype=dtype) * 20
    side = torch.rand(count, 2, device=device, dtype=dtype) * 20 + 1
    index = torch.randint(0, images, (count, 1), device=device).to(dtype)
    return input, torch.cat([index, corner, corner + side], 1)


@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_gradcheck_and_gradgradcheck(device, sampling_ratio):
    input, boxes = _inputs(device, channels=2, size=(5, 4), count=3)
    input.requires_grad_()

    def pooled(x):
        return roi_align(x, boxes, 2, 0.25, sampling_ratio, True)

    torch.autograd.gradcheck(pooled, input, fast_mode=False)
    torch.autograd.gradgradcheck(pooled, input)


def test_expanded_gradient(device):
    # sum() gives a gradient of stride 0.
    input, boxes = _inputs(device, torch.float32, channels=70)
    input.requires_grad_()
    for like in (input, input.detach().to(memory_format=torch.channels_last).requires_grad_()):
        (ours,) = torch.autograd.grad(roi_align(like, boxes, 3, 0.25, 2).sum(), like)
        (theirs,) = torch.autograd.grad(torchvision_roi_align(like, boxes, 3, 0.25, 2).sum(), like)
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == like.stride()


def test_overlapping_input(device):
    row = torch.randn(1, 1, 9, 1, device=device)
    _, boxes = _inputs(device, torch.float32, images=1)
    ours = roi_align(row.expand(1, 20, 9, 11), boxes, 3, 0.25, 2)
    torch.testing.assert_close(ours, torchvision_roi_align(row.expand(1, 20, 9, 11).contiguous(), boxes, 3, 0.25, 2))


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
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_bad_box_is_zero_and_changes_no_other(device, box, sampling_ratio):
    input, boxes = _inputs(device, torch.float32)
    input.requires_grad_()
    bad = torch.cat([boxes[:3], torch.tensor([box], device=device), boxes[3:]])
    alone = roi_align(input, boxes, 3, 0.25, sampling_ratio)
    output = roi_align(input, bad, 3, 0.25, sampling_ratio)
    assert torch.equal(output[3], torch.zeros_like(output[3]))
    assert torch.equal(torch.cat([output[:3], output[4:]]), alone)
    weight = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, input, weight)
    (grad_alone,) = torch.autograd.grad(alone, input, torch.cat([weight[:3], weight[4:]]))
    assert torch.equal(grad, grad_alone)


def test_enormous_adaptive_boxes_end_soon(device):
    input = torch.ones(1, 3, 50, 40, device=device)
    sides = torch.tensor([1e4, 1e6, 1e9, 1e20, 1e30], device=device)
    boxes = torch.stack([0 * sides, -sides, -sides, sides, sides], 1)
    output = roi_align(input, boxes, 1, 1.0, 0)
    # The average over the box of a map of ones: its area's share.
    expected = 50 * 40 / (2 * sides.double()) ** 2
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output[:2, 0, 0, 0].double(), expected[:2], rtol=0.1, atol=0)
    torch.testing.assert_close(output[2, 0, 0, 0].double(), expected[2], rtol=0.5, atol=0)
    assert (output[3:] <= 1e-30).all()


def test_large_box_takes_as_many_samples_as_torchvision(device):
    # 4 x 4 bins of 250 samples each, of which few are on the map.
    input = torch.randn(1, 4, 20, 30, device=device, dtype=torch.float64)
    boxes = torch.tensor([[0.0, -400, -450, 600, 550]], device=device, dtype=torch.float64)
    for aligned in (False, True):
        ours = roi_align(input, boxes, 4, 1.0, 0, aligned)
        torch.testing.assert_close(ours, torchvision_roi_align(input, boxes, 4, 1.0, 0, aligned), rtol=1e-9, atol=1e-12)


@pytest.mark.slow_emulated("51 million threads")
def test_many_boxes(device):
    input = torch.randn(2, 2, 8, 8, device=device)
    _, boxes = _inputs(device, torch.float32, count=100_000)
    output = roi_align(input, boxes, 2, 0.25, 1)
    part = slice(65_000, 66_000)
    torch.testing.assert_close(output[part], torchvision_roi_align(input, boxes[part], 2, 0.25, 1))
    precise, boxes = input.double().requires_grad_(), boxes.double()
    (ours,) = torch.autograd.grad(roi_align(precise, boxes, 2, 0.25, 1).sum(), precise)
    (theirs,) = torch.autograd.grad(torchvision_roi_align(precise, boxes, 2, 0.25, 1).sum(), precise)
    torch.testing.assert_close(ours, theirs)


def test_channels_last_in_is_channels_last_out(device):
    input, boxes = _inputs(device, torch.float32, channels=19)
    assert roi_align(input, boxes, 3).is_contiguous()
    last = roi_align(input.to(memory_format=torch.channels_last), boxes, 3)
    assert last.is_contiguous(memory_format=torch.channels_last)
    if device == "cpu" and not _simt.options():  # one order of summation for both layouts
        assert torch.equal(last, roi_align(input, boxes, 3))
    torch.testing.assert_close(last, roi_align(input, boxes, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_with_float32_boxes(device, dtype):
    input, boxes = _inputs(device, torch.float32)
    half = input.to(dtype)
    torch.testing.assert_close(roi_align(half, boxes, 3), roi_align(half.float(), boxes, 3).to(dtype), rtol=0, atol=0)


def test_box_list_equals_joined_boxes(device):
    input, boxes = _inputs(device, torch.float32)
    boxes = boxes[boxes[:, 0].argsort()]
    split = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
    assert torch.equal(roi_align(input, split, 3, 0.25), roi_align(input, boxes, 3, 0.25))
    assert roi_align(input, [boxes[:0, 1:], boxes[:0, 1:]], 3).shape == (0, 5, 3, 3)


def test_box_list_of_many_images_in_16_bits(device):
    # 257 and 2049 have no bfloat16 and float16.
    for dtype, images in ((torch.bfloat16, 260), (torch.float16, 2052)):
        input = torch.arange(images, device=device).to(dtype).view(-1, 1, 1, 1).expand(images, 1, 2, 2)
        box = torch.tensor([[0.0, 0, 1, 1]], device=device, dtype=dtype)
        output = roi_align(input, [box] * images, 1)
        assert torch.equal(output.flatten(), input[:, 0, 0, 0])


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0), (2, 1)])
def test_vmap_equals_a_loop(device, in_dims):
    inputs, boxes = zip(*(_inputs(device) for _ in range(3)), strict=True)
    boxes = [box.index_fill(0, torch.tensor([1], device=device), 7.0) for box in boxes]  # one index out of range
    stacked = [
        tensors[0] if dim is None else torch.stack(tensors, dim)
        for tensors, dim in zip((inputs, boxes), in_dims, strict=True)
    ]

    def pooled(input, boxes):
        return roi_align(input, boxes, (2, 3), 0.25, 2, True)

    def grad(input, boxes):
        return torch.func.grad(lambda x: pooled(x, boxes).pow(2).sum())(input)

    for function in (pooled, grad):
        looped = torch.stack(
            [function(inputs[0 if in_dims[0] is None else i], boxes[0 if in_dims[1] is None else i]) for i in range(3)]
        )
        torch.testing.assert_close(torch.func.vmap(function, in_dims)(*stacked), looped)


def test_layer_is_a_drop_in(device):
    input, boxes = _inputs(device, torch.float32)
    arguments = {"output_size": (3, 2), "spatial_scale": 0.25, "sampling_ratio": 2, "aligned": True}
    ours, theirs = pvk.nn.RoIAlign(**arguments), TorchvisionRoIAlign(**arguments)
    torch.testing.assert_close(ours(input, boxes), theirs(input, boxes))
    assert repr(ours).replace(" ", "") == repr(theirs).replace(" ", "")
    assert ours.state_dict() == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_tangents_are_refused_and_not_dropped(device):
    input, boxes = _inputs(device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        with pytest.raises(NotImplementedError, match="roi_align: expected inputs without tangents"):
            roi_align(dual, boxes, 2)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device):
    input = torch.zeros(1, 1100, 1400, 1400, dtype=torch.bfloat16, device=device)
    input[:, :, -30:, -30:] = 1
    boxes = torch.tensor([[0.0, 1375, 1375, 1395, 1395]], device=device)
    assert (roi_align(input, boxes, 3) == 1).all()
    last = input.to(memory_format=torch.channels_last)
    del input
    assert (roi_align(last, boxes, 3) == 1).all()
