"""`MultiScaleRoIAlign`, in place of `torchvision.ops.MultiScaleRoIAlign`.

Where torchvision is installed the class is a subclass of torchvision's, which its detectors insist on; importing this
module then imports torchvision. `pyvision_kernels.nn` therefore imports it only when the class is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pyvision_kernels.ops import multiscale_roi_align

if TYPE_CHECKING:
    Base = nn.Module
else:
    try:
        from torchvision.ops import MultiScaleRoIAlign as Base
    except (ImportError, RuntimeError, OSError):  # not installed, or built for another torch
        Base = nn.Module


class MultiScaleRoIAlign(Base):
    """Layer of :func:`pyvision_kernels.ops.multiscale_roi_align`; same constructor as torchvision's.

    The scales are found at the first call, as torchvision finds them: powers of 2, from the heights of the maps and of
    the largest image. `map_levels` is None here: an instance that was torchvision's may hold one, which is not read,
    and one that becomes torchvision's finds its own.

    Args:
        featmap_names (list of str): Names of the maps that boxes are pooled from.
        output_size (int or (int, int)): Bins (PH, PW).
        sampling_ratio (int): Samples per bin and axis; <= 0: adaptive.
        canonical_scale (int): Side of a square box that belongs to ``canonical_level``. Default: 224.
        canonical_level (int): Default: 4.
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ):
        nn.Module.__init__(self)
        self.featmap_names = featmap_names
        self.sampling_ratio = sampling_ratio
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.scales: list[float] | None = None
        self.map_levels = None
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, x: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Maps by name, [K_i, 4] and (height, width) of each image -> [K, C, PH, PW]."""
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if self.scales is None:
            if not image_shapes:
                raise ValueError("images list should not be empty")
            height = max(shape[0] for shape in image_shapes)
            self.scales = [2.0 ** round(math.log2(feature.shape[-2] / height)) for feature in features]
        return multiscale_roi_align(
            features,
            boxes,
            self.output_size,
            self.scales,
            self.sampling_ratio,
            self.canonical_scale,
            self.canonical_level,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(featmap_names={self.featmap_names}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio})"
        )
