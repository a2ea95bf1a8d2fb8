"""Cases of the losses of box regression: as many boxes as detectors train on, ties, hostile boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss
from pyvision_kernels.ops.generalized_box_iou_loss import reference

NAN, INF = math.nan, math.inf


def make_pairs(generator: torch.Generator, count: int, ties: bool = False) -> tuple[Tensor, Tensor]:
    """[count, 4] each: boxes of 4 to 64 pixels, and others near them."""
    random = torch.rand(count, 8, generator=generator, dtype=torch.float64)
    if ties:
        random = (random * 4).floor() / 4
    low = random[:, :2] * 100
    size = random[:, 2:4] * 60 + 4
    target = torch.cat([low, low + size], 1)
    shift = (random[:, 4:] - 0.5) * torch.cat([size, size], 1) * 0.9
    return target + shift, target


def _case(
    name: str, count: int, reduction: str = "none", extra: tuple[list, list] | None = None, ties: bool = False, **rest
) -> Case:
    options = rest.pop("options", {})
    leading = rest.pop("leading", None)

    def make(generator: torch.Generator) -> Inputs:
        boxes = list(make_pairs(generator, count, ties))
        if extra is not None:
            boxes = [torch.cat([b, torch.tensor(e, dtype=b.dtype)]) for b, e in zip(boxes, extra, strict=True)]
        if leading is not None:
            boxes = [b.reshape(*leading, 4) for b in boxes]
        return {"boxes1": boxes[0], "boxes2": boxes[1], "reduction": reduction, **options}

    return Case(name, make, **rest)


GOOD = [10.0, 12, 40, 50]
# Pairs: equal, touching, apart, inverted, without area.
DEGENERATE = (
    [GOOD, [40, 12, 60, 50], [60, 60, 80, 90], [40, 50, 10, 12], [10, 12, 10, 50], [10, 12, 10, 12], [10, 12, 10, 12]],
    [GOOD, GOOD, GOOD, GOOD, GOOD, GOOD, [10, 12, 10, 12]],
)
NOT_FINITE = (
    [[NAN, 12, 40, 50], GOOD, [10, 12, INF, 50], GOOD, [-INF, -INF, INF, INF], [INF, 12, INF, 50]],
    [GOOD, [10, 12, 40, NAN], GOOD, [-INF, 12, 40, 50], GOOD, GOOD],
)


def _tests() -> tuple[Case, ...]:
    return (
        _case("odd", 37),
        _case("mean", 1100, "mean"),
        _case("sum", 600, "sum"),
        _case("one_pair", 1),
        _case("one_box", 1, leading=()),
        _case("leading_dimensions", 30, "mean", leading=(2, 3, 5)),
        _case("large_epsilon", 50, options={"eps": 1e-2}),
        _case("ties", 300, ties=True),
        _case("empty", 0),
        _case("empty_mean", 0, "mean"),
        _case("degenerate", 20, extra=DEGENERATE),
        _case("not_finite", 20, extra=NOT_FINITE),
        _case("fcos_image", 1_000, "sum", bench="full"),
        _case("retinanet_batch", 10_000, "sum", bench="quick"),
        _case("dense_batch", 100_000, "mean", bench="quick"),
        _case("dense_batch_each", 100_000, bench="full"),
    )


def _errors(op: str) -> tuple[ErrorCase, ...]:
    def error(name: str, kind: type[Exception], message: str, **changes) -> ErrorCase:
        return error_case(op, name, kind, message, {"boxes1": torch.ones(3, 4), "boxes2": torch.ones(3, 4), **changes})

    return (
        error("boxes1_type", TypeError, "expected boxes1 to be a Tensor, but got list", boxes1=[1.0]),
        error("boxes2_type", TypeError, "expected boxes2 to be a Tensor, but got list", boxes2=[1.0]),
        error(
            "boxes1_shape",
            RuntimeError,
            "expected boxes1 to have size [..., 4], but got [3, 5]",
            boxes1=torch.ones(3, 5),
        ),
        error(
            "boxes2_shape",
            RuntimeError,
            "expected boxes2 to have size [3, 4] as boxes1 has, but got [2, 4]",
            boxes2=torch.ones(2, 4),
        ),
        error(
            "boxes1_dtype",
            NotImplementedError,
            "expected boxes1 to be float16, bfloat16, float32, float64 or of an integer type, but got torch.complex64",
            boxes1=torch.ones(3, 4, dtype=torch.complex64),
        ),
        error(
            "boxes2_device",
            RuntimeError,
            "expected boxes2 to be on the device of boxes1, but got meta",
            boxes2=torch.ones(3, 4, device="meta"),
        ),
        ErrorCase(
            "reduction",
            lambda device: {"boxes1": torch.ones(3, 4), "boxes2": torch.ones(3, 4), "reduction": "max"},
            ValueError,
            "Invalid Value for arg 'reduction': 'max \n Supported reduction modes: 'none', 'mean', 'sum'",
        ),
    )


def _spec(op, flops: float) -> OpCases:
    name = op.__name__
    return OpCases(
        name=name,
        op=op,
        reference=getattr(reference, name),
        peer=lambda **inputs: _torchvision(name)(**inputs),
        operators=("box_iou_loss", "_box_iou_loss_backward"),
        differentiable=("boxes1", "boxes2"),
        layouts=("contiguous", "strided"),
        cases=_tests(),
        errors=_errors(name),
        tiny=_case("per_call_overhead", 2, "sum"),
        flops=lambda inputs, output: flops * inputs["boxes1"].numel() / 4,
        bytes=lambda inputs, output: (
            2 * inputs["boxes1"].numel() * inputs["boxes1"].element_size() + output.numel() * output.element_size()
        ),
    )


def _torchvision(name: str):
    from torchvision import ops

    return getattr(ops, name)


GENERALIZED_BOX_IOU_LOSS = _spec(generalized_box_iou_loss, 32)
DISTANCE_BOX_IOU_LOSS = _spec(distance_box_iou_loss, 40)
COMPLETE_BOX_IOU_LOSS = _spec(complete_box_iou_loss, 90)

CASES = (GENERALIZED_BOX_IOU_LOSS, DISTANCE_BOX_IOU_LOSS, COMPLETE_BOX_IOU_LOSS)
