"""`convert(model, fuse=True)`: whole models compute what they did; the report, choices, and the way back."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from tests.fused import assert_close, forward, norms, operators, randomized

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.usefixtures("one_thread")


class _UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(self._block(a, b) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(sizes[1:]))
        self.merge = nn.ModuleList(self._block(2 * a, a) for a in sizes[1:3])
        self.head = nn.Conv2d(width, 5, 1)

    @staticmethod
    def _block(inputs, outputs):
        layers = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)]
        return nn.Sequential(*layers)

    def forward(self, x):
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for level in (1, 0):
            x = self.merge[level](torch.cat([self.up[level](x), skips[level]], 1))
        return self.head(x)


def _vgg16_bn():
    model = torchvision.models.vgg16_bn(weights=None, init_weights=False, num_classes=4)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Linear(512, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 4))
    return model


def _faster_rcnn_backbone():
    return torchvision.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)


_stock = torchvision.models
# A model and the side of its picture.
MODELS = {
    "resnet18": (lambda: _stock.resnet18(num_classes=10), 32),
    "resnet50": (lambda: _stock.resnet50(num_classes=10), 32),
    "mobilenet_v3_small": (lambda: _stock.mobilenet_v3_small(num_classes=10), 32),
    "densenet121": (lambda: _stock.densenet121(num_classes=10), 32),
    "efficientnet_b0": (lambda: _stock.efficientnet_b0(num_classes=10), 32),
    "vgg16_bn": (_vgg16_bn, 32),
    "googlenet": (lambda: _stock.googlenet(num_classes=10, init_weights=False), 48),
    "inception_v3": (lambda: _stock.inception_v3(num_classes=10, init_weights=False), 80),
    "squeezenet": (lambda: _stock.squeezenet1_1(num_classes=10), 48),
    "shufflenet": (lambda: _stock.shufflenet_v2_x0_5(num_classes=10), 32),
    "unet": (_UNet, 24),
    "faster_rcnn_backbone": (_faster_rcnn_backbone, 32),
    "deeplab": (lambda: _deeplab(), 33),
}


def _deeplab():
    segmentation = torchvision.models.segmentation
    return segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


@pytest.mark.parametrize("name", MODELS)
def test_fused_models_compute_the_same(name):
    make, side = MODELS[name]
    model, picture = randomized(make()), torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = forward(model, picture)
    before = dict(model.state_dict(keep_vars=True))
    stock_class = type(model)
    assert pvk.convert(model, fuse=True) is model
    for _ in range(2):
        assert_close(forward(model, picture), expected)
    calls = operators(model, picture)
    assert "pvk::conv2d" in calls
    assert not {"aten::convolution", "aten::conv2d"} & set(calls)
    assert name == "densenet121" or not {"aten::relu_", "aten::relu", "aten::hardswish_", "aten::silu_"} & set(calls)
    assert sum("batch_norm" in call for call in calls) == 0
    # Another layout in, the same values.
    ours = forward(model, picture.to(memory_format=torch.channels_last))
    assert_close(*(_contiguous(value) for value in (ours, expected)))
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert isinstance(model, stock_class)
    assert type(pvk.revert(model)) is stock_class
    assert_close(forward(model, picture), expected, 0.0)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv2_050", "regnetx_002"])
def test_norms_of_timm_that_activate_are_folded(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm about itself
        timm = pytest.importorskip("timm")
        model = randomized(timm.create_model(name, num_classes=4))
    picture = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = forward(model, picture)
    pvk.convert(model, fuse=True)
    assert_close(forward(model, picture), expected)
    assert norms(model, picture) == 0
    model.bn1.act.register_forward_hook(lambda module, args, output: output * 0) if hasattr(model, "bn1") else None
    assert_close(forward(model, picture), forward(pvk.revert(copy.deepcopy(model)), picture))


def _contiguous(value):
    if isinstance(value, dict):
        return type(value)((key, item.contiguous()) for key, item in value.items())
    return value.contiguous()


def test_fused_models_compute_the_same_in_float32_and_bfloat16():
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model, picture = randomized(_stock.resnet18(num_classes=10)), torch.randn(2, 3, 48, 48, dtype=torch.float64)
        expected = forward(model, picture)
        ours = forward(pvk.convert(model.to(dtype), fuse=True), picture.to(dtype))
        assert ours.dtype == dtype
        assert_close(ours.double(), expected, tolerance)


def test_a_detector_is_fused_in_parts():
    from tests import detectors

    model = detectors.make("faster_rcnn").double()
    model.backbone.stem = nn.Sequential(model.backbone.stem, nn.BatchNorm2d(detectors.CHANNELS), nn.ReLU(True))
    randomized(model)
    pictures = [picture.double() for picture in detectors.pictures()]
    stock = forward(model, pictures)
    pvk.convert(model, fuse=True)
    entries = {entry.name: entry for entry in pvk.conversion_report(model)}
    assert entries["backbone.stem.0"].fused == ("1", "2")
    assert entries["rpn.head.conv.0.0"].fused == ("1",)
    assert entries["roi_heads.box_head.fc6"].fused == ("relu",)
    ours = forward(model, pictures)
    for found, expected in zip(ours, stock, strict=True):  # which of two equal scores comes first is open
        assert_close(found["scores"], expected["scores"])
    assert isinstance(model, torchvision.models.detection.FasterRCNN)


def test_the_report_says_what_was_fused_into_what(capsys):
    model = pvk.convert(_stock.resnet18(num_classes=4), fuse=True)  # in train mode: what eval mode will run
    assert model.training
    report = pvk.conversion_report(model)
    entries = {entry.name: entry for entry in report if entry.name}
    text = capsys.readouterr().out
    assert entries["layer1.0.conv1"].fused == ("bn1", "relu")
    assert entries["layer1.0.conv2"].fused == ("bn2", "add", "relu")
    assert entries["layer2.0.conv2"].fused == ("bn2",)
    assert entries["layer2.0.downsample.0"].fused == ("1", "add", "layer2.0.relu")
    assert entries["fc"].fused == ()
    assert report[0].reason == "in eval mode a fused forward: 21 layers"
    assert "Conv2d <- bn1, relu" in " ".join(text.split())
    assert not [entry for entry in report if entry.layer in ("BatchNorm2d", "ReLU")]


def test_what_is_excluded_is_not_fused():
    picture = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    model = randomized(_stock.resnet18(num_classes=4))
    expected = forward(model, picture)

    def fused(**choices):
        pvk.convert(model, fuse=True, **choices)
        assert_close(forward(model, picture), expected)
        report = pvk.conversion_report(model)
        return {entry.name: entry.fused for entry in report if entry.fused and entry.layer == "Conv2d"}

    everything = fused()
    assert len(everything) == 20
    assert "layer1.0.conv1" not in fused(exclude=["*.bn1"])
    assert set(everything) - set(fused(exclude=["layer1.*"])) == {
        key for key in everything if key.startswith("layer1.")
    }
    assert set(everything) - set(fused(exclude=["layer1"])) == {key for key in everything if key.startswith("layer1.")}
    assert set(fused(include=["layer1.*"])) == {key for key in everything if key.startswith("layer1.")}
    assert fused() == everything
    pvk.convert(model)
    assert type(model) is torchvision.models.ResNet
    assert not [entry for entry in pvk.conversion_report(model) if entry.fused]


def test_reverting_leaves_nothing_behind():
    model = randomized(_stock.mobilenet_v3_small(num_classes=4))
    picture = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    classes = [type(module) for module in model.modules()]
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    pvk.convert(model, fuse=True, exclude=["features.0"])
    forward(model, picture)
    pvk.revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
