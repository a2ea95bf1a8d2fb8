"""`convert(model, fuse=True)`: whole models compute what they did, and whatever happens to them is noticed."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import warnings
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pyvision_kernels as pvk

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The maps here are too small for more, and where a machine is busy, threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _randomized(model, dtype=torch.float64):
    """In eval mode, with running statistics and affine parameters as after training."""
    model = model.eval().to(dtype)
    for module in model.modules():
        for name, low, high in (("running_mean", -0.3, 0.3), ("running_var", 0.5, 2.0)):
            if isinstance(getattr(module, name, None), torch.Tensor):
                getattr(module, name).uniform_(low, high)
                nn.init.uniform_(module.weight, 0.5, 1.5) if module.weight.requires_grad else module.weight.uniform_(
                    0.5, 1.5
                )
                nn.init.uniform_(module.bias, -0.3, 0.3) if module.bias.requires_grad else module.bias.uniform_(
                    -0.3, 0.3
                )
    return model


class _Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def _operators(model, *inputs):
    with torch.no_grad(), _Calls() as calls:
        model(*inputs)
    return calls.names


def _assert_close(ours, stock, tolerance=1e-9):
    if isinstance(stock, dict):
        assert type(ours) is type(stock)
        assert list(ours) == list(stock)
        ours, stock = tuple(ours.values()), tuple(stock.values())
    if isinstance(stock, (tuple, list)):
        assert len(ours) == len(stock)
        for pair in zip(ours, stock, strict=True):
            _assert_close(*pair, tolerance)
        return
    assert ours.shape == stock.shape
    assert ours.is_contiguous() == stock.is_contiguous()
    assert (ours - stock).abs().max() <= tolerance * (stock.abs().max() + 1e-3)


def _forward(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


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
    model, picture = _randomized(make()), torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = _forward(model, picture)
    before = dict(model.state_dict(keep_vars=True))
    stock_class = type(model)
    assert pvk.convert(model, fuse=True) is model
    for _ in range(2):
        _assert_close(_forward(model, picture), expected)
    calls = _operators(model, picture)
    assert "pvk::conv2d" in calls
    assert not {"aten::convolution", "aten::conv2d"} & set(calls)
    assert name == "densenet121" or not {"aten::relu_", "aten::relu", "aten::hardswish_", "aten::silu_"} & set(calls)
    assert sum("batch_norm" in call for call in calls) == 0
    # Another layout in, the same values.
    ours = _forward(model, picture.to(memory_format=torch.channels_last))
    _assert_close(*(_contiguous(value) for value in (ours, expected)))
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert isinstance(model, stock_class)
    assert type(pvk.revert(model)) is stock_class
    _assert_close(_forward(model, picture), expected, 0.0)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv2_050", "regnetx_002"])
def test_norms_of_timm_that_activate_are_folded(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm about itself
        timm = pytest.importorskip("timm")
        model = _randomized(timm.create_model(name, num_classes=4))
    picture = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = _forward(model, picture)
    pvk.convert(model, fuse=True)
    _assert_close(_forward(model, picture), expected)
    assert _norms(model, picture) == 0
    model.bn1.act.register_forward_hook(lambda module, args, output: output * 0) if hasattr(model, "bn1") else None
    _assert_close(_forward(model, picture), _forward(pvk.revert(copy.deepcopy(model)), picture))


def _contiguous(value):
    if isinstance(value, dict):
        return type(value)((key, item.contiguous()) for key, item in value.items())
    return value.contiguous()


def test_fused_models_compute_the_same_in_float32_and_bfloat16():
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model, picture = _randomized(_stock.resnet18(num_classes=10)), torch.randn(2, 3, 48, 48, dtype=torch.float64)
        expected = _forward(model, picture)
        ours = _forward(pvk.convert(model.to(dtype), fuse=True), picture.to(dtype))
        assert ours.dtype == dtype
        _assert_close(ours.double(), expected, tolerance)


def test_a_detector_is_fused_in_parts():
    from tests import detectors

    model = detectors.make("faster_rcnn").double()
    model.backbone.stem = nn.Sequential(model.backbone.stem, nn.BatchNorm2d(detectors.CHANNELS), nn.ReLU(True))
    _randomized(model)
    pictures = [picture.double() for picture in detectors.pictures()]
    stock = _forward(model, pictures)
    pvk.convert(model, fuse=True)
    entries = {entry.name: entry for entry in pvk.conversion_report(model)}
    assert entries["backbone.stem.0"].fused == ("1", "2")
    assert entries["rpn.head.conv.0.0"].fused == ("1",)
    assert entries["roi_heads.box_head.fc6"].fused == ("relu",)
    ours = _forward(model, pictures)
    for found, expected in zip(ours, stock, strict=True):  # which of two equal scores comes first is open
        _assert_close(found["scores"], expected["scores"])
    assert isinstance(model, torchvision.models.detection.FasterRCNN)


class _Block(nn.Module):
    """One of everything."""

    def __init__(self, channels=16):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 3)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(self.drop(out)))
        out += x
        out = self.relu(out)
        return F.gelu(self.fc(out.mean((2, 3))))


def _block(fuse=True):
    torch.manual_seed(3)
    model = _randomized(_Block())
    return (pvk.convert(model, fuse=True) if fuse else model), torch.randn(2, 16, 9, 10, dtype=torch.float64)


def _norms(model, *inputs):
    return sum("batch_norm" in call for call in _operators(model, *inputs))


def _check(model, picture):
    """The fused model against a stock copy of it as it is now."""
    stock = pvk.revert(copy.deepcopy(model))
    expected = _forward(stock, picture)
    for _ in range(2):
        _assert_close(_forward(model, picture), expected)
    assert _norms(model, picture) == 0


def test_train_mode_runs_the_stock_forward_and_eval_fuses_again():
    model, picture = _block()
    model.drop.p = 0.0
    stock = pvk.revert(copy.deepcopy(model))
    _check(model, picture)
    for _ in range(2):
        results = []
        for each in (stock, model):
            each.train()
            leaf = picture.clone().requires_grad_()
            output = each(leaf)
            parameters = list(each.parameters())
            grads = torch.autograd.grad(output.square().sum(), [leaf, *parameters])
            with torch.no_grad():
                for parameter, grad in zip(parameters, grads[1:], strict=True):
                    parameter -= 1e-3 * grad
            results.append((output, *grads))
        for expected, got in zip(*results, strict=True):
            _assert_close(got, expected, 1e-8)
        stock.eval(), model.eval()
        _assert_close(_forward(model, picture), _forward(stock, picture), 1e-8)
        assert _norms(model, picture) == 0


@pytest.mark.parametrize("of", ["parameters", "input"])
def test_gradients_in_eval_mode_are_those_of_the_stock_model(of):
    model, picture = _block()
    stock = pvk.revert(copy.deepcopy(model))
    results = []
    for each in (stock, model):
        leaf = picture.clone()
        if of == "input":
            each.requires_grad_(False)
            leaf.requires_grad_()
        output = each(leaf)
        over = [leaf] if of == "input" else list(each.parameters())
        results.append((output, *torch.autograd.grad(output.square().sum(), over)))
    for expected, got in zip(*results, strict=True):
        _assert_close(got, expected)


def _writes():
    def conv_weight(model):
        model.conv1.weight.mul_(1.5)

    def conv_bias(model):
        model.conv1.bias.add_(1)

    def norm_weight(model):
        model.bn1.weight.mul_(2)

    def norm_bias(model):
        model.bn2.bias.sub_(1)

    def running_statistics(model):
        model.bn1.running_mean.add_(0.5)
        model.bn2.running_var.mul_(3)

    def eps(model):
        model.bn1.eps = 0.5

    def load(model):
        model.load_state_dict({key: value * 1.25 for key, value in model.state_dict().items()})

    def load_a_layer(model):
        model.bn1.load_state_dict({key: value * 1.25 for key, value in model.bn1.state_dict().items()})

    def optimizer_step(model):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(model.parameters(), lr=0.05).step()

    def other_parameter(model):
        model.bn2.weight = nn.Parameter(torch.rand_like(model.bn2.weight))

    def other_memory(model):
        model.bn2.running_mean.data = torch.rand_like(model.bn2.running_mean)

    def other_layer(model):
        model.conv2 = nn.Conv2d(16, 16, 1).double().eval()

    def other_norm(model):
        model.bn1 = _randomized(nn.BatchNorm2d(16))

    def no_bias(model):
        model.conv1.bias = None

    def stride_after_eval(model):
        model.conv2.padding_mode = "circular"
        model.eval()

    def slope_after_eval(model):
        model.bn1.affine_is = 3
        model.eval()

    def uncounted_before_eval(model):
        model.bn1.weight.data.mul_(3)
        model.eval()

    def uncounted_in_numpy_before_load(model):
        model.bn1.running_var.numpy()[:] = 2
        model.load_state_dict({}, strict=False)

    def float_and_back(model):
        model.float().double()

    def pruned(model):
        from torch.nn.utils import prune

        prune.l1_unstructured(model.conv1, "weight", 0.5)

    def weight_normed(model):
        nn.utils.parametrizations.weight_norm(model.conv1)

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("write", _writes(), ids=lambda write: write.__name__)
def test_no_change_of_a_fused_model_is_missed(write):
    model, picture = _block()
    with torch.no_grad():
        model(picture)
        write(model)
    _check(model, picture)


def test_hooks_are_called_and_see_what_they_did():
    stock, picture = _block(fuse=False)
    seen = {}

    def watch(model, key):
        handles = []
        for name in ("conv1", "bn1", "relu", "conv2", "drop", "fc"):
            hook = model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: seen.setdefault(key, []).append((name, output.clone()))
            )
            handles.append(hook)
        return handles

    watch(stock, "stock")
    _forward(stock, picture)
    model = _block()[0]
    _forward(model, picture)
    handles = watch(model, "later")
    _forward(model, picture)
    _forward(pvk.convert(copy.deepcopy(model), fuse=True), picture)
    assert [name for name, _ in seen["stock"]] == ["conv1", "bn1", "relu", "drop", "conv2", "relu", "fc"]
    assert [name for name, _ in seen["later"]] == 2 * [name for name, _ in seen["stock"]]
    for (_, expected), (_, got) in zip(2 * seen["stock"], seen["later"], strict=True):
        _assert_close(got.contiguous(), expected)
    for handle in handles:
        handle.remove()
    _check(model.eval(), picture)


@pytest.mark.parametrize("name", ["layer1", "layer1.0", "layer2.0.downsample"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_blocks_are_called(name, when):
    model, picture = _randomized(_stock.resnet18(num_classes=4)), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    stock, seen = copy.deepcopy(model), []

    def replace(module, args, output):
        seen.append(module)
        return output * 2

    stock.get_submodule(name).register_forward_hook(replace)
    if when == "after":
        _forward(pvk.convert(model, fuse=True), picture)
    model.get_submodule(name).register_forward_hook(replace)
    if when == "before":
        pvk.convert(model, fuse=True)
    expected = _forward(stock, picture)
    _assert_close(_forward(model, picture), expected)
    assert len(seen) == 2
    # What is around the block, and in it where it was known when the model was converted, is fused.
    assert _norms(model, picture) < 6


def test_global_hooks_see_every_layer():
    model, picture = _block()
    _forward(model, picture)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        _forward(model, picture)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Dropout", "Conv2d", "BatchNorm2d", "ReLU", "Linear", "_Block"]


def test_a_norm_in_train_mode_is_not_folded():
    model, picture = _block()
    _forward(model, picture)
    for fused in (False, True):
        model.bn1.train(not fused)
        stock = pvk.revert(copy.deepcopy(model))
        _assert_close(_forward(model, picture), _forward(stock, picture))
        torch.testing.assert_close(dict(model.named_buffers()), dict(stock.named_buffers()))
        assert _norms(model, picture) == (0 if fused else 1)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, copy.copy, _pickled, _saved])
def test_copies_and_pickles_of_a_fused_model_are_fused(twin_of):
    model, picture = _block()
    expected = _forward(model, picture)
    twin = twin_of(model)
    assert "_pvk_plan" not in twin.__dict__
    assert type(twin) is type(model)
    assert isinstance(twin, _Block)
    _assert_close(_forward(twin, picture), expected, 0.0)
    assert _norms(twin, picture) == 0
    if twin_of is not copy.copy:
        with torch.no_grad():
            twin.conv1.weight.zero_()
        _assert_close(_forward(model, picture), expected, 0.0)
        _check(twin, picture)


def test_slices_of_a_fused_sequential_are_fused():
    model = _randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU()))
    picture = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    stock = copy.deepcopy(model)
    pvk.convert(model, fuse=True)
    for part in (slice(0, 2), slice(0, 3), slice(0, None)):
        _assert_close(_forward(model[part].eval(), picture), _forward(stock[part].eval(), picture))
    assert _norms(model[:2].eval(), picture) == 0


class _Function(nn.Module):
    """A function of a convolution, a second one, a batch norm and an input."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())  # something is fused in any case

    def forward(self, x):
        return self.head(self.function(self, x))


