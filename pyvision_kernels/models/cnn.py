"""The reference CNN: two convolutions and two linear layers, small enough to train in seconds."""

from __future__ import annotations

from torch import Tensor, nn


class CNN(nn.Module):
    """A small classifier of square colour pictures.

    For pictures of 24 x 24: [N, 3, 24, 24] -> conv 3x3 [N, 32, 24, 24] -> relu, pool [N, 32, 12, 12] -> conv 3x3
    [N, 64, 12, 12] -> relu, pool [N, 64, 6, 6] -> linear, relu [N, 128] -> linear [N, num_classes].

    Args:
        num_classes (int): Size of the output. Default: 10.
        image_size (int): Height and width of the pictures, at least 4. Default: 24.

    Shape: input [N, 3, image_size, image_size]; output [N, num_classes], logits.

    Raises:
        ValueError: ``image_size`` leaves nothing after two pools.

    Reference: the pattern of LeNet (LeCun et al., Gradient-based learning applied to document recognition, 1998).
    """

    def __init__(self, num_classes: int = 10, image_size: int = 24) -> None:
        if image_size < 4:
            raise ValueError(f"CNN: expected image_size to be at least 4, but got {image_size}")
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * (image_size // 4) ** 2, 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )

    def forward(self, input: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, num_classes]
        return self.classifier(self.features(input))
