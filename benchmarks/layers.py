"""The convolutions of well-known models: their shapes, found by a run on meta tensors, and modules that compute one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import pyvision_kernels as pvk


@dataclass(frozen=True)
class Layer:
    """A convolution of C channels of H x W pixels into K, with what follows it.

    Attributes:
        model: Where it was found first; two layers of the same shape are equal.
        norm, residual, relu: A batch norm, the addition of a map, a relu, in this order.
    """

    model: str = field(compare=False)
    C: int
    H: int
    W: int
    K: int
    taps: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    bias: bool
    transposed: bool = False
    norm: bool = False
    residual: bool = False
    relu: bool = False

    @property
    def name(self) -> str:
        kind = "transposed " if self.transposed else "depthwise " if self.groups == self.C > 1 else ""
        steps = f"{self.taps[0]}x{self.taps[1]}" + (f"/{self.stride[0]}" if self.stride != (1, 1) else "")
        parts = {"bias": self.bias, "bn": self.norm, "add": self.residual, "relu": self.relu}
        after = "".join(f" {part}" for part, present in parts.items() if present)
        return f"{self.model}, {kind}{steps} {self.C}-{self.K} at {self.H}x{self.W}{after}"

    @property
    def output(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        return self._output_of(0, self.H), self._output_of(1, self.W)

    def _output_of(self, axis: int, size: int) -> int:
        taps, stride, padding = self.taps[axis], self.stride[axis], self.padding[axis]
        if self.transposed:
            return (size - 1) * stride - 2 * padding + taps
        return (size + 2 * padding - taps) // stride + 1

    @property
    def alone(self) -> Layer:
        """The convolution with a bias, and nothing after it."""
        return replace(self, bias=True, norm=False, residual=False, relu=False)

    def work(self, batch: int, element_size: int) -> tuple[float, float]:
        """The bytes that must be moved, and the operations of the products."""
        pixels_in, pixels_out = self.H * self.W, math.prod(self.output)
        weights = self.C * self.K // self.groups * math.prod(self.taps)
        maps = batch * (pixels_in * self.C + pixels_out * self.K * (2 if self.residual else 1))
        positions = pixels_in if self.transposed else pixels_out
        return float(element_size * (maps + weights)), 2.0 * batch * positions * weights

    def module(self) -> nn.Module:
        """The layer by PyTorch, in eval mode; the caller seeds its weights."""
        kind = nn.ConvTranspose2d if self.transposed else nn.Conv2d
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        conv = kind(self.C, self.K, self.taps, bias=self.bias, **options)
        if self.norm or self.residual or self.relu:
            return (_ResidualChain if self.residual else _Chain)(conv, self).eval()
        return conv.eval()

    def inputs(self, batch: int) -> list[Tensor]:
        """The maps, and what is added."""
        maps = [torch.randn(batch, self.C, self.H, self.W)]
        return [*maps, torch.randn(batch, self.K, *self.output)] if self.residual else maps


class _Chain(nn.Module):
    def __init__(self, conv: nn.Module, layer: Layer) -> None:
        super().__init__()
        self.conv = conv
        self.norm = _norm(layer.K) if layer.norm else nn.Identity()
        self.activation = nn.ReLU(inplace=True) if layer.relu else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(input)))


class _ResidualChain(_Chain):
    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        out = self.norm(self.conv(input))
        out += residual
        return self.activation(out)


def _norm(channels: int) -> nn.BatchNorm2d:
    """With statistics, a scale and a shift that are not those of a fresh one."""
    norm = nn.BatchNorm2d(channels)
    for tensor in (norm.running_var, norm.weight):
        nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    for tensor in (norm.running_mean, norm.bias):
        nn.init.normal_(tensor, 0, 0.1)  # type: ignore[arg-type]
    return norm


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    """What makes a model of torchvision, which need not be installed."""

    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)()

    return make


# The side of the picture, and the model.
MODELS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "VGG-16": (224, pvk.models.vgg16_bn),
    "ResNet-50": (224, torchvision_model("resnet50")),
    "U-Net": (256, pvk.models.UNet),
    "MobileNetV3": (224, torchvision_model("mobilenet_v3_large")),
    "ConvNeXt-T": (224, torchvision_model("convnext_tiny")),
    "ViT-B/16": (224, torchvision_model("vit_b_16")),
}
CHAINS = ("VGG-16", "ResNet-50", "U-Net")  # models all of whose layers are timed; of others, some kinds


@functools.cache
def found_in(model: str) -> tuple[Layer, ...]:
    """The distinct convolutions of a model, in the order of its run; a relu follows all but downsamplings and heads."""
    side, make = MODELS[model]
    found: list[Layer] = []

    def note(name: str, conv: Any, maps: Tensor) -> None:
        ends = name.endswith((".up", "head"))
        height, width = maps.shape[2:]
        steps = conv.kernel_size, conv.stride, conv.padding
        layer = Layer(
            *(model, conv.in_channels, height, width, conv.out_channels, *steps, conv.groups, conv.bias is not None),
            transposed=conv.transposed,
            norm=not ends,
            residual=name.endswith("conv3"),  # of a bottleneck
            relu=not ends and ".downsample." not in name,
        )
        found.append(layer)

    with torch.device("meta"), torch.no_grad():
        made = make().eval()
        for name, module in made.named_modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args[0]))
        made(torch.empty(1, 3, side, side))
    return tuple(dict.fromkeys(found))


def chains() -> list[Layer]:
    """Convolution, batch norm and relu, in their models' form."""
    layers = (layer for model in CHAINS for layer in found_in(model) if layer.norm)
    return list(dict.fromkeys(layers))


def depthwise() -> list[Layer]:
    return [layer.alone for layer in _others() if layer.groups == layer.C > 1]


def first() -> list[Layer]:
    return [layer.alone for layer in _others() if layer.C == 3]


def alone() -> list[Layer]:
    """The same convolutions with a bias, and transposed, first and depthwise ones."""
    layers = (layer.alone for model in CHAINS for layer in found_in(model))
    return list(dict.fromkeys([*layers, *first(), *depthwise()]))


def _others() -> Iterator[Layer]:
    for model in MODELS:
        if model not in CHAINS:
            yield from found_in(model)
