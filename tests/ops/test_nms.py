"""What is special to nms: exact equality with torchvision on random and hostile boxes, order, syncs."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import nms as torchvision_nms

from pyvision_kernels.ops import nms


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_synchronises_once():
    boxes, scores = (tensor.cuda() for tensor in _random(3000))
    nms(boxes, scores, 0.5)
    with torch.profiler.profile(acc_events=True) as profile:
        nms(boxes, scores, 0.5)
    syncs = [event for event in profile.events() if event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize")]
    assert len(syncs) == 1
