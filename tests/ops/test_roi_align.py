"""What is special to roi_align and its pyramid: gradients of gradients, vmap, bad boxes, layouts, sizes, levels."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign as TorchvisionMultiScale
from torchvision.ops import RoIAlign as TorchvisionRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align
from torchvision.ops.poolers import LevelMapper

import pyvision_kernels as pvk
from pyvision_kernels import _simt
from pyvision_kernels.ops import multiscale_roi_align, roi_align
from pyvision_kernels.ops.roi_align.levels import _areas, level_areas

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


# ---- multiscale_roi_align ----

SCALES = [1 / 4, 1 / 8, 1 / 16]


def _pyramid(device, dtype=torch.float64, images=2, channels=5, size=(48, 64), count=8):
    """Maps, and boxes of all levels for a canonical scale of 16."""
    features = [
        torch.randn(images, channels, int(size[0] * scale), int(size[1] * scale), device=device, dtype=dtype)
        for scale in SCALES
    ]
    corner = torch.rand(count, 2, device=device, dtype=dtype) * 20
    side = torch.tensor([2, 6, 14, 30], device=device, dtype=dtype).repeat(count)[:count, None]
    index = torch.randint(0, images, (count, 1), device=device).to(dtype)
    return features, torch.cat([index, corner, corner + side + torch.rand_like(side)], 1)


def _pool(features, boxes, output_size=3, **options):
    return multiscale_roi_align(features, boxes, output_size, SCALES, canonical_scale=16, **options)


def test_every_box_has_the_level_that_torchvision_gives_it(device):
    # Of maps that hold their own number. Widths at the borders between levels, one float to either side, and random.
    exact = torch.tensor([16.0, 64.0, 256.0])
    steps = torch.stack([exact, exact.nextafter(exact - 1), exact.nextafter(exact + 1)]).flatten()
    near = (exact * (1 + (torch.arange(400).view(-1, 1) - 200) * 1.2e-7)).flatten()
    width = torch.cat([steps, near, torch.rand(1500) * 300, torch.zeros(1)])
    for dtype in (torch.float32, torch.float64):
        boxes = torch.stack([torch.zeros_like(width), torch.zeros_like(width), width, torch.ones_like(width)], 1)
        boxes = torch.cat([boxes, torch.rand(500, 4) * 10 + torch.tensor([0, 0, 12, 12])]).to(dtype)
        features = [torch.full((1, 1, 8, 320 >> level), level, dtype=dtype) for level in range(4)]
        levels = LevelMapper(0, 3, 8, 2)([boxes])
        ours = multiscale_roi_align(
            [item.to(device) for item in features], [boxes.to(device)], 1, [1, 1 / 2, 1 / 4, 1 / 8], 1, 8, 2
        )
        assert torch.equal(ours.flatten().round().long().cpu(), levels)
        assert set(levels.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("double", [False, True])
def test_areas_of_levels_are_the_least_that_reach_them(double):
    dtype = torch.float64 if double else torch.float32
    for canonical_scale, canonical_level in ((224, 4), (56, 4), (300, 3), (1, 0)):
        areas = level_areas("", tuple(2.0**-level for level in range(2, 8)), canonical_scale, canonical_level, double)
        first = torch.tensor(areas, dtype=dtype)
        mapper = LevelMapper(2, 7, canonical_scale, canonical_level)
        for area, shift in ((first, 0), (first.nextafter(torch.zeros_like(first)), -1)):
            # A box with the area as its width: the mapper's own product is exact.
            boxes = torch.stack([torch.zeros_like(area), torch.zeros_like(area), area, torch.ones_like(area)], 1)
            assert torch.equal(mapper([boxes]), torch.arange(1, 6) + shift)


@pytest.mark.parametrize("aligned", [False, True])
def test_pyramid_equals_roi_align_of_each_level_bit_for_bit(device, aligned):
    features, boxes = _pyramid(device, torch.float32, count=30)
    pooled = _pool(features, boxes, aligned=aligned)
    levels = LevelMapper(2, 4, 16)([boxes[:, 1:]])
    for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
        chosen = levels == level
        assert chosen.any()
        assert torch.equal(pooled[chosen], roi_align(feature, boxes[chosen], 3, scale, 2, aligned))
        alone = multiscale_roi_align([feature], boxes, 3, [scale], 2, 16, aligned=aligned)
        assert torch.equal(alone, roi_align(feature, boxes, 3, scale, 2, aligned))


def test_pyramid_gradcheck_and_gradgradcheck(device):
    features, boxes = _pyramid(device, channels=1, size=(16, 32), images=1, count=4)
    features = [feature.requires_grad_() for feature in features]

    def pooled(*features):
        return _pool(list(features), boxes, 2)

    torch.autograd.gradcheck(pooled, features)
    torch.autograd.gradgradcheck(pooled, features)


def test_gradient_of_some_maps(device):
    features, boxes = _pyramid(device)
    features[1].requires_grad_()
    (alone,) = torch.autograd.grad(_pool(features, boxes).sum(), features[1:2])
    for feature in features:
        feature.requires_grad_()
    assert torch.equal(torch.autograd.grad(_pool(features, boxes).sum(), features)[1], alone)


@pytest.mark.parametrize(
    "box",
    [
        [0, NAN, 4, 20, 30],
        [1, 4, 4, INF, 30],
        [-1, 4, 4, 20, 20],
        [2, 4, 4, 20, 20],
        [0, 20, 4, 4, 30],  # of negative area
        [1, -3e38, 4, 3e38, 4],  # whose area is not a number
    ],
)
def test_bad_box_of_a_pyramid_is_zero_and_changes_no_other(device, box):
    features, boxes = _pyramid(device, torch.float32)
    features = [feature.requires_grad_() for feature in features]
    bad = torch.cat([boxes[:3], torch.tensor([box], device=device), boxes[3:]])
    output, alone = _pool(features, bad), _pool(features, boxes)
    assert torch.equal(output[3], torch.zeros_like(output[3]))
    assert torch.equal(torch.cat([output[:3], output[4:]]), alone)
    weight = torch.randn_like(output)
    grads = torch.autograd.grad(output, features, weight)
    for grad, expected in zip(
        grads, torch.autograd.grad(alone, features, torch.cat([weight[:3], weight[4:]])), strict=True
    ):
        assert torch.equal(grad, expected)


def test_layout_of_the_first_map_decides(device):
    features, boxes = _pyramid(device, torch.float32, channels=24)
    expected = _pool(features, boxes)
    last = [feature.to(memory_format=torch.channels_last) for feature in features]
    assert expected.is_contiguous()
    for mixed, is_last in (([last[0], *features[1:]], True), ([features[0], *last[1:]], False), (last, True)):
        output = _pool(mixed, boxes)
        assert output.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
        torch.testing.assert_close(output, expected)
        leaves = [item.detach().requires_grad_() for item in mixed]
        for grad in torch.autograd.grad(_pool(leaves, boxes).sum(), leaves):
            assert grad.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def test_autocast_takes_maps_of_several_dtypes(device):
    features, boxes = _pyramid(device, torch.float32)
    mixed = [features[0].bfloat16(), features[1], features[2].bfloat16()]
    with torch.autocast(device, torch.bfloat16):
        output = _pool(mixed, boxes)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, _pool([item.float() for item in mixed], boxes).bfloat16())


@pytest.mark.parametrize(
    "in_dims", [((0, 0, 0), 0), ((0, 0, 0), None), (None, 0), ((1, None, 2), None), ((0, None, 1), 1)]
)
def test_vmap_of_a_pyramid_equals_a_loop(device, in_dims):
    pyramids, boxes = zip(*(_pyramid(device) for _ in range(2)), strict=True)
    dims = in_dims[0] or (None,) * 3
    features = [
        pyramids[0][level] if dim is None else torch.stack([pyramid[level] for pyramid in pyramids], dim)
        for level, dim in enumerate(dims)
    ]
    stacked = boxes[0] if in_dims[1] is None else torch.stack(boxes, in_dims[1])

    def grads(features, boxes):
        return torch.func.grad(lambda x: _pool(x, boxes, (2, 3)).pow(2).sum())(features)

    for function in (lambda *inputs: [_pool(*inputs, (2, 3))], grads):
        batched = torch.func.vmap(function, (list(dims), in_dims[1]))(features, stacked)
        for i in range(2):
            alone = function(
                [pyramids[0 if dim is None else i][level] for level, dim in enumerate(dims)],
                boxes[0 if in_dims[1] is None else i],
            )
            for one, other in zip(batched, alone, strict=True):
                torch.testing.assert_close(one[i], other)


def test_tangents_in_a_list_are_refused(device):
    features, boxes = _pyramid(device)
    with torch.autograd.forward_ad.dual_level():
        features[1] = torch.autograd.forward_ad.make_dual(features[1], torch.ones_like(features[1]))
        with pytest.raises(NotImplementedError, match="multiscale_roi_align: expected inputs without tangents"):
            _pool(features, boxes)


def test_areas_of_levels_are_found_while_tracing():
    features, boxes = _pyramid("cpu", torch.float32)
    expected = _pool(features, boxes)
    _areas.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert _pool([mode.from_tensor(item) for item in features], mode.from_tensor(boxes)).shape == expected.shape
    _areas.cache_clear()
    assert torch.equal(torch.compile(_pool, fullgraph=True, backend="eager")(features, boxes), expected)


def _poolers(output_size=(3, 2)):
    arguments = (["a", "c"], output_size, 2)
    return [kind(*arguments, canonical_scale=20) for kind in (pvk.nn.MultiScaleRoIAlign, TorchvisionMultiScale)]


def _pooler_inputs(device):
    features, boxes = _pyramid(device, torch.float32)
    x = {"a": features[0], "b": features[1], "c": features[2], "pool": features[2]}
    return x, [boxes[boxes[:, 0] == image, 1:] for image in range(2)], [(40, 64), (48, 50)]


def test_multiscale_layer_is_a_drop_in(device):
    ours, theirs = _poolers()
    assert isinstance(ours, TorchvisionMultiScale)
    assert vars(ours).keys() == vars(theirs).keys()
    inputs = _pooler_inputs(device)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    assert ours.scales == theirs.scales
    assert repr(ours) == repr(theirs)
    assert ours.output_size == theirs.output_size == (3, 2)
    with pytest.raises(ValueError, match="images list should not be empty"):
        _poolers(3)[0](inputs[0], inputs[1], [])


@pytest.mark.parametrize("called", [False, True])
def test_class_of_a_pooler_can_be_swapped(device, called):
    inputs = _pooler_inputs(device)
    expected = _poolers()[1](*inputs)
    for pooler in _poolers():
        if called:
            pooler(*inputs)
        ours = isinstance(pooler, pvk.nn.MultiScaleRoIAlign)
        pooler.__class__ = TorchvisionMultiScale if ours else pvk.nn.MultiScaleRoIAlign
        torch.testing.assert_close(pooler(*inputs), expected)


def test_multiscale_layer_is_copied_pickled_and_taken_by_detectors():
    pooler = _poolers()[0]
    for copied in (copy.deepcopy(pooler), pickle.loads(pickle.dumps(pooler))):
        assert type(copied) is type(pooler) is pvk.nn.MultiScaleRoIAlign
        assert copied.featmap_names == pooler.featmap_names
    backbone = torch.nn.Conv2d(3, 4, 1)
    backbone.out_channels = 4
    FasterRCNN(backbone, 2, rpn_anchor_generator=AnchorGenerator(), box_roi_pool=pooler)


def test_importing_the_library_does_not_import_torchvision():
    code = (
        "import sys, pyvision_kernels as pvk; assert 'torchvision' not in sys.modules; "
        "assert 'MultiScaleRoIAlign' in dir(pvk.nn); pvk.nn.MultiScaleRoIAlign(['0'], 7, 2); "
        "sys.modules['torchvision'] = sys.modules['torchvision.ops'] = None; "
        "del sys.modules['pyvision_kernels.nn.multiscale_roi_align']; "
        "from torch.nn import Module; assert pvk.nn.MultiScaleRoIAlign.__mro__[1] is Module"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