def _in_place(value, other):
    value += other
    return value


FUNCTIONS = {
    "add": lambda m, x: m.a(x) + x,
    "norm_alone": lambda m, x: m.norm(x) + 1,
    "norm_and_relu": lambda m, x: (lambda y: m.a(F.relu(m.norm(y), inplace=True)) + y)(x.exp()),
    "norm_and_other": lambda m, x: m.a(F.silu(m.norm(x))),
    "norm_and_two": lambda m, x: (lambda y: F.relu(y) + y)(m.norm(x)),
    "norm_changed_between": lambda m, x: (lambda y: (lambda c: (y.mul_(2), F.relu(c)))(m.norm(y)))(x * 1)[1],
    "add_reversed": lambda m, x: x + m.norm(m.a(x)),
    "add_function": lambda m, x: torch.add(m.a(x), x).sigmoid(),
    "add_with_alpha": lambda m, x: torch.add(m.a(x), x, alpha=2),
    "add_number": lambda m, x: m.a(x) + 1,
    "add_itself": lambda m, x: (lambda y: y + y)(m.a(x)),
    "add_method": lambda m, x: m.a(x).add_(x).relu_(),
    "add_row": lambda m, x: m.a(x) + x[:, :, :1, :1],
    "add_larger": lambda m, x: m.a(x)[:, :, :1] + m.b(x),
    "add_of_two": lambda m, x: F.relu(m.norm(m.a(x)) + m.b(x)),
    "add_of_two_in_place": lambda m, x: F.silu(_in_place(m.norm(m.a(x)), m.b(x))),
    "add_into_input": lambda m, x: (lambda y: _in_place(y, m.a(y)) * y)(x * 2),
    "add_into_residual": lambda m, x: _in_place(m.b(x), m.norm(m.a(x))),
    "add_into_view": lambda m, x: (lambda y: _in_place(y[:, :4], m.a(x)) + y)(x.clone()),
    "activation_then_add": lambda m, x: F.relu6(m.a(x)) + x,
    "add_then_norm": lambda m, x: m.norm(m.a(x) + x),
    "two_uses": lambda m, x: (lambda y: F.relu(y) + y.sigmoid())(m.a(x)),
    "two_uses_in_place": lambda m, x: (lambda y: F.relu(y, inplace=True) + y)(m.norm(m.a(x))),
    "input_changed_after": lambda m, x: (lambda y: (lambda c: F.relu_(y) + c)(m.a(y)))(x * 1),
    "input_changed_between": lambda m, x: (lambda y: (lambda c: (y.mul_(2), F.relu(c + m.b(x))))(m.a(y)))(x * 1)[1],
    "residual_changed_between": lambda m, x: (lambda y: (lambda c: (y.mul_(2), F.relu(c)))(m.a(x) + y))(x * 1)[1],
    "view_changed_between": lambda m, x: (lambda y: (lambda c: (y[:, 0].zero_(), F.relu(c)))(m.a(y)))(x * 1)[1],
    "set_between": lambda m, x: (lambda y: (lambda c: (operator.setitem(y, 0, 0.0), F.relu(c)))(m.a(y)))(x * 1)[1],
    "shared_layer": lambda m, x: F.relu(m.norm(m.a(m.norm(m.a(x)).relu()))),
    "gelu_tanh": lambda m, x: F.gelu(m.a(x), approximate="tanh"),
    "gelu": lambda m, x: F.gelu(m.a(x)),
    "pool": lambda m, x: F.max_pool2d(F.relu(m.a(x)), 2),
    "pool_alone": lambda m, x: F.max_pool2d(m.a(x), kernel_size=(2, 2), stride=2),
    "pool_of_three": lambda m, x: F.max_pool2d(F.relu(m.a(x)), 3, 2, 1),
    "pool_overlapping": lambda m, x: F.max_pool2d(m.a(x), 2, 1),
    "pool_rounding_up": lambda m, x: F.max_pool2d(m.a(x), 2, ceil_mode=True),
    "pool_with_places": lambda m, x: F.max_pool2d(m.a(x), 2, return_indices=True)[0],
    "dropout": lambda m, x: F.relu(F.dropout(m.a(x), 0.5, m.training)),
    "always_dropout": lambda m, x: F.dropout(m.a(x), 1.0, True),
    "view": lambda m, x: m.b(m.a(x).view(2, 2, 2, 7, 6).view(x.shape)),
    "flattened": lambda m, x: m.a(x).view(x.size(0), -1)[:, :168].view(2, 4, 7, 6),
    "contiguity_asked": lambda m, x: m.a(x) * float(m.a(x).stride(1)),
    "strided": lambda m, x: m.a(x).as_strided((2, 4, 7, 6), (168, 42, 6, 1)),
    "transposed": lambda m, x: m.b(m.a(x).transpose(2, 3)).mT,
    "parameter": lambda m, x: m.a(x) * m.norm.weight.view(1, -1, 1, 1) + m.norm.running_mean[0],
    "keyword": lambda m, x: F.relu(input=m.a(input=x)),
    "channels_of_size": lambda m, x: m.a(x).reshape(x.shape[0], -1, *x.shape[2:]) / x.shape[-1],
}


