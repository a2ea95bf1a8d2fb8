"""Whatever happens to a fused model is noticed: training, writes, hooks, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import pyvision_kernels as pvk
from tests.fused import Block, assert_close, block, check, forward, norms, randomized

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_train_mode_runs_the_stock_forward_and_eval_fuses_again():
    model, picture = block()
    model.drop.p = 0.0
    stock = pvk.revert(copy.deepcopy(model))
    check(model, picture)
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
            assert_close(got, expected, 1e-8)
        stock.eval(), model.eval()
        assert_close(forward(model, picture), forward(stock, picture), 1e-8)
        assert norms(model, picture) == 0


@pytest.mark.parametrize("of", ["parameters", "input"])
def test_gradients_in_eval_mode_are_those_of_the_stock_model(of):
    model, picture = block()
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
        assert_close(got, expected)


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
        model.bn1 = randomized(nn.BatchNorm2d(16))

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
    model, picture = block()
    with torch.no_grad():
        model(picture)
        write(model)
    check(model, picture)


def test_hooks_are_called_and_see_what_they_did():
    stock, picture = block(fuse=False)
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
    forward(stock, picture)
    model = block()[0]
    forward(model, picture)
    handles = watch(model, "later")
    forward(model, picture)
    forward(pvk.convert(copy.deepcopy(model), fuse=True), picture)
    assert [name for name, _ in seen["stock"]] == ["conv1", "bn1", "relu", "drop", "conv2", "relu", "fc"]
    assert [name for name, _ in seen["later"]] == 2 * [name for name, _ in seen["stock"]]
    for (_, expected), (_, got) in zip(2 * seen["stock"], seen["later"], strict=True):
        assert_close(got.contiguous(), expected)
    for handle in handles:
        handle.remove()
    check(model.eval(), picture)


@pytest.mark.parametrize("name", ["layer1", "layer1.0", "layer2.0.downsample"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_blocks_are_called(name, when):
    model, picture = (
        randomized(torchvision.models.resnet18(num_classes=4)),
        torch.randn(1, 3, 32, 32, dtype=torch.float64),
    )
    stock, seen = copy.deepcopy(model), []

    def replace(module, args, output):
        seen.append(module)
        return output * 2

    stock.get_submodule(name).register_forward_hook(replace)
    if when == "after":
        forward(pvk.convert(model, fuse=True), picture)
    model.get_submodule(name).register_forward_hook(replace)
    if when == "before":
        pvk.convert(model, fuse=True)
    expected = forward(stock, picture)
    assert_close(forward(model, picture), expected)
    assert len(seen) == 2
    # What is around the block, and in it where it was known when the model was converted, is fused.
    assert norms(model, picture) < 6


def test_hooks_that_are_put_aside_and_back_are_called():
    model, picture = block()
    forward(model, picture)
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    layer.register_forward_hook(lambda *_: seen.append(1))
    kept = dict(layer._forward_hooks)
    layer._forward_hooks.clear()
    forward(model, picture)
    assert not seen
    layer._forward_hooks.update(kept)
    forward(model, picture)
    assert seen


def test_global_hooks_see_every_layer():
    model, picture = block()
    forward(model, picture)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        forward(model, picture)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Dropout", "Conv2d", "BatchNorm2d", "ReLU", "Linear", "Block"]


def test_a_norm_in_train_mode_is_not_folded():
    model, picture = block()
    forward(model, picture)
    for fused in (False, True):
        model.bn1.train(not fused)
        stock = pvk.revert(copy.deepcopy(model))
        assert_close(forward(model, picture), forward(stock, picture))
        torch.testing.assert_close(dict(model.named_buffers()), dict(stock.named_buffers()))
        assert norms(model, picture) == (0 if fused else 1)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, copy.copy, _pickled, _saved])
def test_copies_and_pickles_of_a_fused_model_are_fused(twin_of):
    model, picture = block()
    expected = forward(model, picture)
    twin = twin_of(model)
    assert "_pvk_plan" not in twin.__dict__
    assert type(twin) is type(model)
    assert isinstance(twin, Block)
    assert_close(forward(twin, picture), expected, 0.0)
    assert norms(twin, picture) == 0
    if twin_of is not copy.copy:
        with torch.no_grad():
            twin.conv1.weight.zero_()
        assert_close(forward(model, picture), expected, 0.0)
        check(twin, picture)


def test_slices_of_a_fused_sequential_are_fused():
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU()))
    picture = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    stock = copy.deepcopy(model)
    pvk.convert(model, fuse=True)
    for part in (slice(0, 2), slice(0, 3), slice(0, None)):
        assert_close(forward(model[part].eval(), picture), forward(stock[part].eval(), picture))
    assert norms(model[:2].eval(), picture) == 0
