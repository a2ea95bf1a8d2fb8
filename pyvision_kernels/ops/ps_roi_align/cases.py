"""Cases of ps_roi_align and ps_roi_pool: sizes of R-FCN and Light-Head R-CNN, odd sizes, hostile boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels._roi_cases import EMPTY, HOSTILE, common_errors, covered, random_boxes
from pyvision_kernels.ops import ps_roi_align, ps_roi_pool
from pyvision_kernels.ops.ps_roi_align import reference

Size = tuple[int, int, int, int]  # images, channels of the output, height, width


def _case(
    name: str,
    size: Size,
    count: int,
    output_size: int | tuple[int, int] = 7,
    spatial_scale: float = 0.25,
    sides: tuple[float, float] = (8.0, 120.0),
    *,
    extra: list[list[float]] | None = None,
    inside: bool = False,
    arguments: dict[str, Any] | None = None,
    **options,
) -> Case:
    """`inside`: no box reaches the last row or column."""
    images, channels, height, width = size
    bins = (output_size, output_size) if isinstance(output_size, int) else output_size

    def make(generator: torch.Generator) -> Inputs:
        boxes = random_boxes(generator, count, images, (height / spatial_scale, width / spatial_scale), sides)
        if inside:
            last = torch.tensor([width - 2, height - 2], dtype=torch.float64) / spatial_scale
            boxes[:, 1:] = boxes[:, 1:].minimum(last.repeat(2))
        if extra:
            boxes = torch.cat([boxes, torch.tensor(extra, dtype=torch.float64)])
        shape = (images, channels * bins[0] * bins[1], height, width)
        return {
            "input": torch.randn(shape, generator=generator, dtype=torch.float64),
            "boxes": boxes,
            "output_size": output_size,
            "spatial_scale": spatial_scale,
            **(arguments or {}),
        }

    options.setdefault("single", ("boxes",))
    if extra:  # hostile boxes come last
        options.setdefault("for_peer", lambda inputs: {**inputs, "boxes": inputs["boxes"][:count]})
    return Case(name, make, **options)


def _align(*args, sampling_ratio: int = 2, **options) -> Case:
    return _case(*args, arguments={"sampling_ratio": sampling_ratio}, **options)


def _pool(*args, **options) -> Case:
    """torchvision's gradient is not that of its own function where a box reaches the last row or column."""
    return _case(*args, inside=True, **options)


def _no_peer(_: Inputs) -> None:
    return None


SAME_16_BITS: dict[str, Any] = {"single": (), "dtypes": (torch.float16, torch.bfloat16)}
WITHOUT_FLOAT16 = (torch.float32, torch.float64, torch.bfloat16)


def _errors(op: str) -> tuple[ErrorCase, ...]:
    inputs = {"input": torch.ones(1, 12, 4, 4), "boxes": torch.ones(7, 5), "output_size": (5, 2)}
    message = "expected input to have channels in a multiple of 5 * 2, but got 12"
    return (*common_errors(op), error_case(op, "channels", RuntimeError, message, inputs))


def _tiny(generator: torch.Generator) -> Inputs:
    return {
        "input": torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64),
        "boxes": torch.tensor([[0, 0.5, 0.5, 3, 3]], dtype=torch.float64),
        "output_size": 2,
    }


def _tiny_align(generator: torch.Generator) -> Inputs:
    return {**_tiny(generator), "sampling_ratio": 1}


def _bytes(inputs: Inputs, output: Tensor) -> float:
    """The output once, and of the map what the boxes cover, at most all of it."""
    inside = covered(inputs) * output.size(1) / inputs["input"].size(1)  # a plane's share of a box is one bin
    return (output.numel() + min(inside, inputs["input"].numel())) * output.element_size()


def _pool_flops(inputs: Inputs, output: Tensor) -> float:
    return _bytes(inputs, output) / output.element_size()