NOT_FOLLOWED = ("contiguity_asked", "channels_of_size")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_patterns_in_code(name):
    model = _randomized(_Function(FUNCTIONS[name]))
    picture = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    kept = picture.clone()
    expected = _forward(copy.deepcopy(model), picture)
    pvk.convert(model, fuse=True)
    assert ("_pvk_plan" in model.__dict__) is (name not in NOT_FOLLOWED)
    for _ in range(2):
        _assert_close(_forward(model, picture), expected)
    assert torch.equal(picture, kept)


class _Branching(_Function):
    def forward(self, x):
        y = self.head(self.norm(self.a(x)))
        return y if y.sum() > 0 else self.b(-y)


class _TypeAsking(_Function):
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            x = x[0]
        return self.head(x) * (2.0 if isinstance(self.a(x), torch.Tensor) else 1.0)


class _Counting(_Function):
    count = 0

    def forward(self, x):
        self.count += 1
        self.last = x
        return self.head(x) * self.count


class _Optional(_Function):
    def forward(self, x, mask=None, scale: float = 1.0):
        y = F.relu(self.norm(self.a(x))) * scale
        return self.head(y if mask is None else y * mask)


class _Constant(_Function):
    def forward(self, x):
        return self.head(F.relu(self.a(x))) + torch.ones(4, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize("kind", [_Branching, _TypeAsking, _Counting, _Optional, _Constant])
def test_code_that_cannot_be_followed_runs_as_it_is(kind):
    model, picture = _randomized(kind(None)), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    stock = copy.deepcopy(model)
    pvk.convert(model, fuse=True)
    assert ("_pvk_plan" in model.__dict__) is (kind is _Optional)
    for sign in (1, -1, 1):
        _assert_close(_forward(model, sign * picture), _forward(stock, sign * picture))
    if kind is _Counting:
        assert (model.count, model.last.shape) == (3, picture.shape)
    if kind is _Optional:
        mask = torch.rand_like(picture)
        _assert_close(_forward(model, picture, mask, 2.0), _forward(stock, picture, mask, 2.0))
        with torch.no_grad():
            _assert_close(model(picture, scale=3.0), stock(picture, scale=3.0))
            _assert_close(model(x=picture), stock(x=picture))
    pvk.conversion_report(model)


def test_what_surrounds_code_that_cannot_be_followed_is_fused():
    def block():
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    model = _randomized(nn.Sequential(block(), _Branching(None), block()))
    picture = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = _forward(model, picture)
    pvk.convert(model, fuse=True)
    _assert_close(_forward(model, picture), expected)
    assert _norms(model, picture) == 1
    fused = {entry.name: entry.fused for entry in pvk.conversion_report(model) if entry.fused}
    assert fused == {"0.0": ("1", "2"), "1.head.0": ("1",), "2.0": ("1", "2")}


class _Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x, y):
        map = F.relu(self.conv(x))
        return OrderedDict(map=map, head=self.head(map), same=y, pair=(map.mean((2, 3)), [y + 1]))


