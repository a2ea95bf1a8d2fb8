"""Cases of multiscale_roi_align: pyramids of real detectors, odd ones, boxes at the borders between levels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case, tensors_of
from pyvision_kernels._roi_cases import EMPTY, HOSTILE, random_boxes
from pyvision_kernels.ops import multiscale_roi_align
from pyvision_kernels.ops.roi_align import reference

FPN = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


def _case(
    name: str,
    size: tuple[int, int, int, int],
    count: int,
    output_size: int | tuple[int, int] = 7,
    scales: Sequence[float] = FPN,
    sampling_ratio: int = 2,
    canonical_scale: int = 56,
    sides: tuple[float, float] = (4.0, 300.0),
    extra: list[list[float]] | None = None,
    joined: bool = False,
    **options,
) -> Case:
    """Images of [N, C, H, W], `count` boxes on all of them; the extra boxes, of (image, x1, y1, x2, y2), come last."""
    images, channels, height, width = size

    def make(generator: torch.Generator) -> Inputs:
        boxes: Any = random_boxes(generator, count, images, (height, width), sides)
        if extra:
            boxes = torch.cat([boxes, torch.tensor(extra, dtype=torch.float64)])
        if not joined:
            boxes = [boxes[boxes[:, 0] == image, 1:] for image in range(images)]
        sizes = [(math.ceil(height * scale), math.ceil(width * scale)) for scale in scales]
        return {
            "features": [
                torch.randn(images, channels, *item, generator=generator, dtype=torch.float64) for item in sizes
            ],
            "boxes": boxes,
            "output_size": output_size,
            "scales": list(scales),
            "sampling_ratio": sampling_ratio,
            "canonical_scale": canonical_scale,
        }

    options.setdefault("single", ("boxes",))
    return Case(name, make, **options)


def _error(name: str, error: type[Exception], message: str, **changes) -> ErrorCase:
    """Fitting inputs with some replaced."""
    fitting: Inputs = {
        "features": [torch.ones(1, 3, 8, 8), torch.ones(1, 3, 4, 4)],
        "boxes": torch.ones(7, 5),
        "output_size": 2,
        "scales": [0.5, 0.25],
    }
    return error_case("multiscale_roi_align", name, error, message, {**fitting, **changes})


def _torchvision(features, boxes, output_size, scales, sampling_ratio, canonical_scale) -> Tensor:
    """torchvision's layer; boxes of [K, 5] are listed by image for it, and their results put back in order."""
    if not isinstance(boxes, Tensor):
        return _pooler(tuple(scales), output_size, sampling_ratio, canonical_scale)(
            dict(zip(map(str, range(len(features))), features, strict=True)), boxes, [(1, 1)]
        )
    order = boxes[:, 0].argsort(stable=True)
    counts = boxes[:, 0].long().bincount(minlength=features[0].size(0)).tolist()
    listed = list(boxes[order, 1:].split(counts))
    return _torchvision(features, listed, output_size, scales, sampling_ratio, canonical_scale)[order.argsort()]


