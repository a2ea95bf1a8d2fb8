"""What is special to ps_roi_align and ps_roi_pool: gradients of gradients, vmap, bad boxes, borders, layouts, sizes."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torchvision
from torch import Tensor

import pyvision_kernels as pvk
from pyvision_kernels._op import REGISTRY
from pyvision_kernels.ops import ps_roi_align, ps_roi_pool, roi_align

NAN, INF = math.nan, math.inf
both = pytest.mark.parametrize("op", [ps_roi_align, ps_roi_pool], ids=lambda op: op.__name__)


def _theirs(op):
    return getattr(torchvision.ops, op.__name__)


def _inputs(device, dtype=torch.float64, images=2, channels=5, bins=(3, 2), size=(9, 11), count=6):
    input = torch.randn(images, channels * bins[0] * bins[1], *size, device=device, dtype=dtype)
    corner = torch.rand(count, 2, device=device, dtype=dtype) * 12
    side = torch.rand(count, 2, device=device, dtype=dtype) * 16 + 2
    index = torch.randint(0, images, (count, 1), device=device).to(dtype)
    return input, torch.cat([index, corner, corner + side], 1)


@pytest.mark.parametrize(
    "op",
    [ps_roi_pool, functools.partial(ps_roi_align, sampling_ratio=2), functools.partial(ps_roi_align, sampling_ratio=0)],
)
def test_gradcheck_and_gradgradcheck(device, op):
    input, boxes = _inputs(device, channels=2, bins=(2, 1), size=(6, 5), count=3)
    boxes = torch.cat([boxes, boxes.new_tensor([[1, 4, 4, 40, 40]])])  # over the border
    input.requires_grad_()

    def pooled(x):
        return op(x, boxes, (2, 1), 0.25)

    torch.autograd.gradcheck(pooled, input, fast_mode=False)
    torch.autograd.gradgradcheck(pooled, input)


def test_equal_planes_give_what_roi_align_gives(device):
    # Where all planes of a channel are alike, the position does not matter.
    input, boxes = _inputs(device)
    maps = input[:, ::6]
    ours = ps_roi_align(maps.repeat_interleave(6, 1), boxes, (3, 2), 0.25, 2)
    torch.testing.assert_close(ours, roi_align(maps, boxes, (3, 2), 0.25, 2, aligned=True))


def test_pool_never_reads_the_last_row_and_column(device):
    input = torch.arange(36.0, device=device).view(1, 1, 6, 6)
    whole = torch.tensor([[0.0, 0, 0, 6, 6]], device=device)
    output = ps_roi_pool(input, whole, 1)
    assert output.item() == input[..., :5, :5].mean().item() == torchvision.ops.ps_roi_pool(input, whole, 1).item()
    input = input.requires_grad_()
    (grad,) = torch.autograd.grad(ps_roi_pool(input, whole, 1).sum(), input)
    expected = torch.zeros_like(grad)
    expected[..., :5, :5] = 1 / 25
    torch.testing.assert_close(grad, expected)


def test_pool_rounds_as_torchvision(device):
    # Whole pixels: sums are exact, and one division follows. Halves, borders, inverted and empty boxes.
    input = torch.randint(-9, 9, (1, 12, 17, 13), device=device).float()
    coordinates = torch.randint(-12, 24, (300, 4), device=device) / 2
    boxes = torch.cat([torch.zeros(300, 1, device=device), coordinates], 1)
    for scale in (1.0, 0.5):
        ours = ps_roi_pool(input, boxes, (2, 3), scale)
        assert torch.equal(ours, torchvision.ops.ps_roi_pool(input, boxes, (2, 3), scale))


@both
def test_expanded_gradient(device, op):
    # sum() gives a gradient of stride 0.
    input, boxes = _inputs(device, torch.float32, channels=40)
    input.requires_grad_()
    for like in (input, input.detach().to(memory_format=torch.channels_last).requires_grad_()):
        (ours,) = torch.autograd.grad(op(like, boxes, (3, 2), 0.25).sum(), like)
        (theirs,) = torch.autograd.grad(_theirs(op)(like, boxes, (3, 2), 0.25).sum(), like)
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == like.stride()


@both
def test_overlapping_input(device, op):
    row = torch.randn(1, 1, 9, 1, device=device)
    _, boxes = _inputs(device, torch.float32, images=1)
    ours = op(row.expand(1, 18, 9, 11), boxes, 3, 0.25)
    torch.testing.assert_close(ours, _theirs(op)(row.expand(1, 18, 9, 11).contiguous(), boxes, 3, 0.25))


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
@both
def test_bad_box_is_zero_and_changes_no_other(device, op, box):
    input, boxes = _inputs(device, torch.float32)
    input.requires_grad_()
    bad = torch.cat([boxes[:3], torch.tensor([box], device=device), boxes[3:]])
    alone = op(input, boxes, (3, 2))
    output = op(input, bad, (3, 2))
    assert torch.equal(output[3], torch.zeros_like(output[3]))
    assert torch.equal(torch.cat([output[:3], output[4:]]), alone)
    weight = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, input, weight)
    (grad_alone,) = torch.autograd.grad(alone, input, torch.cat([weight[:3], weight[4:]]))
    assert torch.equal(grad, grad_alone)


def test_box_without_samples_is_zero_where_torchvision_gives_nan(device):
    input = torch.randn(1, 4, 9, 9, device=device)
    empty = torch.tensor([[0.0, 3, 3, 3, 3]], device=device)
    assert torchvision.ops.ps_roi_align(input, empty, 2).isnan().all()
    assert torch.equal(ps_roi_align(input, empty, 2), torch.zeros(1, 1, 2, 2, device=device))


@both
def test_enormous_boxes_end_soon(device, op):
    # A map of ones: the mean of the pool is 1, of the samples the share of those on the map.
    input = torch.ones(1, 2, 50, 40, device=device)
    sides = torch.tensor([1e4, 1e6, 1e9, 1e20, 1e30], device=device)
    boxes = torch.stack([0 * sides, -sides, -sides, sides, sides], 1)
    output = op(input, boxes, 1)
    if op is ps_roi_pool:
        assert (output == 1).all()
        return
    expected = 50 * 40 / (2 * sides.double()) ** 2
    torch.testing.assert_close(output[:2, 0, 0, 0].double(), expected[:2], rtol=0.1, atol=0)
    assert (output[3:] <= 1e-30).all()


@both
def test_nan_beside_a_bin_does_not_spread(device, op):
    clean, boxes = _inputs(device, torch.float32, images=1)
    boxes[:, 1:] = torch.tensor([8.0, 8, 20, 20], device=device)
    dirty = clean.clone()
    dirty[..., :1, :], dirty[..., :, :1], dirty[..., 8:, :], dirty[..., :, 8:] = NAN, INF, NAN, -INF
    assert torch.equal(op(dirty, boxes, (3, 2), 0.25), op(clean, boxes, (3, 2), 0.25))


@both
def test_infinite_gradient_of_a_bin_stays_in_it(device, op):
    input, _ = _inputs(device, torch.float32, images=1)
    box = torch.tensor([[0.0, 8, 8, 20, 20]], device=device)
    input.requires_grad_()
    output = op(input, box, (3, 2), 0.25)
    (grad,) = torch.autograd.grad(output, input, torch.full_like(output, INF))
    (support,) = torch.autograd.grad(op(input, box, (3, 2), 0.25).sum(), input)
    assert torch.equal(grad == INF, support > 0)
    assert torch.equal(grad[support == 0], support[support == 0])


@pytest.mark.slow_emulated("30 million threads")
@both
def test_many_boxes(device, op):
    input = torch.randn(2, 8, 8, 8, device=device)
    _, boxes = _inputs(device, torch.float32, size=(8, 8), count=100_000)
    output = op(input, boxes, 2, 0.25)
    part = slice(65_000, 66_000)
    torch.testing.assert_close(output[part], _theirs(op)(input, boxes[part], 2, 0.25))
    precise, boxes = input.double().requires_grad_(), boxes.double()
    (ours,) = torch.autograd.grad(op(precise, boxes, 2, 0.25).sum(), precise)
    if op is ps_roi_align:
        (theirs,) = torch.autograd.grad(torchvision.ops.ps_roi_align(precise, boxes, 2, 0.25).sum(), precise)
        torch.testing.assert_close(ours, theirs)
    else:  # the adjoint of the forward: <grad, input> is the sum of the outputs
        torch.testing.assert_close((ours * precise).sum(), op(precise, boxes, 2, 0.25).sum())


@both
def test_channels_last_in_is_channels_last_out(device, op):
    input, boxes = _inputs(device, torch.float32, channels=19)
    assert op(input, boxes, (3, 2), 0.25).is_contiguous()
    last = op(input.to(memory_format=torch.channels_last), boxes, (3, 2), 0.25)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, op(input, boxes, (3, 2), 0.25))  # one order of summation for both layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both
def test_half_features_with_float32_boxes(device, op, dtype):
    input, boxes = _inputs(device, torch.float32)
    half = input.to(dtype)
    ours, single = op(half, boxes, (3, 2), 0.25), op(half.float(), boxes, (3, 2), 0.25)
    torch.testing.assert_close(ours, single.to(dtype), rtol=0, atol=0)


@both
def test_box_list_equals_joined_boxes(device, op):
    input, boxes = _inputs(device, torch.float32)
    boxes = boxes[boxes[:, 0].argsort()]
    split = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
    assert torch.equal(op(input, split, (3, 2), 0.25), op(input, boxes, (3, 2), 0.25))
    assert op(input, [boxes[:0, 1:], boxes[:0, 1:]], (3, 2)).shape == (0, 5, 3, 2)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0), (2, 1)])
@both
def test_vmap_equals_a_loop(device, op, in_dims):
    inputs, boxes = zip(*(_inputs(device) for _ in range(3)), strict=True)
    boxes = [box.index_fill(0, torch.tensor([1], device=device), 7.0) for box in boxes]  # one index out of range
    stacked = [
        tensors[0] if dim is None else torch.stack(tensors, dim)
        for tensors, dim in zip((inputs, boxes), in_dims, strict=True)
    ]

    def pooled(input, boxes):
        return op(input, boxes, (3, 2), 0.25)

    def grad(input, boxes):
        return torch.func.grad(lambda x: pooled(x, boxes).pow(2).sum())(input)

    for function in (pooled, grad):
        looped = torch.stack(
            [function(inputs[0 if in_dims[0] is None else i], boxes[0 if in_dims[1] is None else i]) for i in range(3)]
        )
        torch.testing.assert_close(torch.func.vmap(function, in_dims)(*stacked), looped)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("PSRoIAlign", {"output_size": (3, 2), "spatial_scale": 0.25, "sampling_ratio": 2}),
        ("PSRoIPool", {"output_size": (3, 2), "spatial_scale": 0.25}),
    ],
)
def test_layer_is_a_drop_in(device, name, arguments):
    input, boxes = _inputs(device, torch.float32)
    ours, theirs = getattr(pvk.nn, name)(**arguments), getattr(torchvision.ops, name)(**arguments)
    expected = theirs(input, boxes)
    torch.testing.assert_close(ours(input, boxes), expected)
    assert repr(ours).replace(" ", "") == repr(theirs).replace(" ", "")
    assert ours.state_dict() == {}
    theirs.__class__ = type(ours)
    assert torch.equal(theirs(input, boxes), ours(input, boxes))


def test_backward_operators_take_what_torchvisions_take(device):
    input, boxes = _inputs(device, torch.float32)
    for name, sampling in (("ps_roi_align", (2,)), ("ps_roi_pool", ())):
        geometry = (0.25, 3, 2, *sampling)
        output, mapping = getattr(torch.ops.torchvision, name)(input, boxes, *geometry)
        planes = torch.arange(30, dtype=torch.int32, device=device).view(5, 3, 2)
        assert torch.equal(mapping, planes.expand_as(mapping))  # a constant: our operators need none
        grad = torch.randn_like(output)
        expected = getattr(torch.ops.torchvision, f"_{name}_backward")(grad, boxes, mapping, *geometry, *input.shape)
        ours = REGISTRY[f"_{name}_backward"](grad, boxes, *geometry, *input.shape, False)
        torch.testing.assert_close(ours, expected)


@both
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_tangents_are_refused_and_not_dropped(device, op):
    input, boxes = _inputs(device)
    with torch.autograd.forward_ad.dual_level():
        dual: Tensor = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        with pytest.raises(NotImplementedError, match=f"{op.__name__}: expected inputs without tangents"):
            op(dual, boxes, (3, 2))


@pytest.mark.slow
@both
def test_more_than_2_to_the_31_elements(device, op):
    input = torch.zeros(1, 1104, 1400, 1400, dtype=torch.bfloat16, device=device)
    input[:, :, -30:, -30:] = 1
    boxes = torch.tensor([[0.0, 1375, 1375, 1395, 1395]], device=device)
    assert (op(input, boxes, 2) == 1).all()
    last = input.to(memory_format=torch.channels_last)
    del input
    assert (op(last, boxes, 2) == 1).all()
