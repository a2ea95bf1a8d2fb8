"""Cases of roi_pool: sizes of real detectors, odd sizes, hostile boxes."""

from __future__ import annotations

import math

import torch

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels._roi_cases import EMPTY, HOSTILE, common_errors, covered, random_boxes
from pyvision_kernels.ops import roi_pool
from pyvision_kernels.ops.roi_pool import reference

NAN, INF = math.nan, math.inf


def _case(
    name: str,
    size: tuple[int, int, int, int],
    count: int,
    output_size: int | tuple[int, int] = 7,
    spatial_scale: float = 0.25,
    sides: tuple[float, float] = (8.0, 120.0),
    extra: list[list[float]] | None = None,
    **options,
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        extent = (size[2] / spatial_scale, size[3] / spatial_scale)
        boxes = random_boxes(generator, count, size[0], extent, sides)
        if extra:
            boxes = torch.cat([boxes, torch.tensor(extra, dtype=torch.float64)])
        return {
            "input": torch.randn(size, generator=generator, dtype=torch.float64),
            "boxes": boxes,
            "output_size": output_size,
            "spatial_scale": spatial_scale,
        }

    options.setdefault("single", ("boxes",))
    if extra:  # hostile boxes come last
        options.setdefault("for_peer", lambda inputs: {**inputs, "boxes": inputs["boxes"][:count]})
    return Case(name, make, **options)


def _error(name: str, error: type[Exception], message: str, **changes) -> ErrorCase:
    """Fitting inputs with some replaced."""
    fitting = {"input": torch.ones(1, 3, 4, 4), "boxes": torch.ones(7, 5), "output_size": 2}
    return error_case("roi_pool", name, error, message, {**fitting, **changes})


ROI_POOL = OpCases(
    name="roi_pool",
    op=roi_pool,
    reference=reference.roi_pool,
    peer=lambda **inputs: _torchvision(**inputs),
    operators=("roi_pool", "_roi_pool_backward"),
    tiny=Case(
        "per_call_overhead",
        lambda generator: {
            "input": torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64),
            "boxes": torch.tensor([[0, 0.5, 0.5, 3, 3]], dtype=torch.float64),
            "output_size": 1,
        },
    ),
    differentiable=("input",),
    cases=(
        _case("fast_rcnn_like", (2, 72, 19, 25), 24),
        _case("odd_channels", (2, 33, 19, 23), 17, (4, 3)),
        _case("single_channel", (3, 1, 9, 14), 11, (2, 3)),
        _case("many_channels", (1, 2052, 5, 6), 3, 2, 1 / 16),
        _case("one_bin", (1, 20, 17, 33), 9, 1),
        _case("bins_of_one_pixel", (1, 16, 24, 24), 7, 7, sides=(1.0, 20.0)),
        _case("large_bins", (1, 5, 40, 33), 9, 2, sides=(60.0, 400.0)),
        _case("wide_output", (1, 3, 12, 9), 3, (3, 70)),  # more bins a row than a warp has lanes
        _case("tall_output", (1, 18, 12, 9), 3, (70, 3)),
        _case("many_boxes_on_a_pixel", (1, 4, 3, 2), 90, 2),
        _case("one_pixel_map", (2, 6, 1, 1), 5, 3),
        _case("one_row_map", (1, 18, 1, 37), 5, (2, 3)),
        _case("no_boxes", (2, 8, 6, 7), 0),
        _case("no_images", (0, 8, 6, 7), 3, for_peer=lambda _: None),
        _case("no_channels", (2, 0, 6, 7), 3, for_peer=lambda _: None),
        _case("empty_map_width", (2, 8, 6, 0), 3, for_peer=lambda _: None),
        _case("empty_map", (2, 8, 0, 7), 3, for_peer=lambda _: None),
        _case("empty_and_inverted_boxes", (2, 21, 20, 26), 6, 3, extra=EMPTY, for_peer=lambda inputs: inputs),
        _case("hostile", (2, 35, 20, 26), 9, 3, extra=HOSTILE, dtypes=(torch.float32, torch.float64, torch.bfloat16)),
        _case(
            "boxes_of_the_same_16_bits",
            (2, 24, 16, 16),
            8,
            3,
            sides=(8.0, 30.0),
            single=(),
            dtypes=(torch.float16, torch.bfloat16),
        ),
        # Fast R-CNN on VGG16: conv5 of a 600 x 800 image.
        _case("vgg16_300_rois", (1, 512, 38, 50), 300, 7, 1 / 16, (32.0, 500.0), bench="quick"),
        _case("vgg16_1000_rois", (1, 512, 38, 50), 1000, 7, 1 / 16, (32.0, 500.0), bench="full"),
        _case("fpn_p2", (1, 256, 200, 304), 512, bench="quick", sides=(16.0, 112.0)),
        _case("fpn_p4", (1, 256, 50, 76), 300, 7, 1 / 16, (100.0, 448.0), bench="full"),
    ),
    errors=(
        *common_errors("roi_pool"),
        _error(
            "pixels",
            RuntimeError,
            "expected input to have fewer than 2147483648 pixels a channel, but got 65536 x 32768",
            input=torch.ones(1, 1, 1, 1).expand(1, 1, 65536, 32768),
        ),
    ),
    flops=lambda inputs, output: float(covered(inputs)),
    # Boxes once, outputs and places once, and of the map what the boxes cover, at most all of it.
    bytes=lambda inputs, output: (
        output.numel() * (output.element_size() + 4)
        + min(covered(inputs), inputs["input"].numel()) * output.element_size()
    ),
)


CASES = (ROI_POOL,)


def _torchvision(input, boxes, **rest):
    from torchvision.ops import roi_pool as peer

    if input.dtype == torch.float64 or not input.is_floating_point():
        return peer(input, boxes, **rest)
    # Its CPU kernel has no 16-bit types, under autocast neither. A maximum is the same in float32.
    return peer(input.float(), boxes.float(), **rest).to(input.dtype)