@functools.lru_cache(maxsize=64)
def _pooler(scales: tuple[float, ...], output_size, sampling_ratio: int, canonical_scale: int) -> Any:
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.poolers import LevelMapper

    names = [str(level) for level in range(len(scales))]
    pooler = MultiScaleRoIAlign(names, output_size, sampling_ratio, canonical_scale=canonical_scale)
    k_min, k_max = (int(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    pooler.scales, pooler.map_levels = list(scales), LevelMapper(k_min, k_max, canonical_scale)
    return pooler


def _bytes(inputs: Inputs, output: Tensor) -> float:
    """The output once, and of each map what its boxes cover, at most all of it."""
    covered = [0.0] * len(inputs["scales"])
    for boxes in tensors_of(inputs["boxes"]):
        for box in boxes[:, -4:].double().tolist():
            level = reference.box_level(box, inputs["scales"], inputs["canonical_scale"], 4)
            if level is not None:
                covered[level] += (box[2] - box[0]) * (box[3] - box[1]) * inputs["scales"][level] ** 2
    maps = sum(min(area * item.size(1), item.numel()) for area, item in zip(covered, inputs["features"], strict=True))
    return (output.numel() + maps) * output.element_size()


# Squares of the least side of a level and of the side just below, and a strip of the same area.
BORDERS: list[list[float]] = [
    [0, 1.5, 2, 1.5 + width, 2 + height]
    for side in (28.0, 56.0, 112.0)
    for width, height in ((side, side), (side - 0.25, side), (side / 4, side * 4))
]
ONE_MAP: list[list[float]] = [[1, -1e6, 2, 3, 3e6], [0, 9, 40, 30, 8], [1, 20, 8, 6, 40]]  # whose area chooses nothing

MULTISCALE_ROI_ALIGN = OpCases(
    name="multiscale_roi_align",
    op=multiscale_roi_align,
    reference=reference.multiscale_roi_align,
    peer=_torchvision,
    operators=("multiscale_roi_align", "_multiscale_roi_align_backward"),
    tiny=Case(
        "per_call_overhead",
        lambda generator: {
            "features": [torch.randn(1, 4, side, side, generator=generator, dtype=torch.float64) for side in (4, 2)],
            "boxes": [torch.tensor([[0.5, 0.5, 3, 3]], dtype=torch.float64)],
            "output_size": 1,
            "scales": [1.0, 0.5],
            "sampling_ratio": 1,
            "canonical_scale": 224,
        },
    ),
    differentiable=("features",),
    cases=(
        _case("fpn", (2, 36, 90, 130), 30),
        _case("two_levels", (1, 64, 64, 48), 12, 3, scales=(1 / 8, 1 / 16)),
        _case("joined_boxes", (3, 5, 60, 70), 17, (2, 3), joined=True),
        _case("adaptive", (2, 19, 70, 90), 15, (3, 5), sampling_ratio=0),
        _case("one_map", (2, 21, 60, 70), 11, 3, scales=(1 / 4,), extra=ONE_MAP),
        _case("sixteen_maps", (1, 3, 200, 300), 25, 2, scales=[2.0**-level for level in range(16)]),
        _case("borders_between_levels", (1, 4, 120, 130), 3, 2, extra=BORDERS, joined=True),
        _case("level_between_two_maps", (1, 8, 90, 90), 20, 3, scales=(1 / 4, 1 / 16, 1 / 64)),
        _case("maps_of_one_scale", (1, 8, 40, 50), 9, 3, scales=(1 / 4, 1 / 4)),
        _case("mask_head", (1, 40, 80, 70), 6, 14),
        _case("no_boxes", (2, 8, 40, 50), 0, joined=True, for_peer=lambda _: None),
        _case("empty_box_list", (2, 8, 40, 50), 0),
        _case("no_images", (0, 8, 40, 50), 3, joined=True, for_peer=lambda _: None),
        _case("no_channels", (2, 0, 40, 50), 3, for_peer=lambda _: None),
        _case("empty_maps", (2, 8, 0, 50), 3, for_peer=lambda _: None),
        _case("empty_and_inverted_boxes", (2, 21, 90, 100), 6, 3, extra=EMPTY, joined=True),
        _case(
            "hostile",
            (2, 35, 90, 100),
            9,
            3,
            extra=HOSTILE,
            joined=True,
            dtypes=(torch.float32, torch.float64, torch.bfloat16),
            for_peer=lambda inputs: {**inputs, "boxes": inputs["boxes"][:9]},
        ),
        _case(
            "hostile_adaptive",
            (2, 35, 90, 100),
            9,
            3,
            sampling_ratio=0,
            extra=HOSTILE,
            joined=True,
            dtypes=(torch.float32, torch.float64),
            for_peer=lambda inputs: {**inputs, "boxes": inputs["boxes"][:9]},
        ),
        _case(
            "boxes_of_the_same_16_bits",
            (2, 24, 64, 64),
            8,
            3,
            sides=(8.0, 60.0),
            single=(),
            dtypes=(torch.float16, torch.bfloat16),
        ),
        # An image of 800 x 1216: the box head of Faster R-CNN, and the mask head of Mask R-CNN.
        _case(
            "faster_rcnn_1000_rois",
            (1, 256, 800, 1216),
            1000,
            canonical_scale=224,
            sides=(16.0, 800.0),
            bench="quick",
        ),
        _case(
            "mask_rcnn_100_rois",
            (1, 256, 800, 1216),
            100,
            14,
            canonical_scale=224,
            sides=(16.0, 800.0),
            bench="quick",
        ),
        _case(
            "faster_rcnn_train",
            (2, 256, 800, 1216),
            1024,
            canonical_scale=224,
            sides=(16.0, 800.0),
            bench="full",
        ),
    ),
    errors=(
        _error(
            "features_type",
            TypeError,
            "expected features to be a list of Tensors, but got Tensor",
            features=torch.ones(1, 3, 4, 4),
        ),
        _error("no_features", RuntimeError, "expected between 1 and 16 features, but got 0", features=[], scales=[]),
        _error(
            "too_many_features",
            RuntimeError,
            "expected between 1 and 16 features, but got 17",
            features=[torch.ones(1, 3, 4, 4)] * 17,
            scales=[1.0] * 17,
        ),
        _error("scales_length", RuntimeError, "expected one of scales for each of 2 features, but got 1", scales=[0.5]),
        _error(
            "scales_order",
            RuntimeError,
            "expected scales from the finest map to the coarsest, but got [0.25, 0.5]",
            scales=[0.25, 0.5],
        ),
        _error(
            "scales_sign", RuntimeError, "expected scales to be positive, but got [0.5, -0.25]", scales=[0.5, -0.25]
        ),
        _error(
            "canonical_scale",
            RuntimeError,
            "expected canonical_scale to be positive, but got 0",
            canonical_scale=0,
        ),
        _error(
            "features_rank",
            RuntimeError,
            "expected each of features to have 4 dimensions [N, C, H, W], but got [3, 4, 4]",
            features=[torch.ones(1, 3, 8, 8), torch.ones(3, 4, 4)],
        ),
        _error(
            "features_channels",
            RuntimeError,
            "expected each of features to have 1 images and 3 channels as the first has, but got [1, 5, 4, 4]",
            features=[torch.ones(1, 3, 8, 8), torch.ones(1, 5, 4, 4)],
        ),
        _error(
            "features_images",
            RuntimeError,
            "expected each of features to have 1 images and 3 channels as the first has, but got [2, 3, 4, 4]",
            features=[torch.ones(1, 3, 8, 8), torch.ones(2, 3, 4, 4)],
        ),
        _error(
            "features_dtypes",
            RuntimeError,
            "expected each of features to be torch.float32 as the first is, but got torch.float16",
            features=[torch.ones(1, 3, 8, 8), torch.ones(1, 3, 4, 4, dtype=torch.float16)],
        ),
        _error(
            "features_dtype",
            NotImplementedError,
            "expected each of features to be float16, bfloat16, float32 or float64, but got torch.int32",
            features=[torch.ones(1, 3, 8, 8, dtype=torch.int32)] * 2,
        ),
        _error(
            "features_device",
            RuntimeError,
            "expected each of features to be on the device of the first, but got meta",
            features=[torch.ones(1, 3, 8, 8), torch.ones(1, 3, 4, 4, device="meta")],
        ),
        _error(
            "boxes_shape", RuntimeError, "expected boxes to have size [K, 5], but got [7, 4]", boxes=torch.ones(7, 4)
        ),
        _error(
            "boxes_dtype",
            RuntimeError,
            "expected boxes to be torch.float32 as input is, or float32 beside a 16-bit input, but got torch.float64",
            boxes=torch.ones(7, 5, dtype=torch.float64),
        ),
        _error(
            "boxes_list_length",
            RuntimeError,
            "expected one Tensor of boxes for each of 1 images, but got 2",
            boxes=[torch.ones(7, 4)] * 2,
        ),
        _error("output_size", ValueError, "expected output_size to be positive, but got (0, 2)", output_size=(0, 2)),
        _error(
            "sampling_ratio",
            RuntimeError,
            "expected sampling_ratio to be at most 4096, but got 4097",
            sampling_ratio=4097,
        ),
    ),
    flops=lambda inputs, output: 2.0 * output.numel() * 4 * max(inputs["sampling_ratio"], 1) ** 2,
    bytes=_bytes,
)
