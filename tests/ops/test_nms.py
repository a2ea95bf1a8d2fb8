"""What is special to the NMS family: equality with torchvision on random and hostile boxes, order, classes, syncs."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import nms as torchvision_nms
from torchvision.ops.boxes import _batched_nms_coordinate_trick

from pyvision_kernels.ops import batched_nms, batched_nms_padded, nms, soft_nms


def _random(count, dtype=torch.float32, extent=200.0, sides=60.0, levels=1000):
    corner = torch.rand(count, 2, dtype=dtype) * extent
    side = torch.rand(count, 2, dtype=dtype) * sides
    scores = (torch.rand(count, dtype=dtype) * levels).floor() / levels
    return torch.cat([corner, corner + side], 1), scores


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 0.01, 0.3, 0.5, 0.7, 0.9, 0.999999, 1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchvision_on_random_boxes(device, dtype, threshold):
    for count, extent, sides in ((40, 50.0, 30.0), (700, 200.0, 60.0), (1500, 2000.0, 300.0), (300, 1.0, 1e-3)):
        boxes, scores = _random(count, dtype, extent, sides)
        ours = nms(boxes.to(device), scores.to(device), threshold).cpu()
        assert torch.equal(ours, torchvision_nms(boxes, scores, threshold))


@pytest.mark.parametrize("scale", [1e-38, 1e-22, 1e-10, 1e10, 1e17, 1e19, 1e37])
def test_equals_torchvision_where_areas_underflow_or_overflow(device, scale):
    boxes, scores = _random(400)
    for threshold in (0.0, 0.4, 0.9):
        ours = nms((boxes * scale).to(device), scores.to(device), threshold).cpu()
        assert torch.equal(ours, torchvision_nms(boxes * scale, scores, threshold))


def test_equals_torchvision_at_the_threshold(device):
    # IoUs of boxes on a coarse grid are simple fractions: many equal the threshold exactly, or miss it by one rounding.
    boxes = torch.randint(0, 8, (900, 4)).float()
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(900)
    for fraction in (1 / 2, 1 / 3, 2 / 3, 1 / 7, 3 / 4):
        for threshold in (
            fraction,
            math.nextafter(fraction, 0),
            math.nextafter(fraction, 1),
            float(torch.tensor(fraction)),
        ):
            ours = nms(boxes.to(device), scores.to(device), threshold).cpu()
            assert torch.equal(ours, torchvision_nms(boxes, scores, threshold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_equals_torchvision_with_special_values(device, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    extremes = [3e38, 1e-40] if dtype == torch.float32 else [1.7e308, -1.7e308, 1e300, 1e-300]
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 5.0, 7.0, 1e29, -1e29, 1e30, -1e30, *extremes]
    values = torch.tensor(values, dtype=dtype)
    boxes = values[torch.randint(0, len(values), (500, 4), generator=generator)]
    scores = values[torch.randint(0, len(values), (500,), generator=generator)]
    for threshold in (-0.5, 0.0, 0.3, 0.8):
        ours = nms(boxes.to(device), scores.to(device), threshold).cpu()
        assert torch.equal(ours, torchvision_nms(boxes, scores, threshold))


def test_thin_boxes_at_the_end_of_the_range(device):
    far = torch.tensor([[1.5e308, 0, 1.6e308, 1e-280], [-1.6e308, 0, -1.5e308, 1e-280]], dtype=torch.float64)
    boxes = torch.cat([far, far, torch.tensor([[0.0, 0, 1, 1]], dtype=torch.float64)])
    scores = torch.rand(5, dtype=torch.float64)
    assert torch.equal(nms(boxes.to(device), scores.to(device), 0.5).cpu(), torchvision_nms(boxes, scores, 0.5))


def test_identical_boxes_keep_the_first(device):
    boxes = torch.tensor([[1.0, 1, 5, 5]], device=device).expand(5000, 4)
    assert nms(boxes, torch.ones(5000, device=device), 0.5).tolist() == [0]


def test_disjoint_boxes_are_all_kept_in_order_of_score(device):
    corner = torch.arange(3000.0)[:, None].repeat(1, 2) * 10
    boxes, scores = torch.cat([corner, corner + 5], 1).to(device), torch.rand(3000).to(device)
    assert torch.equal(nms(boxes, scores, 0.5), scores.sort(descending=True, stable=True).indices)


def test_chain_of_overlaps(device):
    # Each box overlaps the next alone: every other one stays, whatever the length of the chain.
    left = torch.arange(2100.0) * 4
    boxes = torch.stack([left, 0 * left, left + 10, 0 * left + 10], 1).to(device)
    scores = torch.linspace(1, 0, 2100).to(device)
    assert torch.equal(nms(boxes, scores, 0.4), torch.arange(0, 2100, 2, device=device))


def test_16_bit_boxes_are_compared_in_float32(device):
    boxes, scores = _random(600)
    for dtype in (torch.float16, torch.bfloat16):
        half_boxes, half_scores = boxes.to(dtype), scores.to(dtype)
        ours = nms(half_boxes.to(device), half_scores.to(device), 0.5).cpu()
        assert torch.equal(ours, torchvision_nms(half_boxes.float(), half_scores.float(), 0.5))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_a_size_that_depends_on_data(backend):
    boxes, scores = _random(200)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda b, s: b[nms(b, s, 0.5)] * 2, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(boxes, scores), boxes[torchvision_nms(boxes, scores, 0.5)] * 2)
    torch._dynamo.reset()


def _class_after_class(boxes, scores, idxs, threshold):
    """torchvision's nms of each class, then all by score."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    for group in idxs.unique():
        members = (idxs == group).nonzero()[:, 0]
        kept[members[torchvision_nms(boxes[members], scores[members], threshold)]] = True
    order = scores.sort(stable=True, descending=True).indices
    return order[kept[order]]


