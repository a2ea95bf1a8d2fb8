"""convert(model, cuda_graph=True): what is captured, replayed and dropped; on the CPU with a capture of the test's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pyvision_kernels as pvk
from pyvision_kernels.convert import graphs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x, scale=1.0, more=None):
        y = self.norm(self.conv(x)).relu() * scale
        return {"maps": y if more is None else y + more["a"], "mean": (y.mean((2, 3)),)}


@pytest.fixture
def captured(monkeypatch):
    """Calls that were captured; a replay makes the call again and writes over its outputs."""
    calls = []

    def capture(call, device, pool):
        outputs = call()
        calls.append(call)

        def replay():
            leaves, fresh = (torch.utils._pytree.tree_flatten(value)[0] for value in (outputs, call()))
            for leaf, value in zip(leaves, fresh, strict=True):
                leaf.copy_(value)

        return replay, outputs, pool

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


def _model(**options):
    torch.manual_seed(1)
    return pvk.convert(Net().eval(), cuda_graph=True, **options)


def _equal(ours, expected):
    torch.testing.assert_close(ours["maps"], expected["maps"])
    torch.testing.assert_close(ours["mean"][0], expected["mean"][0])


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_a_call_is_captured_once_and_replayed_on_new_inputs(captured, fuse):
    model = _model(fuse=fuse)
    stock = pvk.revert(copy.deepcopy(model))
    kept = []
    for _ in range(3):
        x = torch.randn(2, 3, 6, 5)
        kept.append((model(x), stock(x)))
    for ours, expected in kept:  # results are not written over by later calls
        _equal(ours, expected)
    assert len(captured) == 1


@torch.no_grad()
def test_each_size_dtype_layout_and_value_has_a_graph_and_the_oldest_goes(captured):
    model = _model()
    x = torch.randn(2, 3, 6, 5)
    for args in ((x,), (x[:1],), (x.contiguous(memory_format=torch.channels_last),), (x, 2.0), (x, 2)):
        _equal(model(*args), Net.forward(model, *args))
    assert len(captured) == 5
    more = {"a": torch.randn(4, 1, 1)}
    _equal(model(x, more=more), Net.forward(model, x, more=more))
    assert len(captured) == 6
    for size in range(1, 1 + graphs._MOST):
        model(torch.randn(size, 3, 4, 4))
    assert len(model.__dict__[graphs._GRAPHS].kept) == graphs._MOST
    count = len(captured)
    model(x)
    assert len(captured) == count + 1


@torch.no_grad()
def test_writes_replacements_and_modes_are_seen(captured):
    model, x = _model(fuse=True), torch.randn(1, 3, 6, 5)

    def check(count):
        _equal(model(x), Net.forward(pvk.revert(copy.deepcopy(model)), x))
        assert len(captured) == count

    check(1)
    check(1)
    model.conv.weight.mul_(2)
    check(2)
    model.norm.running_mean.add_(1)
    check(3)
    model.conv.bias = nn.Parameter(torch.ones(4))
    check(4)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    check(5)
    model.train()
    model(x)
    assert len(captured) == 5, "in train mode its own forward runs"
    model.eval()
    check(6)


@torch.no_grad()
def test_another_tensor_in_the_place_of_the_old_one_is_seen(captured):
    model, x = _model(), torch.randn(1, 3, 6, 5)
    for count in range(1, 6):
        model(x)
        assert len(captured) == count
        value = float(count)
        del model.conv.bias  # its memory, and its identity, may be given to the next
        model.conv.bias = nn.Parameter(torch.full((4,), value))
    model.extra = nn.Identity().eval()
    model(x)
    assert len(captured) == 6


@torch.no_grad()
def test_hooks_and_layers_in_train_mode_are_called(captured):
    model, x, calls = _model(), torch.randn(1, 3, 6, 5), []
    model(x)
    handle = model.conv.register_forward_hook(lambda *args: calls.append("hook"))
    model(x)
    assert calls == ["hook"]
    handle.remove()
    before = model.norm.num_batches_tracked.item()
    model.norm.train()
    model(x)
    assert model.norm.num_batches_tracked.item() == before + 1
    model.norm.eval()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: calls.append("global"))
    model(x)
    handle.remove()
    assert "global" in calls
    model.register_forward_hook(lambda *args: calls.append("own"))
    count = len(captured)
    model(x)
    model(x)
    assert calls.count("own") == 2
    assert len(captured) <= count + 1


def test_gradients_run_the_forward_of_its_own(captured):
    model, x = _model(), torch.randn(1, 3, 6, 5)
    model(x)["maps"].sum().backward()
    assert model.conv.weight.grad is not None
    assert captured == []


@torch.no_grad()
def test_copies_and_pickles_start_without_graphs(captured):
    for fuse in (False, True):
        model, x = _model(fuse=fuse), torch.randn(1, 3, 6, 5)
        model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert graphs._GRAPHS not in other.__dict__
            _equal(other(x), model(x))
    assert pvk.revert(model).__class__ is Net
    assert graphs._GRAPHS not in model.__dict__
    assert pvk.convert(model).__class__ is Net


def test_the_report_sees_through_it(captured):
    entries = {entry.name: entry for entry in pvk.conversion_report(_model(fuse=True))}
    assert entries["conv"].replaced
    assert entries["conv"].fused


@torch.no_grad()
def test_tensors_that_are_not_on_a_gpu_and_models_that_cannot_be_captured_raise(monkeypatch):
    model, x = _model(), torch.randn(1, 3, 6, 5)
    with pytest.raises(RuntimeError, match=r"convert: expected tensors on a CUDA device, .* but got one on cpu"):
        model(x)

    def capture(call, device, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match=r"expected Net to be one that a CUDA graph can capture .* not permitted"):
        model(x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@torch.no_grad()
def test_a_replay_gives_the_bits_of_the_call():
    with pvk.backend("pvk"):
        model = _model().cuda()
        for size in (2, 1, 2):
            x = torch.randn(size, 3, 6, 5, device="cuda")
            ours, expected = model(x), Net.forward(model, x)
            assert torch.equal(ours["maps"], expected["maps"])
            assert torch.equal(ours["mean"][0], expected["mean"][0])
