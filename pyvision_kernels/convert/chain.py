"""A stretch in one launch on CUDA: weights as csrc/graph/chain_product.cuh reads them, and what is worth it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels._op import declare

# By arithmetic, not by measurement. At batch 1 eight multiprocessors read the weights and multiply: beyond this, layers
# that each have all multiprocessors are as fast.
MOST_BYTES = 2 << 20  # of weights
MOST_PRODUCTS = 32 << 20  # for an image

fits_op = declare(
    "_graph_fits(Tensor[] inputs, Tensor[] constants, Tensor code) -> bool",
    fake=lambda inputs, constants, code: True,
    cuda_only=True,
)


def pack(weight: Tensor, map_size: Sequence[int] = ()) -> Tensor:
    """A weight in tiles of 16 outputs by 16 factors, in the order in which the lanes of a warp read them.

    Factors run over taps, then channels, in groups of 4; what is missing of a tile is zero.

    Args:
        weight (Tensor[K, C, R, S] or Tensor[K, C * R * S]): Of a convolution, or a linear layer.
        map_size (Sequence[int]): Of a linear layer: C, R, S of the map that is flattened.

    Returns:
        Tensor[bytes], uint8.
    """
    weight = weight.detach().reshape(weight.shape[0], *(map_size or weight.shape[1:]))
    rows = F.pad(weight.permute(0, 2, 3, 1), (0, -weight.shape[1] % 4)).flatten(1)
    rows = F.pad(rows, (0, -rows.shape[1] % 16, 0, -rows.shape[0] % 16))
    # [m, half, g, k, t, ...]: row 16 m + 8 half + g, factor 16 k + 4 t + ...
    tiles = rows.view(rows.shape[0] // 16, 2, 8, rows.shape[1] // 16, 4, 4)
    if weight.dtype == torch.float32:
        ordered = tiles.permute(0, 3, 1, 2, 4, 5)
    else:
        ordered = tiles.unflatten(-1, (2, 2)).permute(0, 3, 2, 4, 5, 1, 6)
    return ordered.contiguous().view(-1).view(torch.uint8)
