"""`override_torchvision`: what torchvision's own tests assert of its operators, on ours, and that the block ends."""

from __future__ import annotations

import math
import sys
import threading
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")

from torch.library import opcheck
from torchvision import ops

import pyvision_kernels as pvk

BOXES = [[0, 0, 0, 9, 9], [0, 0, 5, 4, 9], [0, 5, 5, 9, 9], [1, 0, 0, 9, 9]]
SIDE = 5  # of the pooled maps
floating = pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
contiguous = pytest.mark.parametrize("contiguous", [True, False])


# ---- the poolers, by loops over pixels ----


def _integer_bins(box: Tensor, pooled: int, size: tuple[int, int], inclusive: bool):
    """Slices of rows and columns for each bin of a box that is rounded to whole pixels."""
    x1, y1, x2, y2 = (round(value) for value in box.tolist())
    extent = 1 if inclusive else 0
    height, width = (max(length + extent, 1) / pooled for length in (y2 - y1, x2 - x1))
    for i, j in product(range(pooled), repeat=2):
        rows = slice(y1 + math.floor(i * height), min(y1 + math.ceil((i + 1) * height), size[0]))
        columns = slice(x1 + math.floor(j * width), min(x1 + math.ceil((j + 1) * width), size[1]))
        yield i, j, rows, columns


def _max_pooled(map: Tensor, boxes: Tensor, pooled: int) -> Tensor:
    out = map.new_zeros(len(boxes), map.size(1), pooled, pooled)
    for k, box in enumerate(boxes):
        for i, j, rows, columns in _integer_bins(box[1:], pooled, map.shape[2:], inclusive=True):
            pixels = map[int(box[0]), :, rows, columns].flatten(1)
            if pixels.numel():
                out[k, :, i, j] = pixels.max(1).values
    return out


def _position_sensitive_mean(map: Tensor, boxes: Tensor, pooled: int) -> Tensor:
    planes = map.unflatten(1, (-1, pooled, pooled))
    out = map.new_zeros(len(boxes), planes.size(1), pooled, pooled)
    for k, box in enumerate(boxes):
        for i, j, rows, columns in _integer_bins(box[1:], pooled, map.shape[2:], inclusive=False):
            pixels = planes[int(box[0]), :, i, j, rows, columns].flatten(1)
            if pixels.numel():
                out[k, :, i, j] = pixels.mean(1)
    return out


