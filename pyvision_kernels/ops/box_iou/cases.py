"""Cases of the pairwise overlaps: the sizes of detectors' matchers, ties, hostile boxes."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels.ops import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
from pyvision_kernels.ops.box_iou import reference

NAN, INF = math.nan, math.inf
WIDE = (torch.float32, torch.float64)


def make_boxes(generator: torch.Generator, count: int, extent: float = 100.0, ties: bool = False) -> Tensor:
    """[count, 4], (x1, y1, x2, y2), sides of 1 to 0.6 extents; with ties: on a grid of 8 x 8."""
    random = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    if ties:
        corner = (random[:, :2] * 8).floor() * 8
        return torch.cat([corner, corner + (random[:, 2:] * 4 + 1).floor() * 8], 1)
    corner = random[:, :2] * extent
    return torch.cat([corner, corner + random[:, 2:] * 0.6 * extent + 1], 1)


def _case(
    name: str,
    size: tuple[int, int],
    extra1: list[list[float]] | None = None,
    extra2: list[list[float]] | None = None,
    ties: bool = False,
    extent: float = 100.0,
    leading: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    options: Inputs | None = None,
    **rest,
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        sets = []
        for count, extra, lead in zip(size, (extra1, extra2), leading, strict=True):
            boxes = make_boxes(generator, count * math.prod(lead), extent, ties)
            if extra:
                boxes = torch.cat([boxes, torch.tensor(extra, dtype=torch.float64)])
            sets.append(boxes.view(*lead, count, 4) if lead else boxes)
        return {"boxes1": sets[0], "boxes2": sets[1], **(options or {})}

    return Case(name, make, **rest)


# Without area, inverted, or touching another; the last is on the grid of the ties.
DEGENERATE: list[list[float]] = [
    [10.0, 10, 10, 40],
    [10, 10, 40, 10],
    [20, 20, 20, 20],
    [50, 60, 20, 30],
    [50, 20, 20, 60],
    [16, 16, 32, 32],
]
NOT_FINITE: list[list[float]] = [[NAN, 4, 20, 30], [4, 4, 20, NAN], [NAN, NAN, NAN, NAN]]
INFINITE: list[list[float]] = [[4, 4, INF, 30], [-INF, 4, 20, 30], [-INF, -INF, INF, INF], [INF, 4, INF, 8]]
HUGE: list[list[float]] = [[-1e15, -1e15, 1e15, 1e15], [1e15, 0, 2e15, 30], [0, 0, 1e-15, 1e-15]]


def _tests(options: Inputs | None = None) -> tuple[Case, ...]:
    return (
        _case("odd", (7, 33), options=options),
        _case("several_tiles", (70, 1100), options=options, dtypes=(torch.float32, torch.float64, torch.bfloat16)),
        _case("many_rows", (1030, 9), options=options, dtypes=(torch.float32, torch.float16)),
        _case("one_pair", (1, 1), options=options),
        _case("batches", (5, 20), leading=((2, 3), (3,)), options=options),
        _case("ties", (60, 70), ties=True, options=options),
        _case("no_boxes1", (0, 5), options=options),
        _case("no_boxes2", (5, 0), options=options),
        _case("no_batches", (5, 6), leading=((0,), (0,)), options=options),
    )


def _hostile(options: Inputs | None = None) -> tuple[Case, ...]:
    return (
        _case("degenerate", (9, 20), extra1=DEGENERATE, ties=True, options=options),
        _case("degenerate_both", (3, 4), extra1=DEGENERATE, extra2=DEGENERATE, options=options),
        _case("nan", (20, 17), extra1=NOT_FINITE, options=options),
        _case("nan_second", (20, 17), extra2=NOT_FINITE, options=options),
        _case("infinite", (5, 18), extra1=INFINITE, options=options),
        _case("infinite_both", (3, 4), extra1=INFINITE, extra2=INFINITE, options=options),
        _case("huge", (20, 17), extra1=HUGE, options=options, dtypes=WIDE),
    )


def _benchmarks(quick: bool) -> tuple[Case, ...]:
    often = "quick" if quick else "full"
    return (
        _case("detr_matcher", (100, 100), extent=900.0, bench="quick"),
        _case("fcos_matcher", (300, 8400), extent=900.0, bench="quick"),
        _case("retinanet_matcher", (100, 120_000), extent=900.0, bench=often),
        _case("nms_1000", (1000, 1000), extent=900.0, bench="full"),
        _case("dense_5000", (5000, 5000), extent=900.0, bench="full"),
    )


def _errors(op: str) -> tuple[ErrorCase, ...]:
    def error(name: str, kind: type[Exception], message: str, **changes):
        return error_case(op, name, kind, message, {"boxes1": torch.ones(3, 4), "boxes2": torch.ones(5, 4), **changes})

    return (
        error("boxes1_type", TypeError, "expected boxes1 to be a Tensor, but got list", boxes1=[1.0]),
        error("boxes2_type", TypeError, "expected boxes2 to be a Tensor, but got list", boxes2=[1.0]),
        error(
            "boxes1_shape",
            RuntimeError,
            "expected boxes1 to have size [N, 4] or [B, N, 4], but got [3, 5]",
            boxes1=torch.ones(3, 5),
        ),
        error(
            "boxes2_shape",
            RuntimeError,
            "expected boxes2 to have size [M, 4] or [B, M, 4] as boxes1 has, but got [5, 3]",
            boxes2=torch.ones(5, 3),
        ),
        error(
            "boxes1_rank",
            RuntimeError,
            "expected boxes1 to have size [..., 4], but got [4]",
            boxes1=torch.ones(4),
        ),
        error(
            "boxes1_dtype",
            NotImplementedError,
            "expected boxes1 to be float16, bfloat16, float32, float64 or of an integer type, but got torch.bool",
            boxes1=torch.ones(3, 4, dtype=torch.bool),
        ),
        error(
            "boxes2_device",
            RuntimeError,
            "expected boxes2 to be on the device of boxes1, but got meta",
            boxes2=torch.ones(5, 4, device="meta"),
        ),
    )


def _spec(op, peer: str, flops: float, tests: tuple[Case, ...], errors=(), quick: bool = False) -> OpCases:
    name = op.__name__
    return OpCases(
        name=name,
        op=op,
        reference=functools.partial(_in_reverse, getattr(reference, name)),
        peer=lambda **inputs: _torchvision(peer, **inputs),
        operators=("box_iou", "_box_iou_backward"),
        differentiable=("boxes1", "boxes2"),
        layouts=("contiguous", "strided"),
        cases=(*tests, *_benchmarks(quick)),
        errors=(*_errors(name), *errors),
        tiny=_case("per_call_overhead", (2, 3)),
        flops=lambda inputs, output: flops * output.numel(),
        # The output is written once, each box read once.
        bytes=lambda inputs, output: (
            output.numel() * output.element_size()
            + sum(inputs[key].numel() * inputs[key].element_size() for key in ("boxes1", "boxes2"))
        ),
    )


def _in_reverse(function, boxes1: Tensor, boxes2: Tensor, **options) -> Tensor:
    """The sums of the gradients in another order than the peer's, whose error in float64 would else be seen as 0."""
    return function(boxes1.flip(-2), boxes2.flip(-2), **options).flip(-2, -1)