def _peer(name: str) -> Callable[..., Tensor]:
    def peer(input: Tensor, boxes: Tensor, *args, **kwargs) -> Tensor:
        from torchvision import ops

        function = getattr(ops, name)
        if input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # torchvision registers the op for autocast on CUDA alone: what it does there.
            return function(input.float(), boxes.float(), *args, **kwargs).to(input.dtype)
        return function(input, boxes, *args, **kwargs)

    return peer


PS_ROI_ALIGN = OpCases(
    name="ps_roi_align",
    op=ps_roi_align,
    reference=reference.ps_roi_align,
    peer=_peer("ps_roi_align"),
    operators=("ps_roi_align", "_ps_roi_align_backward"),
    tiny=Case("per_call_overhead", _tiny_align),
    differentiable=("input",),
    cases=(
        _align("rfcn_like", (2, 5, 25, 38), 24, 3),
        _align("odd", (2, 3, 19, 23), 17, (2, 3)),
        _align("adaptive", (1, 3, 21, 30), 19, (3, 5), sampling_ratio=-1),
        _align("adaptive_large_boxes", (1, 5, 40, 33), 9, 2, sampling_ratio=0, sides=(60.0, 400.0)),
        _align("one_bin", (3, 20, 17, 33), 11, 1),
        _align("one_channel", (1, 1, 9, 14), 11, (2, 3), sampling_ratio=3),
        _align("many_samples", (1, 2, 12, 9), 5, 2, sampling_ratio=37),
        _align("wide_output", (1, 1, 12, 9), 3, (3, 70), sampling_ratio=1),
        _align("more_taps_than_a_table", (1, 2, 3, 300), 3, (1, 2), sampling_ratio=-1, sides=(100.0, 1200.0)),
        _align("many_boxes", (2, 2, 12, 13), 600, 2),
        _align("one_pixel_map", (2, 6, 1, 1), 5, 3),
        _align("one_row_map", (1, 3, 1, 37), 5, (2, 3)),
        _align("upsampled_boxes", (1, 2, 24, 24), 7, sides=(1.0, 3.0)),
        _align("no_boxes", (2, 8, 6, 7), 0, 2),
        _align("no_images", (0, 8, 6, 7), 3, 2, for_peer=_no_peer),
        _align("no_channels", (2, 0, 6, 7), 3, 2, for_peer=_no_peer),
        _align("empty_map_width", (2, 8, 6, 0), 3, 2, for_peer=_no_peer),
        _align("empty_map", (2, 8, 0, 7), 3, 2, for_peer=_no_peer),
        _align("empty_and_inverted_boxes", (2, 3, 20, 26), 6, 3, extra=EMPTY, for_peer=lambda inputs: inputs),
        _align("empty_boxes_adaptive", (2, 3, 20, 26), 6, 3, sampling_ratio=-1, extra=EMPTY),
        _align("hostile", (2, 3, 20, 26), 9, 3, extra=HOSTILE, dtypes=WITHOUT_FLOAT16),
        _align(
            "hostile_adaptive",
            (2, 3, 20, 26),
            9,
            3,
            sampling_ratio=0,
            extra=HOSTILE,
            dtypes=(torch.float32, torch.float64),
        ),
        _align("boxes_of_the_same_16_bits", (2, 3, 16, 16), 8, 3, sides=(8.0, 30.0), **SAME_16_BITS),
        # R-FCN's 300 proposals on conv5 of an 800 x 1216 image: 20 classes and the background, or 80.
        _align("rfcn_21_classes", (1, 21, 50, 76), 300, 7, 1 / 16, bench="quick", sides=(32.0, 448.0)),
        _align("rfcn_81_classes", (1, 81, 50, 76), 300, 7, 1 / 16, bench="full", sides=(32.0, 448.0)),
        _align("light_head_1000_rois", (1, 10, 50, 76), 1000, 7, 1 / 16, bench="quick", sides=(32.0, 448.0)),
        _align("light_head_train", (2, 10, 50, 76), 512, 7, 1 / 16, bench="full", sides=(32.0, 448.0)),
        _align("rfcn_adaptive", (1, 21, 50, 76), 300, 7, 1 / 16, (32.0, 448.0), sampling_ratio=0, bench="full"),
    ),
    errors=(
        *_errors("ps_roi_align"),
        error_case(
            "ps_roi_align",
            "sampling_ratio",
            RuntimeError,
            "expected sampling_ratio to be at most 4096, but got 4097",
            {"input": torch.ones(1, 4, 4, 4), "boxes": torch.ones(7, 5), "output_size": 2, "sampling_ratio": 4097},
        ),
    ),
    flops=lambda inputs, output: 2.0 * output.numel() * 4 * max(inputs["sampling_ratio"], 1) ** 2,
    bytes=_bytes,
)