def _interpolated(maps: Tensor, y: float, x: float) -> Tensor:
    """[C, H, W] at a point; torchvision's border: samples up to a pixel outside take the border's value."""
    height, width = maps.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return maps.new_zeros(len(maps))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = maps[:, top, left] * (1 - dx) + maps[:, top, right] * dx
    lower = maps[:, bottom, left] * (1 - dx) + maps[:, bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def _bilinear_mean(map: Tensor, boxes: Tensor, pooled: int, aligned: bool, sensitive: bool = False) -> Tensor:
    """roi_align, or ps_roi_align, with an adaptive number of samples."""
    offset = 0.5 if aligned else 0.0
    planes = map.unflatten(1, (-1, pooled, pooled)) if sensitive else None
    out = map.new_zeros(len(boxes), map.size(1) // (pooled**2 if sensitive else 1), pooled, pooled)
    for k, box in enumerate(boxes):
        x1, y1, x2, y2 = (value - offset for value in box[1:].tolist())
        height, width = ((y2 - y1) / pooled, (x2 - x1) / pooled)
        rows, columns = math.ceil(height), math.ceil(width)
        for i, j in product(range(pooled), repeat=2):
            maps = map[int(box[0])] if planes is None else planes[int(box[0]), :, i, j]
            for a, b in product(range(rows), range(columns)):
                y, x = y1 + (i + (a + 0.5) / rows) * height, x1 + (j + (b + 0.5) / columns) * width
                out[k, :, i, j] += _interpolated(maps, y, x) / (rows * columns)
    return out


POOLERS = {
    "roi_align": (
        lambda map, boxes, side: ops.roi_align(map, boxes, side, 1.0, -1),
        lambda map, boxes, side: _bilinear_mean(map, boxes, side, aligned=False),
    ),
    "roi_align_aligned": (
        lambda map, boxes, side: ops.roi_align(map, boxes, side, 1.0, -1, True),
        lambda map, boxes, side: _bilinear_mean(map, boxes, side, aligned=True),
    ),
    "roi_pool": (lambda map, boxes, side: ops.roi_pool(map, boxes, side), _max_pooled),
    "ps_roi_align": (
        lambda map, boxes, side: ops.ps_roi_align(map, boxes, side, 1.0, -1),
        lambda map, boxes, side: _bilinear_mean(map, boxes, side, aligned=True, sensitive=True),
    ),
    "ps_roi_pool": (lambda map, boxes, side: ops.ps_roi_pool(map, boxes, side), _position_sensitive_mean),
}
every_pooler = pytest.mark.parametrize("name", POOLERS)


def _map(side: int, dtype: torch.dtype, contiguous: bool, channels: int, images: int = 2) -> Tensor:
    map = torch.rand(images, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return map.to(dtype) if contiguous else map.to(dtype).permute(0, 1, 3, 2)


@every_pooler
@floating
@contiguous
def test_poolers_are_right_in_every_dtype_and_layout(name, dtype, contiguous, device):
    pool, expected = POOLERS[name]
    map = _map(10, dtype, contiguous, 2 * SIDE**2).to(device)
    boxes = torch.tensor(BOXES, dtype=dtype, device=device)
    with pvk.override_torchvision() as calls:
        pooled = pool(map, boxes, SIDE)
    assert sum(calls.values()) == 1
    assert (pooled.dtype, pooled.is_contiguous()) == (dtype, True)
    tolerance = 4e-3 if dtype == torch.float16 else 1e-5
    right = expected(map.cpu().double(), boxes.cpu().double(), SIDE)
    torch.testing.assert_close(pooled.cpu().double(), right, rtol=tolerance, atol=tolerance)


@every_pooler
@contiguous
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_gradients_of_poolers(name, contiguous, scripted):
    boxes = torch.tensor([[0, 0, 0, 4, 4], [0, 0, 2, 3, 4], [0, 2, 2, 4, 4]], dtype=torch.float64)
    pool = POOLERS[name][0]
    if scripted:
        function = torch.jit.script(getattr(ops, name.removesuffix("_aligned")))
        pool = lambda map, boxes, side: function(map, boxes, side)  # noqa: E731
    map = _map(5, torch.float64, contiguous, 2 * 2**2, images=1).requires_grad_()
    with pvk.override_torchvision() as calls:
        assert torch.autograd.gradcheck(lambda map: pool(map, boxes, 2), (map,), atol=1e-5)
    operator = name.removesuffix("_aligned")
    assert calls[operator] > 0
    assert calls[f"_{operator}_backward"] > 0


@every_pooler
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_poolers_pass_opcheck(name):
    operator = getattr(torch.ops.torchvision, name.removesuffix("_aligned")).default
    map = _map(6, torch.float32, True, 2 * 2**2).requires_grad_()
    extra = {"roi_align": (2, False), "roi_align_aligned": (2, True), "ps_roi_align": (2,)}.get(name, ())
    with pvk.override_torchvision():
        opcheck(operator, (map, torch.tensor(BOXES).float(), 1.0, 2, 2, *extra))


@every_pooler
def test_poolers_take_lists_and_traced_models(name):
    layers = {
        "roi_align": ops.RoIAlign(SIDE, 1.0, -1),
        "roi_align_aligned": ops.RoIAlign(SIDE, 1.0, -1, True),
        "roi_pool": ops.RoIPool(SIDE, 1.0),
        "ps_roi_align": ops.PSRoIAlign(SIDE, 1.0, -1),
        "ps_roi_pool": ops.PSRoIPool(SIDE, 1.0),
    }
    map, boxes = _map(5, torch.float32, True, 2 * SIDE**2), torch.tensor(BOXES).float()
    lists = [boxes[:3, 1:], boxes[3:, 1:]]
    with pvk.override_torchvision():
        direct = layers[name](map, boxes)
        assert torch.equal(torch.fx.symbolic_trace(layers[name])(map, boxes), direct)
        assert torch.equal(layers[name](map, lists), direct)
        with pytest.raises(AssertionError):
            layers[name](map, boxes[:, 1:])
        with pytest.raises(AssertionError):
            layers[name](map, [boxes, boxes])


@every_pooler
def test_boxes_that_make_no_sense_give_finite_results(name):
    map = _map(10, torch.float32, True, 2 * SIDE**2)
    boxes = torch.tensor([[0, 9, 9, 0, 0], [0, -4, -4, -2, -2], [1, 3, 3, 3, 3], [0, 1e9, 0, 2e9, 5]])
    with pvk.override_torchvision():
        assert POOLERS[name][0](map, boxes, SIDE).isfinite().all()


# ---- nms ----


def _boxes_around_a_threshold(count: int, iou: float) -> tuple[Tensor, Tensor]:
    """Random boxes; the last one shrunk from the first so that their IoU is just above the threshold."""
    generator = torch.Generator().manual_seed(count)
    boxes = torch.rand(count, 4, generator=generator) * 100
    boxes[:, 2:] += boxes[:, :2]
    boxes[-1] = boxes[0]
    x1, _, x2, _ = boxes[-1].tolist()
    boxes[-1, 0] += (x2 - x1) * (1 - iou - 1e-5)
    return boxes, torch.rand(count, generator=generator)


def _greedy(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    iou = ops.box_iou(boxes, boxes)
    left, kept = scores.argsort(descending=True).tolist(), []
    while left:
        kept.append(left[0])
        left = [index for index in left[1:] if iou[kept[-1], index] <= iou_threshold]
    return torch.tensor(kept)


@pytest.mark.parametrize("iou", [0.2, 0.5, 0.8])
def test_nms_keeps_what_the_definition_keeps(iou, device):
    boxes, scores = (tensor.to(device) for tensor in _boxes_around_a_threshold(300, iou))
    with pvk.override_torchvision() as calls:
        kept = ops.nms(boxes, scores, iou)
    assert calls == {"nms": 1}
    assert torch.equal(kept.cpu(), _greedy(boxes.cpu(), scores.cpu(), iou))


@pytest.mark.parametrize(
    ("boxes", "scores"),
    [((4,), (3,)), ((3, 5), (3,)), ((3, 4), (3, 2)), ((3, 4), (4,))],
    ids=["rank", "columns", "score rank", "length"],
)
def test_nms_refuses_bad_shapes(boxes, scores):
    with pvk.override_torchvision(), pytest.raises(RuntimeError, match="nms: expected"):
        ops.nms(torch.rand(boxes), torch.rand(scores), 0.5)


def test_batched_nms_of_both_strategies_and_half_precision_boxes():
    boxes, scores = _boxes_around_a_threshold(200, 0.5)
    classes = torch.arange(200) % 3
    with pvk.override_torchvision() as calls:
        trick = ops.boxes._batched_nms_coordinate_trick(boxes, scores, classes, 0.5)
        vanilla = ops.boxes._batched_nms_vanilla(boxes, scores, classes, 0.5)
        assert torch.equal(trick, vanilla)
        assert ops.batched_nms(torch.empty(0, 4), torch.empty(0), torch.empty(0), 0.5).shape == (0,)
        assert ops.nms(torch.empty(0, 4), torch.empty(0), 0.5).shape == (0,)
        half = ops.nms(boxes.half(), scores.half(), 0.5)  # torchvision's own has no such kernel
        assert torch.equal(half, ops.nms(boxes.half().float(), scores.half().float(), 0.5))
    assert calls["nms"] >= 6


@pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated")  # by torchvision's fake
def test_nms_passes_opcheck():
    boxes, scores = _boxes_around_a_threshold(50, 0.5)
    with pvk.override_torchvision():
        opcheck(torch.ops.torchvision.nms.default, (boxes, scores, 0.5))


# ---- the block ----


def _pooled() -> Tensor:
    return ops.roi_align(torch.rand(2, 1, 9, 9), torch.tensor(BOXES).float(), 2)


def test_torchvision_is_back_after_the_block_and_after_an_error():
    boxes = torch.rand(5, 4).double()
    with pvk.override_torchvision() as calls:
        _pooled()
    with pytest.raises(ZeroDivisionError), pvk.override_torchvision() as others:
        raise ZeroDivisionError
    _pooled()
    assert (calls, others) == ({"roi_align": 1}, {})
    with torch.profiler.profile(acc_events=True) as profile:
        ops.nms(boxes, torch.rand(5).double(), 0.5)
        _pooled()
    assert not [event.key for event in profile.key_averages() if event.key.startswith("pvk::")]


def test_blocks_nest():
    with pvk.override_torchvision() as outer:
        with pvk.override_torchvision() as inner:
            _pooled()
        _pooled()
        _pooled()
    assert (outer["roi_align"], inner["roi_align"]) == (2, 1)


def test_other_threads_are_within_the_block():
    with pvk.override_torchvision() as calls:
        thread = threading.Thread(target=_pooled)
        thread.start()
        thread.join()
    assert calls["roi_align"] == 1


def test_detectors_run_our_kernels_without_being_converted():
    from tests import detectors

    model = detectors.make("faster_rcnn")
    with torch.no_grad():
        stock = model(detectors.pictures())
        with pvk.override_torchvision() as calls:
            ours = model(detectors.pictures())
    assert calls["nms"] >= 4
    assert calls["roi_align"] >= 1
    detectors.assert_same(ours, stock)


def test_without_torchvision_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="expected torchvision to be installed"), pvk.override_torchvision():
        pass
