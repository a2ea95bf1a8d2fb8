"""torchvision's Faster R-CNN and RetinaNet on a photograph: stock, and converted.

The weights are random, for nothing is downloaded. So that the detections are like a trained model's (different sizes,
places and scores, not a thousand equal boxes), the batch norms take their statistics from the photograph, and the
predictors are scaled to outputs of a chosen mean and spread.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import pyvision_kernels as pvk
from benchmarks import pair

Detections = dict[str, Tensor]  # boxes [D, 4] in pixels of the photograph, labels [D], scores [D]


@dataclass(frozen=True)
class Outcome:
    """What was detected, and the time of a whole inference.

    Attributes:
        name: Of the detector.
        detections: How many, the same in both.
        worst_iou, worst_score: Of the matched pairs: the lowest IoU, and the largest difference of scores.
        share: Part of the stock model's time that is spent in torchvision's roi_align and nms.
    """

    name: str
    detections: int
    worst_iou: float
    worst_score: float
    share: float
    timing: pair.Timing


def photograph() -> Tensor:
    """[3, H, W] in 0..1: the portrait of Grace Hopper that matplotlib ships."""
    from matplotlib.cbook import get_sample_data
    from matplotlib.image import imread

    pixels = imread(get_sample_data("grace_hopper.jpg", asfileobj=False))  # [H, W, 3] in 0..255
    return torch.tensor(pixels).movedim(-1, 0).float() / 255


def _faster_rcnn(side: int, proposals: int) -> nn.Module:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    model = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=side, rpn_post_nms_top_n_test=proposals
    )
    # A few anchors stand out; boxes move by tenths of the anchor's size and change theirs by some tens of percent.
    predictor = model.roi_heads.box_predictor
    _standardise_outputs(model.rpn.head.cls_logits, mean=-2.0, spread=2.0)
    _standardise_outputs(model.rpn.head.bbox_pred, mean=0.0, spread=0.25)
    _standardise_outputs(predictor.cls_score, mean=0.0, spread=2.0)
    _standardise_outputs(predictor.bbox_pred, mean=0.0, spread=0.8)
    return model


def _retinanet(side: int, proposals: int) -> nn.Module:
    from torchvision.models.detection import retinanet_resnet50_fpn

    model = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=side, topk_candidates=proposals, detections_per_img=1000
    )
    # The heads are shared by levels: all get features of one scale.
    extra = model.backbone.fpn.extra_blocks
    for layer in (*(block[0] for block in model.backbone.fpn.layer_blocks), extra.p6, extra.p7):
        _standardise_outputs(layer, mean=0.0, spread=1.0)
    # Thousands of candidates of many classes pass the score threshold of 0.05, as early in a training.
    _standardise_outputs(model.head.classification_head.cls_logits, mean=-4.0, spread=0.5)
    _standardise_outputs(model.head.regression_head.bbox_reg, mean=0.0, spread=0.25)
    return model


DETECTORS: dict[str, Callable[[int, int], nn.Module]] = {
    "fasterrcnn_resnet50_fpn": _faster_rcnn,
    "retinanet_resnet50_fpn": _retinanet,
}


def calibrated_detector(name: str, picture: Tensor, side: int = 800, proposals: int = 1000) -> nn.Module:
    """A detector in eval mode, its seeded weights calibrated by one pass over the picture [3, H, W].

    Args:
        name: Of DETECTORS.
        side: Shorter side that the model scales the picture to, in pixels.
        proposals: Boxes that Faster R-CNN's first stage hands to the second, or that RetinaNet keeps of each level.
    """
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = DETECTORS[name](side, proposals)
    model.to(picture.device).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # in training mode each layer feeds normalised maps to the next, and keeps their statistics
        norm.momentum = 1.0
        norm.train()
    detect(model, picture)
    return model.eval()


def _standardise_outputs(layer: nn.Linear | nn.Conv2d, mean: float, spread: float) -> None:
    """At its first call, the layer is scaled so that each output channel has this mean and standard deviation."""

    def standardise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        hook.remove()
        values = output.movedim(1, -1).flatten(0, -2)  # [positions, channels]
        scale = spread / values.std(0).clamp(min=1e-6)
        assert layer.bias is not None
        layer.bias.copy_((layer.bias - values.mean(0)) * scale + mean)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        return module.forward(*inputs)

    hook = layer.register_forward_hook(standardise)


def detect(model: nn.Module, picture: Tensor) -> Detections:
    with torch.no_grad():
        return model([picture])[0]


def assert_spread(found: Detections, picture: Tensor) -> None:
    """The detections are worth comparing: many, with different scores, sizes and places."""
    boxes, scores = found["boxes"], found["scores"]
    assert len(boxes) >= 20, f"expected at least 20 detections, but got {len(boxes)}"
    assert scores.max() - scores.min() > 0.1, (
        f"expected scores that differ, but got {scores.min():.3f} to {scores.max():.3f}"
    )
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert sizes.max() > 10 * sizes.min(), (
        f"expected boxes of different sizes, but got {sizes.min():.0f} to {sizes.max():.0f}"
    )
    centers = (boxes[:, 2:] + boxes[:, :2]) / 2
    reach = (centers.max(0).values - centers.min(0).values) / torch.tensor(picture.shape[:0:-1], device=boxes.device)
    assert reach.min() > 0.4, f"expected boxes all over the picture, but their centres span {reach.tolist()} of it"


def match(stock: Detections, ours: Detections) -> tuple[float, float]:
    """Matches one to one; returns the lowest IoU and the largest difference of scores.

    Raises:
        AssertionError: the counts differ, or a detection has no counterpart of the same label with an IoU above 0.99
            and a score within 1e-3.
    """
    from torchvision.ops import box_iou

    count = len(stock["boxes"])
    assert count == len(ours["boxes"]), (
        f"expected {count} detections as torchvision gives, but got {len(ours['boxes'])}"
    )
    iou = box_iou(stock["boxes"], ours["boxes"]).nan_to_num()
    equal = (stock["boxes"][:, None] - ours["boxes"]).abs().amax(-1) < 1e-2  # boxes without area have no IoU
    iou = torch.where(equal, 1.0, iou) * (stock["labels"][:, None] == ours["labels"])
    closeness = iou - (stock["scores"][:, None] - ours["scores"]).abs()
    partner = torch.zeros(count, dtype=torch.int64, device=iou.device)
    for row in range(count):  # the nearest that is left, for there may be equal boxes
        partner[row] = closeness[row].argmax()
        closeness[:, partner[row]] = -torch.inf
    best = iou.gather(1, partner[:, None])[:, 0]
    difference = (stock["scores"] - ours["scores"][partner]).abs().max().item()
    assert best.min() > 0.99, f"expected IoU above 0.99 with the counterpart, but got {best.min():.4f}"
    assert difference < 1e-3, f"expected scores within 1e-3 of the counterpart's, but got {difference:.1e}"
    return best.min().item(), difference


def draw(stock: Detections, ours: Detections, picture: Tensor, path: Path) -> None:
    """The 30 best of both on the picture: torchvision's as wide red frames, ours as thin green ones within them."""
    from matplotlib.image import imsave
    from torchvision.utils import draw_bounding_boxes

    canvas = (picture.cpu() * 255).to(torch.uint8)
    for found, colour, width in ((stock, "red", 5), (ours, "lime", 1)):
        canvas = draw_bounding_boxes(canvas, found["boxes"][:30].cpu(), colors=colour, width=width)
    imsave(path, canvas.movedim(0, -1).numpy())