@pytest.mark.parametrize("classes", [1, 2, 7, 90, 1000])  # the table of classes grows beyond 128
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_equals_torchvision_class_after_class(device, dtype, classes):
    for count, extent, sides, levels in ((1, 50.0, 30.0, 10), (60, 50.0, 30.0, 10), (1200, 200.0, 60.0, 100)):
        boxes, scores = _random(count, dtype, extent, sides, levels)
        idxs = torch.randint(0, classes, (count,))
        for threshold in (0.0, 0.5, 0.9):
            ours = batched_nms(boxes.to(device), scores.to(device), idxs.to(device), threshold).cpu()
            assert torch.equal(ours, _class_after_class(boxes, scores, idxs, threshold))


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.int64, [-(2**63), 2**63 - 1, 0, -1, 1]),
        (torch.int64, [group << 32 for group in range(-150, 150)]),  # equal low words
        (torch.int64, [group << 8 for group in range(300)]),
        (torch.int32, [-(2**31), 2**31 - 1, -7]),
        (torch.int16, [-(2**15), 2**15 - 1, 255, -1]),
        (torch.int8, [-128, 127, -1]),
        (torch.uint8, [255, 127, 0]),
        (torch.uint16, [65535, 32767, 255]),
        (torch.uint32, [2**32 - 1, 2**31 - 1, 0]),
        (torch.uint64, [2**64 - 1, 2**63 - 1, 0]),
    ],
)
def test_classes_are_any_integers(device, dtype, values):
    boxes, scores = _random(700)
    idxs = torch.randint(0, len(values), (700,))
    given = torch.tensor(values, dtype=dtype)
    given = torch.stack([given[i] for i in idxs.tolist()]).to(device)  # uint16 and wider have no indexing
    ours = batched_nms(boxes.to(device), scores.to(device), given, 0.4).cpu()
    assert torch.equal(ours, _class_after_class(boxes, scores, idxs, 0.4))
    soft = soft_nms(boxes.to(device), scores.to(device), idxs=given, method="linear")
    for one, other in zip(
        soft, soft_nms(boxes.to(device), scores.to(device), idxs=idxs.to(device), method="linear"), strict=True
    ):
        assert torch.equal(one, other)


def test_one_class_is_nms_and_a_class_each_keeps_all(device):
    boxes, scores = (tensor.to(device) for tensor in _random(900))
    same, each = torch.full((900,), -3, device=device), torch.arange(900, device=device)
    assert torch.equal(batched_nms(boxes, scores, same, 0.4), nms(boxes, scores, 0.4))
    assert torch.equal(batched_nms(boxes, scores, each, 0.4), scores.sort(descending=True, stable=True).indices)


