"""U-Net with padded convolutions and batch norm, for maps of classes as large as the picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    """Twice: convolution 3x3, batch norm, relu. [N, in_channels, H, W] -> [N, out_channels, H, W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Up(nn.Module):
    """Doubles the deep maps, puts them behind the skipped ones of the same size, and convolves both.

    deep [N, in_channels, H, W], skip [N, out_channels, 2H, 2W] -> [N, out_channels, 2H, 2W].
    """

    def __init__(self, in_channels: int, out_channels: int, bilinear: bool) -> None:
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                nn.Conv2d(in_channels, out_channels, 1),
            )
        else:
            self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.conv = DoubleConv(2 * out_channels, out_channels)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(deep)], 1))


class UNet(nn.Module):
    """U-Net: an encoder that halves the maps, a decoder that doubles them, and skips between their equal sizes.

    Each level convolves twice (3x3, batch norm, relu). Down: a 2x2 pool. Up: a transposed convolution, or bilinear
    interpolation and a 1x1 convolution, and concatenation with the encoder's maps. Unlike the paper's, convolutions are
    padded, so that the output has the size of the input.

    Args:
        in_channels (int): Of the pictures. Default: 3.
        num_classes (int): Channels of the output. Default: 2.
        channels (sequence of int): Of the levels, from the finest; at least one. Default: (64, 128, 256, 512, 1024).
        bilinear (bool): Interpolate on the way up, instead of a transposed convolution. Default: False.

    Shape: input [N, in_channels, H, W], H and W multiples of 2 ** (len(channels) - 1); output [N, num_classes, H, W],
        logits of every pixel.

    Raises:
        ValueError: ``channels`` is empty.

    Reference: Ronneberger et al., U-Net: convolutional networks for biomedical image segmentation, 2015.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 2,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        bilinear: bool = False,
    ) -> None:
        if not channels:
            raise ValueError("UNet: expected channels to have at least one level, but got none")
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(
            DoubleConv(before, after) for before, after in zip((in_channels, *channels), channels, strict=False)
        )
        upward = list(channels)[::-1]
        self.up = nn.ModuleList(Up(before, after, bilinear) for before, after in pairwise(upward))
        self.head = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, input: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes, H, W]
        skips: list[Tensor] = []
        x = input
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        x = skips.pop()
        for block in self.up:
            x = block(x, skips.pop())
        return self.head(x)
