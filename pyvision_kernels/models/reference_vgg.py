"""The reference VGG: ten convolutions in four groups, for pictures of 64 x 64."""

from __future__ import annotations

from torch import Tensor, nn

# (channels, convolutions) of each group; a 2x2 pool follows each.
GROUPS = ((64, 2), (128, 2), (256, 3), (512, 3))


class ReferenceVGG(nn.Module):
    """VGG's pattern with 2 + 2 + 3 + 3 convolutions of 64, 128, 256 and 512 channels.

    Every convolution is 3x3, padded by 1, and followed by a relu; a 2x2 pool halves the maps after each group. Then
    fc1, relu, fc2, dropout, fc3. For pictures of 64 x 64 the maps are [N, 64, 32, 32], [N, 128, 16, 16],
    [N, 256, 8, 8] and [N, 512, 4, 4] after the pools.

    Args:
        num_classes (int): Size of the output. Default: 10.
        image_size (int): Height and width of the pictures, at least 16. Default: 64.
        hidden (int): Size of the outputs of fc1 and fc2. Default: 512.
        dropout (float): Probability of the dropout before fc3. Default: 0.5.

    Shape: input [N, 3, image_size, image_size]; output [N, num_classes], logits.

    Raises:
        ValueError: ``image_size`` leaves nothing after four pools.

    Reference: Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition, 2015.
    """

    def __init__(self, num_classes: int = 10, image_size: int = 64, hidden: int = 512, dropout: float = 0.5) -> None:
        if image_size < 16:
            raise ValueError(f"ReferenceVGG: expected image_size to be at least 16, but got {image_size}")
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, convolutions in GROUPS:
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(channels * (image_size // 16) ** 2, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc3 = nn.Linear(hidden, num_classes)

    def forward(self, input: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, num_classes]
        x = self.flatten(self.features(input))
        x = self.relu(self.fc1(x))
        return self.fc3(self.dropout(self.fc2(x)))
