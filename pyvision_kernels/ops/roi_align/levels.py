"""The level of a feature pyramid that a box belongs to, as areas to compare with.

torchvision's rule, floor(canonical_level + log2(sqrt(area) / canonical_scale) + 1e-6), is monotone in the area. Which
area is the first of a level depends on how each step rounds; it is found here by torch's own steps, once, so that the
kernels of all devices compare and round nothing.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyvision_kernels._check import require

_CANDIDATES = 4096  # areas that are tried together
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@torch.compiler.assume_constant_result
def level_areas(
    op: str, scales: tuple[float, ...], canonical_scale: float, canonical_level: float, double: bool
) -> list[float]:
    """Ascending: a box belongs to the level with the number of these areas that its own reaches.

    As many as there are levels between the first and the last of the scales, but at most one more than the maps can
    serve: a level that lies between two scales has no map. One map serves all boxes.

    Raises:
        RuntimeError: the scales or the canonical scale leave no level.
    """
    return [] if len(scales) == 1 else list(_areas(op, scales, canonical_scale, canonical_level, double))


@functools.lru_cache(maxsize=256)
def _areas(
    op: str, scales: tuple[float, ...], canonical_scale: float, canonical_level: float, double: bool
) -> tuple[float, ...]:
    positive = all(scale > 0 and math.isfinite(scale) for scale in scales)
    require(positive, op, "scales to be positive", list(scales))
    require(canonical_scale > 0, op, "canonical_scale to be positive", canonical_scale)
    with _disable_current_modes():
        k_min, k_max = (
            int(-torch.tensor(scale, dtype=torch.float32, device="cpu").log2().item())
            for scale in scales[:: len(scales) - 1]
        )
        require(k_min <= k_max, op, "scales from the finest map to the coarsest", list(scales))
        dtype = torch.float64 if double else torch.float32

        def level_of(area: Tensor) -> Tensor:
            level = canonical_level + torch.log2(torch.sqrt(area) / canonical_scale)
            level = torch.floor(level + torch.tensor(1e-6, dtype=dtype, device="cpu"))
            return torch.clamp(level, min=k_min, max=k_max).long() - k_min

        return tuple(_first_area(level_of, level, dtype) for level in range(1, min(k_max - k_min, len(scales)) + 1))


def _first_area(level_of, level: int, dtype: torch.dtype) -> float:
    """The smallest area of at least the level. Floats that are not negative are ordered as their bits are."""
    below, reached = 0, int(torch.tensor(math.inf, dtype=dtype, device="cpu").view(_BITS[dtype]))
    while reached - below > 1:
        step = max((reached - below) // _CANDIDATES, 1)
        bits = torch.arange(below, reached, step, dtype=_BITS[dtype], device="cpu")
        reaches = level_of(bits.view(dtype)) >= level
        below, reached = int(bits[~reaches][-1]), int(bits[reaches][0]) if reaches.any() else reached
    return torch.tensor(reached, dtype=_BITS[dtype], device="cpu").view(dtype).item()