def test_inputs_and_results_of_any_structure():
    model, x = _randomized(_Several()), torch.randn(1, 3, 6, 6, dtype=torch.float64)
    y = torch.randn(2, dtype=torch.float64)
    expected = _forward(model, x, y)
    pvk.convert(model, fuse=True)
    ours = _forward(model, x, y)
    _assert_close(ours, expected)
    assert ours["same"] is y
    assert type(ours["pair"]) is tuple
    assert _operators(model, x, y).count("pvk::conv2d") == 2


def test_a_norm_by_itself_in_mixed_precision():
    model, picture = (
        _randomized(_Function(FUNCTIONS["norm_and_relu"]), torch.bfloat16),
        torch.randn(2, 4, 7, 6).bfloat16(),
    )
    model.norm.float()
    expected = _forward(model, picture)
    _assert_close(_forward(pvk.convert(model, fuse=True), picture).double(), expected.double(), 0.02)


def test_layers_in_one_dimension_and_linear_layers():
    model = nn.Sequential(
        *(nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.SiLU(), nn.Flatten()),
        *(nn.Linear(88, 6), nn.GELU(), nn.Dropout(), nn.Linear(6, 6), nn.ReLU6(), nn.Linear(6, 2), nn.Sigmoid()),
    )
    model, rows = _randomized(model), torch.randn(3, 4, 11, dtype=torch.float64)
    expected = _forward(model, rows)
    pvk.convert(model, fuse=True)
    _assert_close(_forward(model, rows), expected)
    calls = _operators(model, rows)
    assert calls.count("pvk::conv2d") == 2
    assert calls.count("pvk::linear") == 3
    assert not {"aten::relu", "aten::gelu", "aten::silu", "aten::sigmoid", "aten::hardtanh"} & set(calls)