def test_large_classes_do_not_round_the_boxes(device):
    # An IoU of 0.48. Moved by the width of a million classes, coordinates are whole numbers, and it is 0.5.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4.8]])
    scores, idxs = torch.tensor([0.9, 0.8]), torch.tensor([1_000_000, 1_000_000])
    exact = torchvision_nms(boxes, scores, 0.49)
    assert not torch.equal(_batched_nms_coordinate_trick(boxes, scores, idxs, 0.49), exact)
    assert torch.equal(batched_nms(boxes.to(device), scores.to(device), idxs.to(device), 0.49).cpu(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_equals_torchvision_with_special_values(device, dtype):
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 5.0, 7.0, 1e29, -1e29, 1e30, -1e30]
    values = torch.tensor(values, dtype=dtype)
    boxes, scores = values[torch.randint(0, len(values), (500, 4))], values[torch.randint(0, len(values), (500,))]
    idxs = torch.randint(0, 4, (500,))
    for threshold in (-0.5, 0.0, 0.3, 0.8):
        ours = batched_nms(boxes.to(device), scores.to(device), idxs.to(device), threshold).cpu()
        assert torch.equal(ours, _class_after_class(boxes, scores, idxs, threshold))
    # -inf is absent in the padded form alone.
    keep, count = batched_nms_padded(boxes[None].to(device), scores[None].to(device), idxs[None].to(device), 0.3, 500)
    present = (scores != -math.inf).nonzero()[:, 0]
    expected = present[_class_after_class(boxes[present], scores[present], idxs[present], 0.3)]
    assert torch.equal(keep[0, : count[0]].cpu(), expected)


@pytest.mark.parametrize("with_classes", [False, True])
def test_padded_is_the_beginning_of_each_images_result(device, with_classes):
    boxes, scores = (torch.stack(part) for part in zip(*[_random(400) for _ in range(3)], strict=True))
    scores = torch.where(torch.rand(3, 400) < 0.3, -math.inf, scores)
    scores[1] = -math.inf
    idxs = torch.randint(-2, 3, (3, 400), dtype=torch.int32)
    for max_output in (0, 1, 50, 400, 1000):
        given = idxs.to(device) if with_classes else None
        keep, count = batched_nms_padded(boxes.to(device), scores.to(device), given, 0.3, max_output)
        assert keep.shape == (3, max_output)
        assert count.shape == (3,)
        assert keep.dtype == count.dtype == torch.int64
        for image in range(3):
            present = (scores[image] != -math.inf).nonzero()[:, 0]
            groups = idxs[image] if with_classes else torch.zeros_like(idxs[image])
            expected = _class_after_class(boxes[image][present], scores[image][present], groups[present], 0.3)
            expected = present[expected[:max_output]]
            assert count[image] == len(expected)
            assert torch.equal(keep[image, : len(expected)].cpu(), expected)
            assert (keep[image, len(expected) :] == -1).all()


def test_padded_through_any_strides(device):
    # Scores whose sort would come back transposed.
    boxes, scores = torch.rand(4, 90, 3).permute(2, 1, 0), torch.rand(90, 3).t()
    boxes = (
        torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], 2).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    )
    idxs = torch.randint(0, 3, (90, 3)).t()
    ours = batched_nms_padded(boxes.to(device), scores.to(device), idxs.to(device), 0.3, 40)
    contiguous = (tensor.contiguous().to(device) for tensor in (boxes, scores, idxs))
    for one, other in zip(ours, batched_nms_padded(*contiguous, 0.3, 40), strict=True):
        assert torch.equal(one, other)


def test_absent_boxes_suppress_nothing(device):
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4], [9, 9, 10, 10]]], device=device)
    scores = torch.tensor([[-math.inf, math.nan, 0.5, -math.inf]], device=device)
    keep, count = batched_nms_padded(boxes, scores, None, 0.5, 3)
    assert keep.tolist() == [[1, -1, -1]]
    assert count.tolist() == [1]
    assert nms(boxes[0], scores[0], 0.5).tolist() == [1, 3]  # there, -inf is a score


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_padded_compiles_without_flags(backend):
    boxes, scores = (tensor[None].expand(2, *tensor.shape) for tensor in _random(100))
    idxs = torch.randint(0, 3, (2, 100))

    def best(boxes, scores, idxs):
        keep, count = batched_nms_padded(boxes, scores, idxs, 0.5, 20)
        return boxes.gather(1, keep.clamp(min=0)[..., None].expand(-1, -1, 4)), count

    compiled = torch.compile(best, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(boxes, scores, idxs), best(boxes, scores, idxs))
    torch._dynamo.reset()


def test_padded_under_vmap(device):
    boxes, scores = (torch.stack(part).to(device) for part in zip(*[_random(80) for _ in range(6)], strict=True))
    idxs = torch.randint(0, 3, (2, 80), device=device)
    grouped = boxes.view(3, 2, 80, 4), scores.view(3, 2, 80)
    mapped = torch.vmap(lambda b, s: batched_nms_padded(b, s, idxs, 0.3, 30))(*grouped)
    for image in range(3):
        alone = batched_nms_padded(grouped[0][image], grouped[1][image], idxs, 0.3, 30)
        assert torch.equal(mapped[0][image], alone[0])
        assert torch.equal(mapped[1][image], alone[1])


