"""`convert`, `conversion_report` and `revert`, on torchvision's detectors."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

import torchvision

import pyvision_kernels as pvk
from pyvision_kernels.convert.table import TABLE, load
from tests import detectors

every_detector = pytest.mark.parametrize("name", detectors.DETECTORS)


def _detect(model, device="cpu"):
    with torch.no_grad():
        return model(detectors.pictures(device))


def _losses(model, device="cpu"):
    """The losses and all gradients, with the samples that a seed draws."""
    model.train()
    torch.manual_seed(7)
    losses = model(detectors.pictures(device), detectors.targets(device))
    grads = torch.autograd.grad(sum(losses.values()), list(model.parameters()), materialize_grads=True)
    model.eval()
    return {name: loss.detach() for name, loss in losses.items()}, grads


def _operators(call) -> set[str]:
    with torch.profiler.profile(acc_events=True) as profile:
        call()
    return {event.key for event in profile.key_averages()}


@every_detector
@pytest.mark.slow_emulated("whole detectors")
def test_converted_detectors_detect_the_same(name, device):
    model = detectors.make(name, device)
    stock = _detect(model, device)
    assert min(len(found["boxes"]) for found in stock) >= 5
    detectors.assert_same(_detect(pvk.convert(model), device), stock)


@every_detector
def test_converted_detectors_learn_the_same(name):
    model = detectors.make(name)
    losses, grads = _losses(model)
    our_losses, our_grads = _losses(pvk.convert(model))
    torch.testing.assert_close(our_losses, losses, rtol=1e-9, atol=1e-9)
    for ours, stock in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-7, atol=1e-10)


@every_detector
def test_no_operator_of_torchvision_is_left_in_a_converted_detector(name):
    model = pvk.convert(detectors.make(name))
    for call in (lambda: _detect(model), lambda: _losses(model)):
        seen = _operators(call)
        assert not [key for key in seen if key.startswith("torchvision::")]
        assert [key for key in seen if key.startswith("pvk::")]


@every_detector
def test_revert_gives_the_stock_model_back(name):
    model = detectors.make(name)
    classes = [type(module) for module in model.modules()]
    stock = _detect(model)
    attributes = {key: set(module.__dict__) for key, module in model.named_modules()}
    pvk.convert(model)
    assert [type(module) for module in model.modules()] != classes
    _detect(model)
    assert pvk.revert(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert {key: set(module.__dict__) for key, module in model.named_modules()} == attributes
    detectors.assert_same(_detect(model), stock)
    assert not [key for key in _operators(lambda: _detect(model)) if key.startswith("pvk::")]


def test_everything_a_model_holds_is_kept():
    model = detectors.make("mask_rcnn").train()
    model.rpn.eval()
    calls = []
    model.roi_heads.box_roi_pool.register_forward_hook(lambda *_: calls.append("pooled"))
    before = dict(model.state_dict(keep_vars=True))
    modes = [module.training for module in model.modules()]
    assert pvk.convert(model) is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [module.training for module in model.modules()] == modes
    _detect(model.eval())
    assert calls == ["pooled"]
    assert isinstance(model.rpn, torchvision.models.detection.rpn.RegionProposalNetwork)
    assert isinstance(model.roi_heads.box_roi_pool, torchvision.ops.MultiScaleRoIAlign)


def test_neither_torchvision_nor_other_models_are_touched():
    other = detectors.make("faster_rcnn")
    from torchvision.models.detection import roi_heads, rpn

    before = {module: dict(vars(module)) for module in (roi_heads, rpn, torchvision.ops, torchvision.ops.boxes)}
    _detect(pvk.convert(detectors.make("faster_rcnn")))
    assert all(dict(vars(module)) == names for module, names in before.items())
    assert not [key for key in _operators(lambda: _detect(other)) if key.startswith("pvk::")]


@pytest.mark.parametrize("round_trip", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_converted_model_is_copied_and_pickled_as_such(round_trip):
    model = pvk.convert(detectors.make("faster_rcnn"), exclude=["rpn"])
    expected = _detect(model)
    twin = round_trip(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    detectors.assert_same(_detect(twin), expected)
    assert pvk.conversion_report(twin) == pvk.conversion_report(model)


def test_converting_twice_is_converting_once():
    model = pvk.convert(detectors.make("faster_rcnn"))
    classes = [type(module) for module in model.modules()]
    pvk.convert(model)
    assert [type(module) for module in model.modules()] == classes


def test_the_last_call_decides():
    model = pvk.convert(pvk.convert(detectors.make("faster_rcnn")), exclude=["rpn"])
    entries = {entry.name: entry for entry in pvk.conversion_report(model)}
    assert (entries["rpn"].replaced, entries["rpn"].reason) == (False, "excluded")
    assert entries["roi_heads"].replaced


def test_converted_layers_are_leaves_of_a_traced_model():
    layers = [
        torchvision.ops.RoIAlign(2, 1.0, 2),
        torchvision.ops.RoIPool(2, 1.0),
        torchvision.ops.PSRoIAlign(2, 1.0, 2),
        torchvision.ops.PSRoIPool(2, 1.0),
    ]
    picture, boxes = torch.rand(1, 4, 9, 9), torch.tensor([[0, 1, 2, 7, 8.0]])
    for layer in layers:
        traced = torch.fx.symbolic_trace(pvk.convert(layer))
        assert torch.equal(traced(picture, boxes), layer(picture, boxes))


def test_include_and_exclude_take_names_and_classes():
    stock = torchvision.models.detection

    def replaced(**choices):
        model = pvk.convert(detectors.make("mask_rcnn"), **choices)
        dense = ("Conv2d", "Linear")
        report = pvk.conversion_report(model)
        return {entry.name for entry in report if entry.replaced and entry.layer not in dense}

    poolers = {"roi_heads.box_roi_pool", "roi_heads.mask_roi_pool"}
    assert replaced() == {"rpn", "roi_heads", *poolers}
    assert replaced(include=["rpn"]) == {"rpn"}
    assert replaced(include=["roi_heads.*"]) == poolers
    assert replaced(exclude=["*mask*"]) == {"rpn", "roi_heads", "roi_heads.box_roi_pool"}
    assert replaced(include=[torchvision.ops.MultiScaleRoIAlign]) == poolers
    assert replaced(exclude=[torchvision.ops.MultiScaleRoIAlign, stock.rpn.RegionProposalNetwork]) == {"roi_heads"}
    assert replaced(include=["roi_heads*"], exclude=["roi_heads"]) == poolers


def test_report_prints_what_was_replaced_what_was_left_and_why(capsys):
    class OwnHeads(torchvision.models.detection.roi_heads.RoIHeads):
        pass

    model = detectors.make("faster_rcnn")
    model.roi_heads.__class__ = OwnHeads
    pvk.convert(model, exclude=["rpn"])
    entries = {entry.name: entry for entry in pvk.conversion_report(model)}
    text = " ".join(capsys.readouterr().out.split())
    assert entries["roi_heads.box_roi_pool"].replaced
    assert "pyvision_kernels.nn.multiscale_roi_align.MultiScaleRoIAlign" in text
    assert entries["rpn"].reason == "excluded"
    assert "subclass of RoIHeads" in entries["roi_heads"].reason
    transform = next(entry for entry in pvk.conversion_report(model) if entry.layer == "GeneralizedRCNNTransform")
    assert (transform.replaced, transform.count) == (False, 1)
    assert "no counterpart" in transform.reason
    for word in ("excluded", "subclass of RoIHeads", "no counterpart"):
        assert word in text


def test_report_of_a_model_that_was_not_converted():
    entries = pvk.conversion_report(detectors.make("ssd"))
    assert not any(entry.replaced for entry in entries)
    assert "convert was not called" in entries[0].reason


def test_the_model_itself_may_be_the_layer():
    layer = torchvision.ops.RoIAlign(3, 0.5, 2, aligned=True)
    assert pvk.convert(layer) is layer
    assert type(layer) is pvk.nn.RoIAlign
    picture, boxes = torch.rand(1, 4, 9, 9), torch.tensor([[0, 1, 2, 12, 14.0]])
    ours = layer(picture, boxes)
    assert type(pvk.revert(layer)) is torchvision.ops.RoIAlign
    torch.testing.assert_close(layer(picture, boxes), ours)


def test_a_layer_in_two_places_stays_one():
    layer = torchvision.ops.RoIAlign(3, 0.5, 2)
    model = pvk.convert(nn.ModuleList([layer, layer]))
    assert model[0] is model[1] is layer
    assert type(layer) is pvk.nn.RoIAlign


def test_a_chosen_box_similarity_is_kept():
    model = detectors.make("faster_rcnn")
    model.rpn.box_similarity = torchvision.ops.generalized_box_iou
    pvk.convert(model)
    assert model.rpn.box_similarity is torchvision.ops.generalized_box_iou
    assert model.roi_heads.box_similarity is pvk.ops.box_iou
    model.roi_heads.box_similarity = torch.add
    assert pvk.revert(model).roi_heads.box_similarity is torch.add


@pytest.mark.parametrize(("stock", "ours"), TABLE.items())
def test_the_table_names_classes_that_swap(stock, ours):
    pytest.importorskip(stock.partition(".")[0])
    stock, ours = load(stock), load(ours)
    assert stock.__name__ == ours.__name__
    instance = stock.__new__(stock)
    instance.__class__ = ours
    instance.__class__ = stock


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"include": ["head.*"]}, ValueError, "expected include to match layers of the model, but head.* matches none"),
        ({"exclude": [nn.LSTM]}, ValueError, "expected exclude to match layers of the model, but LSTM matches none"),
        ({"include": "rpn"}, TypeError, "expected include to be a list of names or classes, but got 'rpn'"),
        ({"exclude": [3]}, TypeError, "expected exclude to hold names or classes, but got int"),
    ],
)
def test_bad_choices_are_refused_before_anything_is_replaced(choices, error, message):
    model = detectors.make("faster_rcnn")
    with pytest.raises(error) as caught:
        pvk.convert(model, **choices)
    assert f"convert: {message}" in str(caught.value)
    assert not any(entry.replaced for entry in pvk.conversion_report(model))


@pytest.mark.parametrize("function", [pvk.convert, pvk.revert, pvk.conversion_report])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, but got list"):
        function([nn.Linear(2, 2)])


def test_importing_and_converting_other_models_does_not_import_torchvision():
    code = (
        "import sys, torch, pyvision_kernels as pvk; pvk.revert(pvk.convert(torch.nn.Linear(2, 2)));"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