def share_of_kernels(model: nn.Module, picture: Tensor) -> float:
    """Part of a stock inference that is spent in torchvision's roi_align and nms."""
    from torchvision.ops import boxes, poolers

    synchronize = torch.cuda.synchronize if picture.is_cuda else lambda: None
    inside = 0.0

    def watched(module: Any, name: str) -> contextlib.AbstractContextManager:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal inside
            synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            inside += time.perf_counter() - start
            return result

        return mock.patch.object(module, name, call)

    start = time.perf_counter()
    with watched(poolers, "roi_align"), watched(boxes, "nms"):
        detect(model, picture)
    synchronize()
    return inside / (time.perf_counter() - start)


def run(name: str, device: str, folder: Path, seconds: float, **model_options: int) -> Outcome:
    """Detects, compares, draws `detections-<name>.png` into the folder, then times.

    Args:
        name: Of DETECTORS.
        seconds: Time box of the timed inferences; at least 3 of each are run.
        model_options: As for `calibrated_detector`.
    """
    picture = photograph().to(device)
    model = calibrated_detector(name, picture, **model_options)
    converted = pvk.convert(copy.deepcopy(model), fuse=True)
    # In float64: in float32 the rounding of a convolution decides which of two nearly equal boxes NMS keeps.
    precise = copy.deepcopy(model).double()
    stock = detect(precise, picture.double())
    assert_spread(stock, picture)
    ours = detect(pvk.convert(precise, fuse=True), picture.double())
    worst_iou, worst_score = match(stock, ours)
    draw(stock, ours, picture, folder / f"detections-{name}.png")
    share = share_of_kernels(model, picture)
    # A detector synchronises in its nms: the host's clock is the caller's time on every device.
    timing = pair.interleave(
        lambda: detect(converted, picture), lambda: detect(model, picture), pair.host_clock(device), seconds
    )
    return Outcome(name, len(stock["boxes"]), worst_iou, worst_score, share, timing)


def as_row(outcome: Outcome) -> dict[str, Any]:
    """The outcome as a row of the report."""
    found = asdict(outcome)
    timing = found.pop("timing")
    labels = {"op": "end_to_end", "case": found.pop("name"), "dtype": "float32", "layout": "contiguous"}
    return {**labels, "direction": "forward", "mode": "eager", "provider": "torchvision", **timing, **found}
