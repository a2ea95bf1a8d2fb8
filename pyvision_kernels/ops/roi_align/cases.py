"""Cases of roi_align: sizes of real detectors, odd sizes, hostile boxes."""

from __future__ import annotations

import torch

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels._roi_cases import EMPTY, HOSTILE, common_errors, covered, random_boxes
from pyvision_kernels.ops import roi_align
from pyvision_kernels.ops.roi_align import reference
from pyvision_kernels.ops.roi_align.multiscale_cases import MULTISCALE_ROI_ALIGN


def _case(
    name: str,
    size: tuple[int, int, int, int],
    count: int,
    output_size: int | tuple[int, int] = 7,
    spatial_scale: float = 0.25,
    sampling_ratio: int = 2,
    aligned: bool = False,
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
            "sampling_ratio": sampling_ratio,
            "aligned": aligned,
        }

    options.setdefault("single", ("boxes",))
    if extra:  # hostile boxes come last
        options.setdefault("for_peer", lambda inputs: {**inputs, "boxes": inputs["boxes"][:count]})
    return Case(name, make, **options)


def _error(name: str, error: type[Exception], message: str, **changes) -> ErrorCase:
    """Fitting inputs with some replaced."""
    fitting = {"input": torch.ones(1, 3, 4, 4), "boxes": torch.ones(7, 5), "output_size": 2}
    return error_case("roi_align", name, error, message, {**fitting, **changes})


ROI_ALIGN = OpCases(
    name="roi_align",
    op=roi_align,
    reference=reference.roi_align,
    peer=lambda **inputs: _torchvision()(**inputs),
    operators=("roi_align", "_roi_align_backward"),
    tiny=Case(
        "per_call_overhead",
        lambda generator: {
            "input": torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64),
            "boxes": torch.tensor([[0, 0.5, 0.5, 3, 3]], dtype=torch.float64),
            "output_size": 1,
            "sampling_ratio": 1,
        },
    ),
    differentiable=("input",),
    cases=(
        _case("fpn_like", (2, 64, 25, 38), 24),
        _case("aligned", (2, 33, 19, 23), 17, aligned=True),
        _case("adaptive", (1, 70, 21, 30), 19, (3, 5), sampling_ratio=-1, aligned=True),
        _case("adaptive_large_boxes", (1, 5, 40, 33), 9, 2, sampling_ratio=0, sides=(60.0, 400.0)),
        _case("single_channel", (3, 1, 9, 14), 11, (2, 3), sampling_ratio=3),
        _case("many_channels", (1, 4096, 5, 6), 3, 2, spatial_scale=1 / 16),
        _case("one_bin", (1, 20, 17, 33), 9, 1),
        _case("mask_head", (1, 40, 30, 20), 5, 14),
        _case("wide_output", (1, 3, 12, 9), 3, (3, 70), sampling_ratio=1),
        _case("many_bins", (2, 8, 12, 13), 60, 14),  # a warp has several
        _case("one_pixel_map", (2, 6, 1, 1), 5, 3),
        _case("one_row_map", (1, 18, 1, 37), 5, (2, 3)),
        _case("upsampled_boxes", (1, 16, 24, 24), 7, 7, sides=(1.0, 3.0)),
        _case("no_boxes", (2, 8, 6, 7), 0),
        _case("no_images", (0, 8, 6, 7), 3, for_peer=lambda _: None),
        _case("no_channels", (2, 0, 6, 7), 3, for_peer=lambda _: None),
        _case("empty_map_width", (2, 8, 6, 0), 3, for_peer=lambda _: None),
        _case("empty_map", (2, 8, 0, 7), 3, for_peer=lambda _: None),
        _case("empty_and_inverted_boxes", (2, 21, 20, 26), 6, 3, extra=EMPTY, for_peer=lambda inputs: inputs),
        _case(
            "empty_and_inverted_boxes_aligned",
            (2, 21, 20, 26),
            6,
            3,
            aligned=True,
            extra=EMPTY,
            for_peer=lambda inputs: inputs,
        ),
        _case("empty_boxes_adaptive", (2, 9, 20, 26), 6, 3, sampling_ratio=-1, aligned=True, extra=EMPTY),
        _case("hostile", (2, 35, 20, 26), 9, 3, extra=HOSTILE, dtypes=(torch.float32, torch.float64, torch.bfloat16)),
        _case(
            "hostile_adaptive",
            (2, 35, 20, 26),
            9,
            3,
            sampling_ratio=0,
            extra=HOSTILE,
            dtypes=(torch.float32, torch.float64),
        ),
        _case(
            "boxes_of_the_same_16_bits",
            (2, 24, 16, 16),
            8,
            3,
            sides=(8.0, 30.0),
            single=(),
            dtypes=(torch.float16, torch.bfloat16),
        ),
        # A third of an RPN's 1,000 proposals on each of the finer levels of a 800 x 1216 image.
        _case("faster_rcnn_fpn_p2", (1, 256, 200, 304), 512, bench="quick", sides=(16.0, 112.0)),
        _case("faster_rcnn_fpn_p3", (1, 256, 100, 152), 256, spatial_scale=1 / 8, bench="quick", sides=(112.0, 224.0)),
        _case("faster_rcnn_fpn_p4", (1, 256, 50, 76), 160, spatial_scale=1 / 16, bench="quick", sides=(224.0, 448.0)),
        _case("faster_rcnn_fpn_p5", (1, 256, 25, 38), 72, spatial_scale=1 / 32, bench="full", sides=(448.0, 800.0)),
        _case("faster_rcnn_1000_rois", (1, 256, 200, 304), 1000, bench="quick", sides=(16.0, 224.0)),
        _case("faster_rcnn_train_p2", (2, 256, 200, 304), 1024, bench="full", sides=(16.0, 112.0)),
        _case("mask_rcnn_fpn_p2", (1, 256, 200, 304), 100, 14, bench="quick", sides=(16.0, 112.0)),
        _case("c4_adaptive", (1, 1024, 50, 76), 300, 14, 1 / 16, 0, True, bench="quick", sides=(32.0, 500.0)),
        _case("vitdet_adaptive", (1, 256, 64, 64), 1000, 7, 1 / 16, 0, True, bench="full", sides=(16.0, 500.0)),
    ),
    errors=(
        *common_errors("roi_align"),
        _error(
            "sampling_ratio",
            RuntimeError,
            "expected sampling_ratio to be at most 4096, but got 4611686018427387904",
            sampling_ratio=2**62,
        ),
    ),
    flops=lambda inputs, output: 2.0 * output.numel() * 4 * max(inputs["sampling_ratio"], 1) ** 2,
    # Boxes once, the output once, and of the map what the boxes cover, at most all of it.
    bytes=lambda inputs, output: (
        output.numel() * output.element_size() + min(covered(inputs), inputs["input"].numel()) * output.element_size()
    ),
)


CASES = (ROI_ALIGN, MULTISCALE_ROI_ALIGN)


def _torchvision():
    from torchvision.ops import roi_align as peer

    return peer