def test_a_layer_with_an_activation_of_its_own_takes_what_may_follow():
    layer = pvk.nn.Conv2d(3, 4, 3, activation="relu")
    model = _randomized(
        nn.Sequential(layer, nn.MaxPool2d(2), pvk.nn.Conv2d(4, 4, 1, activation="silu"), nn.BatchNorm2d(4))
    )
    picture = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    expected = _forward(model, picture)
    pvk.convert(model, fuse=True)
    _assert_close(_forward(model, picture), expected)
    fused = {entry.name: entry.fused for entry in pvk.conversion_report(model) if entry.fused}
    assert fused == {"0": ("1",)}


def test_unbatched_and_empty_pictures():
    model, picture = _block()
    stock = pvk.revert(copy.deepcopy(model))
    _assert_close(_forward(model, picture[:1]), _forward(stock, picture[:1]))
    assert _forward(model, picture[:0]).shape == (0, 3)
    pooling = _randomized(nn.Sequential(nn.Conv2d(16, 4, 3), nn.ReLU(), nn.MaxPool2d(2)))
    expected = _forward(pooling, picture[0])
    _assert_close(_forward(pvk.convert(pooling, fuse=True), picture[0]), expected)


def test_other_dtypes_subclasses_and_modes_take_the_stock_forward():
    model, picture = _block()
    stock = pvk.revert(copy.deepcopy(model))
    _forward(model, picture)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_forward(model.float(), picture.float()), _forward(stock.float(), picture.float()))
    model.double(), stock.double()
    with torch.no_grad():
        many = torch.stack([picture, picture * 2])
        _assert_close(torch.vmap(model)(many), torch.vmap(stock)(many))
        with pvk.backend("torch"):
            assert not [call for call in _operators(model, picture) if call.startswith("pvk::")]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        _assert_close(compiled(picture), stock(picture))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that jit.trace is deprecated
            traced = torch.jit.trace(model, picture)
        with torch.no_grad():
            model.conv1.weight.mul_(2), stock.conv1.weight.mul_(2)
        _assert_close(traced(picture), stock(picture))
        graph = torch.fx.symbolic_trace(model)
        _assert_close(graph(picture), stock(picture))


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
    model = _randomized(_stock.resnet18(num_classes=4))
    expected = _forward(model, picture)

    def fused(**choices):
        pvk.convert(model, fuse=True, **choices)
        _assert_close(_forward(model, picture), expected)
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
    model = _randomized(_stock.mobilenet_v3_small(num_classes=4))
    picture = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    classes = [type(module) for module in model.modules()]
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    pvk.convert(model, fuse=True, exclude=["features.0"])
    _forward(model, picture)
    pvk.revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
