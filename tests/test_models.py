"""The models compute what their sources do, and learn with our kernels as with PyTorch's."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels.recipes import digits

VGGS = [f"vgg{depth}{norm}" for norm in ("", "_bn") for depth in (11, 13, 16, 19)]


def _with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms with means, variances and scales that differ, so that they do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high)
    return model


@pytest.fixture(scope="module")
def numbers():
    """Random weights enough for the largest layer, for to make them anew takes longer than to use them."""
    return torch.randn(25088 * 4096, generator=torch.Generator().manual_seed(0))


def _pair(name, numbers, **options):
    """Our model and torchvision's with the same weights."""
    with torch.device("meta"):
        models = [getattr(module, name)(num_classes=10, **options) for module in (pvk.models, torchvision.models)]
    ours, theirs = (model.state_dict() for model in models)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert list(ours) == list(theirs)
    weights = {}
    for key, value in ours.items():
        if not value.is_floating_point():  # num_batches_tracked
            weights[key] = torch.zeros(value.shape, dtype=value.dtype)
            continue
        inputs = value[0].numel() if value.dim() > 1 else 16
        drawn = numbers[: value.numel()].view(value.shape) * (2 / inputs) ** 0.5
        scales = value.dim() == 1 and key.endswith(("weight", "running_var"))
        weights[key] = drawn.abs() + 0.5 if scales else drawn
    for model in models:
        model.load_state_dict(weights, assign=True)
    return models


@pytest.mark.parametrize("name", VGGS)
def test_vgg_is_torchvisions(name, numbers):
    # 40 x 72: the adaptive pool has maps of 1 x 2 to widen to 7 x 7.
    input = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        ours, theirs = (model.eval()(input) for model in _pair(name, numbers))
    assert torch.equal(ours, theirs)
    assert ours.std() > 1e-3


def test_vgg_drops_out_as_torchvisions(numbers):
    input, results = torch.randn(1, 3, 32, 32), []
    for model in _pair("vgg11", numbers, dropout=0.3):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(model.train()(input))
    assert torch.equal(*results)


def test_cnn_is_its_formula():
    torch.manual_seed(0)
    model = pvk.models.CNN(num_classes=7, image_size=20)
    input = torch.randn(2, 3, 20, 20)
    first, second, third, fourth = (module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    maps = F.max_pool2d(F.relu(F.conv2d(input, first.weight, first.bias, padding=1)), 2)
    maps = F.max_pool2d(F.relu(F.conv2d(maps, second.weight, second.bias, padding=1)), 2)
    assert maps.shape == (2, 64, 5, 5)
    hidden = F.relu(F.linear(maps.flatten(1), third.weight, third.bias))
    torch.testing.assert_close(model(input), F.linear(hidden, fourth.weight, fourth.bias))
    shapes = [tuple(value.shape) for value in pvk.models.CNN().parameters() if value.dim() > 1]
    assert shapes == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 2304), (10, 128)]


def test_reference_vgg_has_ten_convolutions():
    model = pvk.models.ReferenceVGG(num_classes=5)
    channels = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert channels == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512]
    assert model.fc1.in_features == 512 * 4 * 4
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert pvk.models.ReferenceVGG(image_size=32)(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("bilinear", [False, True])
def test_unet_is_its_formula(bilinear):
    torch.manual_seed(0)
    model = _with_statistics(pvk.models.UNet(4, 3, channels=(5, 6), bilinear=bilinear)).eval()
    input = torch.randn(2, 4, 8, 12)
    fine = model.down[0](input)
    deep = model.down[1](F.max_pool2d(fine, 2))
    up = model.up[0].up
    if bilinear:
        wide = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        wide = F.conv2d(wide, up[1].weight, up[1].bias)
    else:
        wide = F.conv_transpose2d(deep, up.weight, up.bias, stride=2)
    joined = model.up[0].conv(torch.cat([fine, wide], 1))
    expected = F.conv2d(joined, model.head.weight, model.head.bias)
    assert expected.shape == (2, 3, 8, 12)
    torch.testing.assert_close(model(input), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pvk.models.CNN(image_size=3), "CNN: expected image_size to be at least 4, but got 3"),
        (lambda: pvk.models.ReferenceVGG(image_size=8), "expected image_size to be at least 16, but got 8"),
        (lambda: pvk.models.VGG(12), r"VGG: expected depth to be one of \[11, 13, 16, 19\], but got 12"),
        (lambda: pvk.models.UNet(channels=()), "UNet: expected channels to have at least one level"),
    ],
)
def test_sizes_that_make_no_model_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _features(make):
    """A VGG without its hundred million weights of linear layers."""
    with torch.device("meta"):
        model = make(num_classes=10).features
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (pvk.models.CNN, (24, 24)),
        (pvk.models.ReferenceVGG, (64, 64)),
        (lambda: _features(pvk.models.vgg11_bn), (64, 64)),
        (lambda: pvk.models.UNet(channels=(16, 32, 64)), (32, 48)),
        (lambda: pvk.models.UNet(channels=(16, 32), bilinear=True), (32, 48)),
    ],
    ids=["CNN", "ReferenceVGG", "vgg11_bn.features", "UNet", "UNet-bilinear"],
)
@pytest.mark.parametrize("fuse", [False, True], ids=["layers", "fused"])
def test_converted_model_computes_the_same(make, size, fuse):
    torch.manual_seed(0)
    model = _with_statistics(make()).eval()
    input = torch.randn(2, 3, *size)
    converted = pvk.convert(copy.deepcopy(model), fuse=fuse)
    with torch.no_grad():
        stock, ours = model(input), converted(input)
        exact = model.double()(input.double())
    error, allowed = (((found - exact).norm() / exact.norm()).item() for found in (ours, stock))
    # Beside twice PyTorch's error, that of Winograd F(4x4): 2e-6 of each layer.
    assert error <= 2 * allowed + 1e-5, (error, allowed)
    with torch.no_grad():
        names = digits.kernels_of(lambda: converted(input))
    assert {"pvk::conv2d"} <= set(names), names
    assert list(converted.state_dict()) == list(model.state_dict())


@pytest.fixture(scope="module", params=list(digits.LESSONS))
def learnt(request):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    return request.param, digits.train(model=request.param)


def test_digits_are_learnt(learnt):
    model, outcome = learnt
    assert outcome.stock_accuracy >= digits.LESSONS[model].least_accuracy
    assert outcome.our_accuracy >= digits.LESSONS[model].least_accuracy


def test_losses_agree_at_every_step(learnt):
    _, outcome = learnt
    assert len(outcome.stock) == len(outcome.ours) == 200
    assert outcome.widest <= 0.01
    assert outcome.stock[-1] < outcome.stock[0] / 2


def test_digits_are_learnt_by_our_kernels(learnt):
    model, outcome = learnt
    by_attention = {"pvk::attention", "pvk::_attention_backward"} if model == "attention" else set()
    assert {"pvk::conv2d", "pvk::linear"} | by_attention <= set(outcome.kernels)


def test_recipe_says_what_it_did(capsys):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    assert digits.main(["--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "test accuracy:" in out
    assert "pvk::conv2d" in out


def test_recipe_names_the_package_that_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert digits.main(["--steps", "1"]) == 1
    assert "pip install scikit-learn" in capsys.readouterr().out
