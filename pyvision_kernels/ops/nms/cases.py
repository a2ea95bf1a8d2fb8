"""Cases of nms: sizes of real detectors, ties, hostile boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels.ops import nms
from pyvision_kernels.ops.nms import reference

NAN, INF = math.nan, math.inf
HOSTILE = [
    [NAN, 0, 10, 10],
    [0, 0, NAN, 10],
    [-INF, -INF, INF, INF],
    [0, 0, INF, 10],
    [0, 0, 0, 0],
    [10, 10, 0, 0],  # inverted twice: a positive area that overlaps nothing
    [10, 0, 0, 10],
    [-1e30, -1e30, 1e30, 1e30],
    [-1e30, -1e30, 1e30, 1e30],
    [0, 0, 1e-25, 1e-25],
    [0, 0, 1e-25, 1e-25],
    [0, 0, 3e38, 3e38],
    [0, 0, 10, 10],
    [0, 0, 10, 10],
]


def _proposals(generator: torch.Generator, count: int, sides=(16.0, 256.0), extent=(800.0, 1216.0)) -> Tensor:
    """[N, 4] in clusters of eight around objects, as an RPN gives them."""
    low, high = (math.log(side) for side in sides)
    objects = max(count // 8, 1)
    pick = torch.randint(0, objects, (count,), generator=generator)
    center = (torch.rand(objects, 2, generator=generator, dtype=torch.float64) * torch.tensor([extent[1], extent[0]]))[
        pick
    ]
    side = torch.exp(torch.rand(objects, 2, generator=generator, dtype=torch.float64) * (high - low) + low)[pick]
    center = center + side * 0.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    side = side * torch.exp(0.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64))
    return torch.cat([center - side / 2, center + side / 2], 1)


def _case(
    name: str, count: int, threshold: float, levels: int = 0, hostile: bool = False, round_to: float = 0.0, **options
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        boxes = _proposals(generator, count)
        if round_to:
            boxes = (boxes / round_to).round() * round_to
        if hostile:
            boxes = torch.cat([boxes, torch.tensor(HOSTILE, dtype=torch.float64)])
        scores = torch.rand(len(boxes), generator=generator, dtype=torch.float64)
        if levels:  # few different scores: ties
            scores = (scores * levels).floor() / levels
        if hostile:
            scores[::9] = NAN
            scores[1::9] = INF
            scores[2::9] = -0.0
            scores[3::9] = 0.0
        return {"boxes": boxes, "scores": scores, "iou_threshold": threshold}

    return Case(name, make, **options)


def _error(name: str, error: type[Exception], message: str, **changes) -> ErrorCase:
    """Fitting inputs with some replaced."""
    fitting = {"boxes": torch.ones(3, 4), "scores": torch.ones(3), "iou_threshold": 0.5}
    return error_case("nms", name, error, message, {**fitting, **changes})


NMS = OpCases(
    name="nms",
    op=nms,
    reference=reference.nms,
    peer=lambda **inputs: _torchvision()(**inputs),
    operators=("nms",),
    tiny=Case(
        "per_call_overhead",
        lambda generator: {
            "boxes": torch.tensor([[0, 0, 2, 2], [0, 0, 2, 3], [5, 5, 6, 6]], dtype=torch.float64),
            "scores": torch.tensor([0.5, 0.7, 0.6], dtype=torch.float64),
            "iou_threshold": 0.5,
        },
    ),
    exact=True,
    sized_by_data=True,
    layouts=("contiguous", "strided"),
    cases=(
        _case("none", 0, 0.5),
        _case("one", 1, 0.5),
        _case("small", 65, 0.5),
        _case("ties", 700, 0.5, levels=4),
        _case("rounded_coordinates", 600, 0.5, round_to=16.0),
        _case("all_tied", 300, 0.6, levels=1),
        _case("strict", 500, 0.95),
        _case("loose", 500, 0.05),
        _case("zero_threshold", 300, 0.0),
        _case("threshold_one", 400, 1.0, round_to=32.0),
        _case("threshold_above_one", 100, 2.0),
        _case("negative_threshold", 100, -0.1, hostile=True),
        _case("nan_threshold", 100, NAN),
        _case("hostile", 400, 0.5, levels=30, hostile=True),
        _case("hostile_low_threshold", 200, 1e-6, levels=30, hostile=True),
        _case("several_blocks", 4500, 0.6, dtypes=(torch.float32, torch.bfloat16)),
        _case("fcos_1000", 1000, 0.6, bench="quick"),
        _case("rpn_2000", 2000, 0.7, bench="quick"),
        _case("rpn_5000", 5000, 0.7, bench="quick"),
        _case("dense_20000", 20000, 0.5, bench="quick"),
        _case("dense_50000", 50000, 0.5, bench="full"),
        _case("dense_100000", 100000, 0.5, bench="full"),
    ),
    errors=(
        _error(
            "boxes_shape", RuntimeError, "expected boxes to have size [N, 4], but got [3, 5]", boxes=torch.ones(3, 5)
        ),
        _error("boxes_type", TypeError, "expected boxes to be a Tensor, but got list", boxes=[1.0]),
        _error("scores_shape", RuntimeError, "expected scores to have size [3], but got [4]", scores=torch.ones(4)),
        _error("scores_type", TypeError, "expected scores to be a Tensor, but got list", scores=[1, 2, 3]),
        _error(
            "scores_dtype",
            RuntimeError,
            "expected scores to be torch.float32 as boxes is, but got torch.float64",
            scores=torch.ones(3, dtype=torch.float64),
        ),
        _error(
            "scores_device",
            RuntimeError,
            "expected scores to be on the device of boxes, but got meta",
            scores=torch.ones(3, device="meta"),
        ),
        _error(
            "boxes_dtype",
            NotImplementedError,
            "expected boxes to be float16, bfloat16, float32 or float64, but got torch.int64",
            boxes=torch.ones(3, 4, dtype=torch.int64),
            scores=torch.ones(3, dtype=torch.int64),
        ),
    ),
    # Ten operations for each box against each box kept; boxes, scores and indices once.
    flops=lambda inputs, output: 10.0 * len(inputs["boxes"]) * len(output) / 2,
    bytes=lambda inputs, output: 5 * len(inputs["boxes"]) * inputs["boxes"].element_size() + 8 * len(output),
)

CASES = (NMS,)


def _torchvision():
    from torchvision.ops import nms as peer

    return peer
