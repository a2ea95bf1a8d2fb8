"""For the cases of the RoI ops: random boxes, hostile boxes, and what each of the ops refuses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyvision_kernels._case import ErrorCase, Inputs, error_case

NAN, INF = math.nan, math.inf

HOSTILE: list[list[float]] = [
    [0, NAN, 4, 20, 30],
    [0, 4, 4, NAN, NAN],
    [1, -INF, 4, INF, 30],
    [0, 4, INF, 8, INF],
    [NAN, 4, 4, 20, 20],
    [INF, 4, 4, 20, 20],
    [2, 4, 4, 20, 20],  # one image too far
    [-1, 4, 4, 20, 20],
    [3e9, 4, 4, 20, 20],
    [1, -1e30, -1e30, 1e30, 1e30],
    [0, 1e30, 1e30, 2e30, 2e30],
    [1, -3e38, 0, 3e38, 20],  # its width is not finite
    [0, -1e6, -1e6, 1e6, 1e6],
]
EMPTY: list[list[float]] = [
    [0, 10, 12, 10, 12],
    [1, 10, 12, 10, 40],
    [0, 60, 70, 20, 30],
    [1, 20, 70, 60, 30],
    [0, -50, -50, -20, -20],
]


def random_boxes(
    generator: torch.Generator, count: int, images: int, extent: tuple[float, float], sides=(8.0, 120.0)
) -> Tensor:
    """[K, 5] with sides in a range, log-uniform, on an image of (height, width); some reach over the border."""
    height, width = extent
    low, high = (math.log(side) for side in sides)
    side = torch.exp(torch.rand(count, 2, generator=generator, dtype=torch.float64) * (high - low) + low)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([width, height]) - 0.4 * side
    image = torch.randint(0, max(images, 1), (count, 1), generator=generator).double()
    # Quarters of a pixel are exact in every dtype that boxes have here.
    return torch.cat([image, (corner * 4).round() / 4, ((corner + side) * 4).round() / 4], 1)


def covered(inputs: Inputs) -> float:
    """Elements of the map below the boxes, each as often as boxes cover it."""
    boxes = inputs["boxes"].double()
    area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2]) * inputs["spatial_scale"] ** 2
    return float(area.clamp(min=0).nan_to_num().sum()) * inputs["input"].size(1)


def common_errors(op: str) -> tuple[ErrorCase, ...]:
    """What is wrong with the input, the boxes or the output_size of every op that pools boxes of one map."""
    fitting = {"input": torch.ones(1, 12, 4, 4), "boxes": torch.ones(7, 5), "output_size": 2}

    def error(name: str, kind: type[Exception], message: str, **changes) -> ErrorCase:
        return error_case(op, name, kind, message, {**fitting, **changes})

    return (
        error(
            "input_rank",
            RuntimeError,
            "expected input to have 4 dimensions [N, C, H, W], but got [12, 4, 4]",
            input=torch.ones(12, 4, 4),
        ),
        error("input_type", TypeError, "expected input to be a Tensor, but got list", input=[1.0]),
        error(
            "input_dtype",
            NotImplementedError,
            "expected input to be float16, bfloat16, float32 or float64, but got torch.int32",
            input=torch.ones(1, 12, 4, 4, dtype=torch.int32),
            boxes=torch.ones(7, 5, dtype=torch.int32),
        ),
        error(
            "boxes_shape", RuntimeError, "expected boxes to have size [K, 5], but got [7, 4]", boxes=torch.ones(7, 4)
        ),
        error(
            "boxes_dtype",
            RuntimeError,
            "expected boxes to be torch.float32 as input is, or float32 beside a 16-bit input, but got torch.float64",
            boxes=torch.ones(7, 5, dtype=torch.float64),
        ),
        error(
            "boxes_device",
            RuntimeError,
            "expected boxes to be on the device of input, but got meta",
            boxes=torch.ones(7, 5, device="meta"),
        ),
        error(
            "boxes_type",
            TypeError,
            "expected boxes to be a Tensor or a list of Tensors, but got list",
            boxes=[[0.0, 0, 0, 1, 1]],
        ),
        error(
            "boxes_list_length",
            RuntimeError,
            "expected one Tensor of boxes for each of 1 images, but got 2",
            boxes=[torch.ones(7, 4)] * 2,
        ),
        error(
            "boxes_list_shape",
            RuntimeError,
            "expected each of boxes to have size [K, 4], but got [7, 5]",
            boxes=[torch.ones(7, 5)],
        ),
        error("output_size", ValueError, "expected output_size to be positive, but got (0, 2)", output_size=(0, 2)),
        error(
            "output_size_triple",
            TypeError,
            "expected output_size to be an int or a pair of ints, but got (1, 2, 3)",
            output_size=(1, 2, 3),
        ),
        error(
            "output_size_float",
            TypeError,
            "expected output_size to be an int or a pair of ints, but got 7.0",
            output_size=7.0,
        ),
    )
