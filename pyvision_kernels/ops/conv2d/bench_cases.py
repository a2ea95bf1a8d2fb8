"""Benchmark cases of conv2d: layers of well-known models, by the part of the model that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyvision_kernels._case import Case

Make = Callable[..., Case]

# (channels in, channels out, side): the 3 x 3 layers of VGG-16 after the first, and how many times each comes.
VGG16 = (
    (64, 64, 224),
    (64, 128, 112),
    (128, 128, 112),
    (128, 256, 56),
    (256, 256, 56),
    (256, 512, 28),
    (512, 512, 28),
    (512, 512, 14),
)
RESNET50_3X3 = ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7))
# 1 x 1 layers of ResNet-50: into and out of the bottlenecks.
RESNET50_1X1 = (
    (64, 256, 56),
    (256, 64, 56),
    (512, 128, 28),
    (128, 512, 28),
    (1024, 256, 14),
    (256, 1024, 14),
    (2048, 512, 7),
    (512, 2048, 7),
)
# (channels, taps, stride, side): depthwise layers of MobileNetV3, EfficientNet-B0 and ConvNeXt-T.
DEPTHWISE = (
    (16, 3, 1, 112),
    (64, 3, 2, 112),
    (72, 5, 2, 56),
    (120, 5, 1, 28),
    (200, 3, 1, 14),
    (672, 5, 1, 14),
    (960, 5, 1, 7),
    (144, 3, 1, 56),
    (480, 5, 1, 14),
    (96, 7, 1, 56),
    (384, 7, 1, 14),
)
# name, channels out, taps, stride, padding
FIRST = (
    ("vgg16", 64, 3, 1, 1),
    ("resnet50", 64, 7, 2, 3),
    ("mobilenet", 16, 3, 2, 1),
    ("convnext", 96, 4, 4, 0),
    ("vit", 768, 16, 16, 0),
)
_QUICK = {
    "vgg16_256_256_56",
    "vgg16_512_512_14",
    "resnet50_b1_64_64_56",
    "resnet50_b1_256_256_14",
    "conv1x1_b1_256_64_56",
    "conv1x1_b1_256_1024_14",
    "depthwise_b1_120_5x5_28",
    "first_b1_resnet50",
    "strided_b1_128_56",
}


def _size(name: str) -> str:
    return "quick" if name in _QUICK else "full"


def conv2d(case: Make) -> Iterator[Case]:
    for inputs, outputs, side in VGG16:
        yield _dense(case, f"vgg16_{inputs}_{outputs}_{side}", 1, inputs, outputs, side, 3)
    for batch in (1, 8):
        for inputs, outputs, side in RESNET50_3X3:
            yield _dense(case, f"resnet50_b{batch}_{inputs}_{outputs}_{side}", batch, inputs, outputs, side, 3)
        for inputs, outputs, side in RESNET50_1X1:
            yield _dense(case, f"conv1x1_b{batch}_{inputs}_{outputs}_{side}", batch, inputs, outputs, side, 1)
        for channels, taps, stride, side in DEPTHWISE:
            name = f"depthwise_b{batch}_{channels}_{taps}x{taps}_{side}" + ("_s2" if stride == 2 else "")
            options = {"stride": stride, "padding": taps // 2, "groups": channels}
            yield case(name, (batch, channels, side, side), channels, taps, bench=_size(name), **options)
        for model, outputs, taps, stride, padding in FIRST:
            name = f"first_b{batch}_{model}"
            options = {"stride": stride, "padding": padding}
            yield case(name, (batch, 3, 224, 224), outputs, taps, bench=_size(name), activation="relu", **options)
    for channels, side in ((128, 56), (256, 28), (512, 14)):
        name = f"strided_b1_{channels}_{side}"
        yield case(name, (1, channels, side, side), channels, 3, bench=_size(name), stride=2, padding=1, bias=False)
    yield case("resnext_b1_grouped_128_56", (1, 128, 56, 56), 128, 3, bench="full", groups=32, padding=1, bias=False)
    yield case("deeplab_b1_dilated_256_33", (1, 256, 33, 33), 256, 3, bench="full", dilation=12, padding=12, bias=False)


def _dense(case: Make, name: str, batch: int, inputs: int, outputs: int, side: int, taps: int) -> Case:
    """As the model has it: VGG with a bias and relu, ResNet with a batch norm and relu."""
    norm = not name.startswith("vgg16")
    exact = taps == 1 or batch * side * side < 256
    return case(
        name,
        (batch, inputs, side, side),
        outputs,
        taps,
        padding=taps // 2,
        bias=not norm,
        norm=norm,
        activation="relu",
        bench=_size(name),
        l2=None if exact else 2e-6,
    )


def conv2d_max_pool2d(case: Make) -> Iterator[Case]:
    for inputs, outputs, side in ((64, 64, 224), (128, 128, 112), (256, 256, 56), (512, 512, 28), (512, 512, 14)):
        name = f"vgg16_{inputs}_{outputs}_{side}"
        size = "quick" if side == 56 else "full"
        yield case(
            name,
            (1, inputs, side, side),
            outputs,
            3,
            padding=1,
            activation="relu",
            bench=size,
            l2=2e-6 if side > 14 else None,
        )
