"""Vision transformers: ViT-B/16 with torchvision's keys of the state_dict, and a small one for digits."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn


class EncoderBlock(nn.Module):
    """Self-attention and a perceptron, each after a layer norm and added to its input: [B, L, E] -> the same."""

    def __init__(self, num_heads: int, hidden_dim: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, hidden_dim),
            nn.Dropout(dropout),
        )

    def forward(self, input: Tensor) -> Tensor:
        normed = self.ln_1(input)
        update, _ = self.self_attention(normed, normed, normed, need_weights=False)
        x = input + self.dropout(update)
        return x + self.mlp(self.ln_2(x))


class _Encoder(nn.Module):
    def __init__(self, tokens: int, layers: int, num_heads: int, hidden_dim: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, hidden_dim).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        make = partial(EncoderBlock, num_heads, hidden_dim, mlp_dim, dropout)
        self.layers = nn.Sequential(OrderedDict((f"encoder_layer_{i}", make()) for i in range(layers)))
        self.ln = nn.LayerNorm(hidden_dim, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(input + self.pos_embedding)))


class VisionTransformer(nn.Module):
    """A vision transformer; takes the weights of torchvision's model of the same sizes.

    Args:
        image_size (int): Height and width of the input; a multiple of ``patch_size``.
        patch_size (int): Height and width of the pictures that become tokens.
        num_layers, num_heads, hidden_dim, mlp_dim (int): Of the encoder.
        num_classes (int): Size of the output. Default: 1000.
        channels (int): Of the input. Default: 3.
        dropout (float): Of embeddings, updates and hidden features. Default: 0.

    Shape: input [N, channels, image_size, image_size]; output [N, num_classes], logits.

    Raises:
        ValueError: ``image_size`` is not a multiple of ``patch_size``, or the input of another size.

    Reference: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        num_classes: int = 1000,
        channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        if image_size % patch_size:
            raise ValueError(
                f"VisionTransformer: expected image_size to be a multiple of {patch_size}, but got {image_size}"
            )
        super().__init__()
        self.image_size = image_size
        self.conv_proj = nn.Conv2d(channels, hidden_dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        tokens = (image_size // patch_size) ** 2 + 1
        self.encoder = _Encoder(tokens, num_layers, num_heads, hidden_dim, mlp_dim, dropout)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(hidden_dim, num_classes)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torchvision's initialisation: truncated normal patches, Xavier's perceptrons, zeros in the head."""
        fan_in = self.conv_proj.weight[0].numel()
        nn.init.trunc_normal_(self.conv_proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]
        for block in self.encoder.modules():
            for layer in block.mlp if isinstance(block, EncoderBlock) else ():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.normal_(layer.bias, std=1e-6)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:  # [N, C, H, W] -> [N, num_classes]
        if input.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"VisionTransformer: expected pictures of {self.image_size} x {self.image_size}, but got "
                f"{list(input.shape)}"
            )
        tokens = self.conv_proj(input).flatten(2).transpose(1, 2)  # [N, L, E]
        first = self.class_token.expand(tokens.size(0), -1, -1)
        return self.heads(self.encoder(torch.cat((first, tokens), 1))[:, 0])


class PatchClassifier(VisionTransformer):
    """A small vision transformer for 24 x 24 pictures: 16 patches, 2 blocks of 4 heads of 24 features.

    Args:
        num_classes (int): Size of the output. Default: 10.

    Shape: input [N, 3, 24, 24]; output [N, num_classes], logits.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(24, 6, 2, 4, 96, 192, num_classes)

    def reset_parameters(self) -> None:
        """As of `VisionTransformer`, but for a head that is not 0: nothing was learnt elsewhere."""
        super().reset_parameters()
        nn.init.xavier_uniform_(next(self.heads.parameters()))


def vit_b_16(num_classes: int = 1000, image_size: int = 224, dropout: float = 0.0) -> VisionTransformer:
    """ViT-B/16: 12 layers of 12 heads, 768 features; see `VisionTransformer`."""
    return VisionTransformer(image_size, 16, 12, 12, 768, 3072, num_classes, dropout=dropout)
