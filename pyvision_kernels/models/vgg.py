"""VGG-11, 13, 16 and 19, with and without batch norm; the keys of the state_dict are torchvision's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Convolutions of each group; a 2x2 pool follows each group.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """VGG of a given depth.

    3x3 convolutions with relus in five groups of 64, 128, 256, 512 and 512 channels, a 2x2 pool after each, an adaptive
    average pool to 7 x 7, and three linear layers with relu and dropout between them. Takes the weights of
    torchvision's model of the same name.

    Args:
        depth (int): Layers with weights: 11, 13, 16 or 19.
        batch_norm (bool): Whether a batch norm follows each convolution. Default: False.
        num_classes (int): Size of the output. Default: 1000.
        dropout (float): Probability of both dropouts. Default: 0.5.

    Shape: input [N, 3, H, W], H and W at least 32; output [N, num_classes], logits.

    Raises:
        ValueError: there is no VGG of that depth.

    Reference: Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition, 2015.
    """

    def __init__(self, depth: int, batch_norm: bool = False, num_classes: int = 1000, dropout: float = 0.5) -> None:
        if depth not in DEPTHS:
            raise ValueError(f"VGG: expected depth to be one of {sorted(DEPTHS)}, but got {depth}")
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, convolutions in zip(CHANNELS, DEPTHS[depth], strict=True):
            for _ in range(convolutions):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's initialisation of the convolutions, small normal weights of the linear layers, as torchvision does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, num_classes]
        maps = self.avgpool(self.features(input))  # [N, 512, 7, 7]
        return self.classifier(torch.flatten(maps, 1))


def vgg11(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-11 ("configuration A"); see `VGG`."""
    return VGG(11, False, num_classes, dropout)


def vgg11_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-11 with batch norm; see `VGG`."""
    return VGG(11, True, num_classes, dropout)


def vgg13(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-13 ("configuration B"); see `VGG`."""
    return VGG(13, False, num_classes, dropout)


def vgg13_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-13 with batch norm; see `VGG`."""
    return VGG(13, True, num_classes, dropout)


def vgg16(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-16 ("configuration D"); see `VGG`."""
    return VGG(16, False, num_classes, dropout)


def vgg16_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-16 with batch norm; see `VGG`."""
    return VGG(16, True, num_classes, dropout)


def vgg19(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-19 ("configuration E"); see `VGG`."""
    return VGG(19, False, num_classes, dropout)


def vgg19_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-19 with batch norm; see `VGG`."""
    return VGG(19, True, num_classes, dropout)