def _torchvision(name: str, boxes1: Tensor, boxes2: Tensor, **options):
    from torchvision import ops

    # Of 16-bit boxes torchvision rounds the sides of the intersection to 16 bits; ours are float32 throughout.
    if boxes1.element_size() == 2:
        boxes1, boxes2 = boxes1.float(), boxes2.float()
    fmt = options.pop("fmt", "xyxy")
    if fmt != "xyxy":  # which torchvision 0.26 has not
        boxes1, boxes2 = (ops.box_convert(boxes, fmt, "xyxy") for boxes in (boxes1, boxes2))
    return getattr(ops, name)(boxes1, boxes2, **options)


BOX_IOU = _spec(
    box_iou,
    "box_iou",
    14,
    (
        *_tests(),
        *_hostile(),
        _case("xywh", (9, 31), options={"fmt": "xywh"}),
        _case("cxcywh", (9, 31), options={"fmt": "cxcywh"}),
        _case("cxcywh_nan", (9, 31), extra1=[[4.0, 4, NAN, 3]], options={"fmt": "cxcywh"}),
    ),
    errors=(
        ErrorCase(
            "fmt",
            lambda device: {"boxes1": torch.ones(3, 4), "boxes2": torch.ones(5, 4), "fmt": "xxyy"},
            ValueError,
            "Unsupported format 'xxyy'. Supported axis-aligned formats: ('xyxy', 'xywh', 'cxcywh').",
        ),
    ),
    quick=True,
)
GENERALIZED_BOX_IOU = _spec(generalized_box_iou, "generalized_box_iou", 24, (*_tests(), *_hostile()))
DISTANCE_BOX_IOU = _spec(distance_box_iou, "distance_box_iou", 32, (*_tests({"eps": 1e-5}), *_hostile()))
COMPLETE_BOX_IOU = _spec(complete_box_iou, "complete_box_iou", 42, (*_tests({"eps": 1e-5}), *_hostile()))

CASES = (BOX_IOU, GENERALIZED_BOX_IOU, DISTANCE_BOX_IOU, COMPLETE_BOX_IOU)