def test_soft_scores_of_a_pair(device):
    # IoU 1/3; the third box is of another place.
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [8, 8, 9, 9]], dtype=torch.float64, device=device)
    scores = torch.tensor([0.5, 0.9, 0.4], dtype=torch.float64, device=device)
    keep, kept = soft_nms(boxes, scores)
    weight = math.exp(-(1 / 9) / 0.5)
    assert keep.tolist() == [1, 2, 0] if 0.5 * weight < 0.4 else [1, 0, 2]
    assert sorted(kept.tolist()) == pytest.approx(sorted([0.9, 0.4, 0.5 * weight]), rel=1e-15)
    keep, kept = soft_nms(boxes, scores, method="linear")
    assert keep.tolist() == [1, 2, 0]
    assert kept.tolist() == pytest.approx([0.9, 0.4, 0.5 * 2 / 3], rel=1e-15)
    assert soft_nms(boxes, scores, method="linear", iou_threshold=0.34)[1].tolist() == [0.9, 0.5, 0.4]
    assert soft_nms(boxes, scores, idxs=torch.tensor([0, 1, 0], device=device))[1].tolist() == [0.9, 0.5, 0.4]


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_soft_equals_the_paper(device, method):
    boxes, scores = _random(150, torch.float64)
    keep, kept = soft_nms(boxes.to(device), scores.to(device), method=method, iou_threshold=0.2, sigma=0.4)
    # Figure 2 of the paper, in Python's own floats.
    remaining = dict(enumerate(scores.tolist()))
    expected = []
    while remaining:
        best = max(remaining, key=lambda index: (remaining[index], -index))
        score = remaining.pop(best)
        if score <= 1e-3:
            break
        expected.append((best, score))
        for index in remaining:
            iou = _iou(boxes[best].tolist(), boxes[index].tolist())
            if method == "gaussian":
                remaining[index] *= math.exp(-iou * iou / 0.4)
            elif iou > 0.2:
                remaining[index] *= 1 - iou
    assert keep.tolist() == [index for index, _ in expected]
    assert kept.tolist() == pytest.approx([score for _, score in expected], rel=1e-14)


def _iou(a, b):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def test_soft_classes_are_independent(device):
    boxes, scores = (tensor.to(device) for tensor in _random(300, levels=40))
    idxs = torch.randint(0, 5, (300,), device=device)
    keep, kept = soft_nms(boxes, scores, idxs=idxs)
    assert (kept[1:] <= kept[:-1]).all()
    for group in range(5):
        members = (idxs == group).nonzero()[:, 0]
        alone, alone_scores = soft_nms(boxes[members], scores[members])
        of_group = idxs[keep] == group
        assert torch.equal(keep[of_group], members[alone])
        assert torch.equal(kept[of_group], alone_scores)


def test_soft_drops_scores_at_the_threshold_and_nan(device):
    boxes = torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5], [6, 6, 7, 7]], device=device)
    scores = torch.tensor([0.25, math.nan, 0.5, math.inf], device=device)
    keep, kept = soft_nms(boxes, scores, score_threshold=0.25)
    assert keep.tolist() == [3, 2]
    assert kept.tolist() == [math.inf, 0.5]
    keep, kept = soft_nms(boxes, torch.full_like(scores, math.nan))
    assert keep.shape == kept.shape == (0,)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_synchronises_once_or_not_at_all():
    boxes, scores = (tensor.cuda() for tensor in _random(3000))
    idxs = torch.randint(0, 9, (3000,), device="cuda")
    calls = {
        1: (
            lambda: nms(boxes, scores, 0.5),
            lambda: batched_nms(boxes, scores, idxs, 0.5),
            lambda: soft_nms(boxes, scores, idxs=idxs),
        ),
        0: (lambda: batched_nms_padded(boxes[None], scores[None], idxs[None], 0.5, 100),),
    }
    for expected, functions in calls.items():
        for call in functions:
            call()
            with torch.profiler.profile(acc_events=True) as profile:
                call()
            names = [event.name for event in profile.events()]
            assert (
                len([name for name in names if name in ("cudaStreamSynchronize", "cudaDeviceSynchronize")]) == expected
            )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_padded_is_captured_in_a_cuda_graph():
    boxes, scores = (tensor[None].cuda() for tensor in _random(3000))
    batched_nms_padded(boxes, scores, None, 0.5, 100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep, count = batched_nms_padded(boxes, scores, None, 0.5, 100)
    scores.copy_(torch.rand_like(scores))
    graph.replay()
    expected = batched_nms_padded(boxes, scores, None, 0.5, 100)
    assert torch.equal(keep, expected[0])
    assert torch.equal(count, expected[1])


def test_classes_may_be_floats(device):
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(300, 2, generator=generator) * 50
    boxes = torch.cat([corner, corner + 20], 1).to(device)
    scores = torch.rand(300, generator=generator).to(device)
    classes = torch.tensor([0.0, -0.0, 0.5, 0.7, -3.0], device=device).repeat(60)
    same = torch.tensor([0, 0, 1, 2, 3], device=device).repeat(60)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kept = batched_nms(boxes, scores, classes.to(dtype), 0.4)
        assert torch.equal(kept, batched_nms(boxes, scores, same, 0.4))