PS_ROI_POOL = OpCases(
    name="ps_roi_pool",
    op=ps_roi_pool,
    reference=reference.ps_roi_pool,
    peer=_peer("ps_roi_pool"),
    operators=("ps_roi_pool", "_ps_roi_pool_backward"),
    tiny=Case("per_call_overhead", _tiny),
    differentiable=("input",),
    cases=(
        _pool("rfcn_like", (2, 5, 25, 38), 24, 3),
        _pool("odd", (2, 3, 19, 23), 17, (2, 3)),
        _pool("large_boxes", (1, 5, 40, 33), 9, 2, sides=(60.0, 400.0)),
        _case("over_the_border", (1, 3, 21, 30), 19, (3, 5), for_peer=_no_peer),
        _pool("one_bin", (3, 20, 17, 33), 11, 1),
        _pool("one_channel", (1, 1, 9, 14), 11, (2, 3)),
        _pool("wide_output", (1, 1, 12, 9), 3, (3, 70)),
        _pool("more_pixels_than_a_table", (1, 2, 3, 900), 3, (1, 1), sides=(100.0, 3600.0)),
        _pool("many_boxes", (2, 2, 12, 13), 600, 2),
        _case("one_pixel_map", (2, 6, 1, 1), 5, 3, for_peer=_no_peer),
        _case("one_row_map", (1, 3, 1, 37), 5, (2, 3), for_peer=_no_peer),
        _pool("upsampled_boxes", (1, 2, 24, 24), 7, sides=(1.0, 3.0)),
        _pool("no_boxes", (2, 8, 6, 7), 0, 2),
        _case("no_images", (0, 8, 6, 7), 3, 2, for_peer=_no_peer),
        _case("no_channels", (2, 0, 6, 7), 3, 2, for_peer=_no_peer),
        _case("empty_map_width", (2, 8, 6, 0), 3, 2, for_peer=_no_peer),
        _case("empty_map", (2, 8, 0, 7), 3, 2, for_peer=_no_peer),
        _pool("empty_and_inverted_boxes", (2, 3, 20, 26), 6, 3, extra=EMPTY),
        _pool("hostile", (2, 3, 20, 26), 9, 3, extra=HOSTILE, dtypes=WITHOUT_FLOAT16),
        _pool("boxes_of_the_same_16_bits", (2, 3, 16, 16), 8, 3, sides=(8.0, 30.0), **SAME_16_BITS),
        _pool("rfcn_21_classes", (1, 21, 50, 76), 300, 7, 1 / 16, bench="quick", sides=(32.0, 448.0)),
        _pool("rfcn_81_classes", (1, 81, 50, 76), 300, 7, 1 / 16, bench="full", sides=(32.0, 448.0)),
        _pool("light_head_1000_rois", (1, 10, 50, 76), 1000, 7, 1 / 16, bench="full", sides=(32.0, 448.0)),
    ),
    errors=_errors("ps_roi_pool"),
    flops=_pool_flops,
    bytes=_bytes,
)

CASES = (PS_ROI_ALIGN, PS_ROI_POOL)
