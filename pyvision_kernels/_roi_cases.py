"""Boxes for the cases of the RoI ops: random ones, hostile ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
